"""What was the fastest on this card, as `python -m evals bench gpu --only tune` found it.

One JSON file per card in the folder `tuned` beside this file: {"device", "torch", "triton", "fastest"}. "fastest" maps
a key (below) to what was the fastest at each length that was measured: the name of a kernel, or the fields of
`triton.common.Tiles`. The nearest length counts, by its ratio. A file counts for the versions of torch and triton that
it was measured with; without one the built-in order and tiles stand.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("tuned")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def full_key(dtype: torch.dtype, head_dim: int, packed: bool) -> str:
    """Of the kernel of full attention, of several documents or one."""
    return f"full {'packed' if packed else 'single'} {DTYPES[dtype]} D{head_dim}"


def moba_key(what: str, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """Of MoBA's kernel ("moba") or of its Triton tiles ("tiles", "key_tiles")."""
    return f"{what} {DTYPES[dtype]} D{head_dim} B{block_size}"


@torch.compiler.assume_constant_result
def tuned(key: str, tokens: int) -> Any:
    """What was the fastest on the current GPU for about so many tokens, None where that was not measured."""
    if not torch.cuda.is_available():
        return None
    lengths = fastest(torch.cuda.get_device_name(), FOLDER).get(key)
    if not lengths:
        return None
    nearest = min(lengths, key=lambda length: abs(math.log(int(length) / max(1, tokens))))
    _log(key, nearest, str(lengths[nearest]))
    return lengths[nearest]


@functools.cache
def _log(key: str, length: str, found: str) -> None:
    logger.info("%s: %s, the fastest for %s tokens when this card was tuned", key, found, length)


def table_path(device: str, folder: Path) -> Path:
    """The file of a card, by the name that torch gives it."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


@functools.cache
def fastest(device: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What was the fastest on a card, key -> tokens -> choice; empty where there is no file, or one of other versions,
    which is logged."""
    path = table_path(device, folder)
    if not path.exists():
        return {}
    table = json.loads(path.read_text(encoding="utf-8"))
    measured, here = {name: table[name] for name in ("torch", "triton")}, versions()
    if measured != here:
        logger.info("%s was measured with %s, here is %s: not used; tune again", path, measured, here)
        return {}
    return table["fastest"]


def write_table(device: str, folder: Path, tokens: int, found: dict[str, Any]) -> Path:
    """Write what was found by key for a card and a length over what the file had of it; returns the file."""
    path = table_path(device, folder)
    folder.mkdir(parents=True, exist_ok=True)
    fastest.cache_clear()
    known = fastest(device, folder)
    merged = known | {key: known.get(key, {}) | {str(tokens): choice} for key, choice in found.items()}
    table = {"device": device, **versions(), "fastest": dict(sorted(merged.items()))}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    fastest.cache_clear()
    return path


def versions() -> dict[str, str]:
    """torch and triton, to their minor versions."""
    found = {"torch": torch.__version__, "triton": "none"}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return {name: ".".join(version.split(".")[:2]) for name, version in found.items()}

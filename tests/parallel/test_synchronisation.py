"""Within an update the host looks at no number of the device but in the one collective that brings them all.

On a GPU each such look would stop the host until the device has caught up; here, on CPUs, they are refused by name.
What DeepSpeed waits for without a look, docs/numerics.md says.
"""

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neomoba_dist.config import Config, parse_config
from neomoba_dist.data.batch import Batch
from neomoba_dist.train.engines import build_engine
from tests.parallel.test_engines import LAYOUTS, RATE, make_config, updates
from tests.ranks import run_ranks
from tests.runs import build_mesh

# operators whose result, or its shape, the host waits for
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal", "is_nonzero")
# where batches are made, which lie on the host; where the one collective is; and where its norm, on the host, is used
ON_THE_HOST = ("data/batch.py", "in split_batch", "in _decide", "in is_invalid_grad_norm")
ATTENTION = ("model/attention/",)


class Watch(TorchDispatchMode):
    """Collects where the host looks at a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in LOOKS or masked or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        stack = "".join(traceback.format_stack())
        if not any(place in stack for place in (*ON_THE_HOST, *ATTENTION)):
            self.found.append(f"{name} in {traceback.format_stack(limit=5)[0]}")

    def watched(self, name: str) -> Callable[..., Any]:
        """A method of tensors that no operator shows."""
        method = getattr(torch.Tensor, name)

        def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.note(name)
            return method(tensor, *args, **kwargs)

        return noted


def watched_rank(config: Config) -> list[str]:
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    mine = [batches[mesh["dp"].index :: mesh["dp"].size] for batches in updates(config.model.objective)]
    engine.update(mine[0], RATE)  # what the first one alone does
    watch = Watch()
    with ExitStack() as stack:
        for name in ("tolist", "cpu", "numpy"):
            stack.enter_context(patch.object(torch.Tensor, name, watch.watched(name)))
        stack.enter_context(watch)
        engine.update(mine[1], RATE)
    return watch.found


@pytest.mark.parametrize("layout", ["dp2_zero1", "dp2_zero2", "dp2_zero3", "pp2", "tp2_sp_dp2_zero2", "cp2_zero2"])
def test_the_host_never_looks(layout: str) -> None:
    world, parallel, stage = LAYOUTS[layout]
    config = parse_config({**make_config("mlm", parallel, stage).to_dict(), "bf16": {"enabled": True}})
    for found in run_ranks(world, watched_rank, config):
        assert not found, "".join(sorted(set(found)))


def test_the_watch_sees_a_look() -> None:
    """Without the numbers of the tokens that count, the loss has to ask for them."""
    with patch.object(Batch, "with_counted", lambda batch: batch):
        (found,) = run_ranks(1, watched_rank, make_config("mlm", {}, 1))
    assert any("nonzero" in look for look in found)

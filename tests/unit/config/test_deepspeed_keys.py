"""deepspeed_keys.py against the installed DeepSpeed: the same names in both directions, and types that it takes."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from neomoba_dist.config import load_config
from neomoba_dist.config.check import check_value
from neomoba_dist.config.deepspeed_keys import DEEPSPEED_KEYS
from neomoba_dist.config.types import Range, Refused

FOLDER = Path(__file__).parents[3] / "ds_configs"


class Recorder(dict[str, Any]):
    """A mapping that remembers every key it was asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value as dict does, and remember the key."""
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """Return the mapping itself, so that `in x.keys()` is seen too."""
        return self

    def __copy__(self) -> "Recorder":
        return self


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, ...], Any]:
    """DeepSpeed's pydantic models by the path of the block that they parse."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        ("zero_optimization",): DeepSpeedZeroConfig,
        ("zero_optimization", "offload_param"): DeepSpeedZeroOffloadParamConfig,
        ("zero_optimization", "offload_optimizer"): DeepSpeedZeroOffloadOptimizerConfig,
        ("bf16",): DeepSpeedBF16Config,
        ("fp16",): DeepSpeedFP16Config,
        ("comms_logger",): CommsLoggerConfig,
        ("timers", "throughput"): DeepSpeedThroughputTimerConfig,
    }


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The keys that DeepSpeed's own parser asks for, of the root ("") and of the blocks that are no pydantic models."""
    from deepspeed.runtime import config as deepspeed_config

    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: 1)
    blocks = {name: Recorder() for name in ("flops_profiler", "data_types", "timers")}
    root = Recorder(train_micro_batch_size_per_gpu=1, **blocks)
    deepspeed_config.DeepSpeedConfig(root)
    old_style = Recorder(train_micro_batch_size_per_gpu=1, zero_optimization=True)
    deepspeed_config.DeepSpeedConfig(old_style)
    return {"": root.asked | old_style.asked, **{name: block.asked for name, block in blocks.items()}}


def at(path: tuple[str, ...]) -> Any:
    """Return our table's block at `path`."""
    block: Any = DEEPSPEED_KEYS
    for name in path:
        block = block[name]
    return block


def model_names(model: Any) -> set[str]:
    """Return every name that a pydantic model takes: fields and aliases."""
    aliases = {field.alias for field in model.model_fields.values() if field.alias}
    return set(model.model_fields) | aliases


def test_root_keys(recorded: dict[str, set[str]]) -> None:
    import deepspeed
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    assert '"data_parallel_size" in config' in inspect.getsource(deepspeed.initialize)
    known = recorded[""] | set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) | {"data_parallel_size"}
    assert known == set(DEEPSPEED_KEYS)


def test_removed_keys_are_refused() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    assert all(isinstance(DEEPSPEED_KEYS[name], Refused) for name in _REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert all(isinstance(at(("zero_optimization",))[name], Refused) for name in _REMOVED_ZERO_CONFIG_KEYS)


def test_keys_of_every_accepted_block(models: dict[tuple[str, ...], Any], recorded: dict[str, set[str]]) -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS

    blocks = set(block_paths(DEEPSPEED_KEYS))
    assert blocks == set(models) | {("flops_profiler",), ("data_types",), ("timers",)}
    for path, model in models.items():
        removed = set(_REMOVED_ZERO_CONFIG_KEYS) if path == ("zero_optimization",) else set()
        assert set(at(path)) == model_names(model) | removed, path
    for name in ("flops_profiler", "data_types", "timers"):
        assert set(at((name,))) == recorded[name], name


def test_deepspeeds_defaults_have_our_types(models: dict[tuple[str, ...], Any]) -> None:
    for path, model in models.items():
        defaults = model().model_dump(by_alias=True)
        for name, node in at(path).items():
            if isinstance(node, (Refused, dict)) or name not in defaults:
                continue
            value = getattr(defaults[name], "value", defaults[name])
            assert check_value(node, value, (*path, name), "DeepSpeed") == value


def test_deepspeed_takes_every_value_that_we_take(models: dict[tuple[str, ...], Any]) -> None:
    for path, model in models.items():
        for name, node in at(path).items():
            if not isinstance(node, (Refused, dict)):
                for value in samples(node):
                    model(strict=True, **{name: value})


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_takes_the_shipped_files(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_config(path)
    parsed = DeepSpeedConfig({**config.deepspeed, "gradient_accumulation_steps": 1})
    assert parsed.zero_optimization_stage == config.zero_stage
    assert parsed.gradient_clipping == config.gradient_clipping
    assert parsed.bfloat16_config.enabled == (config.dtype_name == "bfloat16")


def test_our_default_clipping_is_deepspeeds() -> None:
    from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT

    from neomoba_dist.config.root import DEFAULT_GRADIENT_CLIPPING

    assert DEFAULT_GRADIENT_CLIPPING == GRADIENT_CLIPPING_DEFAULT


def block_paths(block: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every accepted block."""
    for name, node in block.items():
        if isinstance(node, dict):
            yield (*path, name)
            yield from block_paths(node, (*path, name))


def samples(node: Any) -> list[Any]:
    """Return values that `node` accepts, at its lower bound too."""
    if get_origin(node) is Annotated:
        base, bounds = get_args(node)
        assert isinstance(bounds, Range)
        lowest = bounds.ge if bounds.ge is not None else 1
        return [base(lowest), base(lowest + 1)]
    if get_origin(node) is Literal:
        return list(get_args(node))
    if get_origin(node) is list:
        return [[], ["a"]]
    if node == (bool | None):
        return [True, False, None]
    return [True, False] if node is bool else ["a"]

"""The shipped configuration files: each loads, is what the README says, and no key of it can be misspelt unnoticed."""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neomoba_dist.config import ConfigError, ModelConfig, load_config, parse_config
from neomoba_dist.config.deepspeed_keys import DEEPSPEED_KEYS
from neomoba_dist.config.load import KNOWN_KEYS
from neomoba_dist.config.root import BLOCKS
from neomoba_dist.config.types import Block, Refused

FOLDER = Path(__file__).parents[3] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
LARGEST_WORLD = {
    "cpu_tiny": 8,
    "cpu_tiny_clm": 8,
    "cpu_tiny_moe": 8,
    "cpu_tiny_encdec": 8,
    "three_way_125m": 32,
    "ablation_tiny": 2,
    "qwen3_moba": 64,
    "modernbert_moba": 64,
    "ablation_125m": 32,
    "phase1": 128,
    "phase2": 128,
    "phase3": 64,
    "phase3_moe": 64,
    "phase3_cp": 256,
    "long_128k": 256,
}  # every power of two to it


def paths(block: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key of a nested mapping."""
    for name, inner in block.items():
        yield (*path, name)
        if isinstance(inner, dict):
            yield from paths(inner, (*path, name))


def misspelt(name: str, known: Block) -> list[str]:
    """Return typos of `name` that are no known key: a letter left out, doubled, swapped with the next one."""
    middle = len(name) // 2
    typos = {
        name[:middle] + name[middle + 1 :],
        name[:middle] + name[middle] + name[middle:],
        name[:-2] + name[-1] + name[-2],
    }
    return sorted(typos - set(known))


def rename(tree: dict[str, Any], path: tuple[str, ...], name: str) -> dict[str, Any]:
    """Return a copy of `tree` in which the key at `path` is called `name`, in the same place."""
    if len(path) == 1:
        return {name if key == path[0] else key: value for key, value in tree.items()}
    return {**tree, path[0]: rename(tree[path[0]], path[1:], name)}


def assert_typos_are_refused(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    known: Any = KNOWN_KEYS
    for part in path[:-1]:
        known = known[part]
    typos = misspelt(path[-1], known)
    assert len(typos) >= 2
    for typo in typos:
        with pytest.raises(ConfigError) as caught:
            parse_config(rename(tree, path, typo), source="FILE")
        message = str(caught.value)
        wrong, right = (".".join((*path[:-1], name)) for name in (typo, path[-1]))
        assert message.startswith(f"FILE: unknown key {wrong}; did you mean {right}?")
        assert message.isprintable()


def test_the_shipped_files() -> None:
    assert set(LARGEST_WORLD) <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_file_loads_round_trips_and_closes(path: Path) -> None:
    config = load_config(path)
    assert parse_config(json.loads(json.dumps(config.to_dict()))) == config
    parallel = config.parallel
    model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    model_parallel *= parallel.context_parallel_size
    model_parallel *= parallel.expert_model_parallel_size
    for world_size in [model_parallel << power for power in range(8)]:
        if world_size <= LARGEST_WORLD.get(path.stem, 4):
            plan = config.plan(world_size)
            assert plan.rows_per_update * config.phase.sequence_length == config.phase.tokens_per_update


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_every_shipped_file_misspelt_is_refused(path: Path) -> None:
    tree = json.loads(path.read_text())
    for key in paths(tree):
        assert_typos_are_refused(tree, key)


@pytest.mark.parametrize("name", ["phase1", "phase2", "phase3", "phase3_cp", "long_128k"])
def test_the_phases_have_the_sizes_that_their_page_says(name: str) -> None:
    """NeoBERT's 3072 is a SwiGLU of 2048; 245M parameters with its 12 key/value heads, 223M with ours."""
    model = load_config(FOLDER / f"{name}.json").model
    assert (model.intermediate_size, model.num_key_value_heads) == (2048, 4)
    assert round(parameters(model) / 1e6) == 223
    assert round(parameters(dataclasses.replace(model, num_key_value_heads=12)) / 1e6) == 245
    assert round(parameters(dataclasses.replace(model, intermediate_size=3072)) / 1e6) == 289
    page = (FOLDER.parent / "docs" / "phases.md").read_text(encoding="utf-8")
    assert "223M with 4 key/value heads; 245M with `num_key_value_heads` 12" in page


def parameters(model: ModelConfig) -> int:
    """Of a dense model with an untied head and plain RMSNorms."""
    assert model.head_dim is not None
    heads = model.num_attention_heads + model.num_key_value_heads
    layer = model.hidden_size * (2 * heads * model.head_dim + 3 * model.intermediate_size + 2)
    return model.num_hidden_layers * layer + model.hidden_size * (2 * model.vocab_size + 1)


def test_experts_are_as_wide_together_as_the_dense_layers() -> None:
    mixture, dense = (load_config(FOLDER / f"{name}.json").model for name in ("phase3_moe", "phase3"))
    assert mixture.moe_intermediate_size is not None
    assert mixture.num_experts_per_tok * mixture.moe_intermediate_size == dense.intermediate_size


def test_every_known_key_misspelt_is_refused() -> None:
    base = json.loads((FOLDER / "cpu_tiny.json").read_text())
    for key in paths(KNOWN_KEYS):
        tree = copy.deepcopy(base)
        block = tree
        for name in key[:-1]:
            block = block.setdefault(name, {})
        block.setdefault(key[-1], {})
        assert_typos_are_refused(tree, key)


def test_phase_3_is_the_run_the_project_is_for() -> None:
    config = load_config(FOLDER / "phase3.json")
    model, phase = config.model, config.phase
    assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads) == (28, 768, 12)
    assert (model.num_key_value_heads, model.moba_block_size, model.moba_top_k) == (4, 512, 3)
    assert (model.hybrid_layer_count, phase.sequence_length, phase.learning_rate) == (3, 32768, 2e-4)
    assert (phase.recompute, phase.full_attention_fraction) == ("auto", 0.1)
    assert phase.full_attention_schedule == "tail"
    assert (config.zero_stage, config.dtype_name, config.micro_batch_size) == (1, "bfloat16", 1)
    assert config.parallel.tensor_model_parallel_size == 1


def test_context_parallel_variants() -> None:
    base, cp, long = (load_config(FOLDER / f"{name}.json") for name in ("phase3", "phase3_cp", "long_128k"))
    assert (cp.parallel.context_parallel_size, long.parallel.context_parallel_size) == (4, 8)
    assert cp.model == base.model
    assert (cp.phase.sequence_length, cp.phase.tokens_per_update) == (32768, base.phase.tokens_per_update)
    assert long.phase.sequence_length == long.model.max_position_embeddings == 131072
    assert long.model.rope_scaling_factor * base.model.max_position_embeddings == 131072
    trained = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    assert all(getattr(long.model, name) == getattr(base.model, name) for name in trained)


@pytest.mark.parametrize(("name", "length"), [("phase1", 1024), ("phase2", 4096)])
def test_phases_1_and_2(name: str, length: int) -> None:
    config = load_config(FOLDER / f"{name}.json")
    phase = config.phase
    assert (phase.sequence_length, phase.tokens_per_update, phase.full_attention_fraction) == (length, 2**21, 1.0)
    assert (phase.learning_rate, phase.warmup_steps, phase.schedule) == (6e-4, 2000, "cosine")
    assert (config.zero_stage, config.dtype_name, config.model.objective) == (1, "bfloat16", "mlm")


def test_phases_share_one_model() -> None:
    models = [load_config(FOLDER / f"phase{number}.json").model for number in (1, 2, 3)]
    assert models[0] == models[1] == models[2]


@pytest.mark.parametrize("name", ["cpu_tiny", "cpu_tiny_clm", "cpu_tiny_moe"])
def test_cpu_files_exercise_sparse_attention(name: str) -> None:
    config = load_config(FOLDER / f"{name}.json")
    assert config.dtype_name == "float32"
    assert config.model.causal == name.endswith("clm")
    assert config.model.num_hidden_layers - config.model.hybrid_layer_count == 2
    assert config.phase.sequence_length // config.model.moba_block_size >= 6
    assert config.model.moba_top_k < 6
    for axis, size in (("tensor", 2), ("pipeline", 2)):
        override = f"neomoba.parallel.{axis}_model_parallel_size={size}"
        assert load_config(FOLDER / f"{name}.json", [override]).plan(4).data_parallel_size == 2


# ----------------------------------------------------------------------------------------------------- README


def tables() -> dict[str, list[list[str]]]:
    """Return the rows (cells) of the README's tables by heading; code ticks of headings are dropped."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in (FOLDER / "README.md").read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        elif line.startswith("| `"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_readme_explains_every_key_with_its_default(block: str) -> None:
    rows = {row[0].strip("`"): row for row in tables()[f"neomoba.{block}"]}
    fields = {field.name: field for field in dataclasses.fields(BLOCKS[block])}
    assert list(rows) == list(fields)
    for name, (_, kind, default, meaning) in rows.items():
        value = fields[name].default
        assert default == ("required" if value is dataclasses.MISSING else f"`{json.dumps(value)}`")
        assert kind
        assert len(meaning) > 10


def test_readme_lists_the_shipped_files_and_deepspeeds_keys() -> None:
    found = tables()
    listed = [name for row in found["Configuration files"] for name in re.findall(r"`([\w.]+)`", row[0])]
    assert sorted(listed) == [path.name for path in FILES]
    accepted = [name for name, node in DEEPSPEED_KEYS.items() if not isinstance(node, Refused)]
    assert sorted(row[0].strip("`") for row in found["Accepted"]) == sorted(accepted)
    refused = [key for row in found["Refused, and what replaces them"] for key in re.findall(r"`(\w+)`", row[0])]
    assert sorted(refused) == sorted(set(DEEPSPEED_KEYS) - set(accepted))


def test_every_neomoba_path_in_the_texts_exists() -> None:
    advice = [node.advice for path, node in walk(DEEPSPEED_KEYS) if isinstance(node, Refused)]
    text = "\n".join([(FOLDER / "README.md").read_text(), *advice])
    named = {tuple(name.split(".")) for name in re.findall(r"neomoba(?:\.[a-z_0-9]+)+", text)}
    assert named
    assert named - set(paths(KNOWN_KEYS)) == set()


def walk(block: Block, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every key of the table with what it may hold."""
    for name, node in block.items():
        yield (*path, name), node
        if isinstance(node, dict):
            yield from walk(node, (*path, name))


def test_the_table_of_the_phases_is_that_of_the_files() -> None:
    """docs/phases.md."""
    phases = [load_config(FOLDER / f"phase{number}.json") for number in (1, 2, 3)]
    rows = {
        "sequence length": [f"{config.phase.sequence_length:,}" for config in phases],
        "steps": [f"{config.phase.steps:,}" for config in phases],
        "tokens per update": [f"{config.phase.tokens_per_update:,}" for config in phases],
        "tokens in all": [
            f"{config.phase.steps * config.phase.tokens_per_update / 1e9:.1f} billion" for config in phases
        ],
        "peak learning rate, warm-up": [
            f"{config.phase.learning_rate:.0e}, {config.phase.warmup_steps:,} steps".replace("e-0", "e-")
            for config in phases
        ],
        "rows per micro-batch": [str(config.micro_batch_size) for config in phases],
        "ZeRO, recomputation": [f"{config.zero_stage}, `{config.phase.recompute}`" for config in phases],
    }
    lines = (FOLDER.parent / "docs/phases.md").read_text().splitlines()
    for name, cells in rows.items():
        assert f"| {name} | {' | '.join(cells)} |" in lines

"""load_config: what it reads, what it refuses, and that every refusal is one line that names the file and the key."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neomoba_dist.config import ConfigError, load_config, parse_config
from neomoba_dist.config.load import KNOWN_KEYS
from neomoba_dist.config.root import BLOCKS
from tests.configs import MINIMAL, changed


def write(folder: Path, content: Any) -> Path:
    path = folder / "c.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(path: Path, *overrides: str) -> str:
    """Return the one line with which the file is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def test_minimal_file_gets_the_documented_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.model.head_dim == 64
    assert not config.model.causal
    assert (config.micro_batch_size, config.zero_stage, config.dtype_name) == (1, 1, "float32")
    assert config.gradient_clipping == config.deepspeed["gradient_clipping"] == 1.0
    assert config.phase.decay_steps is None
    assert config.log.validation_rows == 64


@pytest.mark.parametrize(
    ("block", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), (None, "float32")], ids=["bf16", "fp16", "fp32"]
)
def test_dtype_name(tmp_path: Path, block: str | None, name: str) -> None:
    path = write(tmp_path, {**MINIMAL, **({block: {"enabled": True}} if block else {"bf16": {"enabled": False}})})
    assert load_config(path).dtype_name == name


def test_round_trip_copies_and_pickles(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["neomoba.model.objective=clm", "fp16.enabled=true"])
    saved = config.to_dict()
    assert parse_config(json.loads(json.dumps(saved))) == config
    assert set(saved["neomoba"]) == set(BLOCKS)
    assert saved["neomoba"]["model"]["head_dim"] == 64
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    saved["zero_optimization"]["stage"] = 3
    assert config.zero_stage == 1


def test_config_is_frozen_and_parsing_does_not_change_the_tree() -> None:
    tree = copy.deepcopy(MINIMAL)
    config = parse_config(tree)
    assert tree == MINIMAL
    tree["zero_optimization"]["stage"] = 3
    assert config.zero_stage == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.phase.steps = 3  # type: ignore[misc]


def test_number_of_keys() -> None:
    """Every key must be worth its place; the blocks of fine-tuning and distillation are read by a program each."""
    own = [cls for name, cls in BLOCKS.items() if name not in ("finetune", "distill")]
    assert sum(len(dataclasses.fields(cls)) for cls in own) <= 113


def test_import_is_light() -> None:
    code = "import sys, neomoba_dist.config as c; print(*sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"bf16": {"enabled": true},\n "fp16" {}}', "line 2 column 9 is not JSON"),
        ("", "line 1 column 1 is not JSON"),
        ("[1, 2]", "holds [1, 2]; it must be one block of keys"),
        ("3", "holds 3"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "bf16.enabled stands twice; delete one"),
        ('{"bf16": {}, "bf16": {}}', "bf16 stands twice"),
        (
            '{"neomoba": {"model": {"a": {"vocab_size": 1, "vocab_size": 1}}}}',
            "neomoba.model.a.vocab_size stands twice",
        ),
        ("[" * 100_000, "nested too deeply"),
        ('{"train_batch_size": ' + "9" * 5000 + "}", "a number is too long"),
        ('{"a\\nb": 1}', "unknown key a\\nb"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_missing_folder_and_binary_files(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.json")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(tmp_path / "b.json")


def test_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(MINIMAL), encoding="utf-8-sig")
    assert load_config(path) == parse_config(MINIMAL)


# ------------------------------------------------------------------------------------------------- keys, values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("zero_optimization.stgae=1", "unknown key zero_optimization.stgae; did you mean zero_optimization.stage?"),
        ("neomoba.phase.lerning_rate=1", "did you mean neomoba.phase.learning_rate?"),
        ("neomoba.learning_rate=1", "unknown key neomoba.learning_rate; did you mean neomoba.phase.learning_rate?"),
        ("neomoba.model.Hidden-Size=1", "did you mean neomoba.model.hidden_size?"),
        ("neomba.model.hidden_size=1", "unknown key neomba; did you mean neomoba?"),
        ("neomoba.log.zzz=1", "known here: tensorboard, wandb_project, validate_every, validation_rows"),
        ("zzz=1", "all in ds_configs/README.md"),
        ("optimiser.type=Adam", "did you mean optimizer? It is not taken: set neomoba.phase.optimizer (adamw or muon)"),
        ("optimizer.type=Adam", "DeepSpeed's key optimizer is not taken: set neomoba.phase.optimizer (adamw or muon)"),
        ("scheduler={}", "neomoba.phase.schedule"),
        ("activation_checkpointing={}", "neomoba.phase.recompute"),
        ("pipeline.pipe_partitioned=true", "neomoba.parallel.pipeline_model_parallel_size"),
        ("tensorboard.enabled=true", "neomoba.log.tensorboard"),
        ("bf16.bf16_optimizer_states=true", "always float32"),
        ("zero_optimization.max_live_parameters=1", "write it as zero_optimization.stage3_max_live_parameters"),
        ("zero_optimization.offload_optimizer.device=nvme", 'must be one of "none", "cpu"'),
        (
            "neomoba.phase.schedule=cosin",
            'must be one of "cosine", "linear", "wsd", "constant"; did you mean "cosine"?',
        ),
        ("neomoba.phase.optimizer=muno", 'must be one of "adamw", "muon"; did you mean "muon"?'),
        ("neomoba.phase.steps=true", "neomoba.phase.steps is true; it must be an integer of at least 1"),
        ("neomoba.phase.steps=1.5", "an integer"),
        ("neomoba.phase.steps=ten", 'neomoba.phase.steps is "ten"'),
        ("neomoba.phase.steps=null", "an integer"),
        ("neomoba.phase.steps=1e999", "Infinity"),
        ("neomoba.phase.learning_rate=NaN", "neomoba.phase.learning_rate is NaN; it must be a number above 0"),
        ("neomoba.phase.learning_rate=1" + "0" * 400, "a number above 0"),
        ("neomoba.phase.learning_rate=false", "a number above 0"),
        ("neomoba.data.mlm_probability=1", "a number above 0 and below 1"),
        ("neomoba.phase.adam_beta2=1.0", "a number of at least 0 and below 1"),
        ("bf16.enabled=True", "true or false"),
        ("bf16=true", "bf16 is true; it must be a block of keys"),
        ("neomoba.data.train=[]", "a string"),
        ("comms_logger.prof_ops=[1]", "a list, each item a string"),
        ("neomoba.phase.steps.x=1", "neomoba.phase.steps holds a value (an integer of at least 1), not a block"),
        ("neomoba.phase.steps", "write path.to.key=value"),
        ("=1", "write path.to.key=value"),
        ("neomoba..steps=1", "write path.to.key=value"),
    ],
)
def test_overrides_that_are_refused(tmp_path: Path, override: str, expected: str) -> None:
    message = refusal(write(tmp_path, MINIMAL), override)
    assert message.startswith(f"--set {override}: ")
    assert expected in message
    key, _, text = override.partition("=")
    if "write path" not in message and "holds a value" not in message:  # the same line for the same mistake in the file
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        with pytest.raises(ConfigError) as caught:
            parse_config(changed({key: value}), source="FILE")
        assert str(caught.value).startswith("FILE: ")
        assert expected in str(caught.value)


def test_overrides_that_are_taken(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL),
        [
            "neomoba.phase.steps=1e2",
            "neomoba.phase.learning_rate=1",
            "neomoba.phase.name=3",
            "neomoba.data.train=/data/a=b",
            "neomoba.data.validation=2024",
            "neomoba.data.validation=null",
            "neomoba.data.mlm_scheme=80/10/10",
            "zero_optimization.offload_optimizer.device=cpu",
            "neomoba.parallel.tensor_model_parallel_size=2",
        ],
    )
    assert config.phase.steps == 100
    assert isinstance(config.phase.steps, int)
    assert config.phase.learning_rate == 1.0
    assert isinstance(config.phase.learning_rate, float)
    assert (config.phase.name, config.data.train, config.data.validation) == ("3", "/data/a=b", None)
    assert config.deepspeed["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config.parallel.tensor_model_parallel_size == 2


def test_override_into_a_wrong_block_of_the_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "bf16": True})
    assert refusal(path, "bf16.enabled=true") == f"{path}: bf16 is true; it must be a block of keys: {{...}}"


@pytest.mark.parametrize(
    "key",
    [
        "train_micro_batch_size_per_gpu",
        "zero_optimization",
        "zero_optimization.stage",
        "neomoba",
        "neomoba.data",
        "neomoba.data.train",
        "neomoba.phase",
        *(f"neomoba.phase.{name}" for name in MINIMAL["neomoba"]["phase"]),
    ],
)
def test_required_keys(tmp_path: Path, key: str) -> None:
    tree = copy.deepcopy(MINIMAL)
    block = tree
    *parents, last = key.split(".")
    for name in parents:
        block = block[name]
    del block[last]
    message = refusal(write(tmp_path, tree))
    assert key in message
    assert "is missing; " in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["auto", "cpu", "mlm"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
PATHS = [
    *KNOWN_KEYS,
    *(f"neomoba.{block}.{field.name}" for block, cls in BLOCKS.items() for field in dataclasses.fields(cls)),
    *(f"zero_optimization.{key}" for key in KNOWN_KEYS["zero_optimization"]),
]


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(PATHS), value=JSON)
def test_any_value_gives_a_config_or_one_line(path: str, value: Any) -> None:
    refused = ""
    try:
        config = parse_config(changed({path: value}), source="FILE")
    except ConfigError as error:
        refused = str(error)
    if refused:
        assert refused.startswith("FILE: ")
        assert refused.isprintable()
    else:
        assert parse_config(config.to_dict()) == config

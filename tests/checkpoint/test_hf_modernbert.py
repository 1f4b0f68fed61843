"""ModernBERT's folders: the logits of `transformers`, both ways, and MoBA in the place of its global layers."""

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from launch.convert import main as convert
from neomoba_dist.checkpoint.hf import HuggingFaceReader, export_folder, import_folder, open_checkpoint
from neomoba_dist.checkpoint.layout import CheckpointError
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.generate.stage import batch_of
from neomoba_dist.model.init import views_of
from neomoba_dist.model.neobert import NeoBERT
from tests.checkpoint.test_hf import logits_of, saved
from tests.faults.job import Job
from tests.programs import run_program
from tests.ranks import run_ranks
from tests.runs import run_config, train_here

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "local_attention": 16,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
}
YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 2.0, "original_max_position_embeddings": 256}
MODELS: dict[str, dict[str, Any]] = {
    "as published": {},
    "untied, norms with biases": {"tie_word_embeddings": False, "norm_bias": True, "norm_eps": 1e-4},
    "other sizes": {"vocab_size": 130, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 40,
                    "num_hidden_layers": 7, "local_attention": 8, "hidden_activation": "silu"},
    "other layers": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]},
    "all global": {"layer_types": ["full_attention"] * 4},
    "scaled global rotation": {"rope_parameters": {"full_attention": YARN, "sliding_attention": {
        "rope_type": "default", "rope_theta": 500.0}}},
    "one rotation": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 2e4} for kind in ("full_attention", "sliding_attention")}},
}  # fmt: skip


def published(folder: Path, **changes: Any) -> Any:
    """A random ModernBERT of `transformers`, saved in two files or more; norms are not all one, biases not zero."""
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(ModernBertConfig(**{**SIZES, "initializer_range": 0.2, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def read(folder: Path) -> NeoBERT:
    """A folder of the hub as our model, by way of a run folder beside it."""
    import_folder(HuggingFaceReader(folder), folder.with_name(f"{folder.name}_read"), file_bytes=50_000)
    return load_model(folder.with_name(f"{folder.name}_read"))[0]


def draw(length: int, vocab_size: int = 300) -> torch.Tensor:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = published(tmp_path / "hub", **MODELS[name])
    ours = read(tmp_path / "hub")
    ids = draw(90, ours.config.vocab_size)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(ours, ids), expected, rtol=0, atol=1e-5)

    export_folder(CheckpointReader(tmp_path / "hub_read"), tmp_path / "back", torch.float32, None, file_bytes=50_000)
    first, second = saved(tmp_path / "hub"), saved(tmp_path / "back")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first), "the same bits"
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert torch.equal(again(ids[None]).logits[0], expected)
    assert HuggingFaceReader(tmp_path / "back").config.model == ours.config


def test_padding_and_packing(tmp_path: Path) -> None:
    """Texts padded there are packed here; each gives what it gives alone."""
    theirs = published(tmp_path / "hub")
    ours = read(tmp_path / "hub")
    texts = [draw(length) for length in (61, 1, 40)]
    ids, mask = torch.zeros(2, 3, 61, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    with torch.no_grad():
        padded = theirs(ids, attention_mask=mask).logits
        packed = ours.logits(ours.hidden_states(batch_of([text.tolist() for text in texts], "cpu")))
    for row, (text, start) in enumerate(zip(texts, accumulate(map(len, texts), initial=0), strict=False)):
        found = packed[start : start + len(text)]
        torch.testing.assert_close(found, padded[row, : len(text)], rtol=0, atol=1e-5)
        torch.testing.assert_close(found, logits_of(ours, text), rtol=0, atol=1e-5)


def test_parts_are_what_the_folder_says(tmp_path: Path) -> None:
    """A folder of transformers 4, and a copy of the tied matrix in it, as published models have."""
    theirs = published(tmp_path / "hub", num_hidden_layers=7)
    for file in tmp_path.glob("hub/*.safetensors"):
        file.unlink()
    (tmp_path / "hub" / "model.safetensors.index.json").unlink()
    save_file(
        {name: tensor.clone() for name, tensor in theirs.state_dict().items()}, tmp_path / "hub/model.safetensors"
    )
    file = tmp_path / "hub" / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_parameters", "layer_types", "tie_word_embeddings"):
        config.pop(key, None)
    old = {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3}
    file.write_text(json.dumps({**config, **old}))
    assert "decoder.weight" in load_file(tmp_path / "hub" / "model.safetensors")
    ours = read(tmp_path / "hub")
    model = ours.config
    assert model.attention == "full*1,sliding_window*2,full*1,sliding_window*2,full*1"
    assert (model.rope_theta, model.sliding_rope_theta, model.sliding_window) == (160000.0, 10000.0, 9)
    assert (model.norm, model.mlp_activation, model.tie_word_embeddings) == ("layernorm_no_bias", "geglu", True)
    ids = draw(80)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, ids), theirs(ids[None]).logits[0], rtol=0, atol=1e-5)
    export_folder(CheckpointReader(tmp_path / "hub_read"), tmp_path / "back", torch.float32, None)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in old} == old, "as transformers 4 reads it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({key: True}, f'"{key}": True has no') for key in ("attention_bias", "mlp_bias", "classifier_bias")),
        ({"decoder_bias": False}, '"decoder_bias": False has no counterpart here; only True has'),
        ({"hidden_activation": "relu"}, "\"hidden_activation\": 'relu' has no counterpart here"),
        ({"classifier_activation": "silu"}, "\"classifier_activation\": 'silu' has no counterpart here"),
        ({"layer_types": ["chunked_attention"] * 4}, "\"layer_types\": 'chunked_attention' has no counterpart here"),
        (
            {"rope_parameters": {"sliding_attention": {**YARN, "rope_theta": 1e4}}},
            "\"rope_type\": 'yarn' of sliding_attention has no counterpart here",
        ),
        ({"norm_bias": True}, "holds no tensor head.norm.bias"),
    ],
)
def test_what_has_no_counterpart_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    published(tmp_path / "hub")
    file = tmp_path / "hub" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match="hub") as caught:
        HuggingFaceReader(tmp_path / "hub")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


PARTS: dict[str, Any] = {
    "norm": "layernorm_no_bias",
    "embedding_norm": True,
    "prediction_head": True,
    "mlp_activation": "geglu",
    "num_key_value_heads": 4,
    "qk_norm": False,
    "attention": "full,sliding_window,full",
    "hybrid_layer_count": 0,
    "sliding_window": 9,
    "sliding_rope_theta": 300.0,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("axis", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_sharded_checkpoints_go_out(axis: str, tmp_path: Path) -> None:
    """Two updates with sharded weights, then the folder of the hub: the biases of the head have been trained."""
    tied = axis.startswith("pipeline")
    config = run_config({axis: 2}, model={**PARTS, "objective": "mlm", "tie_word_embeddings": tied})
    run_ranks(2, train_here, config, tmp_path / "run", 2)
    ours, _ = load_model(tmp_path / "run")
    export_folder(CheckpointReader(tmp_path / "run"), tmp_path / "hub", torch.float32, None)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "hub").eval()
    assert isinstance(theirs, ModernBertForMaskedLM)
    assert theirs.decoder.bias.abs().min() > 0
    ids = draw(60, 1200)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids[None]).logits[0], logits_of(ours, ids), rtol=0, atol=1e-5)
    assert torch.equal(logits_of(read(tmp_path / "hub"), ids), logits_of(ours, ids))


@pytest.mark.parametrize("axes", [{}, {"pipeline_model_parallel_size": 2}])
def test_training_starts_from_a_folder_of_the_hub(axes: dict[str, int], tmp_path: Path) -> None:
    """Continued pretraining with MoBA for the global layers by one flag; the result goes out with its own code."""
    published(tmp_path / "hub", vocab_size=1200, local_attention=8)
    reader = open_checkpoint(tmp_path / "hub")
    model = {key: value for key, value in vars(reader.config.model).items() if key in PARTS or key in SIZES}
    model |= {"attention": "moba*1,sliding_window*2,moba*1", "moba_block_size": 16, "moba_top_k": 2}
    model |= {"rope_theta": reader.config.model.rope_theta, "rms_norm_eps": reader.config.model.rms_norm_eps}
    del model["vocab_size"]  # that of the corpus
    config = run_config(axes, model=model)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    more = ("--init_from", str(tmp_path / "hub"), "--max_steps", "1")
    if axes:
        job = Job(file, tmp_path / "run", more=more)
        try:
            assert job.codes(120) == [0, 0], job.said()
        finally:
            job.end()
    else:
        result = run_program("launch/pretrain.py", "--ds_config", file, *more, "--output_dir", tmp_path / "run")
        assert result.returncode == 0, result.stderr
    trained, _ = load_model(tmp_path / "run")
    names = set()
    for parameter in trained.parameters():
        for shard, view in views_of(parameter):
            names.add(shard.name)
            apart = (view - reader.read("model", shard)).abs().max()
            assert 0 < apart < 3 * config.phase.learning_rate, "one step of AdamW from there"
    assert {"embedding_norm.weight", "head.dense", "head.norm.weight", "head.bias"} <= names
    assert convert(["--to", "hf", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "neomoba"
    ids = draw(80, 1200)
    assert torch.equal(logits_of(read(tmp_path / "out"), ids), logits_of(trained, ids))


def test_moba_that_chooses_all_blocks_is_what_was_published(tmp_path: Path) -> None:
    """The weights with MoBA layers are those of the folder: with every block chosen the logits are its, else others."""
    theirs = published(tmp_path / "hub")
    weights = read(tmp_path / "hub")
    ids = draw(90)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    for top_k, same in ((6, True), (2, False)):
        kinds = "moba*1,sliding_window*2,moba*1"
        config = replace(weights.config, attention=kinds, moba_block_size=16, moba_top_k=top_k)
        sparse = NeoBERT(config, weights.mesh)
        sparse.load_state_dict(weights.state_dict())
        assert torch.allclose(logits_of(sparse, ids), expected, rtol=0, atol=1e-5) == same


def test_the_command_and_the_special_tokens(tmp_path: Path) -> None:
    """`--to hf` says which tokens are special, as ModernBERT's own folders do; `--from hf` reads it again."""
    run_ranks(1, train_here, run_config({}, model={**PARTS, "objective": "mlm"}), tmp_path / "run", 1)
    command = ("launch/convert.py", "--input", tmp_path / "run", "--output", tmp_path / "hub", "--to", "hf")
    result = run_program(*command)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "hub" / "config.json").read_text())
    special = json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())
    assert written["model_type"] == "modernbert"
    assert isinstance(written["cls_token_id"], int)
    assert isinstance(written["pad_token_id"], int)
    assert {"cls_token", "sep_token", "pad_token"} <= special.keys()
    command = ("launch/convert.py", "--from", "hf", "--input", tmp_path / "hub", "--output", tmp_path / "again")
    result = run_program(*command)
    assert (result.returncode, result.stderr) == (0, "")
    result = run_program("launch/convert.py", tmp_path / "again", "--diff", tmp_path / "hub")
    assert result.returncode == 0, "equal to the last bit"

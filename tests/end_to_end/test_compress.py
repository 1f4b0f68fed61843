"""launch/compress.py: exact sparsity, a pruned run that other commands read, int8 near float, bad input."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from neomoba_dist.checkpoint.convert import read_whole
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.checkpoint.prune import prune
from neomoba_dist.checkpoint.tokenizer import tokenizer_of
from neomoba_dist.errors import MISTAKE
from neomoba_dist.model.int8 import num_bytes, quantize_projections
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from tests.decoding import greedy_by_recomputing
from tests.evals.runs import EXPERTS, make_config, write_run
from tests.models import tiny_batch, tiny_model
from tests.programs import run_program
from tests.runs import shared_corpus


def compress(*words: object) -> subprocess.CompletedProcess[str]:
    return run_program("launch/compress.py", *words, timeout=240)


@pytest.mark.parametrize("model", [{}, EXPERTS], ids=["dense", "experts"])
def test_prunes_and_measures(tmp_path: Path, model: dict[str, int]) -> None:
    run = write_run(tmp_path / "run", make_config(shared_corpus(), **model))
    words = ("--checkpoint", run, "--rows", 4, "--repeats", 1, "--prune", 0.3, "--int8", "--output", tmp_path / "small")
    found = compress(*words)
    assert found.returncode == 0, found.stderr
    report = json.loads((tmp_path / "small" / "compress.json").read_text())
    models = report["models"]
    assert list(models) == ["float32", "pruned", "int8", "pruned int8"]
    assert [line.split()[0] for line in found.stdout.splitlines()] == ["model", "float32", "pruned", "int8", "pruned"]
    assert models["float32"]["loss_difference"] == models["float32"]["zeros"] == 0
    assert models["pruned"]["zeros"] == models["pruned int8"]["zeros"] == pytest.approx(0.3, abs=1e-3)
    assert abs(models["pruned"]["loss_difference"]) > 1e-3
    assert 0 < abs(models["int8"]["loss_difference"]) < 0.02
    assert models["int8"]["bytes"] < models["float32"]["bytes"] == models["pruned"]["bytes"]
    assert all(entry["tokens_per_second"] > 0 for entry in models.values())

    before, after = CheckpointReader(run), CheckpointReader(tmp_path / "small")
    weights = [name for name in before.tensors if name.startswith("model.")]
    assert weights == list(after.tensors)
    matrices = 0
    for name in weights:
        old, new = (read_whole(reader, name) for reader in (before, after))
        if not re.search(r"blocks\.\d+\..*_proj", name):
            assert torch.equal(old, new), name
            continue
        for matrix, pruned in (
            zip(old.flatten(0, -3), new.flatten(0, -3), strict=True) if old.dim() > 2 else [(old, new)]
        ):
            kept = pruned != 0
            assert int((~kept).sum()) == round(0.3 * matrix.numel()), name
            assert torch.equal(matrix[kept], pruned[kept])
            assert matrix[~kept].abs().max() <= matrix[kept].abs().min()
            matrices += 1
    assert matrices >= 21
    load_model(tmp_path / "small")
    checked = run_program("launch/convert.py", tmp_path / "small", "--verify")
    assert checked.returncode == 0, checked.stderr


def test_ties_are_pruned_exactly() -> None:
    assert int((prune("blocks.0.mlp.up_proj", torch.ones(4, 25), 0.5) == 0).sum()) == 50
    assert torch.equal(prune("embedding.weight", torch.ones(4, 25), 0.5), torch.ones(4, 25))


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_int8_is_near_float(objective: str) -> None:
    # full attention: a choice of other blocks would be a jump
    config = tiny_model(objective=objective, attention="full", hybrid_layer_count=0)
    models = [NeoBERT(config, Mesh.single(), seed=3).eval() for _ in range(2)]
    quantize_projections(models[1])
    with torch.inference_mode():
        batch = tiny_batch(1, objective=objective)
        exact, near = (model.hidden_states(batch) for model in models)
        x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
        products = [F.linear(x, model.blocks[0].attention.qkv_proj) for model in models]
    assert 0 < (products[1] - products[0]).norm() < 0.015 * products[0].norm()
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()
    block, quantised = (model.blocks[0] for model in models)
    whole = num_bytes(block.mlp.down_proj)
    assert whole == block.mlp.down_proj.numel() * 4
    assert num_bytes(quantised.mlp.down_proj) < 0.35 * whole
    assert type(models[1].head.weight) is torch.nn.Parameter


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_all_feed_forward_layers_are_quantised(activation: str) -> None:
    model = NeoBERT(tiny_model(mlp_activation=activation), Mesh.single()).eval()
    before = {name: num_bytes(weight) for name, weight in model.named_parameters()}
    quantize_projections(model)
    smaller = {name for name, weight in model.named_parameters() if num_bytes(weight) < before[name]}
    assert smaller == {name for name in before if name.endswith("_proj")}


def test_a_compressed_decoder_writes_text_in_int8(tmp_path: Path) -> None:
    """Pruned by this command, then continued by launch/generate.py as the quantised model would."""
    folder = write_run(tmp_path / "run", make_config(shared_corpus(), objective="clm"))
    small = tmp_path / "small"
    found = compress("--checkpoint", folder, "--rows", 2, "--repeats", 1, "--prune", 0.3, "--int8", "--output", small)
    assert found.returncode == 0, found.stderr
    prompt = "def main(argument"
    written = run_program(
        *("launch/generate.py", "--checkpoint", small, "--prompt", prompt, "--max_new_tokens", 4, "--int8"),
        *("--output", tmp_path / "out.jsonl"),
    )
    assert written.returncode == 0, written.stderr
    tokenizer = tokenizer_of(CheckpointReader(small))
    assert tokenizer is not None
    model, _ = load_model(small)
    quantize_projections(model)
    ids = tokenizer.wrap_document(tokenizer.encode(prompt))[:-1]
    with torch.inference_mode():
        expected = greedy_by_recomputing(model, ids, 4, "full")
    together = tokenizer.decode([*tokenizer.encode(prompt), *expected])
    text = together.removeprefix(tokenizer.decode(tokenizer.encode(prompt)))
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to do; give --prune SHARE, --int8, or both"),
        (["--prune", "1.5", "--output", "x"], "--prune is 1.5; give a share between 0 and 1"),
        (["--prune", "0.5"], "name a new folder for the pruned model with --output"),
        (["--int8", "--output", "x"], "belong together"),
        (["--int8", "--checkpoint", "nowhere"], "nowhere: no checkpoint here"),
        (["--int8", "--data", "nowhere"], "nowhere"),
        (["--prune", "0.5", "--output", "launch"], "launch: is there already; give a new folder"),
    ],
)
def test_mistakes_are_one_line(run: Path, words: list[str], message: str) -> None:
    found = compress("--checkpoint", run, *words)
    assert found.returncode == MISTAKE
    assert found.stderr.startswith("error: ")
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", make_config(shared_corpus()))

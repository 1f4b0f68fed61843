"""Efficiency: the passes are those that are named, and the numbers follow from what was timed."""

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evals.__main__ as program
from evals import efficiency, efficiency_passes
from evals.bench._memory import peak_above
from evals.efficiency_passes import Pass, measure, passes, text_batch, token_loss
from evals.load import Layout, Subject, load_subject
from neomoba_dist.config.schema import FinetuneConfig
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.errors import MISTAKE
from neomoba_dist.model.attention.kernels.full import full_attention
from neomoba_dist.parallel.context_split import local_share
from tests.evals.runs import make_config, write_run
from tests.ranks import run_ranks

LENGTHS = (64, 96)
OPTIONS = ["--lengths", "64,96", "--repetitions", "2"]


def evaluate(run: Path, output: Path, *more: object) -> int:
    words = ["run", "--tasks", "efficiency", "--checkpoint", run, "--output", output, *OPTIONS, *more]
    return program.main([str(word) for word in words])


def read(output: Path) -> Any:
    return json.loads((output / "efficiency.json").read_text())


@pytest.fixture(scope="module")
def folders(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("efficiency")
    for kind, run in runs.items():
        assert evaluate(run, folder / kind) == 0
    return {kind: folder / kind for kind in runs}


@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_files(folders: dict[str, Path], kind: str) -> None:
    result = read(folders[kind])
    places = [(row["part"], row["pass"], row["length"]) for row in result["rows"]]
    timed = [(part, name) for part in ("attention", "model") for name in ("forward", "forward + backward")]
    timed += [("decoding", "one token")] * (kind == "clm")
    assert places == [(*place, length) for length in LENGTHS for place in timed]
    for row in result["rows"]:
        repetitions = efficiency_passes.NEW_TOKENS if row["part"] == "decoding" else 2
        assert [len(row["seconds"][name]) for name in ("moba", "full")] == [repetitions] * 2
        assert all(seconds > 0 for times in row["seconds"].values() for seconds in times)

    lines = list(csv.DictReader((folders[kind] / "efficiency.csv").open()))
    assert len(lines) == 2 * len(places)
    own, full = lines[-2:]
    assert (own["impl"], full["impl"], own["length"]) == ("moba", "full", "96")
    assert (own["block"], own["topk"], float(own["sparsity"])) == ("8", "2", pytest.approx(1 - 16 / 96, abs=1e-4))
    assert float(own["speedup_vs_full"]) == pytest.approx(float(full["ms_min"]) / float(own["ms_min"]))
    tokens = 1 if kind == "clm" else 96
    assert float(own["tokens_per_s"]) == pytest.approx(1e3 * tokens / float(own["ms_min"]))
    assert float(own["ms_median"]) >= float(own["ms_min"])

    (results,) = folders[kind].glob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    entry = scores["efficiency_model_forward_backward_moba_96"]
    times = next(row["seconds"] for row in result["rows"][::-1] if row["pass"] == "forward + backward")
    assert entry["seconds,none"] == min(times["moba"])
    assert entry["speedup,none"] == min(times["full"]) / min(times["moba"])

    figure = efficiency.figure(result)
    panels = figure.axes
    words = {"MoBA", "full attention", "forward + backward", "speed-up in theory"}
    words.add("forward or one token" if kind == "clm" else "forward")
    assert {text.get_text() for text in figure.legends[0].get_texts()} == words
    assert len(panels) == 3 * (3 if kind == "clm" else 2)
    first = [row for row in result["rows"] if (row["part"], row["pass"]) == ("attention", "forward")]
    drawn = next(line for line in panels[0].lines if line.get_label() == "MoBA, forward")
    assert np.allclose(drawn.get_ydata(), [1e3 * min(row["seconds"]["moba"]) for row in first])
    assert "blocks of 8 tokens" in efficiency.caption(result)


def test_theory_counts_pairs(subjects: dict[str, Subject]) -> None:
    config, n, size = subjects["clm"].config.model, 96, 8
    blocks = n // size
    own = blocks * size * (size + 1) / 2 + (blocks - 1) * size * size  # top_k 2: one block besides the own one
    gate = size * blocks * (blocks - 1) / 2 / 2
    full = n * (n + 1) / 2
    assert efficiency.theory(config, "attention", n, "moba", 0.2) == pytest.approx(full / (own + gate), rel=1e-3)
    model = efficiency.theory(config, "model", n, "moba", 0.2)
    decoding = efficiency.theory(config, "decoding", n, "moba", 0.2)
    assert model is not None
    assert decoding is not None
    assert 1 < model < full / own  # what is not attention is the same
    assert decoding > model
    assert efficiency.theory(config, "model", n, "full", 0.2) is None


@pytest.mark.parametrize("kind", ["clm", "mlm"])
def test_the_loss_is_that_of_the_model(subjects: dict[str, Subject], kind: str) -> None:
    subject = subjects[kind]
    batch = text_batch(subject, 96)
    found = {}
    for attention in ("moba", "full"):
        subject.model.use(attention)
        with torch.no_grad():
            found[attention] = token_loss(subject.model.stage, batch)
        torch.testing.assert_close(found[attention], -subject.model.log_likelihoods(batch)[0].sum())
    assert abs(found["moba"] - found["full"]) > 1e-3
    counted = (batch.labels != -100).sum().item()
    assert counted == (95 if kind == "clm" else 20)


def test_passes_run_the_attention_that_is_named(subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    subject, outputs = subjects["clm"], []
    monkeypatch.setattr(efficiency_passes, "_forward", lambda work: outputs.append(work()))
    first = next(passes(subject, 96, 1))
    for kind in ("moba", "full"):
        subject.model.use(kind)
        first.works[kind]()
    _, inputs = efficiency_passes.layer_core(subject.model.stage, text_batch(subject, 96))
    expected = full_attention(*inputs, causal=True, cu_seqlens=None)
    torch.testing.assert_close(outputs[1], expected)
    assert (outputs[0] - expected).abs().max() > 1e-3


def test_what_does_not_fit_is_said(subjects: dict[str, Subject], folders: dict[str, Path]) -> None:
    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    works: dict[str, Callable[[], None]] = {"moba": lambda: None, "full": too_much}
    found = measure(subjects["clm"], Pass("model", "forward", works, 2))
    assert found["seconds"].keys() == found["bytes"].keys() == {"moba"}
    result = read(folders["mlm"])
    del result["rows"][-1]["seconds"]["full"]
    *_, last = efficiency.table(result)
    assert last[3] == "does not fit"
    assert last[-2] == "-"
    assert efficiency.figure(result).axes

    def broken() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        measure(subjects["clm"], Pass("model", "forward", {"moba": broken}, 1))


def test_peak_is_what_was_held_at_once() -> None:
    size = 64 << 20

    def work() -> None:
        for _ in range(3):
            np.ones(size, dtype=np.uint8)

    work()
    assert peak_above(work, "cpu") == pytest.approx(size, rel=0.05)  # Linux adds pages up in batches


def loss_on_rank(run: Path, layout: dict[str, int]) -> float:
    subject = load_subject(run, None, "cpu", layout=Layout(**layout))
    share = local_share(text_batch(subject, 96), subject.model.mesh, subject.config.model)
    with torch.no_grad():
        return float(token_loss(subject.model.stage, share))


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_the_loss_on_two_ranks(runs: dict[str, Path], axis: str) -> None:
    losses = run_ranks(2, loss_on_rank, runs["clm"], {axis: 2})
    whole = sum(losses) if axis == "cp" else losses[0]
    assert whole == pytest.approx(loss_on_rank(runs["clm"], {}), rel=1e-5)


SHORT = ["--lengths", 64, "--repetitions", 1]


def test_four_ranks(runs: dict[str, Path], tmp_path: Path) -> None:
    assert run_ranks(4, evaluate, runs["clm"], tmp_path, "--tp", 2, "--cp", 2, *SHORT) == [0] * 4
    result = read(tmp_path)
    assert len(result["rows"]) == 5
    assert (result["layout"]["cp"], result["clock"]) == (2, "wall time")
    assert "tp 2 x cp 2, the slowest rank" in efficiency.caption(result)


def test_experts_on_two_ranks(corpus: Corpus, tmp_path: Path) -> None:
    config = make_config(corpus.folder, objective="clm", num_experts=4, moe_intermediate_size=16)
    run = write_run(tmp_path / "run", config)
    assert run_ranks(2, evaluate, run, tmp_path, "--ep", 2, *SHORT) == [0, 0]
    assert len(read(tmp_path)["rows"]) == 5


@pytest.mark.parametrize("attention", ["full", "sliding_window"])
def test_other_attention(corpus: Corpus, attention: str, tmp_path: Path) -> None:
    config = make_config(corpus.folder, objective="clm", attention=attention)
    assert evaluate(write_run(tmp_path / "run", config), tmp_path, *SHORT) == 0
    result = read(tmp_path)
    assert result["attentions"] == (["full"] if attention == "full" else ["sliding_window", "full"])
    assert [len(row["seconds"]) for row in result["rows"] if row["part"] == "decoding"] == [1]
    assert ("in theory" in efficiency.table(result)[0]) == (attention != "full")
    assert efficiency.figure(result).axes


def refused(run: Path, output: Path, *more: object) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return evaluate(run, output, *more), said.getvalue()


def test_refusals(runs: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    (code, said), _ = run_ranks(2, refused, runs["clm"], tmp_path, "--pp", 2)
    assert code == MISTAKE
    assert "--pp 2: efficiency times passes of whole models; give --pp 1" in said
    config = dataclasses.replace(make_config(corpus.folder), finetune=FinetuneConfig(tasks="sst2", pooling="mean"))
    corpus.tokenizer().save(tmp_path / "run")
    code, said = refused(write_run(tmp_path / "run", config), tmp_path)
    assert code == MISTAKE
    assert "is fine-tuned on whole texts" in said
    assert said.count("\n") == 1

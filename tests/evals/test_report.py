"""The report: its numbers, its figures, and that it stands alone."""

import argparse
import base64
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from evals import needle, position_loss
from evals.ablation import FORMAT
from evals.cli import EvalError
from evals.load import Subject
from evals.plots import MOST_POINTS, needle_figure, position_loss_figure, thinned
from evals.report import distinct, duration, layout, write_report
from evals.results import header, read_results, write_result
from evals.runs import read_run
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.model.init import views_of
from neomoba_dist.train.metrics import METRICS_FILE, read_metrics
from tests.evals.runs import TOKENS_PER_UPDATE, make_config, write_run

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Counts tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def phases(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two phases; the second changes to full attention after 16 of its 20 steps."""
    folder = tmp_path_factory.mktemp("phases")
    first = write_run(folder / "one", make_config(corpus.folder, name="first & <b>"), switch_after=0)
    return [first, write_run(folder / "two", make_config(corpus.folder, name="second"), switch_after=16)]


@pytest.fixture(scope="module")
def results(subjects: dict[str, Subject], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a result of each task."""
    folder = tmp_path_factory.mktemp("results")
    subject = subjects["mlm"]
    given = {"mask_stride": 8, "trailing": None, "border": None, "limit": None}
    args = argparse.Namespace(length=128, rows=4, buckets=4, rule="rows", **given)
    measured = position_loss.run(subject, position_loss.prepare(subject, args))
    write_result(folder, {**header(subject, "position_loss", "python -m evals run --tasks A", 1.0, None), **measured})
    args = argparse.Namespace(lengths=[64, 96], depths=[0.0, 100.0], samples=2, seed=0, digits=5, needles=1, limit=None)
    measured = needle.run(subject, needle.prepare(subject, args))
    write_result(folder, {**header(subject, "needle", "python -m evals run --tasks B", 1.0, None), **measured})
    return folder


def report(
    output: Path, runs: list[Path], evals: list[Path], ablations: Sequence[Path] = ()
) -> tuple[str, Checker, list[str]]:
    """The report's HTML, its tags, and its figures as SVG."""
    assert write_report(argparse.Namespace(run=runs, eval=evals, ablation=ablations, output=output)) == 0
    html = output.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    prefix = "data:image/svg+xml;base64,"
    assert all(link.startswith(prefix) for link in checker.links)
    return html, checker, [base64.b64decode(link.removeprefix(prefix)).decode() for link in checker.links]


def test_report_with_results(tmp_path: Path, phases: list[Path], results: Path) -> None:
    html, checker, figures = report(tmp_path / "new" / "report.html", phases, [results])
    labels = ["loss, nats", "gradient norm", "learning rate", "tokens per second", "gradient norm of a layer"]
    labels += ["activations", "position in the document", "depth of"]
    for label, figure in zip(labels, figures, strict=True):
        assert label in figure
        root = ET.fromstring(figure)
        assert root.tag.endswith("svg")
        assert "prefers-color-scheme" in figure
        assert not re.search(r"https?://(?!www\.w3\.org/)", figure)  # name spaces only
    assert "first &amp; &lt;b&gt; · 96" in figures[0]
    assert "second · 96" in figures[0]
    assert "full attention" in figures[0]
    assert "script" not in checker.seen
    assert "http" not in html
    assert checker.seen.count("table") == 3
    assert "python -m evals run --tasks A" in html
    assert "python -m evals run --tasks B" in html
    assert "Not evaluated" not in html
    assert "first &amp; &lt;b&gt;" in html


def test_report_numbers(tmp_path: Path, phases: list[Path], corpus: Corpus) -> None:
    html, _, figures = report(tmp_path / "report.html", phases, [])
    rows = dict(re.findall(r'<th scope="row">([^<]*)</th>(.*?)</tr>', html))
    cells = {label: re.findall(r"<td>(.*?)</td>", row) for label, row in rows.items()}
    run = read_run(phases[0])
    assert cells["steps"] == ["20", "20"]
    assert cells["tokens"] == [f"{20 * TOKENS_PER_UPDATE:,}"] * 2
    assert cells["steps with full attention"] == ["100 %", "20 %"]
    assert cells["training loss, final"] == ["5.450"] * 2  # mean of steps 11 to 20
    assert cells["validation loss, last"] == ["5.100"] * 2
    assert cells["unigram entropy"] == [f"{corpus.unigram_entropy:.3f}"] * 2
    assert cells["tokens per second, median"] == ["1,010"] * 2
    assert cells["wall time of the steps"] == ["10 s"] * 2
    assert cells["layout"] == ["dp 4, ZeRO-1"] * 2
    assert cells["parameters"] == [f"{run.parameters:,}"] * 2
    assert len(figures) == 6
    assert "Not evaluated" in html
    assert f"python -m evals run --tasks position_loss,needle --checkpoint {phases[1]} --output EVAL" in html
    assert "--num_gpus 4 launch/pretrain.py" in html


def test_parameters_are_those_of_the_model(phases: list[Path], subjects: dict[str, Subject]) -> None:
    model = subjects["mlm"].model.stage
    assert read_run(phases[0]).parameters == sum(math.prod(s.shape) for p in model.parameters() for s, _ in views_of(p))


def test_results_of_several_checkpoints_are_told_apart(tmp_path: Path, phases: list[Path], results: Path) -> None:
    html, _, figures = report(tmp_path / "report.html", phases, [results, results])
    assert len(figures) == 10
    assert html.count("Loss by position: phase1, step 20") == 2
    named = [("base, step 5", {"checkpoint": f"runs/{run}/checkpoints/step_5"}) for run in ("a", "b", "b")]
    assert list(distinct(named)) == ["base, step 5, a", "base, step 5, b", "base, step 5, b (3)"]
    assert list(distinct(named[:1])) == ["base, step 5"]
    html, _, figures = report(tmp_path / "alone.html", [], [results])
    assert "<h1>Evaluation report</h1>" in html
    assert len(figures) == 2
    assert "PARTIAL" not in html
    with pytest.raises(EvalError, match="nothing to show"):
        write_report(argparse.Namespace(run=[], eval=[], ablation=[], output=tmp_path / "none.html"))


def test_series_and_switch(phases: list[Path]) -> None:
    first, second = (read_run(folder) for folder in phases)
    assert (first.switch, second.switch) == (None, 16 * TOKENS_PER_UPDATE)
    tokens, loss = second.series("loss", 1000)
    assert len(tokens) == 19  # the step without a finite loss is left out
    assert tokens[0] == 1000 + TOKENS_PER_UPDATE
    assert loss[0] == pytest.approx(6.9)
    tokens, _ = second.series("validation_loss", 0)
    assert tokens.tolist() == [10 * TOKENS_PER_UPDATE, 20 * TOKENS_PER_UPDATE]


def test_long_curves_are_averaged_in_groups() -> None:
    x = np.arange(2_500, dtype=np.float64)
    thin_x, thin_y = thinned(x, 2 * x)
    assert len(thin_x) <= MOST_POINTS
    assert thin_x[0] == pytest.approx(2.0)  # mean of 0 .. 4
    assert np.allclose(thin_y, 2 * thin_x)
    assert thin_x[-1] == pytest.approx(x[2_495:].mean())
    assert thinned(x[:600], x[:600])[0] is not None
    assert len(thinned(x[:600], x[:600])[0]) == 600


def test_figures_show_the_numbers(results: Path) -> None:
    found = read_results(results)
    curve = found["position_loss"]["curves"]["moba"]
    axes = position_loss_figure(found["position_loss"]).axes[0]
    assert axes.lines[0].get_ydata().tolist() == [bucket["loss"] for bucket in curve["buckets"]]
    assert axes.lines[0].get_xdata().tolist() == [16.0, 48.0, 80.0, 112.0]
    _, below = position_loss_figure(found["position_loss"]).axes[1].lines
    assert below.get_ydata().tolist() == [bucket["loss"] for bucket in found["position_loss"]["difference"]]
    keys, *panels = needle_figure(found["needle"]).axes[:3]
    *lines, chance = keys.lines
    for line, curve in zip(lines, found["needle"]["curves"].values(), strict=True):
        assert line.get_ydata().tolist() == [100 * entry["exact"] for entry in curve["by_length"]]
    assert chance.get_ydata() == [pytest.approx(0.001)] * 2, "five digits"
    for panel, name in zip(panels, ("moba", "full"), strict=True):
        shown = [text.get_text() for text in panel.texts]
        assert shown == [f"{100 * cell['accuracy']:.0f}" for cell in found["needle"]["curves"][name]["cells"]]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1:01 min"), (3599.6, "1:00:00 h"), (36_061, "10:01:01 h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_layout_of_one_rank(phases: list[Path]) -> None:
    run = read_run(phases[0])
    assert layout(type(run)(run.folder, run.config, run.steps, None, 1, None)) == "one rank, ZeRO-1"


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "needle.json").write_text('{"format": "something else"}')
    with pytest.raises(EvalError, match=r"needle\.json: not a result of neomoba-eval"):
        read_results(tmp_path)
    (tmp_path / "needle.json").write_text('{"format"')
    with pytest.raises(EvalError, match="run the task again"):
        read_results(tmp_path)


def test_report_on_an_ablation(tmp_path: Path) -> None:
    arms = {"full <b>": [{"loss": 2.0, "hit": 0.5}, {"loss": 4.0, "hit": 0.7}], "MoBA": [{"loss": 3.0}, {"loss": 3.0}]}
    curve = {"tokens": [10.0, 20.0], "validation_loss": [[5.0, 4.0], [5.5, 4.5]]}
    metrics = [{"label": "loss, nats", "key": "loss", "form": ".2f", "chance": None}]
    metrics.append({"label": "keys found", "key": "hit", "form": ".0%", "chance": 0.1})
    result = {"format": FORMAT, "grid": "small", "size": "tiny", "question": "Which?", "seeds": [1, 2]}
    result |= {"command": ["ablation", "small"], "arms": arms, "metrics": metrics, "curves": dict.fromkeys(arms, curve)}
    (tmp_path / "small.json").write_text(json.dumps(result))
    html, checker, figures = report(tmp_path / "report.html", [], [], [tmp_path])
    assert "<h2>Ablation: small, tiny</h2>" in html
    assert "full &lt;b&gt;</th><td>3.00 ± 1.41</td><td>60% ± 14%</td>" in html
    assert "a dot for each of 2 seeds" in html
    assert "python -m evals ablation small" in html
    assert checker.seen.count("table") == 1
    assert len(figures) == 1
    assert "keys found" in figures[0]
    with pytest.raises(EvalError, match="no result of an ablation here"):
        report(tmp_path / "none.html", [], [], [tmp_path / "nowhere"])


def test_report_on_experts_and_layers(tmp_path: Path, corpus: Corpus, phases: list[Path]) -> None:
    config = make_config(corpus.folder, name="mixed", num_experts=4, first_k_dense_replace=1)
    mixed = write_run(tmp_path / "mixed", config)
    dense, _, figures = report(tmp_path / "dense.html", phases, [])
    html, _, more = report(tmp_path / "mixed.html", [phases[0], mixed], [])
    assert "<h2>Layers</h2>" in dense
    assert "<h2>Experts</h2>" not in dense
    # loads of the last step: 10, 30, 50, 70
    assert "of the least even layer is 0.75; over the last 10 steps together it is 0.70." in html
    assert "6 choices were dropped, 4 went to another expert" in html
    assert len(more) == len(figures) + 3
    run = read_run(mixed)
    tokens, values = run.layer_series("kl_to_uniform", 1000)
    assert values.shape == (20, 2)
    assert tokens[0] == 1000 + TOKENS_PER_UPDATE
    assert read_run(phases[0]).layer_series("kl_to_uniform", 0)[1].shape == (0, 0)


def test_report_on_pairs(tmp_path: Path, phases: list[Path]) -> None:
    """Losses are those of tokens, as the entropy is; those of pairs get figures of their own."""
    paired = tmp_path / "paired"
    shutil.copytree(phases[0], paired)
    entries = read_metrics(paired / METRICS_FILE)
    for number, entry in enumerate(entries):
        pairs = {"next_sentence_loss": 0.5, "next_sentence_accuracy": 0.75} if number % 2 else {}
        entry |= {"token_loss": entry["loss"], **pairs, "loss": entry["loss"] + 0.5}
    (paired / METRICS_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    _, _, figures = report(tmp_path / "plain.html", [phases[0]], [])
    _, _, more = report(tmp_path / "paired.html", [paired], [])
    assert len(more) == len(figures) + 2
    assert read_run(paired).final_loss == read_run(phases[0]).final_loss
    assert read_run(paired).series("next_sentence_accuracy", 0)[1].tolist() == [0.75] * (len(entries) // 2)

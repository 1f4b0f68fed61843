"""RULER through the whole pipeline: models whose scores are known, files that RULER reads, all layouts alike."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import evals.__main__ as program
from evals.model import ShardedModel
from evals.ruler.prepare import read_samples
from evals.ruler.score import score_folder, score_set, shares, summarize
from evals.ruler.sets import RULER_TASKS
from evals.ruler.task import restored
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.generate.stage import GenerationError
from tests.evals.ruler.data import write_data
from tests.evals.runs import half_done, journal_lines
from tests.ranks import run_ranks

LENGTH = 4608
# of two samples the first is answered wholly, of the second one reference only
HALF = {"niah_multivalue": 62.5, "niah_multiquery": 62.5, "vt": 60.0, "cwe": 55.0, "fwe": 66.67}


@pytest.fixture(scope="module")
def prepared(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ruler")
    data = write_data(folder / "data")
    words = ["prepare", "ruler", "--tokenizer", corpus.folder, "--output", folder / "prepared", "--data-dir", data]
    assert program.main([*map(str, words), "--lengths", str(LENGTH), "--samples", "2"]) == 0
    return folder / "prepared"


def run(checkpoint: Path, output: Path, *more: object, tasks: str = "ruler") -> int:
    words = ["run", "--tasks", tasks, "--checkpoint", checkpoint, "--output", output, *more]
    return program.main([str(word) for word in words])


def all_samples(prepared: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for task in RULER_TASKS:
        for sample in read_samples(prepared / str(LENGTH) / task / "validation.jsonl"):
            yield task, sample


def answer_with(
    monkeypatch: pytest.MonkeyPatch, corpus: Corpus, prepared: Path, answer: Callable[[dict[str, Any]], str]
) -> None:
    """Let models answer a prompt with what `answer` says of its sample, cut to the tokens that they may make."""
    tokenizer = corpus.tokenizer()
    head, _ = tokenizer.document_borders
    known = {}
    for _, sample in all_samples(prepared):
        known[tuple(head + tokenizer.encode(sample["input"] + sample["answer_prefix"]))] = answer(sample)

    def generate(_: Any, prompts: Sequence[list[int]], most: int, stop: int | None) -> list[list[int]]:
        assert stop == tokenizer.special.sep
        return [tokenizer.encode(known[tuple(prompt)])[:most] for prompt in prompts]

    monkeypatch.setattr(ShardedModel, "generate", generate)


def half(sample: dict[str, Any]) -> str:
    return " ".join(sample["outputs"] if sample["index"] == 0 else sample["outputs"][:1])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda sample: ", ".join(sample["outputs"]), dict.fromkeys(RULER_TASKS, 100.0)),
        (lambda _: "", dict.fromkeys(RULER_TASKS, 0.0)),
        (half, {**dict.fromkeys(RULER_TASKS, 100.0), **HALF}),
        (lambda sample: half(sample) if sample["index"] == 0 else "", dict.fromkeys(RULER_TASKS, 50.0)),
    ],
    ids=["perfect", "empty", "one reference", "every other sample"],
)
def test_scores_of_known_answers(
    runs: dict[str, Path],
    corpus: Corpus,
    prepared: Path,
    answer: Callable[[dict[str, Any]], str],
    expected: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer_with(monkeypatch, corpus, prepared, answer)
    assert run(runs["clm"], tmp_path, "--prepared", prepared) == 0
    result = json.loads((tmp_path / "ruler.json").read_text())
    assert {entry["task"]: entry["score"] for entry in result["scores"]} == expected
    average = round(sum(expected.values()) / 13, 2)
    assert result["averages"] == [{"length": LENGTH, "average": average}]
    assert result["effective_length"] == (LENGTH if average >= 85.6 else None)
    assert "average of 13" in capsys.readouterr().out
    summary = list(csv.reader((tmp_path / "ruler" / str(LENGTH) / "summary.csv").open()))
    assert summary[1:3] == [["Tasks", *RULER_TASKS], ["Score", *(str(expected[task]) for task in RULER_TASKS)]]

    assert program.main(["score", str(tmp_path)]) == 0
    assert f"{average:.1f}" in capsys.readouterr().out.splitlines()[-2]


def test_files_of_a_run(
    runs: dict[str, Path], corpus: Corpus, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, corpus, prepared, half)
    more = ["--prepared", prepared, "--limit", "1"]
    assert run(runs["clm"], tmp_path, *more, tasks="ruler:vt,ruler:qa_1") == 0
    lines = list(read_samples(tmp_path / "ruler" / str(LENGTH) / "vt.jsonl"))
    assert list(lines[0]) == ["index", "pred", "input", "outputs", "others", "truncation", "length"]
    (results,) = tmp_path.glob("results_*.json")
    found = json.loads(results.read_text())
    for key in ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "config"):
        assert key in found
    name = f"ruler_{LENGTH}_vt"
    assert found["results"][name] == {"alias": name, "string_match,none": 1.0, "string_match_stderr,none": None}
    assert found["n-samples"][name] == {"original": 1, "effective": 1}
    assert found["neomoba"]["ruler"]["layout"] == {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "dp": 1}
    assert found["neomoba"]["ruler"]["partial"] == 1
    (samples,) = tmp_path.glob("samples_ruler_*.jsonl")
    entries = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [entry["string_match"] for entry in entries] == [1.0, 1.0]
    assert entries[0]["filtered_resps"] == [lines[0]["pred"]]


def test_a_failing_sample_does_not_lose_the_others(
    runs: dict[str, Path], corpus: Corpus, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, corpus, prepared, lambda sample: " ".join(sample["outputs"]))
    works = ShardedModel.generate
    (_, bad), *_ = all_samples(prepared)
    prompt = corpus.tokenizer().encode(bad["input"])

    def generate(model: ShardedModel, prompts: Sequence[list[int]], most: int, stop: int | None) -> list[list[int]]:
        if any(ids[1 : len(prompt) + 1] == prompt for ids in prompts):
            raise GenerationError("this one is broken")
        return works(model, prompts, most, stop)

    monkeypatch.setattr(ShardedModel, "generate", generate)
    more = ["--prepared", prepared, "--batch-tokens", 3 * LENGTH]
    assert run(runs["clm"], tmp_path, *more, tasks="ruler:niah_single_1") == 0
    (score,) = json.loads((tmp_path / "ruler.json").read_text())["scores"]
    assert (score["score"], score["failed"], score["empty"], score["samples"]) == (50.0, 1, 1, 2)
    first, second = read_samples(tmp_path / "ruler" / str(LENGTH) / "niah_single_1.jsonl")
    assert (first["pred"], first["others"]) == ("", {"error": "this one is broken"})
    assert second["outputs"][0] in second["pred"]


@pytest.fixture(scope="module")
def small(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short sets, for models that really answer."""
    folder = tmp_path_factory.mktemp("small")
    words = ["prepare", "ruler", "--tokenizer", corpus.folder, "--output", folder, "--lengths", "600"]
    assert program.main([*map(str, words), "--samples", "3", "--only", "vt,fwe"]) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoints(runs: dict[str, Path], moe_run: Path) -> dict[str, Path]:
    return {**runs, "moe": moe_run}


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path], small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in ("clm", "moe"):
        assert run(checkpoints[kind], folder / kind, "--prepared", small, tasks="ruler:vt,ruler:fwe") == 0
        assert any(predictions(folder / kind))
    return {kind: folder / kind for kind in ("clm", "moe")}


def predictions(output: Path) -> list[str]:
    files = [output / "ruler" / "600" / f"{task}.jsonl" for task in ("vt", "fwe")]
    return [line["pred"] for file in files for line in read_samples(file)]


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [
        ("clm", 2, ["--tp", 2]),
        ("clm", 2, ["--pp", 2]),
        ("clm", 2, ["--cp", 2]),
        ("clm", 2, ["--batch-tokens", 1300]),
        ("clm", 4, ["--tp", 2, "--cp", 2]),
        ("moe", 2, ["--ep", 2]),
    ],
)
def test_layouts_answer_alike(
    checkpoints: dict[str, Path],
    small: Path,
    alone: dict[str, Path],
    kind: str,
    ranks: int,
    layout: list[object],
    tmp_path: Path,
) -> None:
    def on_rank() -> int:
        return run(checkpoints[kind], tmp_path, "--prepared", small, *layout, tasks="ruler:vt,ruler:fwe")

    assert run_ranks(ranks, on_rank) == [0] * ranks
    assert predictions(tmp_path) == predictions(alone[kind])


def test_goes_on_at_another_world_size(
    checkpoints: dict[str, Path], small: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    left = half_done(alone["clm"], tmp_path)
    before = journal_lines(tmp_path)

    def on_rank() -> int:
        return run(checkpoints["clm"], tmp_path, "--prepared", small, "--pp", 2, tasks="ruler:vt,ruler:fwe")

    assert run_ranks(2, on_rank) == [0, 0]
    assert journal_lines(tmp_path) == before + left
    assert predictions(tmp_path) == predictions(alone["clm"])


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("mlm", [], "masked language model; evaluate it with needle"),
        ("clm", ["--lengths", 500], "no samples of vt at 500 tokens; its lengths are 600"),
        ("clm", ["--prepared", "nowhere"], "manifest.json cannot be read"),
        ("clm", ["--tokenizer", "other"], "made for another tokenizer"),
    ],
)
def test_mistakes(
    checkpoints: dict[str, Path],
    small: Path,
    kind: str,
    more: list[object],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.corpora import make_tokenizer

    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "other", "byte_bpe", 600)
    assert run(checkpoints[kind], tmp_path / "out", "--prepared", small, *more, tasks="ruler:vt") != 0
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_changed_set_is_refused(
    checkpoints: dict[str, Path], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in small.rglob("*.json*"):
        target = tmp_path / file.relative_to(small)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    with (tmp_path / "600" / "vt" / "validation.jsonl").open("a") as file:
        file.write("\n")
    assert run(checkpoints["clm"], tmp_path / "out", "--prepared", tmp_path, tasks="ruler:vt") != 0
    assert "not the file that manifest.json names" in capsys.readouterr().err


def test_run_prepares_by_itself(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--lengths", 600, "--samples", 1]
    assert run(checkpoints["clm"], tmp_path, *more, tasks="ruler:fwe") == 0
    assert (tmp_path / "prepared" / "600" / "fwe" / "validation.jsonl").is_file()
    assert run(checkpoints["clm"], tmp_path, tasks="ruler:fwe") != 0
    assert "--lengths is missing" in capsys.readouterr().err


def test_shares_as_published() -> None:
    assert shares("all", " The Answer\x00is 12 ", ["12", "answer", "13", "x"]) == 0.5
    assert shares("part", "I do not know", ["no", "never"]) == 1.0
    assert shares("all", "a\x07b", ["a\nb"]) == 1.0
    lines = [{"pred": "1 2", "outputs": ["1", "2", "3"]}, {"pred": " \x01", "outputs": ["1", "2", "3"]}]
    assert score_set("vt", lines) == {
        "task": "vt", "score": 33.33, "standard_error": 33.33, "samples": 2, "empty": 1, "failed": 0
    }  # fmt: skip


def test_averages_and_effective_length() -> None:
    averages = [95.0, 90.0, 85.6, 80.0]
    scores = [
        {"length": length, "task": task, "score": average + change}
        for length, average in zip((4, 8, 16, 32), averages, strict=True)
        for task, change in (("vt", 1.0), ("cwe", -1.0))
    ]
    found = summarize([4, 8, 16, 32], scores)
    assert [entry["average"] for entry in found["averages"]] == averages
    assert found["effective_length"] == 16
    assert found["weighted_to_long"] == round((95 + 2 * 90 + 3 * 85.6 + 4 * 80) / 10, 2)
    assert found["weighted_to_short"] == round((4 * 95 + 3 * 90 + 2 * 85.6 + 80) / 10, 2)
    missing = summarize([4, 8, 16, 32], scores[:-1])
    assert missing["averages"][-1] == {"length": 32, "average": None}


def test_predictions_of_another_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "4096").mkdir()
    lines = [{"index": 0, "pred": "12", "input": "", "outputs": ["12"], "others": {}, "truncation": -1, "length": 9}]
    (tmp_path / "4096" / "niah_single_1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert score_folder(tmp_path)["scores"][0]["score"] == 100.0
    assert program.main(["score", str(tmp_path / "4096")]) != 0
    assert "no predictions of RULER here" in capsys.readouterr().err


def test_answers_of_tokenizers_that_add_spaces(corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer()
    text = "ab12-cd34"
    spelt = tokenizer.decode(tokenizer.encode(text))
    assert spelt != text
    assert restored(tokenizer, f"It is {spelt}.", [text]) == f"It is {text}."

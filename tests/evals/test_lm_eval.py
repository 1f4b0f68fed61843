"""lm-evaluation-harness drives our checkpoints, offline: equal to a direct computation, on every layout alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import evals.__main__ as program
from evals.lm_eval_model import before
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.generate.stage import batch_of
from tests.evals.runs import half_done, journal_lines
from tests.ranks import run_ranks

QUESTIONS = [
    {"question": "def parse(text): return", "choices": [" text", " None", " parse text"], "answer": 0},
    {"question": "import", "choices": [" os", " a module"], "answer": 1},
    {"question": "The value of the", "choices": [" argument is", " x", " default value"], "answer": 2},
]
TEXTS = [
    "def f(value): return value",
    "class Error(Exception): the base class of all errors of a parser",
    "for x in y:",
]
TASKS = "lm_eval:tiny_choice,lm_eval:tiny_text,lm_eval:tiny_answer"


def write_tasks(folder: Path) -> Path:
    """Three tasks on local data: one of each type of request."""
    folder.mkdir(parents=True)
    texts = [{"text": text, "target": "value"} for text in TEXTS]
    for name, entries in (("choice", QUESTIONS), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def task(name: str, data: str, **more: Any) -> None:
        files = {"data_files": {"test": str(folder / f"{data}.jsonl")}, "cache_dir": str(folder / "cache")}
        settings = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **more}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))

    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    task(
        "tiny_choice", "choice", output_type="multiple_choice", doc_to_text="{{question}}", doc_to_target="{{answer}}",
        doc_to_choice="{{choices}}", target_delimiter="", metric_list=accuracy,
    )  # fmt: skip
    bits = [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]
    task(
        "tiny_text", "text", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=bits,
    )  # fmt: skip
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    settings = {"until": ["\n\n", "e"], "max_gen_toks": 9, "do_sample": False}
    task(
        "tiny_answer", "text", output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{target}}",
        generation_kwargs=settings, metric_list=exact,
    )  # fmt: skip
    task(
        "tiny_sampled", "text", output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{target}}",
        generation_kwargs={**settings, "do_sample": True, "temperature": 0.7}, metric_list=exact,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("lm_eval") / "tasks")


def evaluate(run: Path, output: Path, tasks: Path, *more: object, names: str = TASKS) -> int:
    words = ["run", "--tasks", names, "--checkpoint", run, "--output", output, "--include-path", tasks, *more]
    return program.main([str(word) for word in words])


def samples(output: Path) -> dict[str, list[dict[str, Any]]]:
    (file,) = output.glob("samples_lm_eval_*.jsonl")
    found: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["task"], []).append(entry)
    return {name: sorted(entries, key=lambda entry: entry["doc_id"]) for name, entries in found.items()}


@pytest.fixture(scope="module")
def alone(
    runs: dict[str, Path], moe_run: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The results of one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, run in (("clm", runs["clm"]), ("moe", moe_run)):
        assert evaluate(run, folder / name, tasks) == 0
    return {name: folder / name for name in ("clm", "moe")}


def test_equals_a_direct_computation(runs: dict[str, Path], alone: dict[str, Path], corpus: Corpus) -> None:
    tokenizer = corpus.tokenizer()
    head, _ = tokenizer.document_borders
    model, _ = load_model(runs["clm"])
    found = samples(alone["clm"])

    def log_p(context: list[int], text: list[int]) -> tuple[float, bool]:
        with torch.no_grad():
            logits = model.logits(model.hidden_states(batch_of([context + text], "cpu"))).double()
        rows = logits[len(context) - 1 : -1].log_softmax(-1)
        return rows[range(len(text)), text].sum().item(), rows.argmax(-1).tolist() == text

    right = []
    for sample, question in zip(found["tiny_choice"], QUESTIONS, strict=True):
        context = head + tokenizer.encode(question["question"])
        choices = [tokenizer.encode(question["question"] + choice) for choice in question["choices"]]
        expected = [log_p(context, (head + ids)[len(context) :]) for ids in choices]
        for (nats, greedy), (expected_nats, expected_greedy) in zip(sample["filtered_resps"], expected, strict=True):
            assert nats == pytest.approx(expected_nats, abs=1e-4)
            assert greedy == expected_greedy
        right.append(max(range(len(expected)), key=lambda i: expected[i][0]) == question["answer"])
    result = json.loads((alone["clm"] / "lm_eval.json").read_text())
    assert result["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / 3)

    nats = [log_p(head, tokenizer.encode(text))[0] for text in TEXTS]
    size = sum(len(text.encode()) for text in TEXTS)
    bits = result["results"]["tiny_text"]["bits_per_byte,none"]
    assert bits == pytest.approx(-sum(nats) / size / 0.6931471805599453, rel=1e-5)

    for sample in found["tiny_answer"]:
        text = sample["resps"][0][0]
        assert "e" not in text
    assert {name: entry["effective"] for name, entry in result["n-samples"].items()} == dict.fromkeys(
        ("tiny_choice", "tiny_text", "tiny_answer"), 3
    )


def test_files(alone: dict[str, Path]) -> None:
    (file,) = alone["clm"].glob("results_*.json")
    found = json.loads(file.read_text())
    own = json.loads((alone["clm"] / "lm_eval.json").read_text())["results"]
    assert found["results"]["tiny_choice"]["acc,none"] == own["tiny_choice"]["acc,none"]
    assert found["n-samples"]["tiny_choice"] == {"original": 3, "effective": 3}
    assert (alone["clm"] / "lm_eval.png").stat().st_size > 1000
    assert "tiny_answer,exact_match,none" in (alone["clm"] / "lm_eval.csv").read_text()


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [
        ("clm", 2, ["--tp", 2]),
        ("clm", 2, ["--pp", 2]),
        ("clm", 2, ["--cp", 2]),
        ("clm", 2, ["--batch-tokens", 1]),
        ("clm", 4, ["--tp", 2, "--cp", 2]),
        ("moe", 2, ["--ep", 2]),
    ],
)
def test_layouts_agree(
    runs: dict[str, Path],
    moe_run: Path,
    alone: dict[str, Path],
    tasks: Path,
    kind: str,
    ranks: int,
    layout: list[object],
    tmp_path: Path,
) -> None:
    run = moe_run if kind == "moe" else runs[kind]
    assert run_ranks(ranks, evaluate, run, tmp_path, tasks, *layout) == [0] * ranks
    require_same_samples(tmp_path, alone[kind])


def test_goes_on_at_another_world_size(
    runs: dict[str, Path], alone: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    left = half_done(alone["clm"], tmp_path)
    before = journal_lines(tmp_path)
    assert run_ranks(2, evaluate, runs["clm"], tmp_path, tasks, "--cp", 2) == [0, 0]
    assert journal_lines(tmp_path) == before + left
    require_same_samples(tmp_path, alone["clm"])


def require_same_samples(output: Path, one: Path) -> None:
    """The same answers, log-likelihoods within 1e-4."""
    found, expected = samples(output), samples(one)
    assert found.keys() == expected.keys()
    for name, entries in expected.items():
        for mine, alone in zip(found[name], entries, strict=True):
            for answer, other in zip(mine["filtered_resps"], alone["filtered_resps"], strict=True):
                if name == "tiny_answer":
                    assert answer == other
                else:
                    assert answer == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        ("clm", "lm_eval:no_such_thing", "--tasks lm_eval:no_such_thing: lm-eval has no such task"),
        ("clm", "lm_eval", "name tasks of lm-evaluation-harness"),
        ("mlm", "lm_eval:tiny_text", "masked language model"),
        ("clm", "lm_eval:tiny_sampled", "samples its answers; only greedy tasks can be run"),
    ],
)
def test_mistakes(
    runs: dict[str, Path],
    tasks: Path,
    kind: str,
    names: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lm_eval.tasks import TaskManager

    # lm-eval's own 14,000 tasks take long to read
    works = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **given: works(self, **{**given, "include_defaults": False})
    )
    assert evaluate(runs[kind], tmp_path, tasks, names=names) != 0
    assert said in capsys.readouterr().err


def test_limit_marks_the_result(runs: dict[str, Path], tasks: Path, tmp_path: Path, capsys: Any) -> None:
    assert evaluate(runs["clm"], tmp_path, tasks, "--limit", 2, names="lm_eval:tiny_choice") == 0
    assert "PARTIAL: --limit 2" in capsys.readouterr().out
    result = json.loads((tmp_path / "lm_eval.json").read_text())
    assert result["partial"] == 2
    assert result["n-samples"]["tiny_choice"]["effective"] == 2


def test_answers_end_before_the_first_stop() -> None:
    assert before("one. two\nthree", ["\n", ". "]) == "one"
    assert before("one", ["\n", ""]) == "one"

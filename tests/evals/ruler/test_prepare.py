"""Prepared samples: full, never too long, right, independent of each other, made once."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import evals.__main__ as program
from evals.ruler.fit import TokenCounter
from evals.ruler.prepare import MANIFEST, read_samples
from evals.ruler.sets import RULER_TASKS
from evals.ruler.wording import KINDS, read_wording
from neomoba_dist.data.tokenizer import Tokenizer, load_tokenizer
from tests.corpora import make_tokenizer, standard_library_texts
from tests.evals.ruler.data import write_data

LENGTHS = (2048, 4096)
SAMPLES = 3
VOCABULARY = 5000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=["byte_bpe", "unigram"])
def prepared(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tokenizer]:
    """All 13 tasks at two lengths, with one tokenizer that is counted word by word and one that is not."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(folder / "tokenizer", request.param, VOCABULARY)
    assert make(folder / "prepared", tokenizer, data) == 0
    return folder / "prepared", load_tokenizer(tokenizer)


def make(folder: Path, tokenizer: Path, data: Path | None, *more: object, lengths: tuple[int, ...] = LENGTHS) -> int:
    words = ["prepare", "ruler", "--tokenizer", tokenizer, "--output", folder, "--samples", SAMPLES]
    words += ["--lengths", ",".join(map(str, lengths)), *(["--data-dir", data] if data else []), *more]
    return program.main([str(word) for word in words])


def samples(folder: Path, length: int, task: str) -> list[dict[str, Any]]:
    return list(read_samples(folder / str(length) / task / "validation.jsonl"))


@pytest.mark.parametrize("task", RULER_TASKS)
def test_every_sample_fills_its_length(prepared: tuple[Path, Tokenizer], task: str) -> None:
    folder, tokenizer = prepared
    manifest = json.loads((folder / MANIFEST).read_text())["sets"]
    head, _ = tokenizer.document_borders
    for length in LENGTHS:
        found = samples(folder, length, task)
        assert [sample["index"] for sample in found] == list(range(SAMPLES))
        for sample in found:
            tokens = len(tokenizer.encode(sample["input"] + sample["answer_prefix"]))
            assert sample["length"] == tokens + RULER_TASKS[task].generated
            assert 0.99 * length <= sample["length"] + len(head) <= length
        assert manifest[f"{length}/{task}"]["samples"] == SAMPLES
        assert len({sample["input"] for sample in found}) == SAMPLES


@pytest.mark.parametrize("task", [name for name, task in RULER_TASKS.items() if task.kind == "niah"])
def test_needles(prepared: tuple[Path, Tokenizer], task: str) -> None:
    settings, needle = RULER_TASKS[task], read_wording(None).needle
    for length in LENGTHS:
        for sample in samples(prepared[0], length, task):
            keys = re.split(r", and |, ", sample["query"])
            assert len(keys) == settings.queries
            pattern = re.escape(needle).replace(r"\{type_needle_v\}", settings.value_type)
            found = re.findall(pattern.replace(r"\{key\}", r"(\S+)").replace(r"\{value\}", r"(\S+?)"), sample["input"])
            assert len(found) >= settings.keys * settings.values
            assert [value for key in keys for k, value in found if k == key] != []
            assert sorted(value for k, value in found if k in keys) == sorted(sample["outputs"])
            assert len(sample["outputs"]) == settings.queries * settings.values
            one = settings.queries * settings.values == 1
            assert sample["answer_prefix"].endswith(" is" if one else " are")
            assert ("A special magic" in sample["input"]) == one
            assert 0 <= sample["depth"] <= 100


def test_variable_chain(prepared: tuple[Path, Tokenizer]) -> None:
    for sample in samples(prepared[0], 2048, "vt"):
        example, main = sample["input"].split("\n\n", 2)[1:], sample["input"].rsplit("\n\n", 1)[1]
        assert example
        value = sample["answer_prefix"].split("value ")[1].split(",")[0]
        given = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", main))
        reached = [name for name in given if leads_to(name, given) == value]
        assert sorted(reached) == sorted(sample["outputs"])
        assert len(set(reached)) == 5
        # an assignment stands after the one that it uses
        assert [name for name, _ in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", main)] == sample["outputs"]


def leads_to(name: str, given: dict[str, str]) -> str:
    while name in given:
        name = given[name]
    return name


def test_common_and_frequent_words(prepared: tuple[Path, Tokenizer]) -> None:
    for length, common, others in ((2048, 6, 1), (4096, 30, 3)):
        for sample in samples(prepared[0], length, "cwe"):
            text = sample["input"].rsplit("\n", 2)[1]
            counts = Counter(re.findall(r"\d+\. (\S+)", text))
            assert sorted(counts, key=counts.get)[-10:] != []
            assert {word for word, count in counts.items() if count == common} == set(sample["outputs"])
            assert {count for word, count in counts.items() if word not in sample["outputs"]} == {others}
    for sample in samples(prepared[0], 4096, "fwe"):
        text = sample["input"].rsplit("\n", 1)[0].split("coded words. ")[1]
        counts = Counter(text.split(" "))
        assert [word for word, _ in counts.most_common(4)] == ["...", *sample["outputs"]]


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions(prepared: tuple[Path, Tokenizer], task: str) -> None:
    for sample in samples(prepared[0], 4096, task):
        assert sample["outputs"][0].lower() in sample["input"].lower()
        numbers = re.findall(r"Document (\d+):", sample["input"])
        assert numbers == [str(i) for i in range(1, len(numbers) + 1)]
        assert len(numbers) > 3
        assert sample["answer_prefix"] == " Answer:"


def test_sets_do_not_depend_on_each_other(prepared: tuple[Path, Tokenizer], data: Path, tmp_path: Path) -> None:
    folder, tokenizer = prepared
    tokenizer.save(tmp_path / "tokenizer")
    assert make(tmp_path, tmp_path / "tokenizer", data, "--only", "vt,niah_single_2", lengths=(2048,)) == 0
    for task in ("vt", "niah_single_2"):
        place = f"2048/{task}/validation.jsonl"
        assert (tmp_path / place).read_bytes() == (folder / place).read_bytes()


def test_sets_are_made_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", "byte_bpe")
    only, set_file = ("--only", "vt,niah_single_2"), tmp_path / "2048" / "vt" / "validation.jsonl"

    def made(*more: object) -> int:
        assert make(tmp_path, tokenizer, data, *only, *more, lengths=(2048,)) == 0
        return int(capsys.readouterr().out.split(" of them")[0].split()[-1])

    assert made() == 2
    first = set_file.read_bytes()
    assert made() == 0
    set_file.write_bytes(first[:-5])
    assert made() == 1
    assert set_file.read_bytes() == first
    assert made("--seed", 7) == 2
    assert set_file.read_bytes() != first
    other = tmp_path / "essays"
    other.mkdir()
    (other / "a.txt").write_text("Other words. " * 20)
    assert made("--seed", 7, "--essays", other) == 1  # essays are no part of vt


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--only", "vt,wt"], "--only wt: no such task of RULER"),
        (["--essays", "nowhere"], "--essays nowhere: does not exist"),
        (["--squad", "hotpotqa.json", "--only", "qa_1"], "not in SQuAD's format"),
        (["--hotpotqa", "squad.json", "--only", "qa_2"], "not in HotpotQA's format"),
        (["--fit", "nvidia"], "--ruler-root"),
        (["--ruler-root", "nowhere"], "RULER's prompts stand there"),
        (["--lengths", "64"], "--lengths 64: too short for niah_single_1"),
    ],
)
def test_mistakes(
    data: Path,
    tmp_path: Path,
    more: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(data)
    assert make(tmp_path, make_tokenizer(tmp_path / "tokenizer", "byte_bpe"), data, *more) != 0
    err = capsys.readouterr().err.splitlines()
    assert said in err[-1]
    assert not [line for line in err[:-1] if "prepare" not in line and line.strip()]


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path, make_tokenizer(tmp_path / "tokenizer", "byte_bpe"), None, "--only", "qa_2") != 0
    assert "--hotpotqa missing; name a file in HotpotQA's format" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece"])
def test_counts_word_by_word(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, kind))
    count = TokenCounter(tokenizer)
    for text in [*standard_library_texts().values(), "", " ", "a", " a  b \n\n c\t", "e\u0301 \u00a0x\u2003y 12.5%"]:
        assert count(text) == len(tokenizer.encode(text))


def test_wording_of_both_sources(tmp_path: Path) -> None:
    wording = read_wording(None)
    assert wording.source.startswith("lm-eval ")
    for kind in KINDS:
        assert "{context}" in wording.templates[kind]
        assert wording.prefixes[kind].startswith(" ")
    scripts = tmp_path / "scripts" / "data" / "synthetic"
    scripts.mkdir(parents=True)
    tasks = {kind: {"template": f"{kind} {{context}}", "answer_prefix": " so"} for kind in KINDS}
    (scripts / "constants.py").write_text(f"TASKS = {tasks!r}\n")
    (scripts / "niah.py").write_text("import sys\nneedle = 'N {key}'\nif sys:\n    haystack = 'Hay.'\n")
    (scripts / "qa.py").write_text("DOCUMENT_PROMPT = '{i} {document}'\n")
    other = read_wording(tmp_path)
    assert (other.templates["qa"], other.prefixes["qa"]) == ("qa {context}", " so")
    assert (other.needle, other.noise, other.document) == ("N {key}", "Hay.", "{i} {document}")
    assert other.fill("qa", context="c", query="q") == ("qa c so", " so")


def test_check_data(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["check-data", str(data)]) == 0
    out = capsys.readouterr().out
    for part in ("20 questions", "12 questions", "english_words  missing", "qa_2"):
        assert re.sub(" +", " ", part) in re.sub(" +", " ", out)
    (tmp_path / "squad.json").write_text("[]")
    assert program.main(["check-data", str(tmp_path)]) != 0
    assert "not in SQuAD's format" in capsys.readouterr().err
    assert program.main(["check-data", str(tmp_path / "none")]) != 0
    assert "no such folder" in capsys.readouterr().err

"""GLUE and MTEB on checkpoints: the same numbers on every layout, equal to a direct computation, offline."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evals.__main__ as program
from evals import glue
from evals.load import load_subject
from neomoba_dist.config.schema import FinetuneConfig
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.errors import MISTAKE
from neomoba_dist.generate.stage import batch_of
from tests.evals.runs import EXPERTS, half_done, journal_lines, make_config, write_run
from tests.glue import sentence, write_mnli_and_rte, write_pairs
from tests.pairs import PAIRS
from tests.ranks import run_ranks

LAYOUTS = [
    (2, ["--tp", 2]),
    (2, ["--pp", 2]),
    (2, ["--cp", 2]),
    (2, ["--batch-tokens", 1]),
    (4, ["--tp", 2, "--cp", 2]),
]


def evaluate(checkpoint: Path, output: Path, *words: object) -> int:
    return program.main([str(word) for word in ("run", "--checkpoint", checkpoint, "--output", output, *words)])


def rows(output: Path, task: str) -> Any:
    return json.loads((output / f"{task}.json").read_text())["rows"]


def write_finetuned(corpus: Corpus, folder: Path, **model: Any) -> Path:
    """As launch/finetune.py leaves it: a run folder with the tokenizer in it; here of random weights."""
    config = make_config(corpus.folder, **model)
    data = dataclasses.replace(config.data, train=str(write_mnli_and_rte(folder / "glue")))
    settings = FinetuneConfig(tasks="mnli", pooling="mean")
    corpus.tokenizer().save(folder / "run")
    return write_run(folder / "run", dataclasses.replace(config, data=data, finetune=settings))


@pytest.fixture(scope="module")
def finetuned(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finetuned(corpus, tmp_path_factory.mktemp("finetuned"))


@pytest.fixture(scope="module")
def finetuned_experts(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finetuned(corpus, tmp_path_factory.mktemp("finetuned_experts"), **EXPERTS)


@pytest.mark.parametrize("segments", [False, True])
def test_glue_equals_a_direct_computation(segments: bool, finetuned: Path, corpus: Corpus, tmp_path: Path) -> None:
    if segments:
        finetuned = write_finetuned(corpus, tmp_path / "segments", **PAIRS)
    assert evaluate(finetuned, tmp_path, "--tasks", "glue:mnli") == 0
    subject = load_subject(finetuned, None, "cpu", needs_corpus=False)
    text, right = subject.tokenizer, {}
    for split in ("dev_matched", "dev_mismatched"):
        lines = (finetuned.parent / "glue" / "MNLI" / f"{split}.tsv").read_text().splitlines()[1:]
        for first, second, label in (line.split("\t") for line in lines):
            ids = [text.special.cls, *text.encode(first), text.special.sep, *text.encode(second), text.special.sep]
            types = [0] * (ids.index(text.special.sep) + 1)
            types += [1] * (len(ids) - len(types))
            subject.model.use("full")  # as the run was trained
            outputs = subject.model.text_outputs(batch_of([ids], "cpu", [types]))
            assert segments != outputs.equal(subject.model.text_outputs(batch_of([ids], "cpu")))
            guess = int(outputs.argmax())
            right.setdefault(split, []).append(guess == ("entailment", "neutral", "contradiction").index(label))
    result = json.loads((tmp_path / "glue.json").read_text())
    assert result["commonest"] == dict.fromkeys(right, pytest.approx(1 / 3))
    assert "with full attention" in glue.caption(result)
    assert "33.3 % (dev_matched)" in glue.caption(result)
    found = {row["metric"]: row["value"] for row in result["rows"]}
    assert found == {
        "accuracy_matched": pytest.approx(np.mean(right["dev_matched"])),
        "accuracy_mismatched": pytest.approx(np.mean(right["dev_mismatched"])),
    }


@pytest.mark.parametrize("embed", ["mean", None])
def test_outputs_do_not_depend_on_what_lies_beside_a_text(finetuned: Path, embed: str | None) -> None:
    model = load_subject(finetuned, None, "cpu", needs_corpus=False).model
    draw = random.Random(0)
    documents = [[draw.randrange(1200) for _ in range(n)] for n in (3, 70, 11)]
    together = model.text_outputs(batch_of(documents, "cpu"), embed=embed)
    alone = torch.cat([model.text_outputs(batch_of([ids], "cpu"), embed=embed) for ids in documents])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    if embed:
        torch.testing.assert_close(together.norm(dim=1), torch.ones(3))


def outputs_rank(finetuned: Path, layout: dict[str, int], embed: str | None) -> torch.Tensor:
    from evals.load import Layout

    model = load_subject(finetuned, None, "cpu", layout=Layout(**layout), needs_corpus=False).model
    draw = random.Random(1)
    return model.text_outputs(batch_of([[draw.randrange(1200) for _ in range(n)] for n in (90, 5, 33)], "cpu"), embed)


@pytest.mark.parametrize("embed", ["mean", None])
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"cp": 2}], ids=str)
def test_outputs_are_the_same_on_every_layout(finetuned: Path, layout: dict[str, int], embed: str | None) -> None:
    expected = outputs_rank(finetuned, {}, embed)
    for found in run_ranks(2, outputs_rank, finetuned, layout, embed):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def mteb_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets in the form of the hub's: scored pairs, and passkeys to be found among texts."""
    folder, draw = tmp_path_factory.mktemp("mteb"), random.Random(3)
    pairs = folder / "STSBenchmark"
    pairs.mkdir()
    with open(pairs / "test.jsonl", "w", encoding="utf-8") as file:
        for _ in range(20):
            first, same = sentence(draw), draw.randrange(5)  # never the whole: equal texts make ties of rounding
            words = first.split()
            second = " ".join(words[: len(words) * same // 5] + sentence(draw).split()[: 5 - same])
            file.write(json.dumps({"sentence1": first, "sentence2": second or "a", "score": float(same)}) + "\n")
    passkey = folder / "LEMBPasskeyRetrieval"
    passkey.mkdir()
    keys = [f"{draw.randrange(10**5):05}" for _ in range(6)]
    texts = [f"{sentence(draw)} passkey {key} {key} {key} {sentence(draw)}" for key in keys]
    parts = {
        "corpus": [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)],
        "queries": [{"_id": f"q{i}", "text": f"passkey {key} {key}"} for i, key in enumerate(keys)],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(6)],
    }
    for name, records in parts.items():
        (passkey / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test_256\n    path: {name}.jsonl\n" for name in parts
    )
    (passkey / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    return folder


MTEB = ["--tasks", "mteb:STSBenchmark,mteb:LEMBPasskeyRetrieval", "--lengths", 256]


@pytest.fixture(scope="module")
def encoders(runs: dict[str, Path], corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    config = make_config(corpus.folder, **EXPERTS)
    return {"mlm": runs["mlm"], "moe": write_run(tmp_path_factory.mktemp("moe"), config)}


@pytest.fixture(scope="module")
def mteb_alone(encoders: dict[str, Path], mteb_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of one rank. In a process of its own: mteb's retrieval starts the threads of polars, and a process that
    has them cannot fork the ranks of the tests below."""
    folder = tmp_path_factory.mktemp("one")
    for kind, run in encoders.items():
        assert run_ranks(1, evaluate, run, folder / kind, *MTEB, "--data-dir", mteb_data) == [0]
    return {kind: folder / kind for kind in encoders}


@pytest.fixture(scope="module")
def mteb_rows(mteb_alone: dict[str, Path]) -> Any:
    return rows(mteb_alone["mlm"], "mteb")


def test_mteb_scores_are_those_of_the_vectors(runs: dict[str, Path], mteb_data: Path, mteb_rows: Any) -> None:
    from scipy.stats import spearmanr

    subject = load_subject(runs["mlm"], None, "cpu", needs_corpus=False)
    subject.model.use("full")

    def vector(text: str) -> np.ndarray:
        ids = subject.tokenizer.wrap_document(subject.tokenizer.encode(text))
        return subject.model.text_outputs(batch_of([ids], "cpu"), embed="mean")[0].numpy()

    records = [json.loads(line) for line in (mteb_data / "STSBenchmark" / "test.jsonl").read_text().splitlines()]
    cosines = [vector(r["sentence1"]) @ vector(r["sentence2"]) for r in records]
    expected = spearmanr(cosines, [r["score"] for r in records])[0]
    found = {row["name"]: row for row in mteb_rows}
    assert found["STSBenchmark"]["metric"] == "cosine_spearman"
    assert found["STSBenchmark"]["value"] == pytest.approx(expected, abs=1e-4)

    read = {
        name: [json.loads(x) for x in (mteb_data / "LEMBPasskeyRetrieval" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("corpus", "queries")
    }
    texts, queries = (np.stack([vector(r["text"]) for r in read[name]]) for name in ("corpus", "queries"))
    hits = (queries @ texts.T).argmax(1) == np.arange(6)
    passkey = found["LEMBPasskeyRetrieval test_256"]
    assert passkey["metric"] == "ndcg_at_1"
    assert passkey["value"] == pytest.approx(hits.mean(), abs=1e-4)
    assert passkey["samples"] == 12


def require_same_rows(output: Path, one: Path) -> None:
    """The same scores, but for the last digits of a similarity."""
    for found, expected in zip(rows(output, "mteb"), rows(one, "mteb"), strict=True):
        assert {**found, "value": None} == {**expected, "value": None}
        assert found["value"] == pytest.approx(expected["value"], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [
        pytest.param("mlm", 2, ["--tp", 2], marks=pytest.mark.full),  # with cp below
        ("mlm", 2, ["--pp", 2]),
        pytest.param("mlm", 2, ["--cp", 2], marks=pytest.mark.full),
        ("mlm", 2, ["--batch-tokens", 1]),  # dp 2
        ("mlm", 4, ["--tp", 2, "--cp", 2]),
        ("moe", 2, ["--ep", 2]),
    ],
)
def test_mteb_gives_the_same_on_every_layout(
    encoders: dict[str, Path],
    mteb_data: Path,
    mteb_alone: dict[str, Path],
    kind: str,
    ranks: int,
    layout: list,
    tmp_path: Path,
) -> None:
    words = [*MTEB, "--data-dir", mteb_data, *layout]
    assert run_ranks(ranks, evaluate, encoders[kind], tmp_path, *words) == [0] * ranks
    require_same_rows(tmp_path, mteb_alone[kind])


@pytest.fixture(scope="module")
def glue_alone(
    finetuned: Path, finetuned_experts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Run folder, and its results in one process."""
    folder = tmp_path_factory.mktemp("glue")
    found = {"dense": (finetuned, folder / "dense"), "moe": (finetuned_experts, folder / "moe")}
    for run, output in found.values():
        assert evaluate(run, output, "--tasks", "glue") == 0
    return found


@pytest.mark.parametrize(("kind", "ranks", "layout"), [*(("dense", *one) for one in LAYOUTS), ("moe", 2, ["--ep", 2])])
def test_glue_gives_the_same_on_every_layout(
    glue_alone: dict[str, tuple[Path, Path]], kind: str, ranks: int, layout: list, tmp_path: Path
) -> None:
    run, alone = glue_alone[kind]
    assert run_ranks(ranks, evaluate, run, tmp_path, "--tasks", "glue", *layout) == [0] * ranks
    assert rows(tmp_path, "glue") == rows(alone, "glue")


def test_glue_goes_on_at_another_world_size(glue_alone: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run, alone = glue_alone["dense"]
    left = half_done(alone, tmp_path)
    before = journal_lines(tmp_path)
    assert run_ranks(2, evaluate, run, tmp_path, "--tasks", "glue", "--pp", 2) == [0, 0]
    assert journal_lines(tmp_path) == before + left
    assert rows(tmp_path, "glue") == rows(alone, "glue")


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("mlm", ["--tasks", "glue:sst2"], "is not fine-tuned on a task of GLUE; give a run of launch/finetune.py"),
        ("finetuned", ["--tasks", "glue:sst2"], "is fine-tuned on mnli; give --tasks glue:mnli"),
        ("finetuned", ["--tasks", "glue", "--data-dir", "nowhere"], "nowhere: holds no MNLI/dev_matched.tsv"),
        ("mlm", ["--tasks", "mteb"], "name its tasks or a benchmark"),
        ("mlm", ["--tasks", "mteb:NoSuchTask"], "the mteb package has no such task"),
        ("mlm", ["--tasks", "mteb:STSBenchmark", "--data-dir", "nowhere"], "no nowhere/STSBenchmark; put a copy"),
    ],
)
def test_mistakes_are_one_line(
    runs: dict[str, Path],
    finetuned: Path,
    kind: str,
    words: list,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(finetuned if kind == "finetuned" else runs[kind], tmp_path, *words) == MISTAKE
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_contrastive_checkpoint_is_an_encoder(corpus: Corpus, mteb_data: Path, tmp_path: Path) -> None:
    """Its run names a file of pairs where others name a corpus; the tokenizer lies in the run folder."""
    config = make_config(corpus.folder)
    data = dataclasses.replace(config.data, train=str(write_pairs(tmp_path / "pairs.jsonl", 4, 0)), validation=None)
    corpus.tokenizer().save(tmp_path / "run")
    settings = FinetuneConfig(tasks="contrastive", pooling="mean")
    run = write_run(tmp_path / "run", dataclasses.replace(config, data=data, finetune=settings))
    assert evaluate(run, tmp_path / "out", "--tasks", "mteb:STSBenchmark", "--data-dir", mteb_data) == 0
    assert -1 <= rows(tmp_path / "out", "mteb")[0]["value"] <= 1

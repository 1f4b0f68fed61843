"""Labelled texts: how files are read, how documents are cut and packed, and the order of the updates."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from neomoba_dist.config.text_tasks import TEXT_TASKS
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.examples import Example, Examples, ExampleStream, encode_examples
from neomoba_dist.data.text_files import LabelledText, read_split
from neomoba_dist.data.tokenizer import Tokenizer, load_tokenizer
from tests.corpora import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "wordpiece"))


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, name: str, split: str = "train") -> list[tuple[tuple[str, ...], float | None, str]]:
    found = read_split(str(folder), name, TEXT_TASKS[name], split)
    assert found is not None
    return [(text.texts, text.label, text.index) for text in found]


def test_glues_own_files(tmp_path: Path) -> None:
    """Quotes mean nothing, CoLA has no header in training and one in its test set, labels are names or numbers."""
    put(tmp_path / "CoLA" / "train.tsv", "gj04\t1\t\tOur \"friends won't.\nbc01\t0\t*\tThem sleeps.\n")
    put(tmp_path / "CoLA" / "test.tsv", "index\tsentence\n7\tBill sings.\n")
    put(tmp_path / "SST-2" / "dev.tsv", "a stirring , funny one\t1\n")
    put(
        tmp_path / "MRPC" / "train.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t70\t71\tHe said it.\tIt was said.\n",
    )
    put(tmp_path / "STS-B" / "dev.tsv", "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\ta man\ta boy\t3.636\n")
    put(tmp_path / "QQP" / "train.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t1\t2\tWhy?\tHow?\t0\n")
    put(tmp_path / "MNLI" / "dev_matched.tsv", "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n")
    put(tmp_path / "QNLI" / "train.tsv", "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n")
    assert read(tmp_path, "cola") == [(("Our \"friends won't.",), 1, "0"), (("Them sleeps.",), 0, "1")]
    assert read(tmp_path, "cola", "test") == [(("Bill sings.",), None, "7")]
    assert read(tmp_path, "sst2", "dev") == [(("a stirring , funny one",), 1, "0")]
    assert read(tmp_path, "mrpc") == [(("He said it.", "It was said."), 1, "0")]
    assert read(tmp_path, "stsb", "dev") == [(("a man", "a boy"), 3.636, "0")]
    assert read(tmp_path, "qqp") == [(("Why?", "How?"), 0, "5")]
    assert read(tmp_path, "mnli", "dev_matched") == [(("a", "b"), 1, "0")]
    assert read(tmp_path, "qnli") == [(("Who?", "He."), 1, "0")]
    assert read_split(str(tmp_path), "rte", TEXT_TASKS["rte"], "train") is None


def test_the_hubs_columns_in_jsonl_and_parquet(tmp_path: Path) -> None:
    record = {"premise": "a", "hypothesis": "b", "label": 2, "idx": 4}
    put(tmp_path / "mnli" / "validation_matched.jsonl", json.dumps(record) + "\n")
    assert read(tmp_path, "mnli", "dev_matched") == [(("a", "b"), 2, "4")]
    records = [{"sentence1": "a", "sentence2": "b", "label": -1, "idx": 4}]
    (tmp_path / "rte").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rte" / "test.parquet")
    assert read(tmp_path, "rte", "test") == [(("a", "b"), None, "4")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\n", "none of the columns sentence1, sentence2"),
        ("sentence1\tlabel\nx\tentailment\n", "record 0 lacks one of the columns"),
        ("sentence1\tsentence2\tlabel\nx\ty\tmaybe\n", "record 0 has the label 'maybe'; known are entailment, not_"),
        ("sentence1\tsentence2\tlabel\nx\ty\t2\n", "has the label '2'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = put(tmp_path / "RTE" / "train.tsv", text)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, "rte")
    assert str(caught.value).startswith(f"{path}: ")


def test_pairs_are_one_document_and_the_longest_text_is_cut(tokenizer: Tokenizer) -> None:
    short, long = "self", "the argument " * 40
    found = encode_examples([LabelledText((short, long), 3.5, "0")], tokenizer, 32, pairs=False, unit=1e-6, name="x")
    (ids,), special = found.examples[0].documents, tokenizer.special
    first, second = tokenizer.encode(short), tokenizer.encode(long)
    assert ids == [special.cls, *first, special.sep, *second[: 32 - 3 - len(first)], special.sep]
    assert (len(ids), found.cut, found.examples[0].label) == (32, 1, 3_500_000)
    types = found.batch([0]).token_type_ids
    assert types is not None
    assert types.tolist() == [0] * (len(first) + 2) + [1] * (30 - len(first)), "the separator ends the first text"


def test_contrastive_texts_are_documents_and_need_equal_numbers(tokenizer: Tokenizer) -> None:
    triple = LabelledText(("self", "the value", "none"), None, "0")
    found = encode_examples([triple], tokenizer, 32, pairs=True, unit=1.0, name="x")
    assert len(found.examples[0].documents) == 3
    assert found.batch([0]).token_type_ids.tolist() == [0] * 32  # type: ignore[union-attr]
    with pytest.raises(DataError, match="some examples have a negative and some have none"):
        encode_examples([triple, LabelledText(("a", "b"), None, "1")], tokenizer, 32, pairs=True, unit=1.0, name="x")


def test_documents_fill_rows_and_labels_stand_at_their_first_token() -> None:
    examples = Examples([Example(([7] * n,), n % 3, str(n)) for n in (5, 6, 4, 10)], 12, 0, 0)
    batch = examples.batch([0, 1, 2, 3])
    assert batch.rows == 3  # 5 + 6, then 4, then 10
    assert batch.length == 12
    assert batch.cu_seqlens.tolist() == [0, 5, 11, 12, 16, 24, 34, 36]
    assert {i: label for i, label in enumerate(batch.labels.tolist()) if label != -100} == {0: 2, 5: 0, 12: 1, 24: 1}
    assert batch.position_ids[11:18].tolist() == [-1, 0, 1, 2, 3, -1, -1]
    assert batch.num_valid == 4


def test_token_types_lie_where_their_documents_lie() -> None:
    given = ((5, 2), (6, None), (4, 1), (10, 9))
    examples = Examples([Example(([7] * n,), 0, str(n), second) for n, second in given], 12, 0, 0)
    types = examples.batch([0, 1, 2, 3]).token_type_ids
    assert types is not None
    assert types.nonzero().flatten().tolist() == [2, 3, 4, 13, 14, 15, 33]


def test_the_label_of_a_query_is_its_positives_number() -> None:
    examples = Examples([Example(([1], [2], [3]), None, str(n)) for n in range(3)], 12, 0, 0)
    labels = [label for label in examples.batch([2, 0, 1]).labels.tolist()[:9] if label != -100]
    assert labels == [0, 2, 4]


@pytest.mark.parametrize(("dp", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_updates_do_not_depend_on_ranks_and_go_on_from_a_state(dp: int, accumulation: int) -> None:
    examples = Examples([Example(([n + 1],), 0, str(n)) for n in range(10)], 4, 0, 0)

    def stream(rank: int) -> ExampleStream:
        micro = 4 // dp // accumulation
        return ExampleStream(
            examples, micro_batch_size=micro, accumulation=accumulation, seed=1, dp_rank=rank, dp_size=dp
        )

    def update(streams: list) -> list[int]:
        batches = [next(it)[0] for it in streams]
        return sorted(int(i) for ranks in batches for batch in ranks for i in batch.input_ids[batch.labels == 0])

    streams = [iter(stream(rank)) for rank in range(dp)]
    found = [update(streams) for _ in range(5)]
    assert sorted(number for numbers in found for number in numbers) == sorted([*range(1, 11)] * 2)  # two whole epochs
    one = iter(ExampleStream(examples, micro_batch_size=4, accumulation=1, seed=1))
    assert found == [update([one]) for _ in range(5)]
    resumed = stream(0)
    first = next(iter(resumed))[1]
    again = stream(0)
    again.load_state_dict(first)
    other = Examples(examples.examples[:-1], 4, 0, 0)
    with pytest.raises(DataError, match="is not that of the checkpoint"):
        ExampleStream(other, micro_batch_size=4, accumulation=1, seed=1).load_state_dict(first)
    later = iter(stream(0))
    next(later)
    assert (next(iter(again))[0][0].input_ids == next(later)[0][0].input_ids).all()

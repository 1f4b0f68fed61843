"""tokenize_corpus: the same bytes for any number of workers, under MPI, after an interruption, after kill -9."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data_tools.blocks as blocks
import data_tools.tokenize_corpus as tokenize_command
from data_tools import verify_shards
from data_tools.blocks import Piece, pieces_of
from data_tools.cleaning import clean_text
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.tokenizer import Tokenizer, load_tokenizer
from tests.corpora import SHARED_DATA, folder_digests, make_tokenizer, standard_library_texts, write_texts

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("wordpiece", "unigram", "bpe", "byte_bpe")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "byte_bpe")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: load_tokenizer(make_tokenizer(root / kind, kind)) for kind in KINDS}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks from little text, and long documents in pieces."""
    monkeypatch.setattr(blocks, "BLOCK_CHARACTERS", 20_000)
    monkeypatch.setattr(blocks, "PIECE_CHARACTERS", 8_000)


@pytest.mark.usefixtures("small_blocks")
def test_same_bytes_for_any_number_of_workers(tmp_path: Path, tokenizer: Path) -> None:
    text = write_texts(tmp_path / "text")
    common = ["--input", str(text), "--tokenizer", str(tokenizer), "--shard_mb", "0.2"]
    for workers in ("1", "4"):
        tokenize_command.main([*common, "--output", str(tmp_path / workers), "--workers", workers])
    digests = folder_digests(tmp_path / "1")
    assert sum(name.endswith(".tar") for name in digests) > 2
    assert digests == folder_digests(tmp_path / "4")
    assert list(verify_shards.corpus_problems(tmp_path / "4")) == []


@pytest.mark.usefixtures("small_blocks")
def test_restart_does_only_what_is_missing(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_texts(tmp_path / "text")
    common = ["--input", str(text), "--tokenizer", str(tokenizer), "--workers", "1"]
    tokenize_command.main([*common, "--output", str(tmp_path / "whole")])
    done: list[Path] = []
    tokenize_block = blocks.tokenize_block

    def stops_after_five(pieces: list[Piece], tokenizer_path: Path, sha256: str, part: Path) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(part)
        tokenize_block(pieces, tokenizer_path, sha256, part)

    def counts(pieces: list[Piece], tokenizer_path: Path, sha256: str, part: Path) -> None:
        done.append(part)
        tokenize_block(pieces, tokenizer_path, sha256, part)

    output = tmp_path / "output"
    monkeypatch.setattr(blocks, "tokenize_block", stops_after_five)
    with pytest.raises(KeyboardInterrupt):
        tokenize_command.main([*common, "--output", str(output)])
    with pytest.raises(DataError, match="no finished corpus"):
        open_corpus(output)
    monkeypatch.setattr(blocks, "tokenize_block", counts)
    tokenize_command.main([*common, "--output", str(output)])
    assert len(done) == len(set(done)) > 10
    assert folder_digests(output) == folder_digests(tmp_path / "whole")

    blocks_made = len(done)
    tokenize_command.main([*common, "--output", str(output)])
    assert len(done) == blocks_made
    (output / "shard-00000.tar").unlink()
    tokenize_command.main([*common, "--output", str(output)])
    assert folder_digests(output) == folder_digests(tmp_path / "whole")


# -- long documents in pieces


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_document_give_the_ids_of_the_whole(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """At every line end that follows a visible character, the places where cuts are made."""
    odd = "a.\n\n b  c\n    def f(x):\n\t\treturn 'é 漢字 😀'\n \n\n\n\n\n\n\n\n\n\n\nx \n\u00a0\ny\u200b\nz--\n...\n\n"
    tokenizer = tokenizers[kind]
    assert tokenizer.splits_at_line_ends == (kind != "unigram")
    if not tokenizer.splits_at_line_ends:
        return
    for text in [odd, *(text[:3000] for text in standard_library_texts().values())]:
        whole = tokenizer.encode(text)
        cuts = [match.start() for match in blocks._LINE_END.finditer(text)]
        assert len(cuts) > 3
        for cut in cuts:
            assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == whole, text[cut - 20 : cut + 20]


def test_tokenizers_that_look_across_line_ends_are_not_cut(tokenizers: dict[str, Tokenizer]) -> None:
    """A prefix space, an expression of its own, or a piece over a line end would change the ids."""
    state = json.loads(tokenizers["byte_bpe"].payload)
    changes = [
        {"pre_tokenizer": state["pre_tokenizer"] | {"add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}},
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": True}],
            }
        },
        {"pre_tokenizer": None},
    ]
    kind = type(tokenizers["byte_bpe"])
    assert kind(json.dumps(state).encode()).splits_at_line_ends  # type: ignore[call-arg]
    for change in changes:
        assert not kind(json.dumps(state | change).encode()).splits_at_line_ends  # type: ignore[call-arg]


def test_pieces_join_to_the_cleaned_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_CHARACTERS", 100)
    document = "\ufeff" + "".join(f"line {i}\r\n" + "\n" * (i % 3) for i in range(200))
    pieces = list(pieces_of(document, True))
    assert len(pieces) > 10
    assert "".join(piece.text for piece in pieces) == clean_text(document)
    assert all(piece.text.startswith("\n") and not piece.first for piece in pieces[1:])
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [clean_text(piece.text) for piece in pieces] == [piece.text for piece in pieces]
    assert list(pieces_of(document, False)) == [Piece(document)]
    assert list(pieces_of("x" * 1000, True)) == [Piece("x" * 1000)]


@pytest.mark.parametrize("kind", KINDS)
def test_corpus_of_pieces_is_that_of_whole_documents(
    tmp_path: Path, tokenizers: dict[str, Tokenizer], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_texts(tmp_path / "text")
    # the same long document three times: as it is, with other line ends, with a mark; one of them stays
    long = "\n".join(standard_library_texts().values())
    for name, variant in (("x", long), ("y", long.replace("\n", "\r\n")), ("z", "\ufeff" + long)):
        (text / f"{name}.txt").write_text(variant, encoding="utf-8", newline="")
    source = tokenizers[kind].save(tmp_path / "tokenizer")
    common = ["--input", str(text), "--tokenizer", str(source), "--workers", "1", "--output"]
    digests = []
    for size in (10**9, 8_000):
        monkeypatch.setattr(blocks, "PIECE_CHARACTERS", size)
        tokenize_command.main([*common, str(tmp_path / str(size))])
        index = json.loads((tmp_path / str(size) / "index.json").read_text(encoding="utf-8"))
        digests.append([index["fingerprint"], index["documents"], index["shards"], index["documents_sha256"]])
    assert digests[0] == digests[1]


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_real_books(tokenizers: dict[str, Tokenizer], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_CHARACTERS", 5_000)
    books = sorted((SHARED_DATA / "text").rglob("*.txt")) or sorted(Path(blocks.__file__).parent.glob("*.py"))
    tokenizer = tokenizers[kind]
    for book in books:
        text = book.read_bytes().decode("utf-8")
        ids = [
            i
            for piece in pieces_of(text, tokenizer.splits_at_line_ends)
            for i in tokenizer.encode(clean_text(piece.text))
        ]
        assert ids == tokenizer.encode(clean_text(text)), book


# -- MPI


def run_mpi(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    mpirun = Path(sys.executable).with_name("mpirun")
    command = [mpirun, "-n", ranks, sys.executable, "-m", "data_tools.tokenize_corpus", "--mpi", *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("ranks", [1, 3])
def test_same_bytes_under_mpi(tmp_path: Path, tokenizer: Path, ranks: int) -> None:
    text = write_texts(tmp_path / "text")
    # several blocks and pieces of the real size
    (text / "long.txt").write_text("\n".join(standard_library_texts().values()) * 3, encoding="utf-8")
    common = ["--input", str(text), "--tokenizer", str(tokenizer), "--shard_mb", "0.2", "--output"]
    tokenize_command.main([*common, str(tmp_path / "one"), "--workers", "1"])
    result = run_mpi(ranks, *common, tmp_path / "mpi")
    assert result.returncode == 0, result.stderr
    assert ("one process under" in result.stdout) == (ranks == 1)
    assert folder_digests(tmp_path / "mpi") == folder_digests(tmp_path / "one")
    again = run_mpi(ranks, *common, tmp_path / "mpi")
    assert "already holds this corpus" in again.stdout


def test_bad_input_under_mpi_is_one_line(tmp_path: Path, tokenizer: Path) -> None:
    result = run_mpi(3, "--input", tmp_path / "none.txt", "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if line] == [
        f"error: --input {tmp_path / 'none.txt'}: no such file or folder"
    ]


# -- kill -9


def kill_again_and_again(tmp_path: Path, tokenizer: Path, kills: int) -> None:
    """Kills the command and all its workers after a random time, `kills` times, then lets it finish.

    The driver makes blocks small, so that a run has many places to be killed at; after each kill the folder must not
    pass for a finished corpus.
    """
    text = write_texts(tmp_path / "text")
    driver = (
        "import sys, data_tools.blocks as b, data_tools.tokenize_corpus as t; b.BLOCK_CHARACTERS = 20_000; "
        "b.PIECE_CHARACTERS = 8_000; print('begun', flush=True); t.main(sys.argv[1:])"
    )
    common = ["--input", str(text), "--tokenizer", str(tokenizer), "--shard_mb", "0.2", "--workers", "1", "--output"]

    def start(output: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", driver, *common, str(output)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        return process

    began = time.monotonic()
    assert start(tmp_path / "whole").wait(60) == 0
    whole_run = time.monotonic() - began
    expected = folder_digests(tmp_path / "whole")
    rng = random.Random(0)
    output = tmp_path / "killed"
    killed = 0
    for _ in range(4 * kills):
        process = start(output)
        try:
            process.wait(rng.uniform(0.0, whole_run))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed += process.returncode != 0
        try:
            open_corpus(output)
        except DataError:
            assert process.returncode != 0
        else:
            # what opens is whole, though its parts may still lie beside it; damaged, it is made again
            assert {k: v for k, v in folder_digests(output).items() if not k.startswith(".")} == expected
            (output / "shard-00001.tar").unlink()
        if killed == kills:
            break
    assert killed == kills
    assert start(output).wait(60) == 0
    assert folder_digests(output) == expected
    assert list(verify_shards.corpus_problems(output)) == []


def test_killed_three_times(tmp_path: Path, tokenizer: Path) -> None:
    kill_again_and_again(tmp_path, tokenizer, 3)


@pytest.mark.full
def test_killed_fifty_times(tmp_path: Path, tokenizer: Path) -> None:
    kill_again_and_again(tmp_path, tokenizer, 50)

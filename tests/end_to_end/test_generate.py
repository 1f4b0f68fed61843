"""launch/generate.py as its users start it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.generate import main, parse_arguments, read_prompts
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.data.chat import load_chat_template
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.span_corruption import encode_source
from neomoba_dist.errors import MISTAKE
from neomoba_dist.generate.decode import generate
from neomoba_dist.generate.stage import Stage
from tests.chats import CHATML, make_chat_corpus, write_jsonl
from tests.corpora import make_corpus
from tests.decoding import greedy_by_recomputing
from tests.evals.runs import make_config, write_run
from tests.programs import ROOT, run_program

PROMPT = "def main(argument"
USER = [{"role": "user", "content": "def f(self):"}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), "wordpiece")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run_program("launch/generate.py", *words)


@pytest.mark.parametrize("decode", ["full", "moba"])
def test_continues_the_prompt_as_the_model_would(decode: str, corpus: Corpus, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", make_config(corpus.folder, objective="clm"))
    prompt = PROMPT * 8  # more blocks than MoBA chooses
    result = run("--checkpoint", folder, "--prompt", prompt, "--max_new_tokens", "6", "--decode", decode)
    assert result.returncode == 0, result.stderr
    tokenizer = corpus.tokenizer()
    model, _ = load_model(folder, dtype=torch.float32)
    ids = tokenizer.wrap_document(tokenizer.encode(prompt))[:-1]
    assert len(ids) > 3 * 8
    expected = greedy_by_recomputing(model, ids, 6, decode)
    if tokenizer.special.sep in expected:
        expected = expected[: expected.index(tokenizer.special.sep)]
    together = tokenizer.decode([*tokenizer.encode(prompt), *expected])
    assert result.stdout == prompt + together.removeprefix(tokenizer.decode(tokenizer.encode(prompt))) + "\n"
    assert result.stderr == ""


def test_more_tokens_than_positions_is_a_warning(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", make_config(corpus.folder, objective="clm", max_position_embeddings=256))
    capsys.readouterr()
    for prompt, new, message in (
        ("x " * 400, "1", "warning: the prompt's 401 tokens are more than the 256 tokens"),
        ("x " * 250, "6", "warning: the prompt's 251 tokens and --max_new_tokens 6 are more than the 256 tokens"),
        ("x " * 250, "5", None),
    ):
        assert main(["--checkpoint", str(folder), "--prompt", prompt, "--max_new_tokens", new]) == 0
        said = capsys.readouterr()
        assert said.out.startswith(prompt)
        assert said.err.count("\n") == (message is not None)
        assert said.err.startswith(message or "")


def test_what_is_wrong_takes_one_line(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = write_run(tmp_path / "encoder", make_config(corpus.folder, objective="mlm"))
    moved = write_run(tmp_path / "moved", make_config(tmp_path / "gone", objective="clm"))
    learned = make_config(corpus.folder, objective="clm", position_embedding="learned")
    short = write_run(tmp_path / "short", learned)
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user"}]}\n')
    large = tmp_path / "vocab.txt"
    large.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map("w{}".format, range(9000))]))
    capsys.readouterr()
    for words, message in (
        ((encoder,), 'neomoba.model.objective "mlm" does not continue text'),
        ((tmp_path / "nothing",), "no checkpoint here"),
        ((moved,), "its tokenizer is not here; name its folder with --tokenizer"),
        ((short, "--max_new_tokens", "2000"), "positions that the model learned"),
        ((short, "--prompt", "x " * 1100), "the prompt's 1101 tokens are more than the 1024 positions that the model"),
        ((short, "--max_new_tokens", "0"), "give at least 1"),
        ((short, "--top-p", "0.5"), "give --temperature too"),
        ((short, "--prompt-file", tmp_path / "none.txt"), "none.txt: cannot be read"),
        ((short, "--prompt", ""), "an empty one"),
        ((short, "--chat"), "--chat: no chat template beside the tokenizer of"),
        ((short, "--prompt-file", chats), 'give one {"prompt": "..."} a line (KeyError(\'prompt\'))'),
        ((short, "--prompt-file", chats, "--chat"), "a message without 'role' or 'content'"),
        ((short, "--tokenizer", large), "vocab.txt: has 9005 ids, the model only "),
        ((short, "--tp", "2"), "--tp 2 takes 2 ranks or a multiple, this launch has 1"),
    ):
        assert main(["--prompt", PROMPT, "--checkpoint", *map(str, words)]) == MISTAKE
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert message in said.err
        assert said.err.count("\n") == 1


def test_a_line_of_a_file_ends_at_a_line_feed(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes('{"prompt": "a\u2028b\x85c"}\n\n{"prompt": "d"}\r\n'.encode())
    arguments = parse_arguments(["--checkpoint", "run", "--prompt-file", str(tmp_path / "in.jsonl")])
    assert read_prompts(arguments) == [{"prompt": "a\u2028b\x85c"}, {"prompt": "d"}]


def test_files_in_and_out(corpus: Corpus, tmp_path: Path) -> None:
    """Prompts of a jsonl with others of the command line; stop texts; drawn with a seed, again the same."""
    folder = write_run(tmp_path / "run", make_config(corpus.folder, objective="clm"))
    (tmp_path / "in.jsonl").write_text('{"prompt": "import os"}\n{"prompt": "def f(x):"}\n')
    words = ["--checkpoint", folder, "--prompt", "class A", "--prompt-file", tmp_path / "in.jsonl"]
    words += ["--max-new-tokens", "20", "--temperature", "1.0", "--output", tmp_path / "out.jsonl"]
    found = []
    for more in ((), (), ("--seed", "1")):
        result = run(*words, *more)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        found.append([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()])
    assert [entry["prompt"] for entry in found[0]] == ["class A", "import os", "def f(x):"]
    assert found[0] == found[1] != found[2]
    assert all(entry["tokens"] <= 20 and entry["finish_reason"] in ("length", "stop") for entry in found[0])
    longest = max(found[0], key=lambda entry: len(entry["text"]))
    stop = longest["text"][3:7]
    result = run(*words, "--stop", stop)
    assert result.returncode == 0, result.stderr
    for entry, whole in zip(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()), found[0], strict=True):
        assert entry["text"] == whole["text"].split(stop)[0]
        assert entry["finish_reason"] == ("stop" if stop in whole["text"] else whole["finish_reason"])
    one = run("--checkpoint", folder, "--prompt", "class A", "--max-new-tokens", "20", "--temperature", "1")
    assert one.stdout == "class A" + found[0][0]["text"] + "\n", "printed as it is made: the same text"


def test_answers_messages_by_the_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_chat_corpus(tmp_path, CHATML)
    folder = write_run(tmp_path / "run", make_config(corpus.folder, objective="clm"))
    tokenizer, (model, _) = corpus.tokenizer(), load_model(folder, dtype=torch.float32)
    template = load_chat_template(corpus.folder, tokenizer)
    assert template is not None
    end, seen = tokenizer.id_of("<|im_end|>"), {}

    def watched(*prompts: Any, **settings: Any) -> list[list[int]]:
        seen.update(settings)
        return generate(*prompts, **settings)

    monkeypatch.setattr("neomoba_dist.generate.decode.generate", watched)
    records = [{"prompt": "import <|im_end|>"}, {"messages": [{"role": "system", "content": "Be brief."}, *USER]}]
    write_jsonl(tmp_path / "in.jsonl", list(records))
    words = ["--checkpoint", str(folder), "--chat", "--max_new_tokens", "6"]
    assert main([*words, "--prompt-file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert seen["stop_id"] == end is not None
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for record, entry in zip(records, found, strict=True):
        messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        expected = greedy_by_recomputing(model, template.encode_prompt(messages), 6, "full")
        assert end not in expected
        assert entry == {**record, "text": tokenizer.decode(expected), "tokens": 6, "finish_reason": "length"}
    capsys.readouterr()
    assert main([*words, "--prompt", "import <|im_end|>"]) == 0
    assert capsys.readouterr().out == found[0]["text"] + "\n", "the answer alone"


def test_fills_gaps_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By an encoder-decoder: prompts of different lengths, each up to the sentinel that comes after its own."""
    corpus = make_corpus(tmp_path, "byte_bpe", sentinels=16)
    config = make_config(corpus.folder, objective="span_corruption", num_decoder_layers=2)
    folder, tokenizer = write_run(tmp_path / "run", config), corpus.tokenizer()
    texts = ["def <extra_id_0>(argument):\n    return <extra_id_1>", "<extra_id_0> os", "a\u00e9 <extra_id_0>"]
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": text} for text in texts])
    output = tmp_path / "out.jsonl"
    words = ["--checkpoint", str(folder), "--max_new_tokens", "6"]
    capsys.readouterr()
    assert main([*words, "--prompt-file", str(tmp_path / "in.jsonl"), "--output", str(output)]) == 0
    sources, ends = zip(*(encode_source(tokenizer, text, 2) for text in texts), strict=True)
    assert list(ends) == [tokenizer.id_of(f"<extra_id_{number}>") for number in (2, 1, 1)]
    stage = Stage.of(load_model(folder, dtype=torch.float32)[0])
    starts = [[tokenizer.special.padding]] * 3
    expected = generate(stage, starts, 6, sources=sources, stop_id=ends)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line, text, ids in zip(lines, texts, expected, strict=True):
        reason = "length" if len(ids) == 6 else "stop"
        wanted = {"prompt": text, "text": tokenizer.decode(ids), "tokens": len(ids), "finish_reason": reason}
        assert line == wanted
    assert main([*words, "--prompt", texts[0]]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == (lines[0]["text"] + "\n", ""), "as it is made, without the prompt"
    assert main([*words, "--prompt", texts[0], "--int8"]) == 0
    assert capsys.readouterr().err == ""
    for more, message in (
        (("--prompt", "import os"), "prompt 'import os': write <extra_id_0>, <extra_id_1>, ... where text is missing"),
        (("--prompt", "a <extra_id_0>", "--chat"), "--chat: "),
        (("--prompt", "a <extra_id_0>", "--pp", "2"), "pipeline_model_parallel_size 2 does not work with an encoder-"),
        (("--prompt", "a <extra_id_0>", "--cp", "2"), "context_parallel_size 2 does not work with an encoder-decoder"),
    ):
        assert main([*words, *more]) == MISTAKE
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert message in said.err
        assert said.err.count("\n") == 1


def test_ranks_say_the_same_once(corpus: Corpus, tmp_path: Path) -> None:
    """torchrun, tp 2 x cp 2: the text of one process, printed by one rank."""
    folder = write_run(tmp_path / "run", make_config(corpus.folder, objective="clm"))
    words = ["--checkpoint", str(folder), "--prompt", PROMPT, "--max-new-tokens", "8", "--temperature", "0.7"]
    alone = run(*words)
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "4", "launch/generate.py"]
    together = subprocess.run(
        [*command, *words, "--tp", "2", "--cp", "2"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout

"""tokenize_chat: ids and counted tokens as transformers has them; lines that cannot be used; the folder it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from data_tools import index, tokenize_chat, tokenize_corpus, verify_shards
from data_tools.tokenize_corpus import PARTS
from neomoba_dist.data.chat import ChatTemplate, Dialogue, encode_pair, load_chat_template
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.errors import DataError
from neomoba_dist.data.index import INDEX_FILE, LOSS_SPANS_FILE, LossSpans
from neomoba_dist.data.tokenizer import Tokenizer, load_tokenizer
from tests.chats import CHATML, TEMPLATE, chat_tokenizer, write_jsonl
from tests.corpora import folder_digests

CHAT = [
    {"role": "system", "content": "Answer in a line."},
    {"role": "user", "content": "import os"},
    {"role": "assistant", "content": "the module of the system"},
    {"role": "user", "content": "def f(self):"},
    {"role": "assistant", "content": "return self"},
]
GOOD = {"prompt": "def main(", "response": "argv):"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def mask(found: Dialogue) -> list[int]:
    counted = np.zeros(len(found.ids), int)
    for start, stop in found.spans:
        counted[start:stop] = 1
    return counted.tolist()


@pytest.mark.parametrize("source", [CHATML, TEMPLATE], ids=["plain", "generation tag"])
def test_ids_and_mask_are_those_of_transformers(folder: Path, tokenizer: Tokenizer, source: str) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    expected = theirs.apply_chat_template(CHAT, chat_template=TEMPLATE, return_assistant_tokens_mask=True)
    template = ChatTemplate(source, {}, tokenizer)
    found = template.encode(CHAT)
    assert found.ids == expected["input_ids"]
    assert mask(found) == expected["assistant_masks"]
    assert 0 < sum(mask(found)) < len(found.ids)
    prompt = template.encode_prompt(CHAT[:2])
    assert prompt == found.ids[: found.spans[0][0]]


def test_special_tokens_in_a_message_are_text(tokenizer: Tokenizer) -> None:
    said = "stop at <|im_end|> now"
    found = ChatTemplate(CHATML, {}, tokenizer).encode([{"role": "user", "content": said}, *CHAT[2:3]])
    assert found.ids.count(tokenizer.id_of("<|im_end|>")) == 2
    assert said in tokenizer.decode(found.ids)


def test_an_answer_that_the_template_rewrites_later_does_not_count(tokenizer: Tokenizer) -> None:
    """Qwen3's template leaves the thoughts of earlier answers out."""
    source = CHATML.replace("message['content'] +", "('' if loop.last else '~') + message['content'] +", 1)
    found = ChatTemplate(source, {}, tokenizer).encode(CHAT[1:])
    assert (len(found.spans), found.rewritten) == (1, 1)
    assert tokenizer.decode(found.ids[slice(*found.spans[0])]) == "return self<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "end"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}", "[SEP]"),
        ("{% for message in messages %}{{ '<|im_start|>' + message['content'] }}{% endfor %}", None),
        ("{% for message in messages[:1] %}{{ message['content'] + '<|im_end|>' }}{% endfor %}", None),
        ("{{ raise_exception('a system first') }}", None),
    ],
    ids=["ChatML", "end of text", "none", "no answer", "refused"],
)
def test_the_token_that_ends_an_answer(tokenizer: Tokenizer, source: str, end: str | None) -> None:
    template = ChatTemplate(source, {"eos_token": "[SEP]"}, tokenizer)
    assert template.end_of_turn == (None if end is None else tokenizer.id_of(end))


def test_a_pair_without_template(tokenizer: Tokenizer) -> None:
    found = encode_pair("def main(", "argv):", tokenizer)
    (span,) = found.spans
    cls, sep = tokenizer.special.cls, tokenizer.special.sep
    assert found.ids == [cls, *tokenizer.encode("def main("), *tokenizer.encode("argv):"), sep]
    assert found.ids[slice(*span)] == [*tokenizer.encode("argv):"), sep]


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_beside_a_tokenizer(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    settings: dict[str, object] = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "add_bos_token": True}
    if name == "chat_template.jinja":
        (tmp_path / name).write_text("{{ bos_token }}x")
    else:
        settings["chat_template"] = [
            {"name": "tools", "template": "t"},
            {"name": "default", "template": "{{ bos_token }}x"},
        ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = load_chat_template(tmp_path, tokenizer)
    assert found is not None
    assert (found.source, found.variables) == ("{{ bos_token }}x", {"eos_token": "</s>", "bos_token": "<s>"})
    found.save(tmp_path)
    again = load_chat_template(tmp_path, tokenizer)
    assert again is not None
    assert vars(again) == vars(found)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match="no chat template can be read"):
        load_chat_template(tmp_path, tokenizer)


def run(tmp_path: Path, folder: Path, records: list[object], *flags: str) -> Path:
    file = write_jsonl(tmp_path / "in.jsonl", records)
    tokenize_chat.main(["--input", str(file), "--tokenizer", str(folder), "--output", str(tmp_path / "out"), *flags])
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a"}, "'response' is missing"),
        ({"response": "a"}, "'prompt' is missing"),
        ({"prompt": "a", "response": " "}, "'response' is empty or not a string"),
        ({"prompt": 3, "response": "b"}, "'prompt' is empty or not a string"),
        ([], "not a JSON object"),
        ({"messages": "a"}, "'messages' is not a list"),
        ({"messages": [{"role": "user"}]}, "a message without 'role' or 'content'"),
        ({"messages": CHAT[:2]}, "no message of the assistant"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_line_that_cannot_be_used_is_left_out_and_named(
    tmp_path: Path, folder: Path, record: object, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    flags = ["--chat-template", str(tmp_path / "t.jinja")]
    corpus = open_corpus(run(tmp_path, folder, [GOOD, record, GOOD], *flags))
    said = capsys.readouterr().out
    assert corpus.documents == 1
    assert "dropped 1 repeated of 3 documents" in said
    assert f"left out 1 records without text, the first: {tmp_path / 'in.jsonl'}:2: {reason}" in said
    with pytest.raises(DataError, match=rf"in\.jsonl:2: {reason}"):
        run(tmp_path, folder, [GOOD, record], *flags, "--strict", "--overwrite")
    with pytest.raises(DataError, match=f"no text left after cleaning; left out 1 .*{reason}"):
        run(tmp_path, folder, [record], *flags, "--overwrite")
    assert open_corpus(tmp_path / "out").fingerprint == corpus.fingerprint, "a refused run replaces nothing"
    run(tmp_path, folder, [GOOD], *flags, "--overwrite")


def test_refusals(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="no chat template, which messages need"):
        run(tmp_path, folder, [{"messages": CHAT}])
    assert not (tmp_path / "out" / INDEX_FILE).exists()
    before = folder_digests(run(tmp_path, folder, [GOOD]))
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no system, please') }}")
    with pytest.raises(DataError, match=r"the chat template refuses it \(no system, please\)"):
        run(tmp_path, folder, [{"messages": CHAT}], "--chat_template", str(tmp_path / "t.jinja"), "--overwrite")
    assert folder_digests(tmp_path / "out") == before
    assert not (tmp_path / "out" / PARTS).exists()
    (tmp_path / "in.txt").write_text("x")
    with pytest.raises(DataError, match=r"in\.txt: give \.jsonl"):
        tokenize_chat.main(
            ["--input", str(tmp_path / "in.txt"), "--tokenizer", str(folder), "--output", str(tmp_path / "o")]
        )
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: not a JSON object"):
        tokenize_chat.main(
            ["--input", str(tmp_path / "bad.jsonl"), "--tokenizer", str(folder), "--output", str(tmp_path / "o")]
        )


def test_the_folder(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    flags = ["--chat_template", str(tmp_path / "t.jinja")]
    output = run(tmp_path, folder, [{"messages": CHAT}, GOOD], *flags)
    corpus = open_corpus(output)
    template = load_chat_template(output, corpus.tokenizer())
    assert template is not None
    chat, pair = template.encode(CHAT), template.encode([
        {"role": "user", "content": GOOD["prompt"]}, {"role": "assistant", "content": GOOD["response"]},
    ])  # fmt: skip
    assert corpus.tokens_at(0, corpus.tokens).tolist() == chat.ids + pair.ids
    spans = [*chat.spans, *((len(chat.ids) + start, len(chat.ids) + stop) for start, stop in pair.spans)]
    assert corpus.index.loss_spans_sha256 is not None
    table = LossSpans.from_file(output / LOSS_SPANS_FILE, corpus.index.loss_spans_sha256)
    assert list(zip(table.starts.tolist(), table.stops.tolist(), strict=True)) == spans
    verify_shards.main([str(output)])
    capsys.readouterr()
    run(tmp_path, folder, [{"messages": CHAT}, GOOD], *flags)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(DataError, match="--overwrite"):
        run(tmp_path, folder, [GOOD], *flags)
    fingerprint = open_corpus(run(tmp_path, folder, [GOOD], *flags, "--overwrite")).fingerprint
    assert fingerprint != corpus.fingerprint
    digests = folder_digests(output)
    assert not any(name.startswith(".") for name in digests)
    assert digests == folder_digests(run(tmp_path, folder, [GOOD], *flags, "--overwrite"))
    (output / LOSS_SPANS_FILE).write_bytes(b"")
    with pytest.raises(DataError, match=r"loss_spans\.npz: not the file that index\.json names"):
        verify_shards.main([str(output)])


def test_no_other_index_forgets_what_counts(tmp_path: Path, folder: Path) -> None:
    output = run(tmp_path, folder, [GOOD])
    (output / INDEX_FILE).unlink()
    with pytest.raises(DataError, match=r"loss_spans\.npz: says which tokens the loss counts.*run tokenize_chat again"):
        index.main([str(output), "--tokenizer", str(folder)])
    assert not (output / INDEX_FILE).exists()


def test_tokenize_corpus_takes_the_whole_of_it_out(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    output = run(tmp_path, folder, [GOOD], "--chat_template", str(tmp_path / "t.jinja"))
    (tmp_path / "text.txt").write_text("import os")
    common = ["--input", str(tmp_path / "text.txt"), "--tokenizer", str(folder), "--workers", "1", "--overwrite"]
    for place in (output, tmp_path / "fresh"):
        tokenize_corpus.main([*common, "--output", str(place)])
    assert folder_digests(output) == folder_digests(tmp_path / "fresh")

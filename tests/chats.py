"""Prompts with responses for tests: definitions of the standard library, the first line of each and what follows."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import tokenizers

from data_tools import tokenize_chat
from neomoba_dist.data.chat import TEMPLATE_FILE
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from tests.corpora import make_tokenizer, standard_library_texts

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")  # as most templates are


def chat_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer with the special tokens of ChatML."""
    backend = tokenizers.Tokenizer.from_file(str(make_tokenizer(folder, "byte_bpe", 1198) / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def pairs() -> list[dict[str, str]]:
    """Some hundred short prompts with their responses, no two alike."""
    pieces = {piece for text in standard_library_texts().values() for piece in text.split("\n\n")}
    lines = [piece.partition("\n") for piece in sorted(pieces) if len(piece) < 400]
    return [{"prompt": first, "response": rest} for first, _, rest in lines if first.strip() and rest.strip()]


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_chat_corpus(folder: Path, template: str | None = None) -> Corpus:
    """The pairs as shards: by a chat template, or without one end to end."""
    folder.mkdir(parents=True, exist_ok=True)
    file = write_jsonl(folder / "pairs.jsonl", list(pairs()))
    tokenizer = chat_tokenizer(folder / "tokenizer")
    if template is not None:
        (tokenizer / TEMPLATE_FILE).write_text(template)
    tokenize_chat.main(["--input", str(file), "--tokenizer", str(tokenizer), "--output", str(folder / "shards")])
    return open_corpus(folder / "shards")


@functools.cache
def shared_chats() -> Path:
    """The pairs as shards without a template, once for the whole test session; removed with the process's temporary
    folder."""
    keeper = tempfile.TemporaryDirectory(prefix="neomoba-chats-")
    shared_chats.keeper = keeper  # type: ignore[attr-defined] - lives as long as the cache
    return make_chat_corpus(Path(keeper.name)).folder

"""Prompts with their responses, and chats, as token ids of which it is known whether the loss counts them.

A chat template, the jinja text that the Hugging Face hub keeps beside a tokenizer, makes one text of messages;
`transformers` renders it. Names of special tokens in the template stand for these tokens; in a message they are text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from neomoba_dist.data.errors import DataError
from neomoba_dist.data.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # templates with this tag say themselves what is an answer
_TEXT_MARK = "\U000f0000"  # of private use: stands inside a special token's name that is text

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """Token ids, and [start, stop) of those that the loss counts, ascending; `rewritten`: answers that are not among
    them, because the template writes them otherwise when messages follow."""

    ids: list[int]
    spans: list[tuple[int, int]]
    rewritten: int = 0


def encode_pair(prompt: str, response: str, tokenizer: Tokenizer) -> Dialogue:
    """The two texts end to end, each tokenised by itself as in generation, between the borders of a document. The
    response and the border after it count."""
    head, tail = tokenizer.document_borders
    before, after = [*head, *tokenizer.encode(prompt)], [*tokenizer.encode(response), *tail]
    return Dialogue(before + after, [(len(before), len(before) + len(after))])


class ChatTemplate:
    """A chat template and the tokenizer that it belongs to. `variables`: what it may name, such as `eos_token`."""

    def __init__(self, source: str, variables: Mapping[str, str], tokenizer: Tokenizer) -> None:
        self.source, self.variables, self.tokenizer = source, dict(variables), tokenizer
        names = sorted(map(tokenizer.token, tokenizer.reserved_ids()), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def encode(self, messages: Sequence[Message]) -> Dialogue:
        """A whole chat. What an answer adds to the prompt for it counts, or what the template marks as generated.

        ValueError, with the reason, for messages that the template refuses.
        """
        text, spans, rewritten = self._answers(map_strings(messages, self._as_text))
        ids: list[int] = []
        counted = []
        position = 0
        for start, stop in spans:
            ids += self._ids(text[position:start])
            answer = self._ids(text[start:stop])
            if answer:
                counted.append((len(ids), len(ids) + len(answer)))
            ids += answer
            position = stop
        return Dialogue(ids + self._ids(text[position:]), counted, rewritten)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """A chat up to where an answer begins. ValueError as above."""
        return self._ids(self._render(map_strings(messages, self._as_text), add_generation_prompt=True)[0])

    @cached_property
    def end_of_turn(self) -> int | None:
        """The id that ends an answer: the first special token that the template writes behind one; None without any."""
        answer = "\U000f0001"
        try:
            text, _ = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}])
        except ValueError:  # a template for other chats than this one
            return None
        _, written, after = text.rpartition(answer)
        found = self._special.search(after) if written else None
        return None if found is None else self.tokenizer.id_of(found[0])

    @property
    def settings(self) -> dict[str, str]:
        """What `tokenizer_config.json` says of it, where `load_chat_template` and `transformers` look."""
        return {**self.variables, "chat_template": self.source}

    def save(self, folder: Path) -> None:
        """Write the template beside a tokenizer."""
        from neomoba_dist.data.index import write_atomically

        write_atomically(folder / SETTINGS_FILE, (json.dumps(self.settings, indent=1) + "\n").encode("utf-8"))

    def _answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], int]:
        """The text of a chat, [start, stop) of its answers in characters, and how many others are rewritten."""
        if _GENERATION.search(self.source):
            text, spans = self._render(messages, return_assistant_tokens_mask=True)
            return text, spans, 0
        text = self._render(messages)[0]
        spans, rewritten = [], 0
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True)[0]
            through = self._render(messages[: number + 1])[0]
            if text.startswith(through) and through.startswith(before):
                spans.append((len(before), len(through)))
            else:
                rewritten += 1
        return text, spans, rewritten

    def _render(self, messages: Sequence[Message], **how: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text, and with `return_assistant_tokens_mask` the characters that were marked as generated."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        settings: dict[str, Any] = {
            "conversations": [list(messages)],
            "chat_template": self.source,
            **how,
            **self.variables,
        }
        try:
            found: Any = render_jinja_template(**settings)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses it ({error})") from error
        (text,), spans = found
        return text, spans[0] if spans else []

    def _as_text(self, text: str) -> str:
        return self._special.sub(lambda found: found[0][0] + _TEXT_MARK + found[0][1:], text)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(self._special.split(text)):
            if number % 2:
                token = self.tokenizer.id_of(piece)
                assert token is not None
                ids.append(token)
            elif piece:
                ids += self.tokenizer.encode(piece.replace(_TEXT_MARK, ""))
        return ids


def check_messages(messages: Any) -> None:
    """ValueError, with the reason, if these are not messages of text."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("'messages' is not a list of JSON objects")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError("a message without 'role' or 'content' that are strings")


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The lists and dictionaries `value` with every string in them changed, but for the keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_strings(inner, change) for key, inner in value.items()}
    return [map_strings(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def load_chat_template(place: str | Path, tokenizer: Tokenizer, file: str | Path | None = None) -> ChatTemplate | None:
    """The template of `file`, or the one beside the tokenizer at `place`: `chat_template.jinja`, or the one that
    `tokenizer_config.json` holds; None where there is none. Raises DataError."""
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    settings: Any = {}
    try:
        if (folder / SETTINGS_FILE).is_file():
            settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        beside = folder / TEMPLATE_FILE
        path = Path(file) if file is not None else beside if beside.is_file() else None
        source = path.read_text(encoding="utf-8") if path else settings.get("chat_template")
        if isinstance(source, list):  # several by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        found = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file or folder}: no chat template can be read here ({error})") from error
    if source is None:
        return None
    variables = {key: value for key, value in found.items() if key.endswith("_token") and isinstance(value, str)}
    return ChatTemplate(source, variables, tokenizer)

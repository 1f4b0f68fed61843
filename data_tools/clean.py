"""Cleaning of text: what every document goes through before it is tokenised.

Byte order mark dropped, CRLF and CR to LF, Unicode NFC, control characters dropped (tab and newline stay), invalid
UTF-8 replaced by U+FFFD and counted with file and line, empty documents and exact repetitions dropped.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

CLEANING_VERSION = 1
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text. `raw_bytes`: how far it takes its input file, for progress."""

    id: str
    text: str
    raw_bytes: int


@dataclass
class CleaningReport:
    """Counts what cleaning met. `invalid_lines` names lines with invalid UTF-8 as file:line."""

    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    invalid_lines: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people, one fact a line; nothing where nothing was dropped."""
        facts = []
        if self.empty or self.duplicates:
            facts.append(f"dropped {self.empty} empty and {self.duplicates} repeated of {self.documents} documents")
        if self.invalid_lines:
            shown = ", ".join(self.invalid_lines[:5]) + (", ..." if len(self.invalid_lines) > 5 else "")
            facts.append(f"invalid UTF-8 replaced in {len(self.invalid_lines)} lines: {shown}")
        return facts


def decode_utf8(payload: bytes, name: str, report: CleaningReport, first_line: int = 1) -> str:
    """Text of `payload`; lines that are not UTF-8 are reported as name:line and keep U+FFFD in place of the bytes."""
    try:
        return payload.decode("utf-8-sig")
    except UnicodeDecodeError:
        for number, line in enumerate(payload.split(b"\n"), first_line):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                report.invalid_lines.append(f"{name}:{number}")
        return payload.decode("utf-8-sig", errors="replace")


def clean_text(text: str) -> str:
    """The cleaned text; cleaning it again changes nothing."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = _SURROGATE.sub("\ufffd", text)
    return unicodedata.normalize("NFC", _CONTROL.sub("", text))


def text_digest(text: str) -> bytes:
    """16 bytes that tell texts apart."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def clean_documents(documents: Iterable[Document], report: CleaningReport) -> Iterator[Document]:
    """Cleans each document; drops empty ones and exact repetitions (the first stays) and counts them in `report`."""
    seen: set[bytes] = set()
    for document in documents:
        report.documents += 1
        text = clean_text(document.text)
        digest = text_digest(text)
        if not text.strip():
            report.empty += 1
        elif digest in seen:
            report.duplicates += 1
        else:
            seen.add(digest)
            yield Document(document.id, text, document.raw_bytes)

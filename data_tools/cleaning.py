"""What every document goes through before it is tokenised.

Byte order mark dropped, CRLF and CR to LF, Unicode NFC, control characters dropped (tab and newline stay), invalid
UTF-8 replaced by U+FFFD and counted with file and line, empty documents and exact repetitions dropped; where asked
for, near repetitions and documents that share text with evaluation sets too.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from neomoba_dist.data.errors import DataError

CLEANING_VERSION = 1
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_CONTROL_BYTES = bytes([*range(9), 11, 12, *range(14, 32), 127])
_UPPER_CONTROL_BYTES = re.compile(rb"\xc2[\x80-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text. `raw_bytes`: how far it takes its input file, for progress."""

    id: str
    text: str
    raw_bytes: int


@dataclass
class CleaningReport:
    """Counts what reading and cleaning met; `strict` stops at the first record that would be repaired or left out.

    invalid_lines  lines with invalid UTF-8, as file:line
    without_text   records whose text is missing, null or not a string; `first_without_text` says where and why
    """

    strict: bool = False
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    contaminated: int = 0
    invalid_lines: list[str] = field(default_factory=list)
    without_text: int = 0
    first_without_text: str = ""

    def invalid(self, where: str) -> None:
        """Notes a line with invalid UTF-8. DataError if `strict`."""
        if self.strict:
            raise DataError(f"{where}: invalid UTF-8; repair the file or leave --strict out")
        self.invalid_lines.append(where)

    def no_text(self, where: str, reason: str) -> None:
        """Notes a record that is left out. DataError if `strict`."""
        if self.strict:
            raise DataError(f"{where}: {reason}; repair the file or leave --strict out")
        self.without_text += 1
        self.first_without_text = self.first_without_text or f"{where}: {reason}"

    def nothing_left(self) -> DataError:
        """The error of an input without any text, with what has been left out of it."""
        return DataError("; ".join(["--input: no text left after cleaning", *self.lines()]))

    def lines(self) -> list[str]:
        """The report for people, one fact a line; nothing where nothing was dropped."""
        dropped = {
            "empty": self.empty,
            "repeated": self.duplicates,
            "nearly repeated": self.near_duplicates,
            "contaminated": self.contaminated,
        }
        facts = []
        if any(dropped.values()):
            counts = ", ".join(f"{count} {name}" for name, count in dropped.items() if count)
            facts.append(f"dropped {counts} of {self.documents} documents")
        if self.without_text:
            facts.append(f"left out {self.without_text} records without text, the first: {self.first_without_text}")
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
                report.invalid(f"{name}:{number}")
        return payload.decode("utf-8-sig", errors="replace")


def clean_text(text: str) -> str:
    """The cleaned text; cleaning it again changes nothing."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    # most text has nothing to drop: a pass over its bytes finds that out at a fraction of a regular expression's cost
    try:
        payload = text.encode("utf-8")
    except UnicodeEncodeError:
        text = _SURROGATE.sub("\ufffd", text)
        payload = text.encode("utf-8")
    if len(payload.translate(None, _CONTROL_BYTES)) < len(payload) or _UPPER_CONTROL_BYTES.search(payload):
        text = _CONTROL.sub("", text)
    # the mark comes last: what stood before it may be gone now
    return unicodedata.normalize("NFC", text).lstrip("\ufeff")


def text_digest(text: str) -> bytes:
    """16 bytes that tell texts apart."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def clean_documents(
    documents: Iterable[Document],
    report: CleaningReport,
    *,
    seen: set[bytes] | None = None,
    is_contaminated: Callable[[str], bool] | None = None,
    is_near_duplicate: Callable[[str], bool] | None = None,
) -> Iterator[Document]:
    """Cleans each document, drops and counts in `report`: empty ones, exact repetitions (the first stays; `seen` holds
    the digests of those that came before), and those that the optional tests find."""
    seen = set() if seen is None else seen
    for document in documents:
        report.documents += 1
        text = clean_text(document.text)
        digest = text_digest(text)
        if not text.strip():
            report.empty += 1
        elif digest in seen:
            report.duplicates += 1
        elif is_contaminated is not None and is_contaminated(text):
            report.contaminated += 1
        elif is_near_duplicate is not None and is_near_duplicate(text):
            report.near_duplicates += 1
        else:
            seen.add(digest)
            yield Document(document.id, text, document.raw_bytes)

"""docs/glossary.md: each term once, in order, on one line, with a file that is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"\| ([^|]+) \| ([^|]{8,100}) \| `([^`|]+)` \|")


def test_every_term_has_its_line_and_file() -> None:
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").split("|---|---|---|\n")[1].splitlines()
    rows = [ROW.fullmatch(line) for line in lines]
    assert len(rows) > 100
    assert None not in rows, [line for line, row in zip(lines, rows, strict=True) if row is None]
    terms = [row[1] for row in rows if row]
    assert terms == sorted(set(terms), key=str.casefold)
    files = [row[3] for row in rows if row]
    assert not [file for file in files if not any((base / file).is_file() for base in (ROOT / "neomoba_dist", ROOT))]

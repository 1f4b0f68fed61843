"""The key neomoba.data.train: one place or several, with least lengths and exact weights."""

from fractions import Fraction

import pytest

from neomoba_dist.config.sources import SourceEntry, parse_sources, source_problems

ONE = Fraction(1)


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("runs/web", [("runs/web", 0, ONE)]),
        ("runs/web@1024", [("runs/web", 1024, ONE)]),
        ("runs/web*0.1, runs/books@2048*3", [("runs/web", 0, Fraction(1, 10)), ("runs/books", 2048, Fraction(3))]),
        ("s3://bucket/a@8192*0.25,b", [("s3://bucket/a", 8192, Fraction(1, 4)), ("b", 0, ONE)]),
        ("https://user:key@host/path", [("https://user:key@host/path", 0, ONE)]),
        ("pipe:ssh me@host cat /data/*/{}", [("pipe:ssh me@host cat /data/*/{}", 0, ONE)]),
    ],
)
def test_sources(text: str, sources: list[tuple[str, int, Fraction]]) -> None:
    assert list(source_problems(text)) == []
    assert parse_sources(text) == tuple(SourceEntry(*source) for source in sources)


@pytest.mark.parametrize("text", ["", " ", "a,", ",a", "a*0", "a*0.0,b"])
def test_sources_that_name_nothing(text: str) -> None:
    assert len(list(source_problems(text))) == 1

"""What a key may hold, as type annotations: `Annotated[int, Range(ge=1)]`, `Literal[...]`, `str | None`, `Refused`.

Both halves of the configuration use these: the dataclass fields of schema.py and the table of deepspeed_keys.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number; None = no bound on that side. `ge`/`le` include the bound, `gt`/`lt` do not."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: float) -> bool:
        """Return whether `value` lies within all bounds."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        """Return the bounds in words: "of at least 1", "above 0 and below 1"; LARGEST is no news to most readers."""
        most = None if self.le == LARGEST else self.le
        words = (("of at least", self.ge), ("above", self.gt), ("at most", most), ("below", self.lt))
        return " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)


@dataclass(frozen=True)
class Refused:
    """A DeepSpeed key that is known but not taken; `advice` says why, or what to set instead."""

    advice: str


# Bounds that no machine reaches, so that no check counts, and no rule makes lists, for ever. LARGEST: of every integer
# that says no size (int64).
LARGEST: Final = 2**63 - 1
_MOST_RANKS, _MOST_PARTS, _MOST_ELEMENTS = 1 << 20, 1 << 16, 1 << 30

PositiveInt = Annotated[int, Range(ge=1, le=LARGEST)]
NonNegativeInt = Annotated[int, Range(ge=0, le=LARGEST)]
Ranks = Annotated[int, Range(ge=1, le=_MOST_RANKS)]
Parts = Annotated[int, Range(ge=1, le=_MOST_PARTS)]  # layers, heads, experts
OptionalParts = Annotated[int, Range(ge=0, le=_MOST_PARTS)]
Size = Annotated[int, Range(ge=1, le=_MOST_ELEMENTS)]  # of a dimension of a tensor: tokens, features, rows
OptionalSize = Annotated[int, Range(ge=0, le=_MOST_ELEMENTS)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]

# A block maps names to nodes; a node is a block, a Refused, or the annotation of a value.
Node: TypeAlias = Any
Block: TypeAlias = Mapping[str, Node]

"""What a key may hold, as type annotations: `Annotated[int, Range(ge=1)]`, `Literal[...]`, `str | None`, `Refused`.

Both halves of the configuration use these: the dataclass fields of schema.py and the table of deepspeed_keys.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias


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
        """Return the bounds in words: "of at least 1", "above 0 and below 1"."""
        words = (("of at least", self.ge), ("above", self.gt), ("of at most", self.le), ("below", self.lt))
        return " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)


@dataclass(frozen=True)
class Refused:
    """A DeepSpeed key that is known but not taken; `advice` says why, or what to set instead."""

    advice: str


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]

# A block maps names to nodes; a node is a block, a Refused, or the annotation of a value.
Node: TypeAlias = Any
Block: TypeAlias = Mapping[str, Node]

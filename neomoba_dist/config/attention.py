"""The key `neomoba.model.attention`: one kind for all layers, or a list such as "moba*25,full*3"."""

from collections.abc import Iterator, Sequence
from typing import Final

KINDS: Final = ("moba", "full", "sliding_window")


def expand_attention(attention: str, layers: int, hybrid_layer_count: int, decoder_layers: int = 0) -> tuple[str, ...]:
    """Kind of every layer, first to last, those of a decoder after those of its encoder.

    A single kind is that of all but the last `hybrid_layer_count` layers, which are "full", in both alike. A list says
    it for every layer. `attention_problems` tells whether the value can be used at all.
    """
    if is_list(attention):
        return tuple(kind for kind, count in _items(attention) for _ in range(count))
    full = [min(hybrid_layer_count, count) for count in (layers, decoder_layers)]
    kinds = zip((layers, decoder_layers), full, strict=True)
    return tuple(kind for count, last in kinds for kind in (attention,) * (count - last) + ("full",) * last)


def list_attention(kinds: Sequence[str]) -> str:
    """The list that expands to these kinds."""
    return ",".join(f"{kind}*1" for kind in kinds)


def is_list(attention: str) -> bool:
    """Whether the value counts layers."""
    return "," in attention or "*" in attention


def attention_problems(attention: str, layers: int, hybrid_layer_count: int, decoder_layers: int = 0) -> Iterator[str]:
    """What is wrong with the value, in words that follow its name and name a value that works."""
    wrong = [item for item in attention.split(",") if not _is_item(item)]
    if wrong or (not is_list(attention) and attention not in KINDS):
        yield (
            f'"{attention}" is not known; set it to one of {", ".join(KINDS)}, or to a list such as '
            f'"moba*{max(layers - 1, 1)},full*1"'
        )
        return
    if not is_list(attention):
        return
    kinds, total = expand_attention(attention, layers, hybrid_layer_count), layers + decoder_layers
    if len(kinds) != total:
        key = "num_hidden_layers + num_decoder_layers" if decoder_layers else "num_hidden_layers"
        yield f'"{attention}" makes {len(kinds)} layers, but {key} is {total}; let the counts add up to it'
    at_end = len(kinds) - len("".join("f" if kind == "full" else "-" for kind in kinds).rstrip("f"))
    if hybrid_layer_count not in (0, at_end):
        yield (
            f'"{attention}" ends with {at_end} full layers, but neomoba.model.hybrid_layer_count is '
            f"{hybrid_layer_count}; set hybrid_layer_count to 0"
        )


def _is_item(item: str) -> bool:
    kind, star, count = item.strip().partition("*")
    # the length first: more layers than the schema allows need not be counted
    return kind in KINDS and (not star or (count.isascii() and count.isdigit() and len(count) < 6 and int(count) > 0))


def _items(attention: str) -> Iterator[tuple[str, int]]:
    for item in attention.split(","):
        kind, star, count = item.strip().partition("*")
        yield kind, int(count) if star else 1

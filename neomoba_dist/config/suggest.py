"""The message for an unknown key: the nearest known name at its level, or where else the key stands."""

import difflib
from collections.abc import Iterable, Iterator, Mapping

from neomoba_dist.config.types import Block, Node, Refused

_LISTED = 12  # names shown when nothing is near; all of them stand in ds_configs/README.md


def closest(name: str, names: Iterable[str]) -> str | None:
    """Return the known name that `name` most resembles, or None. Case and "-" against "_" do not count."""
    folded = {_fold(known): known for known in names}
    near = difflib.get_close_matches(_fold(name), list(folded))
    swapped = [known for known in near if sorted(known) == sorted(_fold(name))]  # letters swapped: surer than any ratio
    return folded[(swapped or near)[0]] if near else None


def unknown_key(root: Block, block: Block, path: tuple[str, ...], name: str) -> str:
    """Return the text for key `name`, unknown in `block` at `path`: "unknown key a.b; did you mean a.c?"."""
    message = f"unknown key {'.'.join((*path, name))}"
    elsewhere = [(found, node) for found, node in _walk(root) if _fold(found[-1]) == _fold(name)]
    if len(elsewhere) == 1:
        return f"{message}; did you mean {_pointer(*elsewhere[0])}"
    near = closest(name, block)
    if near is not None:
        return f"{message}; did you mean {_pointer((*path, near), block[near])}"
    names = [known for known, node in block.items() if not isinstance(node, Refused)]
    more = ", ... (all in ds_configs/README.md)" if len(names) > _LISTED else ""
    return f"{message}; known here: {', '.join(names[:_LISTED])}{more}"


def _pointer(path: tuple[str, ...], node: Node) -> str:
    advice = f" It is not taken: {node.advice}" if isinstance(node, Refused) else ""
    return f"{'.'.join(path)}?{advice}"


def _walk(block: Block, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Yield every known key with its path, depth first."""
    for name, node in block.items():
        yield (*path, name), node
        if isinstance(node, Mapping):
            yield from _walk(node, (*path, name))


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")

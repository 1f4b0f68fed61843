"""Context parallelism: what moves between ranks that hold different tokens of the same documents.

Three movements, which model/context_attention.py combines into strategies: tokens for heads (Ulysses, arXiv
2309.14509), keys and values whole (all-gather, or around a ring, arXiv 2310.01889), and single tokens that a rank needs
beside its own (the halo of a convolution or a window). Sending queries to the keys instead is MoBA's own.

Legend: S tokens of this rank, T tokens of all ranks of the axis, C ranks, U ranks of a Ulysses group, H heads, D head
size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neomoba_dist.parallel.comm import all_gather, all_to_all, reduce_scatter
from neomoba_dist.parallel.context_split import ContextSplit

if TYPE_CHECKING:
    from neomoba_dist.parallel.mesh import Mesh


def tokens_for_heads(parts: list[Tensor], mesh: "Mesh", axis: str, order: Tensor) -> list[Tensor]:
    """Give up heads, get tokens: [S, H, D] each -> [U * S, H / U, D] each, in one exchange. Differentiable.

    order: int64 [U * S], for each token of the result its place among the ranks' tokens laid end to end.
    """
    size, tokens = mesh[axis].size, len(parts[0])
    heads = [part.shape[1] // size for part in parts]
    sent = torch.cat([part.unflatten(1, (size, -1)) for part in parts], dim=2).transpose(0, 1).flatten(0, 1)
    received = all_to_all(sent, mesh, axis, [tokens] * size, [tokens] * size)
    return list(received.index_select(0, order).split(heads, dim=1))


def heads_for_tokens(x: Tensor, mesh: "Mesh", axis: str, order: Tensor) -> Tensor:
    """The way back: [U * S, H / U, D] -> [S, H, D]. Differentiable."""
    size = mesh[axis].size
    tokens = len(x) // size
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    received = all_to_all(x.index_select(0, place), mesh, axis, [tokens] * size, [tokens] * size)
    return received.unflatten(0, (size, tokens)).transpose(0, 1).flatten(1, 2)


def group_order(split: ContextSplit, group: int, index: int, device: torch.device) -> Tensor:
    """`order` of the Ulysses group number `index` of `group` neighbouring ranks: its tokens, ascending."""
    members = range(index * group, (index + 1) * group)
    return torch.cat([split.global_index(rank, device) for rank in members]).argsort()


def gather_tokens(x: Tensor, mesh: "Mesh", axis: str, split: ContextSplit) -> Tensor:
    """Everybody's tokens in global order: [S, ...] -> [T, ...]. Not differentiable; see `scatter_gradients`."""
    gathered = all_gather(x, mesh, axis).flatten(0, 1)
    return gathered.index_select(0, split.gathered_order(x.device))


def scatter_gradients(grad: Tensor, mesh: "Mesh", axis: str, split: ContextSplit) -> Tensor:
    """The backward of `gather_tokens`: the ranks' gradients [T, ...], summed over the axis, to the tokens' owners."""
    everything = torch.cat([split.global_index(rank, grad.device) for rank in range(split.ranks)])
    return reduce_scatter(grad.index_select(0, everything).unflatten(0, (split.ranks, -1)), mesh, axis)


def fetch_tokens(x: Tensor, wanted: Callable[[int], Tensor], mesh: "Mesh", axis: str, split: ContextSplit) -> Tensor:
    """Rows of other ranks' tokens: [S, ...] -> [n, ...], zeros where nothing is wanted. Differentiable.

    wanted: the global indices that a rank needs, int64 [n] on the CPU, -1 for none; the same function on all ranks, so
    that no index travels.
    """
    rank, ranks = mesh[axis].index, range(mesh[axis].size)
    mine = wanted(rank)
    given = [_owned_places(wanted(other), rank, split)[1] for other in ranks]
    taken = [_owned_places(mine, other, split)[0] for other in ranks]
    sent = x.index_select(0, torch.cat(given).to(x.device))
    received = all_to_all(sent, mesh, axis, [len(part) for part in given], [len(part) for part in taken])
    result = x.new_zeros((len(mine), *x.shape[1:]))
    return result.index_copy(0, torch.cat(taken).to(x.device), received)


def _owned_places(indices: Tensor, rank: int, split: ContextSplit) -> tuple[Tensor, Tensor]:
    """Which of the global indices the rank owns, and their local indices there."""
    row, place = indices // split.unit // split.ranks, indices // split.unit % split.ranks
    owner = torch.where(row % 2 == 1, split.ranks - 1 - place, place)
    chosen = ((owner == rank) & (indices >= 0)).nonzero()[:, 0]
    return chosen, (row * split.unit + indices % split.unit)[chosen]


def with_halo(x: Tensor, before: int, after: int, mesh: "Mesh", axis: str, split: ContextSplit) -> Tensor:
    """Each unit with its neighbours: [S, ...] -> [units, before + unit + after, ...], zeros past the ends.

    The first and last tokens of the flat axis have no neighbours; documents are the caller's business. Differentiable.
    """

    def wanted(rank: int) -> Tensor:
        starts = torch.tensor(split.unit_starts(rank))[:, None]
        sides = (torch.arange(-before, 0), torch.arange(split.unit, split.unit + after))
        index = starts + torch.cat(sides)
        return index.masked_fill((index < 0) | (index >= split.num_tokens), -1).flatten()

    units = x.unflatten(0, (split.units, split.unit))
    if before + after == 0:
        return units
    halo = fetch_tokens(x, wanted, mesh, axis, split).unflatten(0, (split.units, before + after))
    return torch.cat((halo[:, :before], units, halo[:, before:]), dim=1)

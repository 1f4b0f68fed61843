"""Context parallelism: what moves between ranks that hold different tokens of the same documents.

Three movements, which model/attention/context/strategy.py combines into strategies: tokens for heads (Ulysses, arXiv
2309.14509), keys and values whole (all-gather, or around a ring, arXiv 2310.01889), and single tokens that a rank needs
beside its own (the halo of a convolution or a window). Sending queries to the keys instead is MoBA's own.

Legend: S tokens of this rank, T tokens of all ranks of the axis, C ranks, U ranks of a Ulysses group, H heads, D head
size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from neomoba_dist.parallel.comm import all_gather, all_to_all, reduce_scatter
from neomoba_dist.parallel.context_split import ContextSplit
from neomoba_dist.parallel.mesh import Mesh


def tokens_for_heads(parts: list[Tensor], mesh: Mesh, axis: str, order: Tensor) -> list[Tensor]:
    """Give up heads, get tokens: [S, H, D] each -> [U * S, H / U, D] each, in one exchange. Differentiable.

    order: int64 [U * S], for each token of the result its place among the ranks' tokens laid end to end.
    """
    size, tokens = mesh[axis].size, len(parts[0])
    heads = [part.shape[1] // size for part in parts]
    sent = torch.cat([part.unflatten(1, (size, -1)) for part in parts], dim=2).transpose(0, 1).flatten(0, 1)
    received = all_to_all(sent, mesh, axis, [tokens] * size, [tokens] * size)
    return list(received.index_select(0, order).split(heads, dim=1))


def heads_for_tokens(x: Tensor, mesh: Mesh, axis: str, order: Tensor) -> Tensor:
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


def gather_tokens(x: Tensor, mesh: Mesh, axis: str, split: ContextSplit) -> Tensor:
    """Everybody's tokens in global order: [S, ...] -> [T, ...]. Not differentiable; see `scatter_gradients`."""
    return in_global_order(all_gather(x, mesh, axis), split)


def in_global_order(gathered: Tensor, split: ContextSplit) -> Tensor:
    """[C, S, ...], the ranks' tokens, -> [T, ...]."""
    return gathered.flatten(0, 1).index_select(0, split.gathered_order(gathered.device))


def scatter_gradients(grad: Tensor, mesh: Mesh, axis: str, split: ContextSplit) -> Tensor:
    """The backward of `gather_tokens`: the ranks' gradients [T, ...], summed over the axis, to the tokens' owners."""
    by_owner = grad.index_select(0, split.gathered_index(grad.device))
    return reduce_scatter(by_owner.unflatten(0, (split.ranks, -1)), mesh, axis)


def fetch_tokens(x: Tensor, wanted: Callable[[int], Tensor], mesh: Mesh, axis: str, split: ContextSplit) -> Tensor:
    """Rows of other ranks' tokens: [S, ...] -> [n, ...]. Differentiable.

    wanted: the global indices that a rank needs, int64 [n] on the CPU, each once; the same function on all ranks, so
    that no index travels.
    """
    rank, ranks = mesh[axis].index, range(mesh[axis].size)
    given = []
    for other in ranks:
        owner, local = split.owners_of(wanted(other))
        given.append(local[owner == rank])
    owner, _ = split.owners_of(wanted(rank))
    sent = x.index_select(0, torch.cat(given).to(x.device))
    counts = [int((owner == other).sum()) for other in ranks]
    received = all_to_all(sent, mesh, axis, [len(part) for part in given], counts)
    order = owner.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return received.index_select(0, place.to(x.device))


def with_halo(x: Tensor, before: int, after: int, mesh: Mesh, axis: str, split: ContextSplit) -> Tensor:
    """Each unit with its neighbours: [S, ...] -> [units, before + unit + after, ...], zeros past the ends.

    The first and last tokens of the flat axis have no neighbours; documents are the caller's business. Differentiable.
    A token that several units of a rank need travels once, and one that it holds itself not at all: what a rank
    receives is never more than everybody's tokens.
    """

    def neighbours(rank: int) -> Tensor:
        sides = (torch.arange(-before, 0), torch.arange(split.unit, split.unit + after))
        return torch.tensor(split.unit_starts(rank))[:, None] + torch.cat(sides)

    def foreign(rank: int) -> Tensor:
        index = neighbours(rank).unique()
        index = index[(index >= 0) & (index < split.num_tokens)]
        return index[split.owners_of(index)[0] != rank]

    units = x.unflatten(0, (split.units, split.unit))
    if before + after == 0:
        return units
    rank = mesh[axis].index
    index, wanted = neighbours(rank), foreign(rank)
    owner, local = split.owners_of(index.clamp(0, split.num_tokens - 1))
    row = torch.where(owner == rank, local, len(x) + torch.searchsorted(wanted, index))
    row[(index < 0) | (index >= split.num_tokens)] = len(x) + len(wanted)
    known = torch.cat((x, fetch_tokens(x, foreign, mesh, axis, split), x.new_zeros(1, *x.shape[1:])))
    halo = known.index_select(0, row.flatten().to(x.device)).unflatten(0, (split.units, before + after))
    return torch.cat((halo[:, :before], units, halo[:, before:]), dim=1)

"""Choices of experts, and rows sorted by expert, on one rank: which row belongs to which token, and moving values
between the two.

Shape letters: S tokens, H hidden size, K experts per token, E experts, P rows.
"""

from typing import NamedTuple

import torch

DROPPED = -1  # a choice that no expert takes: padding, or beyond the capacity


class RowOrder(NamedTuple):
    """pair_P: int64, the (token * K + choice) of each row, sorted by expert; DROPPED where the row only fills up.

    slot_SK: int64, the row of each choice, DROPPED where it has none. full: no DROPPED in either.
    """

    pair_P: torch.Tensor
    slot_SK: torch.Tensor
    full: bool


def top_experts(scores_SE: torch.Tensor, count: int, valid_S: torch.Tensor) -> torch.Tensor:
    """The `count` best experts of every token, best first: int64 [S, K], DROPPED for padding and for scores of -inf."""
    best, expert_SK = scores_SE.topk(count, dim=1)
    return torch.where((best > -torch.inf) & valid_S[:, None], expert_SK, DROPPED)


def choice_mask(expert_SK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int32 [S, E]: 1 where the token chooses the expert, else 0. DROPPED counts nowhere."""
    mask = torch.zeros(len(expert_SK), num_experts + 1, dtype=torch.int32, device=expert_SK.device)
    return mask.scatter_(1, torch.where(expert_SK < 0, num_experts, expert_SK), 1)[:, :num_experts]


def count_choices(expert_SK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many choices fall on each expert: int64 [E]."""
    expert = torch.where(expert_SK < 0, num_experts, expert_SK).flatten()
    return torch.bincount(expert, minlength=num_experts + 1)[:num_experts]


def order_by_expert(expert_SK: torch.Tensor, counts_E: torch.Tensor, rows: int, fill: int = 0) -> RowOrder:
    """The order of rows within which each expert's are next to each other, tokens ascending.

    expert_SK: int64, the experts of every token, DROPPED for none. rows: how many there are, sum of `counts_E`, or of
    E * fill. fill: every expert gets exactly so many rows, empty ones where it has fewer (0: as many as there are).
    """
    num_experts = len(counts_E)
    expert = torch.where(expert_SK < 0, num_experts, expert_SK).flatten()
    pair_P = expert.argsort(stable=True)
    pair_P = _filled(pair_P, counts_E, fill) if fill else pair_P[:rows]
    # one more than there are: where rows that only fill up write
    slot = torch.full((len(expert) + 1,), DROPPED, device=expert.device)
    slot[torch.where(pair_P == DROPPED, len(expert), pair_P)] = torch.arange(len(pair_P), device=expert.device)
    return RowOrder(pair_P, slot[:-1].view_as(expert_SK), full=not fill and len(pair_P) == len(expert))


def _filled(pair: torch.Tensor, counts_E: torch.Tensor, fill: int) -> torch.Tensor:
    """The sorted pairs with every expert's part brought to `fill` rows."""
    place = torch.arange(fill, device=pair.device)
    start = (counts_E.cumsum(0) - counts_E)[:, None]
    index = (start + place).clamp(max=len(pair) - 1)
    return torch.where(place < counts_E[:, None], pair[index], DROPPED).flatten()


def spread(x_SH: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """x [S, H] -> a new tensor of one row per pair [P, H]; a row that only fills up is zero."""
    rows = x_SH.index_select(0, order.pair_P.clamp(min=0) // order.slot_SK.shape[1])
    return rows if order.full else rows.mul_((order.pair_P >= 0)[:, None])


def spread_backward(grad_PH: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """[P, H] -> [S, H]: adds in the order of choices."""
    result = _rows_of_choice(grad_PH, order, 0)
    for choice in range(1, order.slot_SK.shape[1]):
        result += _rows_of_choice(grad_PH, order, choice)
    return result


def combine(rows_PH: torch.Tensor, weight_SK: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """Rows [P, H] and weights [S, K] -> their weighted sums [S, H], added in the weights' dtype, cast to the rows'."""
    result = _rows_of_choice(rows_PH, order, 0).to(weight_SK.dtype).mul_(weight_SK[:, :1])
    for choice in range(1, weight_SK.shape[1]):
        part = _rows_of_choice(rows_PH, order, choice).to(weight_SK.dtype)
        result.addcmul_(part, weight_SK[:, choice, None])
    return result.to(rows_PH.dtype)


def combine_backward(
    grad_SH: torch.Tensor, rows_PH: torch.Tensor, weight_SK: torch.Tensor, order: RowOrder
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows [P, H] and of the weights [S, K]."""
    exact_SH = grad_SH.to(weight_SK.dtype)
    grad_weight = torch.empty_like(weight_SK)
    for choice in range(weight_SK.shape[1]):
        part = _rows_of_choice(rows_PH, order, choice).to(weight_SK.dtype)
        torch.sum(part.mul_(exact_SH), dim=1, out=grad_weight[:, choice])
    weight_P = weight_SK.flatten()[order.pair_P.clamp(min=0)]
    return spread(grad_SH, order).mul_(weight_P[:, None].to(rows_PH.dtype)), grad_weight


def _rows_of_choice(rows_PH: torch.Tensor, order: RowOrder, choice: int) -> torch.Tensor:
    """A new tensor: [P, H] -> [S, H], zero for tokens whose choice has no row."""
    slot_S = order.slot_SK[:, choice]
    if len(rows_PH) == 0:
        return rows_PH.new_zeros(len(slot_S), rows_PH.shape[1])
    rows = rows_PH.index_select(0, slot_S.clamp(min=0))
    return rows if order.full else rows.mul_((slot_S >= 0)[:, None])

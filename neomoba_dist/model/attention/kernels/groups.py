"""How many heads MoBA's kernels on a GPU work on at a time, so that what they hold in between stays small.

FlashAttention's forward and backward pass holds six times the size of q in half precision beside its inputs, with as
many KV heads as query heads: the output, dq, dk, dv, and float32 sums of dq. MoBA holds the first four too; what comes
on top is made for some heads, used, and made again for the next ones. The limit leaves a whole pass at most 1.2 times
what FlashAttention holds at the lengths where that matters.
"""

from __future__ import annotations

from torch import Tensor

LEAST_LIMIT = 256 << 20  # bytes; below, more launches would cost more than the memory is worth
LIMIT_PER_ELEMENT = 6  # bytes for each element of q: the 4 of FlashAttention's sums, and 2 of the 2.4 that 1.2 allows


def head_groups(q: Tensor, heads: int, bytes_of_one: int) -> int:
    """The fewest equal groups of heads that keep to the limit, or one head each.

    heads: query or KV heads. bytes_of_one: what is held between the kernels of one of them.
    """
    limit = max(LEAST_LIMIT, LIMIT_PER_ELEMENT * q.numel())
    divisors = (count for count in range(1, heads) if heads % count == 0)
    return next((count for count in divisors if heads // count * bytes_of_one <= limit), heads)

"""Normal numbers by number: number i of a key is the same on every device, for any threads, in any slice.

SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators") makes 64 random bits of (key, i); two
16-bit parts of them choose two quantiles of the normal distribution, and the sum of two normal numbers is one. Whole
numbers, look-ups, one exact sum and one product: nothing that is rounded differently elsewhere.
"""

import functools
import math
from statistics import NormalDist

import torch

_QUANTILES = 1 << 16
_GRID = 2.0**-20  # of the quantiles: below 2^23 steps, so that float32 holds a sum of two exactly


def signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return (word & (1 << 64) - 1) - ((word & 1 << 63) << 1)


GAMMA, _MIX_30, _MIX_27 = map(signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@functools.cache
def quantiles(device: torch.device) -> tuple[torch.Tensor, float]:
    """The 2^16 quantiles of the normal distribution, float32 on a grid of 2^-20, and their standard deviation."""
    lower = [NormalDist().inv_cdf((i + 0.5) / _QUANTILES) for i in range(_QUANTILES // 2)]
    half = (torch.tensor(lower, dtype=torch.float64) / _GRID).round_() * _GRID
    table = torch.cat((half, -half.flip(0)))
    return table.float().to(device), math.sqrt(float(half.square().mean()))


def scramble(x: torch.Tensor) -> torch.Tensor:
    """63 random bits of int64 numbers, in their place. Number i of a key is the result of i * GAMMA + key."""
    for shift, factor in ((30, _MIX_30), (27, _MIX_27)):
        # int64 shifts bring in the sign, which the mask takes off again
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    return x.bitwise_xor_(x >> 31)  # which takes the sign off, and mixes it into the bits below


def normal(number: torch.Tensor, key: int, std: float) -> torch.Tensor:
    """Draws of N(0, std^2), float32, of the shape of `number`, int64, which is overwritten. key: any 64 bits."""
    table, spread = quantiles(number.device)
    x = scramble(number.mul_(GAMMA).add_(signed(key)))  # of this only the low 32 bits are used
    second = table[(x >> 16).bitwise_and_(_QUANTILES - 1)]
    return table[x.bitwise_and_(_QUANTILES - 1)].add_(second).mul_(std / (math.sqrt(2.0) * spread))

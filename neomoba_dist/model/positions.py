"""How positions enter the model: rotary embedding and its scalings, additive tables, and biases on the scores.

Shape letters: T tokens, S tokens of this rank, H hidden size, N heads of this rank, D head size, Q queries, K keys.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.parallel.comm import sum_gradient

YARN_BETA_FAST, YARN_BETA_SLOW = 32, 1  # rotations within the trained length: above fast kept, below slow interpolated
T5_BUCKETS, T5_MAX_DISTANCE = 32, 128


def rope_cos_sin(
    position_ids: torch.Tensor, frequencies_D: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * frequency (arXiv 2104.09864, section 3.4), times `temperature`: float64 [T, D/2].

    The angle is taken in float64: in float32 it would be off by up to 0.06 rad at position one million.
    """
    angle_TD = position_ids.to(torch.float64)[:, None] * frequencies_D
    return angle_TD.cos() * temperature, angle_TD.sin() * temperature


def apply_rope(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of every head, in at least float32; returns x's dtype and shape."""
    dtype = torch.promote_types(x_TND.dtype, torch.float32)
    cos, sin = cos_TD.to(dtype)[:, None, :], sin_TD.to(dtype)[:, None, :]
    first, second = x_TND.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TND.dtype)


def sliding_rope(config: ModelConfig) -> ModelConfig:
    """The model whose rotation sliding-window layers have: with a base of their own it is not scaled, because no
    distance in a window was unseen in training (as in ModernBERT and Gemma 3)."""
    if config.sliding_rope_theta is None:
        return config
    return dataclasses.replace(
        config, rope_theta=config.sliding_rope_theta, rope_scaling_type=None, rope_scaling_factor=1.0
    )


def rope_tables(
    position_ids: torch.Tensor, config: ModelConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope_cos_sin` of a model in the dtype that `apply_rope` computes in for states of `dtype`: two [T, D/2]."""
    assert config.head_dim is not None  # resolved by ModelConfig
    frequencies = rope_frequencies(config, config.head_dim, position_ids.device)
    cos, sin = rope_cos_sin(position_ids, frequencies, rope_temperature(config))
    exact = torch.promote_types(dtype, torch.float32)
    return cos.to(exact), sin.to(exact)


def rope_frequencies(config: ModelConfig, head_dim: int, device: torch.device | None = None) -> torch.Tensor:
    """Radians per position of every pair, float64 [D/2]: theta^(-2i/D), slowed down as `rope_scaling_type` says.

    linear: all divided by the factor s (position interpolation, arXiv 2306.15595). ntk: theta * s^(D/(D-2)), which
    leaves the fastest pair alone and divides the slowest by s (NTK-aware, arXiv 2309.00071, section 3.1). yarn: pairs
    that turn often within the trained length stay, slow ones are divided by s, with a ramp between (section 3.2). The
    ramp is linear in the pair's index between whole indices, as in the authors' code and in all published YaRN
    models; the paper's own formula is linear in the number of turns.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    theta, factor = config.rope_theta, config.rope_scaling_factor
    if config.rope_scaling_type == "ntk":
        theta *= factor ** (head_dim / (head_dim - 2))
    frequencies = theta**-exponent
    if config.rope_scaling_type == "linear":
        return frequencies / factor
    if config.rope_scaling_type == "yarn":
        low, high = _yarn_ramp(config, head_dim)
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float64, device=device) - low) / (high - low)).clamp(0, 1)
        return frequencies * (1 - ramp) + frequencies / factor * ramp
    return frequencies


def _yarn_ramp(config: ModelConfig, head_dim: int) -> tuple[float, float]:
    """Indices of the last pair that is kept and of the first one that is fully interpolated."""
    trained = config.original_max_position_embeddings or config.max_position_embeddings

    def pair_with(rotations: int) -> float:
        return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_with(YARN_BETA_FAST)), 0)
    high = min(math.ceil(pair_with(YARN_BETA_SLOW)), head_dim - 1)
    return low, high if high != low else high + 0.001


def rope_temperature(config: ModelConfig) -> float:
    """What queries and keys are multiplied with: YaRN's 0.1 ln(s) + 1 (arXiv 2309.00071, section 3.4), else 1."""
    return 0.1 * math.log(config.rope_scaling_factor) + 1.0 if config.rope_scaling_type == "yarn" else 1.0


class PositionEmbedding(nn.Module):
    """Adds a learned or sinusoidal position to the embedding: State -> State (model/block.py).

    A layer of its own, because the embedding may be tied to the head, and tied pipeline layers share all they hold.
    """

    def __init__(self, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        self.mesh = init.mesh
        self.weight: nn.Parameter | None = None
        if config.position_embedding == "learned":
            # "embedding." keeps it out of weight decay, like the token table
            self.weight = init.weight("embedding.positions", (config.max_position_embeddings, config.hidden_size))

    def forward(self, state: tuple[Any, ...]) -> tuple[Any, ...]:
        x_SH, aux_loss, position_ids, *rest = state
        here = position_ids.clamp(min=0)  # padding is -1
        if self.mesh.sequence_parallel:
            here = here.narrow(0, self.mesh["tp"].index * len(x_SH), len(x_SH))
        if self.weight is None:
            return x_SH + sinusoids(here, x_SH.shape[1]).to(x_SH.dtype), aux_loss, position_ids, *rest
        weight = sum_gradient(self.weight, self.mesh, "tp") if self.mesh.sequence_parallel else self.weight
        return x_SH + F.embedding(here, weight), aux_loss, position_ids, *rest


def sinusoids(position_ids: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """sin and cos of position / 10000^(2i/H) in turn (arXiv 1706.03762, section 3.5): float64 [T, H]."""
    exponent = torch.arange(0, hidden_size, 2, dtype=torch.float64, device=position_ids.device) / hidden_size
    angle = position_ids.to(torch.float64)[:, None] * 10000.0**-exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slope of every head, float64 [heads]: 2^(-8i/n) for n = 2^k heads (ALiBi, arXiv 2108.12409, section 3).

    For other numbers the authors' code takes those of the next smaller power of two, then every second one of the
    next larger.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def slopes(n: int) -> list[float]:
        return [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]

    return torch.tensor(slopes(power) + slopes(2 * power)[::2][: num_heads - power], dtype=torch.float64)


class ScoreBias(nn.Module):
    """What is added to the scores of a key at a distance from its query, for the query heads of this rank.

    alibi: -slope * |distance|, symmetric for a bidirectional model as the authors advise for encoders. t5_relative: one
    learned number per head and bucket of distances (T5, arXiv 1910.10683, section 2.1).
    """

    def __init__(self, name: str, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        tp, heads = init.mesh["tp"], config.num_attention_heads
        self.table: nn.Parameter | None = None
        # the slopes [N], or the bucket of every distance [2 T5_MAX_DISTANCE + 1]
        self.constants = alibi_slopes(heads).tensor_split(tp.size)[tp.index]
        if config.position_embedding == "t5_relative":
            self.table = init.weight(f"{name}.table", (heads, T5_BUCKETS), shard_dim=0)
            distances = torch.arange(-T5_MAX_DISTANCE, T5_MAX_DISTANCE + 1)
            self.constants = t5_buckets(distances, config.causal)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """The constants follow the module to its device, but keep their dtype, unlike the buffers of a half model."""
        super()._apply(fn, recurse)
        self.constants = self.constants.to(fn(self.constants).device)
        return self

    @classmethod
    def of(cls, name: str, config: ModelConfig, init: Initializer) -> Self | None:
        """The bias of the config's position scheme, None where it has none."""
        return cls(name, config, init) if config.position_embedding in ("alibi", "t5_relative") else None

    def weight(self, device: torch.device) -> torch.Tensor:
        """What `bias_scores` computes from: slopes [N], or biases of the distances [N, 2 T5_MAX_DISTANCE + 1]."""
        constants = self.constants.to(device)  # there already, if the module was moved
        if self.table is None:
            return constants
        # at least float32: here the gradients of all distances of a bucket are added up
        return self.table.to(torch.promote_types(self.table.dtype, torch.float32))[:, constants]


def bias_scores(weight: torch.Tensor, distance_QK: torch.Tensor) -> torch.Tensor:
    """[N, Q, K] from `ScoreBias.weight` and distances (query position - key position), in the dtype of the weight."""
    if weight.dim() == 1:
        return weight[:, None, None] * -distance_QK.abs().to(weight.dtype)
    return weight[:, distance_QK.clamp(-T5_MAX_DISTANCE, T5_MAX_DISTANCE) + T5_MAX_DISTANCE]


def t5_buckets(distance: torch.Tensor, causal: bool) -> torch.Tensor:
    """Bucket of every distance (query position - key position): int64 of the same shape, below T5_BUCKETS.

    Half of the buckets hold one distance each, the others ranges that grow geometrically up to T5_MAX_DISTANCE, and
    the last one all beyond. A bidirectional model keeps half of all buckets for keys after the query. On the CPU.
    """
    number = T5_BUCKETS if causal else T5_BUCKETS // 2
    buckets = torch.tensor(_t5_table(number))
    if causal:
        return buckets[distance.clamp(0, T5_MAX_DISTANCE)]
    return buckets[distance.abs().clamp(max=T5_MAX_DISTANCE)] + number * (distance < 0)


@functools.cache
def _t5_table(number: int) -> list[int]:
    """Bucket of the distances 0 to T5_MAX_DISTANCE; whole numbers, so that no rounding moves a border."""
    exact = number // 2
    spans = number - exact

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        # the largest i with distance >= exact * (max / exact)^(i / spans)
        reached = [i for i in range(spans) if distance**spans * exact**i >= exact**spans * T5_MAX_DISTANCE**i]
        return exact + reached[-1]

    return [bucket(distance) for distance in range(T5_MAX_DISTANCE + 1)]

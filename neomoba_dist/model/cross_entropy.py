"""Vocabulary-parallel cross entropy in token chunks: the logits of more than one chunk never exist.

Each tp rank holds a part of the vocabulary and computes its logits; maximum, normaliser and the target's logit are
combined over tp, once for all tokens. The backward pass computes the logits again. megatron-core's function keeps all
logits in float32 and has no ignore index, which is why this one exists.

Shape letters: N tokens, C tokens of one chunk, H hidden size, v vocabulary rows of this rank (padding included).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from neomoba_dist.model.init import shard_of
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.mesh import Mesh

CHUNK_TOKENS = 1024  # 1024 x 30,522 float32 logits are 125 MB; larger chunks were not faster


class ChunkFunctions(NamedTuple):
    """What is computed of the logits of one chunk: `chunk_statistics` and `chunk_gradient`, or both compiled.

    Positional arguments have one row for each token, and so a first dimension that differs between chunks.
    """

    statistics: Callable[..., torch.Tensor]
    gradient: Callable[..., torch.Tensor]


def chunk_statistics(
    hidden_CH: torch.Tensor,
    labels_C: torch.Tensor,
    *,
    weight_vH: torch.Tensor,
    bias_v: torch.Tensor | None,
    offset: int,
    length: int,
) -> torch.Tensor:
    """Of this rank's logits: the largest, the sum of exp(logit - largest), the target's or 0. [3, C]."""
    dtype = torch.promote_types(hidden_CH.dtype, torch.float32)
    logits_Cv = chunk_logits(hidden_CH, weight_vH, length, dtype, bias_v)
    target, owned = local_targets(labels_C, offset, length)
    target_logit = logits_Cv.gather(1, target[:, None]).squeeze(1).where(owned, 0)  # padding rows are -inf
    # a rank may have padding alone, and -inf - -inf is not a number
    largest = logits_Cv.amax(dim=-1).clamp(min=torch.finfo(logits_Cv.dtype).min)
    normaliser = logits_Cv.sub_(largest[:, None]).exp_().sum(dim=-1)
    return torch.stack((largest, normaliser, target_logit))


def chunk_gradient(
    hidden_CH: torch.Tensor,
    labels_C: torch.Tensor,
    log_normaliser_C: torch.Tensor,
    grad_C: torch.Tensor,
    *,
    weight_vH: torch.Tensor,
    bias_v: torch.Tensor | None,
    offset: int,
    length: int,
) -> torch.Tensor:
    """Gradients of this rank's logits, from those of the losses: [C, v] in the dtype of the hidden states."""
    logits_Cv = chunk_logits(hidden_CH, weight_vH, length, log_normaliser_C.dtype, bias_v)
    (target, owned), dtype = local_targets(labels_C, offset, length), hidden_CH.dtype
    target_logit = logits_Cv.gather(1, target[:, None]).squeeze(1)
    at_target = ((target_logit - log_normaliser_C).exp() - owned.to(logits_Cv.dtype)) * grad_C
    grad_Cv = logits_Cv.sub_(log_normaliser_C[:, None]).exp_().mul_(grad_C[:, None]).to(dtype)
    return grad_Cv.scatter_(1, target[:, None], at_target[:, None].to(dtype))


EAGER = ChunkFunctions(chunk_statistics, chunk_gradient)


class OutputMatrix(NamedTuple):
    """What logits are made with: this rank's vocabulary rows [v, H] and, if the model has them, their biases [v].

    Parameters made by `Initializer.weight` with shard_dim 0; `shard_of` tells which rows are real.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None = None


def vocab_parallel_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_vH: nn.Parameter,
    labels_N: torch.Tensor,
    mesh: Mesh,
    functions: ChunkFunctions = EAGER,
    bias_v: nn.Parameter | None = None,
) -> torch.Tensor:
    """-log softmax(hidden W^T + b)[label] for every token.

    hidden_NH: all tokens on every tp rank; its gradient is this rank's part of the sum over tp. weight_vH, bias_v: see
    `OutputMatrix`. labels_N: int64 in [0, vocab_size), no ignored ones. Returns [N], float32 (float64 for float64
    input).
    """
    shard = shard_of(weight_vH)
    return _CrossEntropy.apply(hidden_NH, weight_vH, bias_v, labels_N, mesh, functions, shard.start[0], shard.extent[0])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        mesh: Mesh,
        functions: ChunkFunctions,
        offset: int,
        length: int,
    ) -> torch.Tensor:
        matrix = _matrix(weight, bias, offset, length)
        largest, normaliser, target_logit = statistics_over_vocabulary(hidden, labels, mesh, functions, matrix)
        log_normalisers = normaliser.log() + largest
        ctx.save_for_backward(hidden, weight, bias, labels, log_normalisers)
        ctx.functions, ctx.offset, ctx.length = functions, offset, length
        return log_normalisers - target_logit

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, log_normalisers = ctx.saved_tensors
        matrix, dtype = _matrix(weight, bias, ctx.offset, ctx.length), log_normalisers.dtype
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
        for part in chunks(len(hidden)):
            of_tokens = (x[part] for x in (hidden, labels, log_normalisers, grads[0]))
            grad_logits = ctx.functions.gradient(*of_tokens, **matrix)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=dtype)
        grad_bias = grad_bias if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, *(None,) * 5


@torch.no_grad()
def vocab_parallel_scores(
    hidden_NH: torch.Tensor,
    weight_vH: nn.Parameter,
    labels_N: torch.Tensor,
    mesh: Mesh,
    bias_v: nn.Parameter | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log softmax(hidden W^T + b)[label], whether no other token has a larger logit) of every token, on all tp ranks.

    Arguments as for `vocab_parallel_cross_entropy`. Returns [N] float32 (float64 for float64 input) and bool [N].
    """
    shard = shard_of(weight_vH)
    matrix = _matrix(weight_vH, bias_v, shard.start[0], shard.extent[0])
    largest, normaliser, target_logit = statistics_over_vocabulary(hidden_NH, labels_N, mesh, EAGER, matrix)
    return target_logit - largest - normaliser.log(), target_logit >= largest


def _matrix(weight_vH: torch.Tensor, bias_v: torch.Tensor | None, offset: int, length: int) -> dict[str, Any]:
    """Keyword arguments of `ChunkFunctions`."""
    bias_v = None if bias_v is None else bias_v.detach()
    return {"weight_vH": weight_vH.detach(), "bias_v": bias_v, "offset": offset, "length": length}


def statistics_over_vocabulary(
    hidden_NH: torch.Tensor, labels_N: torch.Tensor, mesh: Mesh, functions: ChunkFunctions, matrix: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`chunk_statistics` of all tokens and all tp ranks' logits, [N] each. matrix: its keyword arguments."""
    own_3N = hidden_NH.new_empty(3, len(hidden_NH), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
    for part in chunks(len(hidden_NH)):
        own_3N[:, part] = functions.statistics(hidden_NH[part], labels_N[part], **matrix)
    own_largest, own_normaliser, own_target = own_3N
    largest = all_reduce(own_largest, mesh, "tp", op="max")
    normaliser, target_logit = all_reduce(
        torch.stack((own_normaliser * (own_largest - largest).exp(), own_target)), mesh, "tp"
    )
    return largest, normaliser, target_logit


def chunks(num_tokens: int) -> Iterator[slice]:
    """All tokens, so many at a time."""
    return (slice(start, start + CHUNK_TOKENS) for start in range(0, num_tokens, CHUNK_TOKENS))


def chunk_logits(
    hidden_CH: torch.Tensor,
    weight_vH: torch.Tensor,
    length: int,
    dtype: torch.dtype,
    bias_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [C, v] with the vocabulary's padding rows at -inf, so that no layout sees them."""
    logits_Cv = (hidden_CH @ weight_vH.t()).to(dtype)
    if bias_v is not None:
        logits_Cv += bias_v
    logits_Cv[:, length:] = float("-inf")
    return logits_Cv


def local_targets(labels_C: torch.Tensor, offset: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's row on this rank (0 if another rank owns it) and whether this rank owns it."""
    local = labels_C - offset
    owned = (local >= 0) & (local < length)
    return local.where(owned, 0), owned

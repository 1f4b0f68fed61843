"""Vocabulary-parallel cross entropy in token chunks: the logits of more than one chunk never exist.

Each tp rank holds a part of the vocabulary and computes its logits; maximum, normaliser and the target's logit are
combined over tp. The backward pass computes the logits again. megatron-core's function keeps all logits in float32
and has no ignore index, which is why this one exists.

Shape letters: N tokens, C tokens of one chunk, H hidden size, v vocabulary rows of this rank (padding included).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from neomoba_dist.model.init import shard_of
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.mesh import Mesh

CHUNK_TOKENS = 1024  # 1024 x 30,522 float32 logits are 125 MB; larger chunks were not faster


def vocab_parallel_cross_entropy(
    hidden_NH: torch.Tensor, weight_vH: nn.Parameter, labels_N: torch.Tensor, mesh: Mesh
) -> torch.Tensor:
    """-log softmax(hidden W^T)[label] for every token.

    hidden_NH: all tokens on every tp rank; its gradient is this rank's part of the sum over tp. weight_vH: this rank's
    vocabulary rows, a parameter made by `Initializer.weight` with shard_dim 0 (`shard_of` tells which rows are real).
    labels_N: int64 in [0, vocab_size), no ignored ones. Returns [N], float32 (float64 for float64 input).
    """
    shard = shard_of(weight_vH)
    return _CrossEntropy.apply(hidden_NH, weight_vH, labels_N, mesh, shard.start[0], shard.extent[0])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        mesh: Mesh,
        offset: int,
        length: int,
    ) -> torch.Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses, log_normalisers = hidden.new_empty(len(hidden), dtype=dtype), hidden.new_empty(len(hidden), dtype=dtype)
        for part in chunks(len(hidden)):
            logits = chunk_logits(hidden[part], weight, length, dtype)
            target, owned = local_targets(labels[part], offset, length)
            largest = all_reduce(logits.amax(dim=-1), mesh, "tp", op="max")
            normaliser = (logits - largest[:, None]).exp_().sum(dim=-1)
            target_logit = logits.gather(1, target[:, None]).squeeze(1).where(owned, 0)  # padding rows are -inf
            normaliser, target_logit = all_reduce(torch.stack((normaliser, target_logit)), mesh, "tp")
            log_normalisers[part] = normaliser.log() + largest
            losses[part] = log_normalisers[part] - target_logit
        ctx.save_for_backward(hidden, weight, labels, log_normalisers)
        ctx.offset, ctx.length = offset, length
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, labels, log_normalisers = ctx.saved_tensors
        dtype = log_normalisers.dtype
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=dtype)
        for part in chunks(len(hidden)):
            logits = chunk_logits(hidden[part], weight, ctx.length, dtype)
            grad_logits = logits.sub_(log_normalisers[part, None]).exp_()
            target, owned = local_targets(labels[part], ctx.offset, ctx.length)
            grad_logits.scatter_add_(1, target[:, None], -owned[:, None].to(dtype))
            grad_logits = (grad_logits * grads[0][part, None]).to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


@torch.no_grad()
def vocab_parallel_scores(
    hidden_NH: torch.Tensor, weight_vH: nn.Parameter, labels_N: torch.Tensor, mesh: Mesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log softmax(hidden W^T)[label], whether no other token has a larger logit) for every token, on every tp rank.

    Arguments as for `vocab_parallel_cross_entropy`. Returns [N] float32 (float64 for float64 input) and bool [N].
    """
    shard = shard_of(weight_vH)
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    scores, first = hidden_NH.new_empty(len(hidden_NH), dtype=dtype), torch.empty_like(labels_N, dtype=torch.bool)
    for part in chunks(len(hidden_NH)):
        logits = chunk_logits(hidden_NH[part], weight_vH, shard.extent[0], dtype)
        target, owned = local_targets(labels_N[part], shard.start[0], shard.extent[0])
        largest = all_reduce(logits.amax(dim=-1), mesh, "tp", op="max")
        target_logit = logits.gather(1, target[:, None]).squeeze(1).where(owned, 0)
        normaliser = logits.sub_(largest[:, None]).exp_().sum(dim=-1)
        del logits  # one chunk is held, also while the next one is computed
        normaliser, target_logit = all_reduce(torch.stack((normaliser, target_logit)), mesh, "tp")
        scores[part] = target_logit - largest - normaliser.log()
        first[part] = target_logit >= largest
    return scores, first


def chunks(num_tokens: int) -> Iterator[slice]:
    """All tokens, so many at a time."""
    return (slice(start, start + CHUNK_TOKENS) for start in range(0, num_tokens, CHUNK_TOKENS))


def chunk_logits(hidden_CH: torch.Tensor, weight_vH: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits [C, v] with the vocabulary's padding rows at -inf, so that no layout sees them."""
    logits_Cv = (hidden_CH @ weight_vH.t()).to(dtype)
    logits_Cv[:, length:] = float("-inf")
    return logits_Cv


def local_targets(labels_C: torch.Tensor, offset: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's row on this rank (0 if another rank owns it) and whether this rank owns it."""
    local = labels_C - offset
    owned = (local >= 0) & (local < length)
    return local.where(owned, 0), owned

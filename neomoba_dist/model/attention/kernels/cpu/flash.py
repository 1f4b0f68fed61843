"""torch's flash attention on the CPU for one document: full attention, and MoBA on documents too small to gather.

It is what SDPA runs on the CPU, called directly because only so it also returns the logsumexp. Grouped queries pass as
[Hkv, G, tokens, D] against an expanded view of the keys, so KV heads are not repeated in memory.

Legend: T queries, S keys, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def group_queries(x_THD: Tensor, num_kv_heads: int) -> Tensor:
    """[T, Hq, ...] -> [Hkv, G, T, ...], a view."""
    grouped = x_THD.unflatten(1, (num_kv_heads, -1))
    return grouped.permute(1, 2, 0, *range(3, grouped.dim()))


def ungroup_queries(x_HGTD: Tensor) -> Tensor:
    """[Hkv, G, T, ...] -> [T, Hq, ...]."""
    return x_HGTD.permute(2, 0, 1, *range(3, x_HGTD.dim())).flatten(1, 2)


def expand_keys(k_SHD: Tensor, group: int) -> Tensor:
    """[S, Hkv, D] -> [Hkv, G, S, D], a view."""
    return k_SHD.transpose(0, 1)[:, None].expand(-1, group, -1, -1)


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask_HGTS: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and logsumexp [T, Hq]; the additive mask replaces `causal`. Rows without keys give 0 and 0."""
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    keys, values = expand_keys(k, group), expand_keys(v, group)
    out, lse = FLASH(
        group_queries(q, num_kv_heads), keys, values, 0.0, causal and mask_HGTS is None, attn_mask=mask_HGTS
    )
    return ungroup_queries(out), ungroup_queries(lse)


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask_HGTS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from the output and logsumexp over all of a query's keys."""
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    keys, values = expand_keys(k, group), expand_keys(v, group)
    queries, grads, outs, lses = (group_queries(x, num_kv_heads) for x in (q, grad, out, lse))
    dq, dk, dv = FLASH_BACKWARD(
        grads, queries, keys, values, outs, lses.contiguous(), 0.0, causal and mask_HGTS is None, attn_mask=mask_HGTS
    )
    return ungroup_queries(dq), dk.sum(1).transpose(0, 1), dv.sum(1).transpose(0, 1)

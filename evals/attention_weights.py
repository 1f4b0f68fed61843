"""What `attention_map` shows, computed on any layout: weights of single heads, chosen blocks, choices of experts.

Keys and queries of a text are gathered over cp, heads stay with their tp rank, layers with their pp rank; then
everybody learns everybody's maps. Letters as in attention_map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.load import Subject
from neomoba_dist.generate.stage import Stage, batch_of
from neomoba_dist.model.attention.layer import Attention, set_full_attention
from neomoba_dist.model.attention.moba import MobaOptions, block_means, select_blocks
from neomoba_dist.model.attention.packed import PackedTokens
from neomoba_dist.model.moe.layer import MoE
from neomoba_dist.model.moe.router import RECORD
from neomoba_dist.parallel.comm import all_gather, all_gather_objects, all_reduce
from neomoba_dist.parallel.context_split import local_share, padded_split


@torch.no_grad()
def head_maps(
    subject: Subject, tokens: np.ndarray, layers: Sequence[int], heads: Sequence[int], cell: int
) -> list[dict[str, Any]]:
    """One entry for each of the `layers` and `heads`, in order; see `_maps_of_layer`."""
    stage, mesh = subject.model.stage, subject.model.mesh
    first = mesh["tp"].index * stage.blocks[0].attention.num_query_heads
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for layer, (attention, q, k, borders) in _inputs_of_layers(stage, tokens.tolist(), layers).items():
        mine = [head - first for head in heads if 0 <= head - first < attention.num_query_heads]
        for head, entry in zip(mine, _maps_of_layer(attention, q, k, borders, len(tokens), mine, cell), strict=True):
            found[layer, first + head] = {"layer": layer, "head": first + head, **entry}
    for others in all_gather_objects(found, mesh, "world"):
        found |= others
    return [found[layer, head] for layer in layers for head in heads]


def _inputs_of_layers(
    stage: Stage, text: list[int], layers: Sequence[int]
) -> dict[int, tuple[Attention, Tensor, Tensor, Tensor]]:
    """Layer -> its attention, and queries [T, N, D], keys and borders of the whole text, of this rank's heads."""
    mesh, device = stage.mesh, next(stage.parameters()).device
    batch = batch_of([text], device)
    share = local_share(batch, mesh, stage.config)
    seen: dict[int, Any] = {}
    chosen = [block for block in stage.blocks if block.index in layers]
    hooks = [
        block.attention.register_forward_pre_hook(lambda _, given, index=block.index: seen.update({index: given[:2]}))
        for block in chosen
    ]
    stage.run(share)
    for hook in hooks:
        hook.remove()

    def whole(x: Tensor) -> Tensor:
        if mesh["cp"].size == 1:
            return x
        order = padded_split(len(text), mesh, stage.config).gathered_order(device)
        return all_gather(x, mesh, "cp").flatten(0, 1)[order]

    found = {}
    for block in chosen:
        q, k, _ = block.attention.project(*seen[block.index])
        found[block.index] = block.attention, whole(q)[: len(text)], whole(k)[: len(text)], batch.cu_seqlens
    return found


def _maps_of_layer(
    attention: Attention, q: Tensor, k: Tensor, borders: Tensor, count: int, heads: list[int], cell: int
) -> Iterator[dict[str, Any]]:
    """For each head its map [C, C], the share of each cell's queries that chose a block [C, B], and numbers of it.

    own_block, first_token: shares of attention there; distance: mean, in tokens; caught: the share of full attention,
    from the same queries and keys, that the chosen blocks hold. chosen, caught: None but for MoBA.
    """
    size = attention.config.moba_block_size
    place = torch.arange(count, device=q.device)
    own, cells = place // size, -(-count // cell)
    per_cell = torch.bincount(place // cell, minlength=cells).double()[:, None]
    kind = "full" if attention.full else attention.kind
    chosen = _chosen_blocks(attention, q, k, borders)[:, heads] if kind == "moba" else None  # [T, heads, B]
    mass = torch.zeros(len(heads), cells, cells, dtype=torch.float64, device=q.device)
    sums = torch.zeros(4, len(heads), dtype=torch.float64, device=q.device)
    for keys, weights in _weights(attention, q, k, borders):
        part = weights[:, heads].double()  # [T, heads, keys]
        by_key = torch.zeros(count, len(heads), cells, dtype=torch.float64, device=q.device)
        by_key.index_add_(2, keys // cell, part)
        mass.index_add_(1, place // cell, by_key.transpose(0, 1))
        there = (own[:, None] == keys // size)[:, None]
        far = (place[:, None] - keys).abs()[:, None]
        sums[0] += (part * there).sum((0, 2))
        sums[1] += part[:, :, keys == 0].sum((0, 2))
        sums[2] += (part * far).sum((0, 2))
    if chosen is not None:
        set_full_attention(attention, True)
        for keys, weights in _weights(attention, q, k, borders):
            sums[3] += (weights[:, heads].double() * chosen[:, :, keys // size]).sum((0, 2))
        set_full_attention(attention, False)
    means = (sums / count).tolist()
    for number in range(len(heads)):
        by_cell = None
        if chosen is not None:
            by_cell = torch.zeros(cells, chosen.shape[2], dtype=torch.float64, device=q.device)
            by_cell.index_add_(0, place // cell, chosen[:, number].double())
        yield {
            "kind": kind,
            "mass": _rounded((mass[number] / per_cell).cpu()),
            "chosen": None if by_cell is None else _rounded((by_cell / per_cell).cpu()),
            **{key: means[i][number] for i, key in enumerate(("own_block", "first_token", "distance"))},
            "caught": None if chosen is None else means[3][number],
        }


def _weights(attention: Attention, q: Tensor, k: Tensor, borders: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(keys, weights [T, N, keys] on them), some keys after the others: the output where values are unit vectors."""
    for keys in torch.arange(len(k), device=k.device).split(k.shape[2]):
        v = torch.zeros_like(k)
        v[keys, :, keys - keys[0]] = 1
        yield keys, attention.core(q, k, v, PackedTokens(borders))[:, :, : len(keys)]


def _chosen_blocks(attention: Attention, q: Tensor, k: Tensor, borders: Tensor) -> Tensor:
    """Whether a query attends to a block: bool [T, N, B]."""
    options = MobaOptions.of(attention.config)
    size, count = options.block_size, len(q)
    means = block_means(k, block_size=size, cu_seqlens=borders, pooling=options.pooling)
    blocks = select_blocks(
        q, means, block_size=size, top_k=options.top_k, causal=attention.config.causal, cu_seqlens=borders,
        gate=options.gate, pooling=options.pooling,
    )  # fmt: skip
    blocks = blocks.long().repeat_interleave(q.shape[1] // blocks.shape[1], dim=1)  # [T, N, top_k], -1: none
    there = torch.zeros(count, q.shape[1], 1 + -(-count // size), dtype=torch.bool, device=q.device)
    return there.scatter_(2, blocks + 1, True)[:, :, 1:]


@torch.no_grad()
def expert_shares(subject: Subject, pieces: Sequence[np.ndarray]) -> list[list[float]]:
    """Of every layer with experts the share of the router's choices that each expert got, over `pieces` of text."""
    stage, mesh = subject.model.stage, subject.model.mesh
    counts: dict[int, Tensor] = {}
    hooks = []
    for block in stage.blocks:
        if isinstance(block.mlp, MoE):
            counts[block.index] = torch.zeros(stage.config.num_experts, dtype=torch.float64, device=subject.device)

            def count(_: Any, given: Any, made: Any, total: Tensor = counts[block.index]) -> None:
                total += made[2][len(RECORD) :]

            hooks.append(block.mlp.register_forward_hook(count))
    for piece in pieces:
        stage.run(local_share(batch_of([piece.tolist()], subject.device), mesh, stage.config))
    for hook in hooks:
        hook.remove()
    shares = {}
    for layer, total in counts.items():
        whole = all_reduce(total, mesh, "cp")
        shares[layer] = _rounded((whole / whole.sum()).cpu())
    for others in all_gather_objects(shares, mesh, "world"):
        shares |= others
    return [shares[layer] for layer in stage.config.moe_layers]


def _rounded(values: Tensor) -> Any:
    """Four digits of every number, as lists."""
    return np.vectorize(lambda x: float(f"{x:.4g}"))(values.numpy()).tolist()

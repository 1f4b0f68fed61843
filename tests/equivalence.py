"""How a parallel layout is compared with the single process: by logical tensors, put together from all shards."""

import math
from dataclasses import replace

import torch
from torch import nn

from neomoba_dist.checkpoint.layout import boxes_of_part
from neomoba_dist.config import ModelConfig, ParallelConfig
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.encoder_decoder import MODELS
from neomoba_dist.model.init import ShardedTensorSpec, views_of
from neomoba_dist.model.moe.layer import saved_buffers
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.context_split import local_share
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.engine import Engine

Pieces = list[tuple[ShardedTensorSpec, torch.Tensor]]


def pieces(module: nn.Module, of: str) -> Pieces:
    """(shard, valid part) of every parameter's value ("data") or gradient ("grad")."""
    return [(shard, view.detach().clone()) for p in module.parameters() for shard, view in views_of(p, getattr(p, of))]


def assemble(all_pieces: list[Pieces]) -> dict[str, torch.Tensor]:
    """Logical tensors from the pieces of all ranks; parts that several ranks hold must agree."""
    whole: dict[str, torch.Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for rank_pieces in all_pieces:
        for shard, value in rank_pieces:
            target = whole.setdefault(shard.name, torch.full(shard.shape, float("nan"), dtype=value.dtype))
            where = tuple(slice(a, a + n) for a, n in zip(shard.start, shard.extent, strict=True))
            part = (shard.name, shard.start, shard.extent)
            if part in seen:
                torch.testing.assert_close(value, target[where], msg=f"the ranks' copies of {shard.name} differ")
            seen.add(part)
            target[where] = value
    assert not any(t.isnan().any() for t in whole.values()), "a part of some tensor is on no rank"
    return whole


def state_pieces(engine: Engine, kind: str) -> Pieces:
    """fp32 weights or a moment of every parameter that this rank's optimizer steps, copies of other ranks included, as
    rectangles of the logical tensors."""
    found = []
    for fragment in engine.fragments():
        spec = fragment.shard
        flat, stop = engine.values(fragment, kind), fragment.start + fragment.valid
        for box in boxes_of_part(spec.start, spec.extent, fragment.start, stop):
            part = flat[box.base :][: math.prod(box.shape)].view(box.shape)
            found.append((replace(spec, start=box.offset, extent=box.shape), part.clone()))
    return [*found, *((spec, buffer.clone()) for spec, buffer in saved_buffers(engine.module) if kind == "model")]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float) -> None:
    """Every logical tensor agrees to `rtol` of its own largest value; reports the worst one."""
    assert actual.keys() == expected.keys()
    errors = {name: float((actual[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()}
    assert all(math.isfinite(error) for error in errors.values()), f"not finite, or all zero: {errors}"
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= rtol, f"{worst}: relative error {errors[worst]:.2e} > {rtol:.0e}"


def single_process(
    config: ModelConfig, batches: list[Batch], full: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the yardstick in float64: sum over the valid tokens of all batches / their number."""
    model = MODELS[config.objective](config, Mesh.single(), dtype=torch.float64, seed=5)
    set_full_attention(model, full)
    num_valid = sum(batch.local_valid() for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = model(batch)[0] / num_valid
        loss.backward()
        total += loss.detach()
    return float(total), assemble([pieces(model, "grad")])


def parallel_rank(
    config: ModelConfig, parallel: ParallelConfig, batches: list[Batch], full: bool, recompute: str = "none"
) -> tuple[float, Pieces]:
    """The same in one rank of a tensor- and context-parallel world: the sums over its context-parallel ranks."""
    mesh = Mesh.build(parallel, num_key_value_heads=config.num_key_value_heads)
    model = MODELS[config.objective](config, mesh, dtype=torch.float64, seed=5, recompute=recompute)
    set_full_attention(model, full)
    num_valid = sum(batch.local_valid() for batch in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = model(local_share(batch, mesh, config))[0] / num_valid
        loss.backward()
        total += loss.detach()
    for parameter in model.parameters():
        parameter.grad = all_reduce(parameter.grad, mesh, "cp")
    return float(all_reduce(total, mesh, "cp")), pieces(model, "grad")

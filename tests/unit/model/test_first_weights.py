"""First weights: pinned bits, normal, and the same for any slice, layout, dtype and number of threads."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neomoba_dist.model.init import (
    FirstValues,
    Initializer,
    ShardedTensorSpec,
    draw_range,
    parts_of,
    shard_of,
    views_of,
)
from neomoba_dist.model.normal import normal, quantiles
from neomoba_dist.parallel.mesh import Axis, Mesh

CPU = torch.device("cpu")


def _initializer(**axes: Axis) -> Initializer:
    return Initializer(Mesh({**Mesh.single().axes, **axes}), 3, 0.02)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def test_the_bits_never_change() -> None:
    """Pinned: a seed gives the same weights on every machine and with every version of torch."""
    table, spread = quantiles(CPU)
    assert _digest(table) == "c626a2537fccfd81"
    assert spread == pytest.approx(1.0, abs=2e-5)
    numbers = torch.tensor([0, 1, 2, 1 << 40, (1 << 62) + 5])
    assert _digest(normal(numbers, 0xFEDCBA9876543210, 1.0)) == "a7efdac62818a235"
    assert _digest(_initializer().weight("blocks.0.mlp.up_proj", (300, 500))) == "2b9d35731fb97bce"


def test_draws_are_normal() -> None:
    x = normal(torch.arange(1 << 20), 7, 2.0).double() / 2.0
    error = len(x) ** -0.5
    assert abs(float(x.mean())) < 5 * error
    for power, moment, variance in ((2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((x**power).mean()) - moment) < 5 * error * variance**0.5, power
    below = torch.tensor([-4.0, -3.0, -2.0, -1.0, 0.0, 0.5, 1.5, 2.5, 3.5], dtype=torch.float64)
    share = torch.special.ndtr(below)
    found = (x[:, None] < below).double().mean(0)
    assert ((found - share).abs() < 5 * error * (share * (1 - share)).sqrt()).all()
    others = [
        normal(torch.arange(1 << 20), 8, 1.0).double(),
        x.roll(1),
        x.roll(1 << 11),
        normal(torch.arange(1 << 20), 7 << 40, 1.0),
    ]
    assert all(abs(float((x * other).mean())) < 5 * error for other in others)
    assert len(x.unique()) > 0.5 * len(x)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_stretch_is_that_of_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    extent = tuple(data.draw(st.integers(1, n)) for n in shape)
    start = tuple(data.draw(st.integers(0, n - e)) for n, e in zip(shape, extent, strict=True))
    padded = tuple(e + data.draw(st.integers(0, 2)) for e in extent)
    whole = torch.empty(shape)
    FirstValues(ShardedTensorSpec("w", shape), shape, 1, 1.0).write(whole.view(-1))
    expected = torch.zeros(padded)
    inner = expected
    for dim, (first, length) in enumerate(zip(start, extent, strict=True)):
        inner, whole = inner.narrow(dim, 0, length), whole.narrow(dim, first, length)
    inner.copy_(whole)
    values = FirstValues(ShardedTensorSpec("w", shape, start, extent), padded, 1, 1.0)
    first = data.draw(st.integers(0, expected.numel() - 1))
    out = torch.full((data.draw(st.integers(0, expected.numel() - first)),), torch.nan)
    values.write(out, first)
    assert torch.equal(out, expected.flatten()[first : first + len(out)])


@pytest.mark.parametrize("shard_dim", [0, 1])
def test_tensor_parallel_ranks_hold_parts_of_one_matrix(shard_dim: int) -> None:
    whole = _initializer().weight("w", (70_000, 6), shard_dim=shard_dim)
    for tp in (2, 3):
        parts = [
            _initializer(tp=Axis(tp, i)).weight("w", (70_000, 6), shard_dim=shard_dim, padded=(70_002, 6)[shard_dim])
            for i in range(tp)
        ]
        found = torch.cat([shard_of(part).valid(part.detach()) for part in parts], shard_dim)
        assert torch.equal(found, whole)
        assert sum(int((part == 0).sum()) for part in parts) == int((whole == 0).sum()) + 12 * (1 - shard_dim)


@pytest.mark.parametrize("tp", [1, 2])
def test_matrices_in_one_parameter_are_those_of_their_own(tp: int) -> None:
    shapes = {"q": (8, 5), "k": (4, 5), "v": (4, 5)}
    for place in range(tp):
        init = _initializer(tp=Axis(tp, place))
        alone = [init.weight(name, shape, shard_dim=0) for name, shape in shapes.items()]
        stacked = init.stacked(shapes, shard_dim=0)
        assert stacked.shape == (16 // tp, 5)
        for (shard, view), parameter in zip(views_of(stacked), alone, strict=True):
            assert shard == shard_of(parameter)
            assert torch.equal(view, parameter)
        flat = stacked.detach().flatten()
        for start, length in ((0, 1), (3, 30), (17, 23), (39, 1)):
            out = torch.full((length,), torch.nan)
            draw_range(stacked, out, start)
            assert torch.equal(out, flat[start : start + length])


def test_experts_are_parts_of_one_tensor() -> None:
    whole = _initializer().experts("e", (4, 6, 5), shard_dim=1)
    rows = [
        torch.cat(
            [_initializer(ep=Axis(2, e), tp=Axis(3, t)).experts("e", (4, 6, 5), shard_dim=1) for t in range(3)], 1
        )
        for e in range(2)
    ]
    assert torch.equal(torch.cat(rows), whole)


def test_dtype_and_threads_change_nothing() -> None:
    init = _initializer()
    weight = init.weight("w", (3000, 700))
    assert torch.equal(replace(init, dtype=torch.bfloat16).weight("w", (3000, 700)), weight.bfloat16())
    assert torch.equal(replace(init, dtype=torch.float64).weight("w", (3000, 700)), weight.double())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads == 1 else 1)
        assert torch.equal(init.weight("w", (3000, 700)), weight)
    finally:
        torch.set_num_threads(threads)


def test_deferred_parameters_take_no_memory() -> None:
    init = replace(_initializer(), deferred=True)
    parameter = init.weight("w", (1 << 20, 1 << 20))  # 4 TB
    assert parameter.shape == (1 << 20, 1 << 20)
    out = torch.empty(1000)
    draw_range(parameter, out, (1 << 40) - 1000)
    assert 0.018 < float(out.std()) < 0.022
    assert parts_of(init.ones("norm", 3))[0].values.std is None

"""What docs/parallelism.md says runs beside what: the order in which messages leave, products run, and messages are
waited for. That a GPU then does both at once does not show on CPUs; that it could not otherwise, does."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neomoba_dist.config import ParallelConfig
from neomoba_dist.model.attention.kernels import ops
from neomoba_dist.model.moe.layer import moe_layers
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.parallel.tensor import column_linear
from neomoba_dist.parallel.transfers import RingTransfer, RowTransfer, UnderWay
from tests.expert_parallel import moe_model
from tests.parallel.test_context_attention import ONE, Case, rank_results
from tests.ranks import run_ranks


class Products(TorchDispatchMode):
    """Notes every matrix product among the events."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.events.append("product")
        return func(*args, **(kwargs or {}))


class Handle:
    """Of an asynchronous collective; notes when it is waited for."""

    def __init__(self, handle: Any, name: str, events: list[str]) -> None:
        self.handle, self.name, self.events = handle, name, events

    def wait(self) -> None:
        self.events.append(f"{self.name} is there")
        self.handle.wait()


def noted(function: Callable[..., Any], name: str, events: list[str]) -> Callable[..., Any]:
    """The collective, which notes when it starts."""

    def call(*args: Any, **kwargs: Any) -> Any:
        events.append(name)
        handle = function(*args, **kwargs)
        return Handle(handle, name, events) if kwargs.get("async_op") else handle

    return call


def column_rank(sequence_parallel: bool) -> list[str]:
    mesh = Mesh.build(ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel))
    from megatron.core.tensor_parallel import layers

    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((8, 4), (6, 4)))
    out, events = column_linear(x, weight, mesh), []
    with (
        patch.object(layers, "dist_all_gather_func", noted(layers.dist_all_gather_func, "gather", events)),
        patch.object(layers, "dist_reduce_scatter_func", noted(layers.dist_reduce_scatter_func, "scatter", events)),
        patch.object(torch.distributed, "all_reduce", noted(torch.distributed.all_reduce, "reduce", events)),
        Products(events),
    ):
        out.sum().backward()
    return events


@pytest.mark.parametrize(
    ("sequence_parallel", "expected"),
    [
        (False, ["product", "reduce", "product", "reduce is there"]),
        (True, ["gather", "product", "gather is there", "scatter", "product", "scatter is there"]),
    ],
)
def test_products_beside_the_messages_of_a_column(sequence_parallel: bool, expected: list[str]) -> None:
    """Backward: the input is gathered beside the product for its gradient, and that travels beside the weight's."""
    assert run_ranks(2, column_rank, sequence_parallel) == [expected] * 2


def expert_rank() -> list[str]:
    config = moe_model()
    mesh = Mesh.build(ParallelConfig(expert_model_parallel_size=2), num_key_value_heads=config.num_key_value_heads)
    layer, events = moe_layers(NeoBERT(config, mesh, dtype=torch.float64, seed=5, row_length=8))[0], []
    layer.shared.register_forward_hook(lambda *_: events.append("shared expert"))
    for name in ("down", "gate_up"):
        getattr(layer.shared, f"{name}_proj").register_hook(lambda _, name=name: events.append(f"gradient of {name}"))
    with patch.object(
        torch.distributed, "all_to_all_single", noted(torch.distributed.all_to_all_single, "exchange", events)
    ):
        x = torch.randn(8, config.hidden_size, dtype=torch.float64, requires_grad=True)
        layer(x, torch.arange(8))[0].sum().backward()
    return events


def test_the_shared_expert_beside_rows_and_their_gradients() -> None:
    """Rows travel to their experts beside it, and their gradients back; counts, results and theirs beside nothing."""
    forward = ["exchange", "exchange", "shared expert", "exchange is there", "exchange"]
    backward = ["exchange", "exchange", "gradient of down", "gradient of gate_up", "exchange is there"]
    assert run_ranks(2, expert_rank) == [forward + backward] * 2


def test_rows_that_have_arrived_are_held_by_no_transfer() -> None:
    """The experts keep theirs until they are done."""
    rows = torch.ones(2, 1)
    transfer = RowTransfer(rows, Mesh.single(), "ep", [2], [2])
    assert transfer.wait() is rows
    assert not any(isinstance(value, torch.Tensor) for value in vars(transfer).values())


def context_rank(ranks: int, kind: str, strategy: str, transfers: type) -> list[bool]:
    """Of every transfer of one layer, in the order in which they start: whether attention runs before it is awaited."""
    under_way: dict[Any, int] = {}  # place in `beside`
    beside: list[bool] = []
    start, wait = transfers.__init__, transfers.wait

    def started(transfer: Any, *args: Any) -> None:
        start(transfer, *args)
        under_way[transfer] = len(beside)
        beside.append(False)

    def arrived(transfer: Any) -> Any:
        del under_way[transfer]
        return wait(transfer)

    def attending(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for place in under_way.values():
                beside[place] = True
            return function(*args, **kwargs)

        return call

    with (
        patch.object(transfers, "__init__", started),
        patch.object(transfers, "wait", arrived),
        patch.object(ops, "attend", attending(ops.attend)),
        patch.object(ops, "attend_backward", attending(ops.attend_backward)),
    ):
        rank_results(ranks, 2, [Case(kind, ONE, causal=False, settings=((f"context_{kind}", strategy),))])
    return beside


@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_beside_the_messages_of_a_ring(ranks: int) -> None:
    """Keys and values always travel beside attention, the first ones beside that of a rank's own tokens. So do their
    gradients, but for the last ones, which end at their owner."""
    others = ranks - 1
    expected = [True] * others + [True] * others + [True] * (others - 1) + [False]
    assert run_ranks(ranks, context_rank, ranks, "full", "ring", RingTransfer) == [expected] * ranks


@pytest.mark.parametrize(
    ("kind", "strategy", "expected"),
    [
        # two chunks of heads, keys and values, forward and backward
        ("full", "allgather_kv", [True] * 2 * 2 * 2),
        # queries, outputs and logsumexp; gradients, statistics, gradients of queries
        ("moba", "route_queries", [True, False, False, True, True, False]),
    ],
)
def test_own_tokens_beside_what_is_gathered_or_sent(kind: str, strategy: str, expected: list[bool]) -> None:
    """What a rank computes with its own tokens runs beside what it needs of others, in both directions."""
    assert run_ranks(2, context_rank, 2, kind, strategy, UnderWay) == [expected] * 2

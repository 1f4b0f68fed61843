"""CUDA graphs without a GPU: torch's own capturing code, over graphs that record operators and run them again.

As on a GPU, a recording computes nothing that lasts: what its operators made is overwritten before the first replay,
which then reads and writes the same tensors. What would have the host wait for a value, or send one, is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
REFUSED = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.lift_fresh.default,  # torch.tensor of numbers
}


def tensors(values: Any) -> list[torch.Tensor]:
    """Those among nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class RecordedGraph:
    """In the place of torch.cuda.CUDAGraph."""

    replays = 0  # of all graphs

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.is_fresh = True

    def replay(self) -> None:
        """Every operator again, with its results in the tensors of the recording."""
        RecordedGraph.replays += 1
        if self.is_fresh:
            self._forget()
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors(function(*args, **kwargs)), strict=True):
                if not _share(old, [new]):
                    old.copy_(new)

    def _forget(self) -> None:
        for _, args, kwargs, results in self.calls:
            for made in results:
                if not _share(made, tensors((args, kwargs))):
                    made.fill_(torch.nan if made.is_floating_point() else 0)
        self.is_fresh = False


def _share(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
    """Whether it is a view of one of them, or one itself."""
    return any(tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in others)


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    """Our own operators in a thread: torch.func, which some call, does not work within a dispatch mode."""
    if function.namespace != "neomoba":
        return function(*args, **kwargs)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.no_grad()(function), *args, **kwargs).result()


class _Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in REFUSED:
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        result = _run(function, args, kwargs)
        self.graph.calls.append((function, args, kwargs, tensors(result)))
        return result


@contextlib.contextmanager
def _graph(graph: RecordedGraph, **settings: Any) -> Iterator[None]:
    with _Recording(graph):
        yield


def recorded_graphs(patch: pytest.MonkeyPatch) -> None:
    """Have torch.cuda.make_graphed_callables work on the CPU."""
    RecordedGraph.replays = 0
    patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    patch.setattr(torch.cuda, "graph", _graph)
    patch.setattr(torch.cuda, "synchronize", lambda *unused: None)
    patch.setattr(torch.cuda, "Stream", object)
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))

"""The code that inductor writes for a GPU, on a machine without one: kernels by name and the bytes that they move.

A graph is traced on the CPU as ever; before inductor lowers it, its tensors are moved to an H100 that is only
described. The Triton source that comes out is what a card would get. None of it runs: the graph does, on the CPU.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.scheduler
import torch.utils._triton
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_map

GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)


@dataclass(frozen=True)
class Graph:
    """One lowered graph. kernels: the Triton kernels in the order of their launch, named by the operators that each
    fuses. products: calls of matrix products. moved: bytes that its kernels and calls read and write."""

    is_backward: bool
    kernels: list[str]
    products: int
    moved: int


@dataclass
class GPUCode:
    """A backend of torch.compile that keeps what inductor would have run on a GPU. graphs: in order of compilation."""

    graphs: list[Graph] = field(default_factory=list)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_fx(graph, inputs, inner_compile=self._lower)

    def _lower(self, graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[[list[Any]], Any]:
        kind = {name: options.get(name, False) for name in ("is_inference", "is_backward")}
        moved = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
        record_original_output_strides(moved)
        _recursive_post_grad_passes(moved, is_inference=kind["is_inference"])
        mode = detect_fake_mode(inputs)
        assert mode is not None
        with mode:
            for node in moved.graph.nodes:
                node.meta["val"] = tree_map(_on_gpu, node.meta.get("val"))
                if node.kwargs.get("device") is not None:
                    node.kwargs = {**node.kwargs, "device": GPU}
            on_gpu = [_on_gpu(value) for value in inputs]
        lowering = GraphLowering(moved, example_inputs=on_gpu, shape_env=mode.shape_env, **kind)
        with ExitStack() as stack:
            for handler in (V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()), V.set_fake_mode(mode)):
                stack.enter_context(handler)
            stack.enter_context(_described_gpu())
            lowering.run(*on_gpu)
            code = str(lowering.codegen()[0].value)
            num_bytes = lowering.count_bytes()[0]
        kernels = re.findall(r"^ +(triton_\w+)\.run\(", code, re.MULTILINE)
        products = len(re.findall(r"extern_kernels\.\w*mm\(", code))
        self.graphs.append(Graph(kind["is_backward"], kernels, products, num_bytes))

        def run(arguments: list[Any]) -> Any:
            values = tuple(arguments)
            arguments.clear()
            return graph(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _on_gpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=GPU)
    return value


@contextmanager
def _described_gpu() -> Iterator[None]:
    """What inductor asks of a GPU while it writes code for one."""
    properties, capability = lambda device=None: H100, lambda device=None: (H100.major, H100.minor)
    answers = {
        "get_device_properties": properties,
        "get_compute_capability": lambda device=None: 10 * H100.major + H100.minor,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: GPU.index,
        "is_triton_capable": lambda device=None: True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(answer)))
        stack.enter_context(patch.object(CudaInterface.Worker, "get_device_properties", staticmethod(properties)))
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", properties))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", capability))
        stack.enter_context(patch.object(torch._inductor.scheduler, "has_triton", lambda: True))
        stack.enter_context(patch.object(torch.utils._triton, "triton_hash_with_backend", lambda: "none"))
        yield

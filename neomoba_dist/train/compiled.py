"""`neomoba.phase.compile`: blocks and loss through torch.compile, one graph for each kind, and what that took."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import calculate_time_spent, counters

from neomoba_dist.config import Config
from neomoba_dist.model.block import Block
from neomoba_dist.model.cross_entropy import EAGER, ChunkFunctions
from neomoba_dist.model.neobert import Head
from neomoba_dist.model.optional import is_available
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.guard import code_fingerprint

# Blocks share their code, and beyond torch's limit of 8 graphs for one code they would run uncompiled, with a warning.
# Dense or with experts, MoBA or full, a full step or not, recomputed or not, training or validation: more than 8.
MOST_GRAPHS = 64


def is_compiled(config: Config, mesh: Mesh) -> bool:
    """Whether blocks and loss are. "auto": only where there is Triton, too."""
    return config.compiled_on(mesh.device.type) and (config.phase.compile != "auto" or is_available("triton"))


def compile_layers(module: nn.Module) -> None:
    """Have every block and the head's loss compiled when they first run.

    Once for all blocks, steps, numbers of documents and of counted tokens.
    """
    # torch's cache on disk knows the operators by name: a graph from before one changed would run, and be wrong
    torch.compiler.config.cache_key_tag = code_fingerprint()
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for layer in module.modules():
        if isinstance(layer, Block):
            layer.compile(dynamic=False)
        if isinstance(layer, Head):
            layer.chunk_functions = compiled_chunks()


def compiled_chunks() -> ChunkFunctions:
    """The functions of the loss, one graph each, which also serves the last chunk with its fewer tokens."""
    return ChunkFunctions(*(_of_any_tokens(function) for function in EAGER))


def _of_any_tokens(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    compiled = torch.compile(function, dynamic=False, fullgraph=True)

    def run(*of_tokens: torch.Tensor, **matrix: Any) -> torch.Tensor:
        for tensor in of_tokens:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*of_tokens, **matrix)

    return run


def compile_summary() -> str:
    """What this process has compiled so far, in words."""
    graphs, hits = counters["stats"]["unique_graphs"], counters["aot_autograd"]["autograd_cache_hit"]
    seconds = calculate_time_spent()["total_wall_time"]
    return f"compiled in {seconds:.1f} s: {graphs} graphs, {hits} of them kept from an earlier run"

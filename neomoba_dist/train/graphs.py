"""`neomoba.phase.compile: cuda_graphs`: the blocks of a micro-batch as CUDA graphs, which a GPU starts as a whole.

`torch.cuda.make_graphed_callables` records forward and backward of every block, once for each kind of step. A replay
reads and writes fixed memory: what all blocks share is copied there once per micro-batch, and gradients of weights come
out there, from where ZeRO 1 and 2 take them before the next backward pass (config/cuda_graphs.py).
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from neomoba_dist.data.batch import LEAST_DOCUMENTS
from neomoba_dist.model.block import Block, State
from neomoba_dist.model.moe.layer import MoE

logger = logging.getLogger(__name__)

Rest = Callable[[Sequence[Tensor]], tuple[Any, ...]]  # from tensors to the last three of a State


class Kind(NamedTuple):
    """The graphs of one kind of step.

    shared: what all blocks read, in fixed memory: positions, borders and what follows from them.
    """

    shared: list[Tensor]
    blocks: dict[Block, Callable[..., Any]]  # -> hidden states, and a mixture's auxiliary loss


class CapturedBlocks:
    """Runs blocks one after the other, first to last, as `NeoBERT.run_block`: in training by graphs.

    sums: what blocks add to while they run; recording leaves it as it was.
    """

    def __init__(self, blocks: nn.ModuleList, sums: Tensor) -> None:
        self.blocks, self.sums = cast(list[Block], list(blocks)), sums
        self.documents = LEAST_DOCUMENTS  # that micro-batches have room for: those of the last recording
        self._kinds: dict[tuple[bool, ...], Kind] = {}  # by which blocks run full attention
        self._pool: Any = None  # of memory, the same for all kinds: steps come one after the other

    def __call__(self, block: Block, state: State) -> State:
        """As `block(state)`, but that the next micro-batch overwrites what it returns."""
        if not (block.training and torch.is_grad_enabled()):
            return block(state)
        full = tuple(other.attention.full for other in self.blocks)
        if block is self.blocks[0]:
            tensors, _ = shared_tensors(state)
            if full not in self._kinds or _shapes(self._kinds[full].shared) != _shapes(tensors):  # more documents
                self._kinds.pop(full, None)  # gives its memory back first
                self._kinds[full] = self._capture(state)
            for fixed, tensor in zip(self._kinds[full].shared, tensors, strict=True):
                fixed.copy_(tensor)
        hidden, aux_loss, *rest = state
        shared, blocks = self._kinds[full]
        if isinstance(block.mlp, MoE):
            hidden, aux_loss = blocks[block](hidden, aux_loss, *shared)
        else:
            (hidden,) = blocks[block](hidden, *shared)
        return hidden, aux_loss, *rest

    @property
    def number(self) -> int:
        """Graphs so far, forward and backward."""
        return 2 * len(self.blocks) * len(self._kinds)

    def _capture(self, state: State) -> Kind:
        """Record all blocks for states of these shapes."""
        began, sums = time.perf_counter(), self.sums.clone()
        (hidden, aux_loss, *_), (tensors, rest) = state, shared_tensors(state)
        shared = [_fixed(tensor) for tensor in tensors]
        blocks = tuple(_OfTensors(block, aux_loss, rest) for block in self.blocks)
        inputs = tuple(
            (*(x.detach().clone().requires_grad_() for x in (hidden, aux_loss)[: 1 + block.is_mixture]), *shared)
            for block in blocks
        )
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graphs = torch.cuda.make_graphed_callables(blocks, inputs, pool=self._pool)
        self.sums.copy_(sums)
        self.documents = len(state[3]) - 1
        seconds, number = time.perf_counter() - began, 2 * len(blocks)
        logger.info(
            "recorded %d CUDA graphs in %.1f s, for at most %d documents in a micro-batch",
            number,
            seconds,
            self.documents,
        )
        return Kind(shared, dict(zip(self.blocks, graphs, strict=True)))


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _fixed(tensor: Tensor) -> Tensor:
    """A copy, of which torch.compile is told the same: which sizes change."""
    copy = tensor.clone()
    for dim in getattr(tensor, "_dynamo_weak_dynamic_indices", ()):
        torch._dynamo.maybe_mark_dynamic(copy, dim)
    return copy


class _OfTensors(nn.Module):
    """A block as a function of tensors alone: hidden states, a mixture's auxiliary loss, `shared_tensors` -> the first
    two, of blocks without experts the first alone."""

    def __init__(self, block: Block, aux_loss: Tensor, rest: Rest) -> None:
        super().__init__()
        self.block, self.rest, self.is_mixture = block, rest, isinstance(block.mlp, MoE)
        self.no_loss = torch.zeros_like(aux_loss, requires_grad=False)

    def forward(self, hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        aux_loss, *shared = others if self.is_mixture else (self.no_loss, *others)
        hidden, aux_loss, *_ = self.block((hidden, aux_loss, *self.rest(shared)))
        return (hidden, aux_loss) if self.is_mixture else (hidden,)


def shared_tensors(state: State) -> tuple[list[Tensor], Rest]:
    """What blocks read of a state beside hidden states and auxiliary loss, and the way back to the state."""
    *_, position_ids, cu_seqlens, packed = state
    packed = packed._replace(token_types=None, pairs=None)  # of layers outside of blocks
    leaves, spec = tree_flatten((position_ids, cu_seqlens, packed))

    def rest(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        found = iter(tensors)
        return tree_unflatten([None if leaf is None else next(found) for leaf in leaves], spec)

    return [leaf for leaf in leaves if leaf is not None], rest

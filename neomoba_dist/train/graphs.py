"""`neomoba.phase.compile: cuda_graphs`: the blocks of a micro-batch as CUDA graphs, which a GPU starts as a whole.

`torch.cuda.make_graphed_callables` records forward and backward of every block, once for each kind of step. A replay
reads and writes fixed memory: what all blocks share is copied there once per micro-batch, and gradients of weights come
out there, from where ZeRO 1 and 2 take them before the next backward pass (config/cuda_graphs.py).
"""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from neomoba_dist.config import ConfigError
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
    graphs: "dict[Block, _OfTensors]"


class CapturedBlocks:
    """Runs blocks one after the other, first to last, as `NeoBERT.run_block`: in training by graphs.

    sums: what blocks add to while they run; recording leaves it as it was.
    """

    def __init__(self, blocks: nn.ModuleList, sums: Tensor) -> None:
        self.blocks, self.sums = cast(list[Block], list(blocks)), sums
        self.documents = LEAST_DOCUMENTS  # that micro-batches have room for
        self._kinds: dict[tuple[bool, ...], Kind] = {}  # by which blocks run full attention
        self._seen: set[tuple[bool, ...]] = set()
        self._now: Kind | None = None  # of the micro-batch under way
        self._pool: Any = None  # of memory, the same for all kinds: steps come one after the other

    def make_room(self, documents: int) -> None:
        """Before an update, whose micro-batches have so many documents at most: graphs for fewer are given up."""
        if documents <= self.documents:
            return
        self.documents, self._pool, self._now = documents, None, None
        self._kinds.clear()
        gc.collect()  # graphs are parts of cycles, and must not be found to be garbage while others are recorded
        torch.cuda.empty_cache()

    def __call__(self, block: Block, state: State) -> State:
        """As `block(state)`, but that the next micro-batch overwrites what it returns."""
        if not (block.training and torch.is_grad_enabled()):
            return block(state)
        if block is self.blocks[0]:
            self._now = self._enter(state)
        assert self._now is not None
        hidden, aux_loss, *rest = state
        shared, graph = self._now.shared, self._now.graphs[block]
        if graph.is_mixture:
            hidden, aux_loss = graph(hidden, aux_loss, *shared)
        else:
            (hidden,) = graph(hidden, *shared)
        return hidden, aux_loss, *rest

    @property
    def number(self) -> int:
        """Graphs that there are now, forward and backward."""
        return 2 * len(self.blocks) * len(self._kinds)

    def _enter(self, state: State) -> Kind:
        """The graphs of this kind of step, with what they share set to this micro-batch's."""
        full = tuple(block.attention.full for block in self.blocks)
        if full not in self._kinds:
            self._record(full, state)
        kind, (tensors, _) = self._kinds[full], shared_tensors(state)
        for fixed, tensor in zip(kind.shared, tensors, strict=True):
            assert fixed.shape == tensor.shape, "the micro-batches of a phase have one shape"
            fixed.copy_(tensor)
        return kind

    def _record(self, full: tuple[bool, ...], state: State) -> None:
        """Record this kind of step, and again those that were given up: what does not fit should be found now."""
        self._seen.add(full)
        for kind in [*sorted(self._seen - self._kinds.keys() - {full}), full]:  # the present one last
            for block, is_full in zip(self.blocks, kind, strict=True):
                block.attention.full = is_full
            self._kinds[kind] = self._capture(state)

    def _capture(self, state: State) -> Kind:
        """Record all blocks for states of these shapes, with the attention that they are set to."""
        began, sums = time.perf_counter(), self.sums.clone()
        (hidden, aux_loss, *_), (tensors, rest) = state, shared_tensors(state)
        shared = [_fixed(tensor) for tensor in tensors]
        blocks = tuple(_OfTensors(block, aux_loss, rest) for block in self.blocks)
        inputs = tuple(
            (*(x.detach().clone().requires_grad_() for x in (hidden, aux_loss)[: 1 + block.is_mixture]), *shared)
            for block in blocks
        )
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with _recording():
                torch.cuda.make_graphed_callables(blocks, inputs, pool=self._pool)  # of modules it changes `forward`
        except torch.OutOfMemoryError:
            raise  # memory.py says what fills it
        except RuntimeError as error:
            raise ConfigError(
                "neomoba.phase.compile cuda_graphs: these layers cannot be recorded on this device "
                f"({str(error).splitlines()[0]}); set it to auto"
            ) from error
        for block in blocks:
            block.release()
        self.sums.copy_(sums)
        seconds, number, documents = time.perf_counter() - began, 2 * len(blocks), len(state[3]) - 1
        logger.info("recorded %d CUDA graphs in %.1f s, for %d documents in a micro-batch", number, seconds, documents)
        return Kind(shared, dict(zip(self.blocks, blocks, strict=True)))


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Other threads may go on using the device (a checkpoint on its way to the disk), and no graph that has become
    garbage is destroyed: both would end a recording."""
    graph, collects = torch.cuda.graph, gc.isenabled()
    torch.cuda.graph = partial(graph, capture_error_mode="thread_local")  # type: ignore[assignment,misc]
    gc.disable()
    try:
        yield
    finally:
        torch.cuda.graph = graph  # type: ignore[misc]
        if collects:
            gc.enable()


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
        self.outputs: tuple[Tensor, ...] = ()

    def forward(self, hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        aux_loss, *shared = others if self.is_mixture else (self.no_loss, *others)
        hidden, aux_loss, *_ = self.block((hidden, aux_loss, *self.rest(shared)))
        self.outputs = (hidden, aux_loss) if self.is_mixture else (hidden,)
        return self.outputs

    def release(self) -> None:
        """Let go of the autograd graph of the recording, which torch keeps with its outputs: through it the gradients
        of weights would for ever be taken on the stream of the recording, and DeepSpeed's hooks run there."""
        for output in self.outputs:
            output.detach_()
        self.outputs = ()


def shared_tensors(state: State) -> tuple[list[Tensor], Rest]:
    """What blocks read of a state beside hidden states and auxiliary loss, each tensor once, and the way back."""
    *_, position_ids, cu_seqlens, packed = state
    packed = packed._replace(token_types=None, pairs=None)  # of layers outside of blocks
    leaves, spec = tree_flatten((position_ids, cu_seqlens, packed))
    found = {id(leaf): leaf for leaf in leaves if leaf is not None}
    places = {key: place for place, key in enumerate(found)}
    wanted = [None if leaf is None else places[id(leaf)] for leaf in leaves]

    def rest(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        return tree_unflatten([None if place is None else tensors[place] for place in wanted], spec)

    return list(found.values()), rest

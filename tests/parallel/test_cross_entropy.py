"""The loss and its gradients equal torch's own, in float64, whole and with the vocabulary split over tp; compiled, too.

Compiled it is one graph for chunks of any size, and for a GPU one product and one pass over the logits of a chunk.
"""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from neomoba_dist.config import ParallelConfig
from neomoba_dist.model.cross_entropy import (
    CHUNK_TOKENS,
    EAGER,
    ChunkFunctions,
    vocab_parallel_cross_entropy,
    vocab_parallel_scores,
)
from neomoba_dist.model.init import Initializer
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.compiled import compiled_chunks
from tests.equivalence import Pieces, assemble, assert_same, pieces
from tests.gpu_code import GPUCode
from tests.ranks import run_ranks

VOCAB, WIDTH = 151, 16
TOKENS = 2 * CHUNK_TOKENS + 100  # the last chunk has fewer


def case(mesh: Mesh) -> tuple[torch.Tensor, torch.nn.Parameter, torch.Tensor, torch.Tensor]:
    """Hidden states, output matrix, labels, and what the loss of every token is multiplied with."""
    generator = torch.Generator().manual_seed(1)
    padded = -(-VOCAB // (128 * mesh["tp"].size)) * 128 * mesh["tp"].size
    weight = Initializer(mesh, 5, 1.0, torch.float64).weight("head", (VOCAB, WIDTH), shard_dim=0, padded=padded)
    hidden, factors = (torch.randn(TOKENS, *w, generator=generator, dtype=torch.float64) for w in ((WIDTH,), ()))
    return hidden.requires_grad_(), weight, torch.randint(0, VOCAB, (TOKENS,), generator=generator), factors


def rank_results(
    parallel: ParallelConfig, functions: ChunkFunctions
) -> tuple[Sequence[torch.Tensor], Pieces, dict[tuple[str, str], int]]:
    """(losses, gradient of the hidden states, scores, which came first), that of the matrix, collectives forward."""
    mesh = Mesh.build(parallel)
    hidden, weight, labels, factors = case(mesh)
    losses = vocab_parallel_cross_entropy(hidden, weight, labels, mesh, functions)
    calls = {name: entry.calls for name, entry in mesh.ledger.entries.items()}
    (losses * factors).sum().backward()
    assert hidden.grad is not None
    scores = vocab_parallel_scores(hidden, weight, labels, mesh)
    tensors = (losses.detach(), all_reduce(hidden.grad, mesh, "tp"), *scores)
    return tensors, pieces(torch.nn.ParameterList([weight]), "grad"), calls


@pytest.mark.parametrize("functions", [EAGER, compiled_chunks()], ids=["eager", "compiled"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_losses_and_gradients(tp: int, functions: ChunkFunctions) -> None:
    """At tp 4 some ranks hold no row of the vocabulary, only padding. Two all-reduces, however many chunks."""
    hidden, weight, labels, factors = case(Mesh.single())
    logits = hidden @ weight[:VOCAB].t()
    expected = F.cross_entropy(logits, labels, reduction="none")
    (expected * factors).sum().backward()
    assert hidden.grad is not None
    results = run_ranks(tp, rank_results, ParallelConfig(tensor_model_parallel_size=tp), functions, timeout=280)
    for (losses, grad_hidden, scores, is_first), _, calls in results:
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_hidden, hidden.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(scores, -expected.detach(), rtol=1e-12, atol=1e-12)
        assert is_first.equal(logits.argmax(dim=1) == labels)
        assert calls == ({("tp", "all_reduce"): 2} if tp > 1 else {})
    assert_same(assemble([r[1] for r in results]), assemble([pieces(torch.nn.ParameterList([weight]), "grad")]), 1e-10)


def test_one_graph_for_chunks_of_any_size() -> None:
    torch._dynamo.reset()
    counters.clear()
    functions, mesh = compiled_chunks(), Mesh.single()
    hidden, weight, labels, factors = case(mesh)
    for count in (TOKENS, CHUNK_TOKENS + 7, 30):
        losses = vocab_parallel_cross_entropy(hidden[:count], weight, labels[:count], mesh, functions)
        (losses * factors[:count]).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2  # forward and backward
    assert not counters["graph_break"]


def test_one_pass_over_the_logits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the product, which writes them in bfloat16, they are read once, and in the backward pass written once."""
    torch._dynamo.reset()
    gpu, vocab = GPUCode(), 30_522
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=gpu))
    functions, mesh = compiled_chunks(), Mesh.single()
    weight = Initializer(mesh, 5, 1.0, torch.bfloat16).weight("head", (vocab, WIDTH), shard_dim=0, padded=30_592)
    hidden = torch.randn(CHUNK_TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    vocab_parallel_cross_entropy(hidden, weight, torch.arange(CHUNK_TOKENS), mesh, functions).sum().backward()
    logits, read = 2 * CHUNK_TOKENS * len(weight), 2 * (CHUNK_TOKENS + len(weight)) * WIDTH
    for graph, passes in zip(gpu.graphs, (2, 3), strict=True):
        assert (len(graph.kernels), graph.products) == (2, 1)  # the smaller kernel looks at the targets alone
        assert graph.moved == pytest.approx(passes * logits + read, rel=0.01)

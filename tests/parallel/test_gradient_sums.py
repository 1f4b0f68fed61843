"""In bf16 the gradients of micro-batches are added up, and reduced over ranks, in float32: in every engine.

What AdamW gets (its first moment after one step is (1 - beta1) times the gradient) is compared with the float64 sum of
the gradients that the same model in bf16 has of each micro-batch. How they are added at ZeRO-1, one by one or together,
changes no bit.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from neomoba_dist.config import Config, parse_config
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train import engine as engine_module
from neomoba_dist.train.engines import build_engine
from neomoba_dist.train.gradient_sums import _add
from tests.equivalence import Pieces, assemble, pieces, state_pieces
from tests.gpu_code import GPUCode
from tests.models import LENGTH, tiny_batch, tiny_model
from tests.parallel.test_engines import make_config
from tests.ranks import run_ranks
from tests.runs import build_mesh

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
PLAIN = {"contiguous_gradients": False, "reduce_scatter": False, "overlap_comm": True, "reduce_bucket_size": 1000}
PIPELINE = {"pipeline_model_parallel_size": 2}
# ranks (three, because an average over them is inexact), layout, ZeRO stage, its keys
ENGINES: dict[str, tuple[int, dict[str, int], int, dict[str, Any]]] = {
    "zero1": (2, {}, 1, {}),
    "zero2": (3, {}, 2, {}),
    "zero3": (2, {}, 3, {}),
    "pipeline": (2, PIPELINE, 1, {}),
    "zero1_plain": (3, {}, 1, PLAIN),
    "zero1_overlap": (2, {}, 1, {"overlap_comm": True}),
    "zero2_plain": (2, {}, 2, PLAIN),
    "zero2_small_buckets": (3, {}, 2, {"reduce_bucket_size": 1000}),  # most gradients are too large for one
    "zero3_plain": (2, {}, 3, PLAIN),
    "pipeline_plain": (2, PIPELINE, 1, PLAIN),
    "zero1_offload": (2, {}, 1, OFFLOAD),
    "zero2_offload": (2, {}, 2, OFFLOAD),
    "zero3_offload": (2, {}, 3, OFFLOAD),
    "pipeline_offload": (2, PIPELINE, 1, OFFLOAD),
}

FAST = {("zero1", "mlm"), ("zero2", "clm"), ("zero3", "mlm"), ("pipeline", "clm")}  # the pipeline's matrices are tied


def bf16_config(engine: str, objective: str, accumulation: int, **root: Any) -> Config:
    ranks, layout, stage, zero = ENGINES[engine]
    micro_batches = accumulation * ranks // layout.get("pipeline_model_parallel_size", 1)
    tree = make_config(objective, layout, stage, tokens_per_update=micro_batches * LENGTH).to_dict()
    tree["zero_optimization"] |= zero
    return parse_config({**tree, "gradient_clipping": 0.0, "bf16": {"enabled": True}, **root})


def micro_batches_of(config: Config) -> list[Batch]:
    count = config.phase.tokens_per_update // LENGTH
    batches = [tiny_batch(number, objective=config.model.objective) for number in range(count)]
    total = sum(batch.local_valid() for batch in batches)
    return [replace(batch, num_valid=total) for batch in batches]


def exact_sum(config: Config, ranks: int) -> dict[str, torch.Tensor]:
    """The float64 sum of the bf16 gradients of all micro-batches, each of a loss scaled as the engine scales it."""
    model = NeoBERT(config.model, Mesh.single(), seed=config.phase.seed, row_length=LENGTH).to(torch.bfloat16)
    if config.parallel.pipeline_model_parallel_size > 1 and config.model.tie_word_embeddings:
        shared = model.embedding.weight  # two stages have a copy each
        model.head.weight = nn.Parameter(shared.detach().clone())
        vars(model.head.weight).update(vars(shared))
    sums: dict[str, torch.Tensor] = {}
    for batch in micro_batches_of(config):
        model.zero_grad()
        (model(batch)[0] * (ranks / batch.num_valid)).backward()
        for shard, gradient in pieces(model, "grad"):
            sums[shard.name] = sums.get(shard.name, 0.0) + gradient.double() / ranks
    return sums


def moments_rank(config: Config) -> Pieces:
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    engine.update(micro_batches_of(config)[mesh["dp"].index :: mesh["dp"].size], 0.0)
    return state_pieces(engine, "exp_avg")


def error(engine: str, config: Config) -> float:
    """Of the whole gradient, relative to its norm."""
    ranks, layout, *_ = ENGINES[engine]
    found = assemble(run_ranks(ranks, moments_rank, config))
    expected = exact_sum(config, ranks // layout.get("pipeline_model_parallel_size", 1))
    assert found.keys() == expected.keys()
    share = 1 - config.phase.adam_beta1
    off = [float((found[name].double() / share - gradient).square().sum()) for name, gradient in expected.items()]
    return (sum(off) / sum(float(gradient.square().sum()) for gradient in expected.values())) ** 0.5


@pytest.mark.parametrize(
    ("engine", "objective"),
    [
        pytest.param(engine, objective, marks=() if (engine, objective) in FAST else pytest.mark.full)
        for engine in ENGINES
        for objective in ("mlm", "clm")
    ],
)
def test_sums_are_float32(engine: str, objective: str) -> None:
    fast = (engine, objective) in FAST
    for accumulation in (32,) if fast else (2, 8, 32):
        assert error(engine, bf16_config(engine, objective, accumulation)) < 1e-6


def test_bf16_sums_are_there_for_their_memory() -> None:
    """And lose precision: what the test above could not see if it did not look at sums."""
    config = bf16_config("zero1", "mlm", 32, data_types={"grad_accum_dtype": "bf16"})
    assert 2e-3 < error("zero1", config) < 2e-2


WAYS = {"DeepSpeed's": None, "one by one": False, "together": True}


def way_rank(config: Config, way: str) -> tuple[list[Pieces], list[int], list[int]]:
    """First moments after every update, the tensors of every list that was compiled, and of every one that was added.

    The last update is one of full attention.
    """
    compiled: list[int] = []
    added: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*tensors: torch.Tensor) -> Any:
            added.append(len(tensors) // 2)
            return graph(*tensors)

        compiled.append(len(inputs) // 2)
        return run

    torch._dynamo.reset()
    compile_function = torch.compile
    torch.compile = lambda function, **how: compile_function(
        function, **how, backend=backend if function is _add else "eager"
    )
    engine_module.compile_layers = lambda module: None
    if WAYS[way] is None:
        engine_module.add_in_place = lambda zero, *, together: None
    config = replace(config, phase=replace(config.phase, compile=way == "together"))
    mesh = build_mesh(config)
    engine = build_engine(config, config.plan(mesh["world"].size), mesh)
    batches, moments = micro_batches_of(config)[mesh["dp"].index :: mesh["dp"].size], []
    for full in (False, False, True):
        engine.set_full_attention(full)
        engine.update(batches, 1e-2)
        moments.append(state_pieces(engine, "exp_avg"))
    return moments, compiled, added


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(name, marks=() if name in ("zero1_overlap", "pipeline") else pytest.mark.full)
        for name, (*_, stage, _) in ENGINES.items()
        if stage == 1
    ],
)
def test_each_way_gives_the_same_bits(engine: str) -> None:
    """And adds whole lists together wherever they are not needed one by one; one graph for all updates."""
    ranks, layout, _, zero = ENGINES[engine]
    config = bf16_config(engine, "clm", 4)
    results = {way: run_ranks(ranks, way_rank, config, way) for way in WAYS}
    for update in range(3):
        expected, *others = (assemble([moments[update] for moments, *_ in found]) for found in results.values())
        assert all(value.count_nonzero() for value in expected.values())
        for moments in others:
            assert moments.keys() == expected.keys()
            assert all(torch.equal(moments[name], value) for name, value in expected.items())
    passes = 4 if layout or not zero.get("overlap_comm") else 3  # whose gradients wait; the first ones are copied
    for _, compiled, added in results["together"]:
        assert len(compiled) == 1
        assert compiled[0] > 5
        assert added == 3 * (passes - 1) * compiled
    assert not any(added for way in ("DeepSpeed's", "one by one") for _, _, added in results[way])


def test_kernels_of_a_gpu() -> None:
    """As many weights as phase 1 has are added by three kernels, which read and write nothing twice."""
    torch._dynamo.reset()
    model = NeoBERT(tiny_model(num_hidden_layers=28, qk_norm=False), Mesh.single(), seed=5)
    sums = [torch.ones_like(weight) for weight in model.parameters()]
    gradients = [weight.detach().bfloat16() for weight in model.parameters()]
    gpu = GPUCode()
    torch.compile(_add, dynamic=False, fullgraph=True, backend=gpu)(sums, gradients)
    (graph,) = gpu.graphs
    assert len(sums) == 171
    assert len(graph.kernels) == 3
    assert graph.moved == 10 * sum(weight.numel() for weight in sums)
    for total, gradient in zip(sums, gradients, strict=True):
        assert torch.equal(total, 1 + gradient.float())

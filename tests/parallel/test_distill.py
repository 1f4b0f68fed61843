"""Distillation equals one process in plain torch that writes the formulas down, on every layout that it runs on.

In float64 the two losses of the head and their gradients; through the engine, in float32, three optimizer steps with
all three losses and a projection: losses and their parts, gradient norms, every gradient, weights. The teacher comes
from a checkpoint, and no byte of it changes.
"""

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.config import Config, ParallelConfig, parse_config
from neomoba_dist.config.distill import matched_layers, teacher_problems
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.distill import PROJECTION_NAME, Lesson, Student, taught_cross_entropy
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.comm import all_reduce
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.distill import DistillEngine, FlatDistillEngine, build_distill_engine
from neomoba_dist.train.optim import parameter_groups
from tests.equivalence import Pieces, assemble, assert_same, pieces, state_pieces
from tests.evals.runs import write_run
from tests.models import LENGTH, tiny_model
from tests.parallel.test_engines import RATE, make_config, updates
from tests.ranks import run_ranks
from tests.runs import build_mesh

VOCAB, TOKENS, WIDTH, TAUGHT_WIDTH = 151, 1100, 16, 24  # more tokens than a chunk has
TEMPERATURE = 3.0
SEED = 18  # under which no weight has a first gradient so near zero that AdamW makes a whole step of its rounding error
WEIGHTS = {"label_weight": 0.7, "logit_weight": 1.3, "hidden_weight": 0.4, "temperature": TEMPERATURE}

LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "dp2_zero1": (2, {}, 1),
    "dp2_zero2": (2, {}, 2),
    "dp2_zero3": (2, {}, 3),
    "tp2_zero1": (2, {"tensor_model_parallel_size": 2}, 1),
    "tp2_sp_dp2_zero2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
    "tp2_dp2_zero3": (4, {"tensor_model_parallel_size": 2}, 3),
    "cp2_zero2": (2, {"context_parallel_size": 2}, 2),
    "cp2_zero3": (2, {"context_parallel_size": 2, "context_parallel_moba": "route_queries"}, 3),
    "tp2_sp_cp2_zero2": (
        4,
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True},
        2,
    ),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, 1),
    "pp3": (3, {"pipeline_model_parallel_size": 3}, 1),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}, 1),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1),
    "cp2_pp2": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1),
    "tp2_sp_pp2_dp2": (
        8,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
        1,
    ),
}


# ------------------------------------------------------------------------------------------------------ the head


def head_case(mesh: Mesh) -> tuple[torch.Tensor, torch.nn.Parameter, torch.Tensor, Lesson, torch.Tensor]:
    """Hidden states, output matrix and labels; a lesson; what the two losses of a token are multiplied with."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    padded = -(-VOCAB // (128 * mesh["tp"].size)) * 128 * mesh["tp"].size
    init = Initializer(mesh, 5, 1.0, torch.float64)
    weight = init.weight("student", (VOCAB, WIDTH), shard_dim=0, padded=padded)
    output = init.weight("teacher", (VOCAB, TAUGHT_WIDTH), shard_dim=0, padded=padded).detach()
    lesson = Lesson(TEMPERATURE, draw(TOKENS, TAUGHT_WIDTH), output)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return draw(TOKENS, WIDTH).requires_grad_(), weight, labels, lesson, draw(2, TOKENS)


def head_rank(parallel: ParallelConfig) -> tuple[torch.Tensor, torch.Tensor, Pieces]:
    mesh = Mesh.build(parallel)
    hidden, weight, labels, lesson, factors = head_case(mesh)
    losses = taught_cross_entropy(hidden, weight, labels, lesson, mesh)
    (losses * factors).sum().backward()
    holder = torch.nn.ParameterList([weight])
    assert hidden.grad is not None
    return losses.detach(), all_reduce(hidden.grad, mesh, "tp"), pieces(holder, "grad")


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_losses_and_gradients_of_the_head(tp: int) -> None:
    """Against the formulas; at tp 4 some ranks hold no row of the vocabulary, only padding."""
    hidden, weight, labels, lesson, factors = head_case(Mesh.single())
    logits = hidden @ weight[:VOCAB].t()
    ours = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    theirs = torch.log_softmax(lesson.hidden_CK @ lesson.output_vK[:VOCAB].t() / TEMPERATURE, dim=-1)
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1) * TEMPERATURE**2
    expected = torch.stack((F.cross_entropy(logits, labels, reduction="none"), divergence))
    (expected * factors).sum().backward()
    assert hidden.grad is not None
    assert divergence.min() > 1e-3
    results = run_ranks(tp, head_rank, ParallelConfig(tensor_model_parallel_size=tp))
    for losses, grad_hidden, _ in results:
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_hidden, hidden.grad, rtol=1e-10, atol=1e-12)
    assert_same(assemble([r[2] for r in results]), assemble([pieces(torch.nn.ParameterList([weight]), "grad")]), 1e-10)


def test_a_teacher_of_itself_teaches_nothing() -> None:
    hidden, weight, labels, _, _ = head_case(Mesh.single())
    lesson = Lesson(TEMPERATURE, hidden.detach(), weight.detach())
    divergence = taught_cross_entropy(hidden, weight, labels, lesson, Mesh.single())[1]
    divergence.sum().backward()
    assert hidden.grad is not None
    assert divergence.abs().max() < 1e-12
    assert hidden.grad.abs().max() < 1e-12


# ---------------------------------------------------------------------------------------------------- the engine


def teacher_config(objective: str, **model: Any) -> Config:
    """Six layers of another width; a tied head where the student's is not."""
    network = tiny_model(
        objective=objective,
        hidden_size=48,
        num_hidden_layers=6,
        hybrid_layer_count=2,
        tie_word_embeddings=objective == "mlm",
        **model,
    )
    tree = make_config(objective, {}, 1).to_dict()
    tree["neomoba"]["model"] = vars(network)
    tree["neomoba"]["phase"]["full_attention_fraction"] = 0.5
    return parse_config(tree)


def student_config(objective: str, layout: dict[str, Any], stage: int, teacher: Path, **distill: Any) -> Config:
    tree = make_config(objective, layout, stage, seed=SEED).to_dict()
    tree["neomoba"]["distill"] = {"teacher": str(teacher), **WEIGHTS, **distill}
    return parse_config(tree)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        objective: write_run(tmp_path_factory.mktemp(objective), teacher_config(objective))
        for objective in ("mlm", "clm")
    }


Run = tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor], list[dict[str, float]]]


def reference(objective: str, teacher_folder: Path, full_teacher: bool = False) -> Run:
    """Losses, gradient norms, gradients of the first step, final weights, parts; teacher and losses in plain torch."""
    config = student_config(objective, {}, 1, teacher_folder)
    phase = config.phase
    taught_by = teacher_config(objective)
    teacher = NeoBERT(taught_by.model, Mesh.single(), seed=7).eval()  # as `write_run` draws it
    set_full_attention(teacher, full_teacher)
    model = Student(config.model, Mesh.single(), 48, seed=phase.seed, row_length=LENGTH)
    optimizer = torch.optim.AdamW(
        parameter_groups(model.parameters(), phase.weight_decay), lr=RATE, betas=(phase.adam_beta1, phase.adam_beta2)
    )
    losses, norms, gradients, parts = [], [], {}, []
    for batches in updates(objective):
        found = torch.zeros(3)
        optimizer.zero_grad()
        for batch in batches:
            states, taught = ([state[0] for state in m.block_states(batch)] for m in (model, teacher))
            logits, aims = (m.logits(m.hidden_states(batch)) for m in (model, teacher))
            counts = batch.labels != -100
            label = F.cross_entropy(logits, batch.labels, reduction="sum")
            soft, aims = (torch.log_softmax(x[counts] / TEMPERATURE, dim=-1) for x in (logits, aims))
            logit = F.kl_div(soft, aims.detach(), reduction="sum", log_target=True) * TEMPERATURE**2
            apart = [
                F.mse_loss(F.linear(ours, model.projection.weight), taught[number].detach())
                for ours, number in zip(states, matched_layers(3, 6), strict=True)
            ]
            hidden = torch.stack(apart).mean() * len(batch.labels) / phase.tokens_per_update
            loss = torch.stack((label / batch.num_valid, logit / batch.num_valid, hidden))
            (loss * torch.tensor([0.7, 1.3, 0.4])).sum().backward()
            found += loss.detach()
        parts.append(dict(zip(DistillEngine.PARTS, found.tolist(), strict=True)))
        losses.append(float((found * torch.tensor([0.7, 1.3, 0.4])).sum()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        gradients = gradients or assemble([pieces(model, "grad")])
        optimizer.step()
    return losses, norms, gradients, assemble([pieces(model, "data")]), parts


@pytest.fixture(scope="module")
def references(teachers: dict[str, Path]) -> dict[str, Run]:
    return {objective: reference(objective, folder) for objective, folder in teachers.items()}


def train_rank(config: Config) -> tuple[list[float], list[float], Pieces, Pieces, list[dict[str, float]], float, float]:
    mesh = build_mesh(config)
    assert config.distill.teacher is not None
    engine = build_distill_engine(
        config, config.plan(mesh["world"].size), mesh, CheckpointReader(config.distill.teacher)
    )
    engine.set_full_attention(False)
    gc.collect()  # DeepSpeed takes its hooks away with an engine that nobody holds
    dp, losses, norms, parts, first_moment = mesh["dp"], [], [], [], []
    before = teacher_bytes(engine)
    given = updates(config.model.objective)
    for batches in given:
        result = engine.update(batches[dp.index :: dp.size], RATE)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        parts.append(dict(result.parts))
        first_moment = first_moment or state_pieces(engine, "exp_avg")
    validation, _ = engine.evaluate(given[0][dp.index :: dp.size])
    assert before == teacher_bytes(engine)
    assert all(parameter.grad is None for parameter in engine.teacher.parameters())
    own = sum(getattr(p, "ds_tensor", p).numel() for p in engine.teacher.parameters())
    return losses, norms, first_moment, state_pieces(engine, "model"), parts, validation, own


def teacher_bytes(engine: DistillEngine) -> list[bytes]:
    """All that this rank holds of the teacher."""
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.teacher.parameters()]
    output = [engine._output] if isinstance(engine, FlatDistillEngine) else []
    return [tensor.detach().numpy().tobytes() for tensor in (*held, *output)]


QUICK = {("dp2_zero3", "clm"), ("tp2_sp_dp2_zero2", "mlm"), ("cp2_zero2", "clm"), ("tp2_pp2", "mlm"), ("pp2", "clm")}


@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        pytest.param(layout, objective, marks=() if (layout, objective) in QUICK else pytest.mark.full)
        for objective in ("mlm", "clm")
        for layout in LAYOUTS
    ],
)
def test_three_steps(layout: str, objective: str, teachers: dict[str, Path], references: dict[str, Run]) -> None:
    world, parallel, stage = LAYOUTS[layout]
    losses, norms, gradients, weights, parts = references[objective]
    assert f"{PROJECTION_NAME}" in gradients
    assert min(min(part.values()) for part in parts) > 1e-2
    results = run_ranks(world, train_rank, student_config(objective, parallel, stage, teachers[objective]))
    for rank_losses, rank_norms, _, _, rank_parts, *_ in results:
        assert rank_losses[:2] == pytest.approx(losses[:2], rel=1e-5)
        assert rank_norms[:2] == pytest.approx(norms[:2], rel=1e-5)
        assert rank_losses == pytest.approx(losses, rel=2e-4)
        assert rank_norms == pytest.approx(norms, rel=2e-4)
        for found, expected in zip(rank_parts, parts, strict=True):
            assert found == pytest.approx(expected, rel=2e-4)
    moments = {name: 0.1 * grad for name, grad in gradients.items()}
    assert all(moment.abs().max() > 0 for moment in moments.values())
    assert_same(assemble([r[2] for r in results]), moments, rtol=2e-5)
    assert_same(assemble([r[3] for r in results]), weights, rtol=2e-4)
    assert len({r[5] for r in results}) == 1, "validation is the same everywhere"
    teacher = NeoBERT(teacher_config(objective).model, Mesh.single())
    whole = sum(parameter.numel() for parameter in teacher.parameters())
    if stage == 3:
        assert results[0][6] <= 0.51 * whole, "each rank holds its part of the teacher"
    if layout in ("pp2", "pp3"):
        tied = teacher.embedding.weight.numel() if teacher.config.tie_word_embeddings else 0
        assert sum(r[6] for r in results) == whole + tied, "each stage holds its part, both ends a tied matrix"


EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "router_scoring": "sigmoid"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "stage"),
    [
        ({}, 3),
        ({"expert_model_parallel_size": 2}, 2),
        ({"tensor_model_parallel_size": 2}, 2),
        ({"pipeline_model_parallel_size": 2}, 1),
    ],
    ids=["dp2_zero3", "ep2", "tp2", "pp2"],
)
def test_mixtures_of_experts(layout: dict[str, Any], stage: int, tmp_path: Path) -> None:
    """Both are some: as in one process."""
    folder = write_run(tmp_path / "teacher", teacher_config("clm", **EXPERTS))

    def config(layout: dict[str, Any], stage: int) -> Config:
        tree = student_config("clm", {}, stage, folder).to_dict()
        tree["neomoba"]["model"] |= EXPERTS
        tree["neomoba"]["parallel"] |= layout
        return parse_config(tree)

    compare_with_one(config({}, 1), config(layout, stage))


def test_a_teacher_whose_layers_are_no_multiple(tmp_path: Path) -> None:
    """Of logits alone, in a pipeline: each of the student's blocks has 2, 1 and 2 of the teacher's 5 beside it."""
    tree = teacher_config("mlm").to_dict()
    tree["neomoba"]["model"] |= {"num_hidden_layers": 5}
    folder = write_run(tmp_path / "teacher", parse_config(tree))
    layouts: tuple[dict[str, Any], ...] = ({}, {"pipeline_model_parallel_size": 2})
    compare_with_one(*(student_config("mlm", layout, 1, folder, hidden_weight=0.0) for layout in layouts))


def compare_with_one(alone: Config, both: Config) -> None:
    """Losses, their parts, gradient norms on two ranks are those of one."""
    (one,) = run_ranks(1, train_rank, alone)
    for found in run_ranks(2, train_rank, both):
        for i in (0, 1):
            assert found[i][:2] == pytest.approx(one[i][:2], rel=1e-5)
            assert found[i] == pytest.approx(one[i], rel=2e-4)
        for parts, expected in zip(found[4], one[4], strict=True):
            assert parts == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("teacher", "layout", "stage", "message"),
    [
        ({**EXPERTS}, {"expert_model_parallel_size": 2}, 3, "set zero_optimization.stage to 2"),
        ({"moba_block_size": 16}, {"context_parallel_size": 2}, 1, "set neomoba.parallel.context_parallel_split"),
        ({"num_key_value_heads": 1}, {"context_parallel_size": 2}, 1, "its 1 KV heads would be split over 1 of 2"),
        ({"vocab_size": 152}, {}, 1, "its vocab_size is 152, and neomoba.model.vocab_size is 151"),
        ({"prediction_head": True}, {}, 1, "it has a prediction_head"),
        ({"num_hidden_layers": 4}, {}, 1, r"set neomoba.model.num_hidden_layers to one of \[1, 2, 4\]"),
    ],
)
def test_teachers_that_do_not_fit(teacher: dict[str, Any], layout: dict[str, int], stage: int, message: str) -> None:
    model = {"num_experts": 4} if "expert_model_parallel_size" in layout else {}
    tree = make_config("mlm", layout, stage, model).to_dict()
    tree["neomoba"]["distill"] = {"teacher": "t", **WEIGHTS}
    found = list(teacher_problems(parse_config(tree), tiny_model(**teacher)))
    assert len(found) == 1
    assert re.search(message, found[0])

"""Fine-tuning on whole texts equals one process in plain torch, on every layout that it runs on.

Three optimizer steps of each head: losses, gradient norms, every gradient (AdamW's first moment), weights, and then the
outputs for a whole split. In-batch negatives come from all data-parallel ranks, so dp 2 must equal one process with the
same micro-batches, only twice as large.
"""

import random
from typing import Any

import numpy as np
import pytest
import torch

from neomoba_dist.config import Config, ConfigError, parse_config
from neomoba_dist.data.examples import Example, Examples, ExampleStream
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.model.text_heads import HEAD_NAME
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.engines import FlatEngine
from neomoba_dist.train.finetune import split_outputs
from neomoba_dist.train.optim import parameter_groups
from tests.equivalence import Pieces, assemble, assert_same, pieces, state_pieces
from tests.models import LENGTH, tiny_model
from tests.ranks import run_ranks
from tests.runs import build_mesh

STEPS, RATE = 3, 1e-2
EXAMPLES = 8  # of an update, in two accumulated micro-batches of all ranks together
TASKS = ("rte", "stsb", "contrastive")  # classifier, regressor, embedder

LAYOUTS = {
    "dp2_zero1": (2, {}, 1),
    "dp2_zero2": (2, {}, 2),
    "dp2_zero3": (2, {}, 3),
    "tp2": (2, {"tensor_model_parallel_size": 2}, 1),
    "tp2_sp_dp2_zero2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2),
    "tp2_dp2_zero3": (4, {"tensor_model_parallel_size": 2}, 3),
}


def make_config(task: str, layout: dict[str, Any], stage: int, dp: int) -> Config:
    return parse_config(
        {
            "train_micro_batch_size_per_gpu": EXAMPLES // 2 // dp,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "neomoba": {
                "model": vars(tiny_model(type_vocab_size=2 if task == "rte" else 0)),
                "parallel": layout,
                "data": {"train": "unused"},
                "finetune": {"tasks": task, "pooling": "cls" if task == "rte" else "mean", "temperature": 0.5},
                "phase": {
                    "name": "test",
                    "steps": STEPS,
                    "sequence_length": LENGTH,
                    "tokens_per_update": EXAMPLES * LENGTH,
                    "learning_rate": RATE,
                },
            },
        }
    )


def make_examples(task: str, number: int = 11) -> Examples:
    """Documents of 3 to 61 tokens, up to eight blocks; an epoch ends within the second update. Those of rte are pairs,
    for a model with segments."""
    draw = random.Random(task)
    found = []
    for index in range(number):
        documents = tuple(
            [draw.randrange(151) for _ in range(draw.choice((3, 17, 49, 61)))]
            for _ in range(3 if task == "contrastive" else 1)
        )
        labels = {"rte": index % 2, "stsb": draw.randrange(5_000_000), "contrastive": None}
        second = 1 + len(documents[0]) // 3 if task == "rte" else None
        found.append(Example(documents, labels[task], str(index), second))
    return Examples(found, LENGTH, 0, 0)


def train_rank(config: Config, task: str) -> tuple[list[float], list[float], Pieces, Pieces, np.ndarray]:
    mesh = build_mesh(config)
    plan = config.plan(mesh["world"].size)
    engine, dp = FlatEngine(config, plan, mesh), mesh["dp"]
    stream = iter(
        ExampleStream(
            make_examples(task),
            micro_batch_size=plan.micro_batch_size,
            accumulation=plan.gradient_accumulation_steps,
            seed=3,
            dp_rank=dp.index,
            dp_size=dp.size,
        )
    )
    losses, norms, first_moment = [], [], []
    engine.set_full_attention(False)
    for _ in range(STEPS):
        batches, _ = next(stream)
        assert len(batches) == 2
        result = engine.update([_counted(batch) for batch in batches], RATE)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        first_moment = first_moment or state_pieces(engine, "exp_avg")
    return losses, norms, first_moment, state_pieces(engine, "model"), split_outputs(engine, make_examples(task, 7))


def _counted(batch: Any) -> Any:
    """num_valid as the trainer sets it: of all ranks."""
    from dataclasses import replace

    return replace(batch, num_valid=EXAMPLES)


def reference(task: str) -> tuple[list[float], list[float], dict, dict, torch.Tensor, list[float]]:
    config = make_config(task, {}, 1, 1)
    phase = config.phase
    model = NeoBERT(config.model, Mesh.single(), seed=phase.seed, row_length=LENGTH, text_head=config.finetune.head)
    optimizer = torch.optim.AdamW(
        parameter_groups(model.parameters(), phase.weight_decay), lr=RATE, betas=(phase.adam_beta1, phase.adam_beta2)
    )
    stream = iter(ExampleStream(make_examples(task), micro_batch_size=EXAMPLES // 2, accumulation=2, seed=3))
    losses, norms, gradients, full = [], [], {}, []
    for _ in range(STEPS):
        batches, _ = next(stream)
        set_full_attention(model, True)
        full.append(sum(float(model(batch)[0].detach()) for batch in batches) / EXAMPLES)
        set_full_attention(model, False)
        optimizer.zero_grad()
        loss = sum(model(batch)[0] for batch in batches) / EXAMPLES
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        gradients = gradients or assemble([pieces(model, "grad")])
        optimizer.step()
    with torch.no_grad():
        outputs = model.eval()(make_examples(task, 7).batch(range(7)), outputs=True)
    return losses, norms, gradients, assemble([pieces(model, "data")]), outputs, full


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {task: reference(task) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps(layout: str, task: str, references: dict[str, Any]) -> None:
    world, parallel, stage = LAYOUTS[layout]
    dp = world // parallel.get("tensor_model_parallel_size", 1)
    losses, norms, gradients, weights, outputs, full = references[task]
    assert abs(losses[0] - full[0]) > 1e-4, "sparse must differ from full"
    assert {name for name in gradients if name.startswith(HEAD_NAME)} or task == "contrastive"
    results = run_ranks(world, train_rank, make_config(task, parallel, stage, dp), task)
    for rank_losses, rank_norms, *_ in results:
        assert rank_losses == pytest.approx(losses, rel=2e-4)
        assert rank_norms == pytest.approx(norms, rel=2e-4)
        assert rank_losses[:2] == pytest.approx(losses[:2], rel=1e-5)
    moments = {name: 0.1 * grad for name, grad in gradients.items()}
    assert all(moment.abs().max() > 0 for moment in moments.values())
    assert_same(assemble([r[2] for r in results]), moments, rtol=2e-5)
    assert_same(assemble([r[3] for r in results]), weights, rtol=2e-4)
    for *_, found in results:
        torch.testing.assert_close(torch.from_numpy(found), outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("axis", ["pipeline_model_parallel_size", "context_parallel_size"])
def test_other_layouts_are_refused_in_one_line(axis: str) -> None:
    with pytest.raises(ConfigError, match=rf"neomoba.parallel.{axis} 2 cannot fine-tune .*; set it to 1 and use"):
        make_config("rte", {axis: 2}, 1, 1)

"""An encoder-decoder gives the same on every layout: float64 without engines, float32 with them."""

from typing import Any

import pytest
import torch

from neomoba_dist.config import ModelConfig, ParallelConfig
from neomoba_dist.generate.decode import generate
from neomoba_dist.generate.stage import Stage
from neomoba_dist.parallel.mesh import Mesh
from tests.decoding import random_documents
from tests.equivalence import assemble, assert_same, parallel_rank, single_process
from tests.models import tiny_batch, tiny_model
from tests.parallel.test_engines import SEED, check, make_config
from tests.ranks import run_ranks

TP = "tensor_model_parallel_size"
SP = {"sequence_parallel": True}
PAIR: dict[str, Any] = {"num_decoder_layers": 2}
PARTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "bert": {"norm": "layernorm", "norm_placement": "post", "mlp_activation": "gelu", "tie_word_embeddings": True},
    "dropout": {"dropout": 0.25, "position_embedding": "learned", "qk_norm": False},
    "t5": {"position_embedding": "t5_relative", "mlp_activation": "geglu", "key_conv_width": 3},
}
LAYERS: dict[str, dict[str, Any]] = {"tp2": {TP: 2}, "tp2_sp": {TP: 2, **SP}, "tp4_sp": {TP: 4, **SP}}


@pytest.mark.parametrize("part", PARTS)
def test_layers(part: str) -> None:
    """Loss and every gradient in float64; at tp 4 two ranks share each KV head."""
    config = tiny_model(objective="span_corruption", **PAIR, **PARTS[part])
    batches = [tiny_batch(2, objective="span_corruption"), tiny_batch(3, rows=2, objective="span_corruption")]
    loss, gradients = single_process(config, batches)
    assert all(g.abs().max() > 0 for g in gradients.values())
    assert abs(loss - single_process(config, batches, full=True)[0]) > 1e-3, "sparse must differ from full"
    for name, layout in LAYERS.items():
        parallel = ParallelConfig(**layout)
        for recompute in ("none", "full", "selective")[: 3 if name == "tp2_sp" else 1]:
            results = run_ranks(layout[TP], parallel_rank, config, parallel, batches, False, recompute)
            for rank_loss, _ in results:
                assert abs(rank_loss - loss) < 1e-12 * abs(loss), name
            assert_same(assemble([grads for _, grads in results]), gradients, rtol=1e-10)


def generating_rank(config: ModelConfig, tp: int) -> list[list[int]]:
    mesh = Mesh.build(ParallelConfig(**{TP: tp}), num_key_value_heads=config.num_key_value_heads)
    stage = Stage.build(config, mesh, dtype=torch.float64, seed=5)
    return generate(stage, [[0]] * 3, 12, sources=random_documents((61, 17, 5)), decode="moba")


def test_generation() -> None:
    """At tp 4 two ranks share each KV head."""
    config = tiny_model(objective="span_corruption", **PAIR, **PARTS["t5"])
    (expected,) = run_ranks(1, generating_rank, config, 1)
    assert len({token for ids in expected for token in ids}) > 5
    for tp in (2, 4):
        assert run_ranks(tp, generating_rank, config, tp) == [expected] * tp


ENGINES: dict[str, tuple[int, dict[str, Any], int, str, dict[str, Any]]] = {
    "dp2_zero1": (2, {}, 1, "usual", {}),
    "dp2_zero2": (2, {}, 2, "dropout", {"recompute": "selective"}),
    "dp2_zero3": (2, {}, 3, "usual", {"recompute": "full", "recompute_every": 2}),
    "tp2_zero1": (2, {TP: 2}, 1, "bert", {}),
    "tp2_sp_dp2_zero2": (4, {TP: 2, **SP}, 2, "dropout", {"recompute": "full"}),
    "tp2_dp2_zero3": (4, {TP: 2}, 3, "dropout", {}),
    "tp4_sp_zero1": (4, {TP: 4, **SP}, 1, "usual", {"optimizer": "muon"}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_engines(name: str) -> None:
    world, layout, stage, part, phase = ENGINES[name]
    check(world, make_config("span_corruption", layout, stage, {**PAIR, **PARTS[part]}, **{"seed": SEED, **phase}))

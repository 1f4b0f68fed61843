"""The count of operations against those that torch sees run, product by product.

Every model is run whole, forward and backward, in float64: there each product is one of torch's. What torch cannot look
into is replaced by the same computation in its operators: SDPA by its formula, the experts by a loop, the router.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from neomoba_dist.config import ModelConfig
from neomoba_dist.data.batch import Batch
from neomoba_dist.model.attention.kernels import cross, full
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.encoder_decoder import MODELS
from neomoba_dist.model.moe import router
from neomoba_dist.model.moe.experts import Experts
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.flops import step_flops
from tests.models import tiny_batch, tiny_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PAIR = {"objective": "span_corruption", "num_decoder_layers": 2}


def _in_place(*shapes: torch.Size, **others: Any) -> int:
    """Of addmm_, which torch does not count."""
    return addmm_flop.__wrapped__(*shapes[:3])


def _by_products(
    experts: Experts, x: Tensor, expert: Tensor, weight: Tensor, fill: int, shared: nn.Module | None = None
) -> Tensor:
    """Experts as they are computed where rows travel: by operators that torch counts."""
    y = experts._receive(*experts._send(x, expert, fill), weight)
    return y if shared is None else y + shared(x)


def _seen(config: ModelConfig, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> int:
    """Operations of all products of a full step."""
    for module in (full, cross):
        monkeypatch.setattr(module, "full_attention_kernel", lambda call: "sdpa")
    monkeypatch.setattr(Experts, "forward", _by_products)
    monkeypatch.setattr(router, "exact_linear", F.linear)
    model: Any = MODELS[config.objective](config, Mesh.single(), dtype=torch.float64, seed=5)
    set_full_attention(model, True)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place})
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss, aux_loss = model(batch)[:2]
        (loss + aux_loss).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "objective": "clm"},
        {"mlp_activation": "gelu", "prediction_head": True},
        EXPERTS,
        {**EXPERTS, "num_shared_experts": 1, "moe_layer_frequency": 2},
        PAIR,
    ],
    ids=["gqa", "mha_tied", "mqa_lm", "two_matrices", "moe", "moe_shared", "encoder_decoder"],
)
def test_operations_are_those_that_torch_counts(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what the convention leaves out: masked pairs, which SDPA's formula computes, and the logits that the
    backward pass computes again."""
    config = tiny_model(vocab_size=256, **changes)  # of which no row is padding
    batch = tiny_batch(0, objective=config.objective, vocab_size=256).with_counted()
    assert batch.counted is not None
    lengths, encoder, counted = batch.cu_seqlens.long().diff(), None, len(batch.counted)
    tokens, seen = len(batch.input_ids), lengths * (lengths + 1) // 2 if config.causal else lengths**2
    masked = config.num_hidden_layers * (tokens**2 - int(seen.sum()))
    if batch.encoder is not None:
        encoder = batch.encoder.cu_seqlens.long().diff()
        read = len(batch.encoder.input_ids)
        masked = config.num_hidden_layers * (read**2 - int((encoder**2).sum()))
        masked += config.num_decoder_layers * (tokens**2 - int((lengths * (lengths + 1) // 2).sum()))
        masked += config.num_decoder_layers * (tokens * read - int((lengths * encoder).sum()))
    again = 2 * counted * config.hidden_size * config.vocab_size
    beside = 3 * 4 * masked * config.num_attention_heads * config.head_dim + again
    assert _seen(config, batch, monkeypatch) - beside == step_flops(config, lengths, counted, True, encoder)

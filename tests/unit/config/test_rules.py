"""The rules between keys, the batch arithmetic, and that the values the messages name do work."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neomoba_dist.config import BatchPlan, ConfigError, load_config
from neomoba_dist.config.batch import nearest_multiples
from neomoba_dist.config.load import KNOWN_KEYS
from tests.configs import build

TP = "neomoba.parallel.tensor_model_parallel_size"
PP = "neomoba.parallel.pipeline_model_parallel_size"
CP = "neomoba.parallel.context_parallel_size"
GRAPHS = {"neomoba.phase.compile": "cuda_graphs", "bf16.enabled": True}
PAIR = {"neomoba.model.objective": "span_corruption", "neomoba.model.num_decoder_layers": 4}

BROKEN: list[tuple[dict[str, Any], str, dict[str, Any]]] = [  # what is set, what the line says, what mends it
    (
        {CP: 8, "neomoba.parallel.context_parallel_moba": "ulysses"},
        "set it to one of auto, allgather_kv, route_queries, ulysses+allgather_kv, ulysses+route_queries",
        {"neomoba.parallel.context_parallel_moba": "ulysses+route_queries"},
    ),
    (
        {CP: 4, "neomoba.parallel.context_parallel_full": "ulysses+ring"},
        "set it to one of auto, ulysses, allgather_kv, ring",
        {"neomoba.parallel.context_parallel_full": "ulysses"},
    ),
    (
        {CP: 2, "neomoba.model.position_embedding": "alibi"},
        "set position_embedding to rope",
        {"neomoba.model.position_embedding": "rope"},
    ),
    (
        {CP: 8, "neomoba.model.attention": "sliding_window*25,full*3", "neomoba.model.global_tokens": 4},
        "neomoba.model.global_tokens 4 needs a " + CP,
        {CP: 4},
    ),
    (
        {
            CP: 8,
            "neomoba.parallel.context_parallel_moba": "ulysses+route_queries",
            "neomoba.model.moba_pooling": "max",
        },
        "neomoba.model.moba_pooling max is not put together",
        {"neomoba.parallel.context_parallel_moba": "auto"},
    ),
    (
        {TP: 4, "neomoba.model.num_key_value_heads": 2, "neomoba.model.moba_gate": "kv_group"},
        "neomoba.model.moba_gate kv_group adds up",
        {"neomoba.model.moba_gate": "per_head"},
    ),
    ({**GRAPHS, TP: 2}, f"neomoba.phase.compile cuda_graphs records whole layers, and {TP} 2 cuts them", {TP: 1}),
    ({**GRAPHS, CP: 2}, f"{CP} 2 cuts them; set it to 1, or compile to auto", {CP: 1}),
    (
        {**GRAPHS, "zero_optimization.stage": 3},
        "which those of zero_optimization.stage 3 do not; set the stage to 1 or 2",
        {"zero_optimization.stage": 2},
    ),
    (
        {**GRAPHS, "bf16.enabled": False},
        "neomoba.phase.compile cuda_graphs writes each micro-batch's gradients where the last one's were",
        {"bf16.enabled": True},
    ),
    (
        {**GRAPHS, "data_types.grad_accum_dtype": "bf16"},
        "beside half-precision ones; delete data_types.grad_accum_dtype",
        {"data_types.grad_accum_dtype": "fp32"},
    ),
    (
        {**GRAPHS, "neomoba.distill.teacher": "runs/teacher"},
        "neomoba.phase.compile cuda_graphs records the pretraining of one stack of layers",
        {"neomoba.phase.compile": "auto"},
    ),
    (
        {
            **GRAPHS,
            "neomoba.model.num_experts": 4,
            "neomoba.model.moe_capacity_factor": 1.0,
            "neomoba.model.moe_overflow": "reroute",
        },
        "which neomoba.model.moe_overflow reroute has; set it to drop",
        {"neomoba.model.moe_overflow": "drop"},
    ),
    ({"zero_optimization.stage": 0}, "set zero_optimization.stage to 1", {"zero_optimization.stage": 1}),
    ({"zero_optimization.stage": 2, PP: 2}, "cannot be combined with " + PP, {"zero_optimization.stage": 1}),
    ({"zero_optimization.stage": 3, PP: 2}, "cannot be combined with " + PP, {PP: 1}),
    (
        {"zero_optimization.stage": 2, "zero_optimization.offload_param.device": "cpu"},
        "zero_optimization.offload_param works at stage 3 only",
        {"zero_optimization.stage": 3},
    ),
    (
        {"zero_optimization.stage": 3, "zero_optimization.zero_hpz_partition_size": 2, TP: 2},
        "zero_optimization.zero_hpz_partition_size works at stage 3 with " + TP,
        {TP: 1},
    ),
    ({"zero_optimization.zero_hpz_partition_size": 2}, "(not 1 and 1)", {"zero_optimization.stage": 3}),
    ({"wall_clock_breakdown": True, PP: 2}, "wall_clock_breakdown does not work", {PP: 1}),
    ({"flops_profiler.enabled": True, PP: 2}, "flops_profiler.enabled does not", {"flops_profiler.enabled": False}),
    ({"bf16.enabled": True, "fp16.enabled": True}, "bf16.enabled and fp16.enabled", {"fp16.enabled": False}),
    (
        {"data_types.grad_accum_dtype": "bf16"},
        "data_types.grad_accum_dtype is bf16 but the model computes in fp32",
        {"bf16.enabled": True},
    ),
    (
        {"neomoba.model.num_key_value_heads": 5},
        "num_key_value_heads to one of [1, 2, 3, 4, 6, 12]",
        {"neomoba.model.num_key_value_heads": 6},
    ),
    ({"neomoba.model.hidden_size": 770}, "set it to 768 or 780", {"neomoba.model.head_dim": 64}),
    ({"neomoba.model.head_dim": 63}, "neomoba.model.head_dim 63 is odd", {"neomoba.model.head_dim": 62}),
    (
        {"neomoba.model.hybrid_layer_count": 29},
        "neomoba.model.hybrid_layer_count 29 is larger than num_hidden_layers 28; set it to 28 or less",
        {"neomoba.model.hybrid_layer_count": 28},
    ),
    (
        {"neomoba.model.objective": "clm", "neomoba.model.type_vocab_size": 2},
        "neomoba.model.type_vocab_size 2 tells the two texts of an encoder's pair apart",
        {"neomoba.model.type_vocab_size": 0},
    ),
    (
        {"neomoba.model.next_sentence_prediction": True},
        "neomoba.model.type_vocab_size 0 does not tell apart; set type_vocab_size to 2",
        {"neomoba.model.type_vocab_size": 2},
    ),
    (
        {
            "neomoba.model.next_sentence_prediction": True,
            "neomoba.model.type_vocab_size": 2,
            "neomoba.distill.teacher": "runs/phase3",
        },
        "neomoba.model.next_sentence_prediction is nothing that neomoba.distill.teacher teaches; set it to false",
        {"neomoba.model.next_sentence_prediction": False},
    ),
    (
        {"neomoba.model.attention": "mobo"},
        'neomoba.model.attention "mobo" is not known; set it to one of moba, full, sliding_window, or to a list',
        {"neomoba.model.attention": "moba*27,full*1", "neomoba.model.hybrid_layer_count": 1},
    ),
    (
        {"neomoba.model.attention": "moba*x"},
        'neomoba.model.attention "moba*x" is not known',
        {"neomoba.model.attention": " moba*25 , full , full*2"},
    ),
    (
        {"neomoba.model.attention": "moba*25,full*2"},
        '"moba*25,full*2" makes 27 layers, but num_hidden_layers is 28; let the counts add up to it',
        {"neomoba.model.num_hidden_layers": 27, "neomoba.model.hybrid_layer_count": 2},
    ),
    (
        {"neomoba.model.attention": "full*4,moba*23,full*1"},
        "ends with 1 full layers, but neomoba.model.hybrid_layer_count is 3; set hybrid_layer_count to 0",
        {"neomoba.model.hybrid_layer_count": 0},
    ),
    (
        {"neomoba.model.global_tokens": 4},
        "set global_tokens to 0",
        {"neomoba.model.attention": "sliding_window"},
    ),
    (
        {"neomoba.model.key_conv_width": 4},
        "neomoba.model.key_conv_width 4 has no middle",
        {"neomoba.model.key_conv_width": 5},
    ),
    (
        {"neomoba.model.sliding_rope_theta": 100.0},
        "set sliding_rope_theta to null",
        {"neomoba.model.attention": "sliding_window"},
    ),
    (
        {
            "neomoba.model.sliding_rope_theta": 100.0,
            "neomoba.model.attention": "sliding_window",
            "neomoba.model.position_embedding": "none",
        },
        "neomoba.model.sliding_rope_theta 100 needs rotary positions",
        {"neomoba.model.sliding_rope_theta": None},
    ),
    (
        {"neomoba.model.prediction_head": True, "neomoba.distill.teacher": "runs/teacher"},
        "neomoba.model.prediction_head true cannot be distilled",
        {"neomoba.model.prediction_head": False},
    ),
    ({"neomoba.model.key_conv_width": 4}, "set it to 5", {"neomoba.model.objective": "clm"}),
    (
        {"neomoba.model.position_embedding": "alibi", "neomoba.model.rope_scaling_type": "linear"},
        "position_embedding is alibi; set rope_scaling_type to null",
        {"neomoba.model.rope_scaling_type": None},
    ),
    (
        {"neomoba.model.rope_scaling_factor": 4},
        "neomoba.model.rope_scaling_factor 4 has no effect without rope_scaling_type",
        {"neomoba.model.rope_scaling_type": "ntk"},
    ),
    (
        {"neomoba.model.rope_scaling_type": "yarn", "neomoba.model.rope_scaling_factor": 4},
        "yarn needs original_max_position_embeddings",
        {"neomoba.model.original_max_position_embeddings": 4096},
    ),
    (
        {"neomoba.model.rope_scaling_type": "ntk", "neomoba.model.head_dim": 2},
        "ntk is not defined for head_dim 2; set rope_scaling_type to linear",
        {"neomoba.model.rope_scaling_type": "linear"},
    ),
    (
        {"neomoba.model.hidden_size": 765, "neomoba.model.head_dim": 64,
         "neomoba.model.position_embedding": "sinusoidal"},
        "set hidden_size to 764 or 766",
        {"neomoba.model.hidden_size": 766},
    ),
    (
        {"neomoba.model.num_decoder_layers": 2},
        "objective mlm does not train; set objective to span_corruption, or num_decoder_layers to 0",
        {"neomoba.model.num_decoder_layers": 0},
    ),
    (
        {"neomoba.model.objective": "span_corruption"},
        "set num_decoder_layers, for example to 28",
        {"neomoba.model.num_decoder_layers": 28},
    ),
    (
        {**PAIR, "neomoba.model.num_decoder_layers": 2},
        "neomoba.model.hybrid_layer_count 3 is larger than num_decoder_layers 2; set it to 2 or less",
        {"neomoba.model.hybrid_layer_count": 2},
    ),
    (
        {**PAIR, "neomoba.model.attention": "moba*28,full*3"},
        "makes 31 layers, but num_hidden_layers + num_decoder_layers is 32; let the counts add up to it",
        {"neomoba.model.num_decoder_layers": 3},
    ),
    (
        {**PAIR, TP: 4, "neomoba.parallel.sequence_parallel": True, "neomoba.phase.sequence_length": 60,
         "neomoba.phase.tokens_per_update": 480},
        "rows of 61 tokens of the encoder and 293 of the decoder over tensor_model_parallel_size 4",
        {"train_micro_batch_size_per_gpu": 4},
    ),
    *(
        ({**PAIR, key: value}, f"{key} {value} does not work with an encoder-decoder", {key: works})
        for key, value, works in (
            (PP, 2, 1), (CP, 2, 1), ("neomoba.model.num_experts", 8, 0), ("neomoba.data.align", 16, 1),
            ("neomoba.data.token_dropout", 0.1, 0.0), ("neomoba.finetune.tasks", "cola", None),
            ("neomoba.distill.teacher", "runs/x", None),
        )
    ),
    ({TP: 5}, f"num_attention_heads 12 is not a multiple of {TP} 5; set {TP} to 4", {TP: 4}),
    ({TP: 3, "neomoba.model.num_key_value_heads": 2}, "num_key_value_heads 2 neither divides nor", {TP: 2}),
    ({TP: 8}, f"num_attention_heads 12 is not a multiple of {TP} 8; set {TP} to 4", {TP: 4}),
    (
        {TP: 4, "neomoba.model.intermediate_size": 3074},
        f"intermediate_size 3074 is not a multiple of {TP} 4; set {TP} to 2",
        {TP: 2},
    ),
    ({"neomoba.parallel.sequence_parallel": True}, "sequence_parallel needs tensor parallelism", {TP: 2}),
    (
        {TP: 4, "neomoba.parallel.sequence_parallel": True, "neomoba.phase.sequence_length": 2,
         "neomoba.phase.tokens_per_update": 8},
        "set sequence_length to 4",
        {"neomoba.phase.sequence_length": 4},
    ),
    ({PP: 29}, f"{PP} 29 is larger than neomoba.model.num_hidden_layers 28; set it to 28 or less", {PP: 28}),
    (
        {"neomoba.model.max_position_embeddings": 32},
        "set max_position_embeddings to 64",
        {"neomoba.model.max_position_embeddings": 64},
    ),
    (
        {"neomoba.phase.warmup_steps": 11},
        "neomoba.phase.warmup_steps 11 is larger than neomoba.phase.steps 10",
        {"neomoba.phase.warmup_steps": 10},
    ),
    (
        {"neomoba.phase.schedule": "wsd", "neomoba.phase.warmup_steps": 4, "neomoba.phase.decay_steps": 7},
        "set decay_steps to 6 or less",
        {"neomoba.phase.decay_steps": 6},
    ),
    (
        {"neomoba.phase.tokens_per_update": 500},
        "set it to 448 or 512",
        {"neomoba.phase.tokens_per_update": 448},
    ),
    ({"train_micro_batch_size_per_gpu": 16}, "set it to 1024", {"neomoba.phase.tokens_per_update": 1024}),
    ({"train_batch_size": 16}, "train_batch_size is 16, but", {"train_batch_size": 8}),
    ({"neomoba.phase.name": " "}, "neomoba.phase.name is empty", {"neomoba.phase.name": "x"}),
    ({"neomoba.data.train": ""}, "neomoba.data.train is empty", {"neomoba.data.train": "x"}),
    ({"neomoba.data.train": "a,,b"}, "neomoba.data.train is empty, or has an empty", {"neomoba.data.train": "a,b"}),
    ({"neomoba.data.train": "a*1,b*0"}, '"a*1,b*0" gives a source the weight 0', {"neomoba.data.train": "a*1,b*2"}),
    ({"neomoba.data.cache": ""}, "neomoba.data.cache is empty", {"neomoba.data.cache": None}),
    (
        {"neomoba.data.align": 30},
        "neomoba.data.align 30 does not divide neomoba.phase.sequence_length 64; set align to 32",
        {"neomoba.data.align": 32},
    ),
    ({"neomoba.data.validation": ""}, "neomoba.data.validation is empty", {"neomoba.data.validation": None}),
    (
        {"neomoba.checkpoint.keep_every": 2500},
        "keep_every 2500 is not a multiple of save_every 1000; set it to 2000 or 3000",
        {"neomoba.checkpoint.keep_every": 2000},
    ),
    ({"neomoba.log.wandb_project": ""}, "neomoba.log.wandb_project is empty", {"neomoba.log.wandb_project": None}),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "expected", "mended"), BROKEN, ids=lambda value: str(value)[:60])
def test_rules(broken: dict[str, Any], expected: str, mended: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(broken)
    message = str(caught.value)
    assert message.startswith("FILE: ")
    assert expected in message
    build({**broken, **mended} if mended else dict.fromkeys(broken, 1))


@pytest.mark.parametrize(
    ("attention", "hybrid", "kinds"),
    [
        ("moba", 1, "m m f"),
        ("full", 1, "f f f"),
        ("sliding_window", 0, "s s s"),
        ("moba*2,full", 1, "m m f"),
        ("sliding_window,moba,full*1", 0, "s m f"),
        ("full*1,moba*2", 0, "f m m"),
    ],
)
def test_layer_attentions(attention: str, hybrid: int, kinds: str) -> None:
    changes = {"attention": attention, "hybrid_layer_count": hybrid, "num_hidden_layers": 3}
    model = build({f"neomoba.model.{key}": value for key, value in changes.items()}).model
    assert [kind[0] for kind in model.layer_attentions] == kinds.split()


def test_positions_without_pairs_take_an_odd_head_dim() -> None:
    assert build({"neomoba.model.head_dim": 63, "neomoba.model.position_embedding": "alibi"}).model.head_dim == 63


def test_number_of_known_keys() -> None:
    assert (
        sum(len(block) for name, block in KNOWN_KEYS["neomoba"].items() if name not in ("finetune", "distill")) <= 113
    )


def test_key_value_heads_may_be_fewer_than_tensor_parallel_ranks() -> None:
    assert build({TP: 4, "neomoba.model.num_key_value_heads": 2}).parallel.tensor_model_parallel_size == 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages(stage: int) -> None:
    assert build({"zero_optimization.stage": stage}).zero_stage == stage


# ------------------------------------------------------------------------------------------------------- plan


def test_plan_of_phase_3_on_8_ranks() -> None:
    config = load_config(Path(__file__).parents[3] / "ds_configs" / "phase3.json")
    assert config.plan(8) == BatchPlan(
        world_size=8,
        data_parallel_size=8,
        micro_batch_size=1,
        gradient_accumulation_steps=8,
        rows_per_update=64,
        tokens_per_update=2_097_152,
    )


@settings(max_examples=200, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]),
    pp=st.integers(1, 4),
    dp=st.integers(1, 12),
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 7),
    length=st.sampled_from([64, 100, 1024]),
    stated=st.booleans(),
)
def test_plan_arithmetic(tp: int, pp: int, dp: int, micro: int, accumulation: int, length: int, stated: bool) -> None:
    rows = micro * accumulation * dp
    changes: dict[str, Any] = {
        TP: tp,
        PP: pp,
        "train_micro_batch_size_per_gpu": micro,
        "neomoba.phase.sequence_length": length,
        "neomoba.phase.tokens_per_update": rows * length,
    }
    if stated:
        changes |= {"gradient_accumulation_steps": accumulation, "train_batch_size": rows}
    plan = build(changes).plan(tp * pp * dp)
    assert (plan.data_parallel_size, plan.gradient_accumulation_steps, plan.rows_per_update) == (dp, accumulation, rows)
    assert plan.tokens_per_update == plan.rows_per_update * length


@pytest.mark.parametrize("world_size", [0, -4, 1, 6, 9, 15])
def test_plan_names_the_world_sizes_that_work(world_size: int) -> None:
    config = build({TP: 2, PP: 2, "neomoba.phase.tokens_per_update": 64 * 4 * 3})
    with pytest.raises(ConfigError) as caught:
        config.plan(world_size)
    message = str(caught.value)
    assert message.startswith(f"FILE: {world_size} ranks are not a multiple of neomoba.parallel.")
    for size in re.findall(r"start (.*) ranks", message)[0].split(" or "):
        assert config.plan(int(size)).world_size == int(size)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 50), dp=st.integers(2, 9), micro=st.integers(1, 3))
def test_plan_names_the_tokens_that_work(rows: int, dp: int, micro: int) -> None:
    changes = {"train_micro_batch_size_per_gpu": micro, "neomoba.phase.tokens_per_update": 64 * micro * rows}
    config = build(changes)
    if rows % dp == 0:
        assert config.plan(dp).gradient_accumulation_steps == rows // dp
        return
    with pytest.raises(ConfigError) as caught:
        config.plan(dp)
    assert "neomoba.phase.tokens_per_update" in str(caught.value)
    values = re.findall(r"set it to (.*)$", str(caught.value))[0].split(" or ")
    for value in values:
        build({**changes, "neomoba.phase.tokens_per_update": int(value)}).plan(dp)


def test_stated_accumulation_must_agree() -> None:
    config = build({"gradient_accumulation_steps": 4})
    assert config.plan(2).gradient_accumulation_steps == 4
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps is 4, but .* on 4 ranks needs 2"):
        config.plan(4)


def test_hpz_must_divide_the_ranks() -> None:
    config = build({"zero_optimization.stage": 3, "zero_optimization.zero_hpz_partition_size": 4})
    assert config.plan(8).data_parallel_size == 8
    with pytest.raises(ConfigError, match="zero_hpz_partition_size 4 does not divide 2 ranks"):
        config.plan(2)


@given(value=st.integers(1, 10**6), step=st.integers(1, 10**4))
def test_nearest_multiples(value: int, step: int) -> None:
    found = [int(number) for number in nearest_multiples(value, step).split(" or ")]
    assert all(number > 0 and number % step == 0 and abs(number - value) <= step for number in found)

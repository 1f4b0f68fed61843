"""Decoding on tensor- and pipeline-parallel models equals one process in float64: every logit and every token."""

from pathlib import Path
from typing import Any

import pytest
import torch

from neomoba_dist.checkpoint.load import CheckpointReader, load_model, load_weights
from neomoba_dist.config import ModelConfig, ParallelConfig
from neomoba_dist.generate.decode import Decoder, generate
from neomoba_dist.generate.stage import Stage
from neomoba_dist.model.init import shard_of
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from tests.decoding import greedy_by_recomputing, random_documents, whole_pass
from tests.evals.runs import make_config, write_run
from tests.models import tiny_model
from tests.ranks import run_ranks

LENGTHS, CHUNK = (41, 1, 17), 6
MIXED = {"attention": "moba*1,sliding_window*1,full*1", "sliding_window": 5}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "moe_capacity_factor": 0.5, "num_shared_experts": 1}
CASES: list[tuple[int, int, int, str, dict[str, Any]]] = [  # tp, cp, pp, decode, changes of the model
    (2, 1, 1, "moba", {"key_conv_width": 3}),
    (1, 1, 2, "moba", {"key_conv_width": 3, "tie_word_embeddings": True, "position_embedding": "learned"}),
    (2, 1, 2, "moba", {"position_embedding": "t5_relative", **MIXED}),
    (2, 1, 2, "full", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    # more ranks than KV heads, and ranks without any row of the vocabulary
    (4, 1, 1, "moba", {"key_conv_width": 3}),
    # keys spread over cp, which here outnumbers the blocks of the shorter documents
    (1, 2, 1, "moba", {"key_conv_width": 3}),
    (1, 4, 1, "full", {}),
    (1, 3, 1, "moba", MIXED),
    (1, 2, 1, "moba", {"moba_gate": "kv_group", "moba_pooling": "minmax"}),
    (2, 1, 1, "moba", EXPERTS),
    (1, 2, 2, "moba", EXPERTS),
    (2, 2, 2, "moba", {"num_hidden_layers": 4}),
]


def loaded_rank(config: ModelConfig, folder: Path, documents: list[list[int]]) -> list[list[int]]:
    """Tokens of a pp 2 model whose stages read their own weights from a checkpoint."""
    stage = Stage.build(config, Mesh.build(ParallelConfig(pipeline_model_parallel_size=2)), seed=99)
    load_weights(CheckpointReader(folder), stage)
    return generate(stage, documents, 8)


def decode_rank(
    config: ModelConfig, parallel: ParallelConfig, decode: str, documents: list[list[int]]
) -> tuple[list[list[int]], list[torch.Tensor], int, int, int]:
    """Generated tokens, logits of all steps with their first column (last stage), bytes received over pp, of caches."""
    mesh = Mesh.build(parallel, num_key_value_heads=config.num_key_value_heads)
    stage = Stage.build(config, mesh, seed=5, dtype=torch.float64)
    decoder, parts, offset = Decoder(stage, LENGTHS, decode), [], 0
    for start in range(0, max(LENGTHS), CHUNK):
        hidden = decoder.step([ids[start : start + CHUNK] for ids in documents])
        if hidden is not None:
            weight = stage.output_matrix
            offset = shard_of(weight).start[0]
            parts.append(decoder.stage.logits(hidden)[:, : shard_of(weight).extent[0]].contiguous())
    received = mesh.ledger.entries.get(("pp", "receive"))
    bytes_received = received.bytes if received else 0
    tokens = generate(stage, documents, 8, decode=decode, prefill_chunk=16)
    assert generate(stage, documents, 8, decode=decode) == tokens  # each cp rank computes its share of the prompts
    return tokens, parts, offset, bytes_received, decoder.cache.num_bytes()


@pytest.mark.parametrize(("tp", "cp", "pp", "decode", "changes"), CASES)
def test_layouts(tp: int, cp: int, pp: int, decode: str, changes: dict[str, Any]) -> None:
    config = tiny_model(objective="clm", **changes)
    model = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5).eval()
    documents = random_documents(LENGTHS)
    expected_logits = whole_pass(model, documents, decode)
    expected_tokens = [greedy_by_recomputing(model, prompt, 8, decode) for prompt in documents]
    parallel = ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, pipeline_model_parallel_size=pp)
    results = run_ranks(tp * cp * pp, decode_rank, config, parallel, decode, documents)
    for rank, (tokens, parts, offset, received, _) in enumerate(results):
        assert tokens == expected_tokens
        stage = rank // (tp * cp)
        assert received == (sum(LENGTHS) * config.hidden_size * 8 if stage > 0 else 0)
        assert bool(parts) == (stage == pp - 1)
        for step, part in enumerate(parts):
            rows = [logits[step * CHUNK : (step + 1) * CHUNK] for logits in expected_logits]
            wanted = torch.cat(rows)[:, offset : offset + part.shape[1]]
            torch.testing.assert_close(part, wanted, atol=1e-10, rtol=0)
    columns = {offset: parts[0].shape[1] for _, parts, offset, *_ in results if parts}
    assert sum(columns.values()) == config.vocab_size


def cache_rank(config: ModelConfig, ranks: int) -> int:
    mesh = Mesh.build(ParallelConfig(context_parallel_size=ranks))
    stage = Stage.build(config, mesh, dtype=torch.float64)
    return Decoder(stage, [96, 32], "full").cache.num_bytes()


def test_keys_stay_spread_over_context_parallel_ranks() -> None:
    config = tiny_model(objective="clm")
    whole = Decoder(Stage.build(config, Mesh.single(), dtype=torch.float64), [96, 32], "full").cache.num_bytes()
    assert run_ranks(4, cache_rank, config, 4) == [whole // 4] * 4


def test_stages_of_a_checkpoint(tmp_path: Path) -> None:
    config = make_config(tmp_path, objective="clm", tie_word_embeddings=True)
    folder, documents = write_run(tmp_path / "run", config), random_documents(LENGTHS)
    model, _ = load_model(folder)
    expected = [greedy_by_recomputing(model, prompt, 8, "full") for prompt in documents]
    assert run_ranks(2, loaded_rank, config.model, folder, documents) == [expected, expected]

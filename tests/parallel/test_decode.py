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
CASES: list[tuple[int, int, str, dict[str, Any]]] = [
    (2, 1, "moba", {"key_conv_width": 3}),
    (1, 2, "moba", {"key_conv_width": 3, "tie_word_embeddings": True, "position_embedding": "learned"}),
    (2, 2, "moba", {"position_embedding": "t5_relative", **MIXED}),
    (2, 2, "full", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    # more ranks than KV heads, and ranks without any row of the vocabulary
    (4, 1, "moba", {"key_conv_width": 3}),
]


def loaded_rank(config: ModelConfig, folder: Path, documents: list[list[int]]) -> list[list[int]]:
    """Tokens of a pp 2 model whose stages read their own weights from a checkpoint."""
    stage = Stage.build(config, Mesh.build(ParallelConfig(pipeline_model_parallel_size=2)), seed=99)
    load_weights(CheckpointReader(folder), stage)
    return generate(stage, documents, 8)


def decode_rank(config: ModelConfig, tp: int, pp: int, decode: str, documents: list[list[int]]) -> Any:
    """Generated tokens, logits of all steps with their first column (last stage), and bytes received over pp."""
    mesh = Mesh.build(ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    stage = Stage.build(config, mesh, seed=5, dtype=torch.float64)
    decoder, parts, offset = Decoder(stage, LENGTHS, decode), [], 0
    for start in range(0, max(LENGTHS), CHUNK):
        hidden = decoder.step([ids[start : start + CHUNK] for ids in documents])
        if hidden is not None:
            weight = stage.output_matrix
            offset = shard_of(weight).offset
            parts.append(shard_of(weight).valid(decoder.logits(hidden).t()).t().contiguous())
    received = mesh.ledger.entries.get(("pp", "receive"))
    bytes_received = received.bytes if received else 0
    tokens = generate(stage, documents, 8, decode=decode, prefill_chunk=16)
    return tokens, parts, offset, bytes_received


@pytest.mark.parametrize(("tp", "pp", "decode", "changes"), CASES)
def test_layouts(tp: int, pp: int, decode: str, changes: dict[str, Any]) -> None:
    config = tiny_model(objective="clm", **changes)
    model = NeoBERT(config, Mesh.single(), dtype=torch.float64, seed=5)
    documents = random_documents(LENGTHS)
    expected_logits = whole_pass(model, documents, decode)
    expected_tokens = [greedy_by_recomputing(model, prompt, 8, decode) for prompt in documents]
    results = run_ranks(tp * pp, decode_rank, config, tp, pp, decode, documents)
    for rank, (tokens, parts, offset, received) in enumerate(results):
        assert tokens == expected_tokens
        stage = rank // tp
        assert received == (sum(LENGTHS) * config.hidden_size * 8 if stage > 0 else 0)
        assert bool(parts) == (stage == pp - 1)
        for step, part in enumerate(parts):
            rows = [logits[step * CHUNK : (step + 1) * CHUNK] for logits in expected_logits]
            wanted = torch.cat(rows)[:, offset : offset + part.shape[1]]
            torch.testing.assert_close(part, wanted, atol=1e-10, rtol=0)
    columns = {offset: parts[0].shape[1] for _, parts, offset, _ in results if parts}
    assert sum(columns.values()) == config.vocab_size


def test_stages_of_a_checkpoint(tmp_path: Path) -> None:
    config = make_config(tmp_path, objective="clm", tie_word_embeddings=True)
    folder, documents = write_run(tmp_path / "run", config), random_documents(LENGTHS)
    model, _ = load_model(folder)
    expected = [greedy_by_recomputing(model, prompt, 8, "full") for prompt in documents]
    assert run_ranks(2, loaded_rank, config.model, folder, documents) == [expected, expected]

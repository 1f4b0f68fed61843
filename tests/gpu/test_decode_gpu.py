"""Decoding on a GPU equals one pass over the whole text on the CPU. Run with `pytest -m gpu tests/gpu`."""

import pytest
import torch

from neomoba_dist.generate.decode import Decoder
from neomoba_dist.generate.stage import Stage
from neomoba_dist.model.neobert import NeoBERT
from neomoba_dist.parallel.mesh import Mesh
from tests.decoding import random_documents, whole_pass
from tests.models import tiny_model

pytestmark = pytest.mark.gpu

LENGTHS = (61, 17, 1, 40)


@pytest.mark.parametrize("chunk", [1, 8])
def test_full_decoding(chunk: int) -> None:
    config = tiny_model(objective="clm", hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    models = [NeoBERT(config, Mesh.single(device), seed=5).to(device) for device in ("cpu", "cuda")]
    documents = random_documents(LENGTHS)
    decoder = Decoder(Stage.of(models[1]), LENGTHS, "full")
    found: list[list[torch.Tensor]] = [[] for _ in documents]
    for start in range(0, max(LENGTHS), chunk):
        tokens = [ids[start : start + chunk] for ids in documents]
        hidden = decoder.step(tokens)
        assert hidden is not None
        for part, rows in zip(found, decoder.stage.logits(hidden).split([len(ids) for ids in tokens]), strict=True):
            part.append(rows.cpu()[:, :151])
    for parts, expected in zip(found, whole_pass(models[0], documents, "full"), strict=True):
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-3, rtol=1e-3)

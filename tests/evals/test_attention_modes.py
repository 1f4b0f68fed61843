"""One kind of attention over the prompt and another after it, against one forward of the whole text."""

import pytest
import torch

from evals.load import Subject
from neomoba_dist.checkpoint.load import load_model
from neomoba_dist.generate.decode import Decoder
from neomoba_dist.generate.stage import batch_of
from neomoba_dist.model.attention.layer import Attention

PROMPTS = (61, 93)  # tokens: eight and twelve blocks, the last ones incomplete
NEW = 6
MODES = [(prefill, decode) for prefill in ("moba", "full") for decode in ("moba", "full")]


def kinds_by_position(monkeypatch: pytest.MonkeyPatch, prompt: int, prefill: str, decode: str) -> None:
    """Let MoBA layers run `prefill` for the first tokens of a text and `decode` for the others."""
    works = Attention.core

    def core(
        layer: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        found = []
        for kind in (prefill, decode):
            layer.full = layer.kind == "full" or kind == "full"
            found.append(works(layer, q, k, v, cu_seqlens))
        return torch.cat((found[0][:prompt], found[1][prompt:]))

    monkeypatch.setattr(Attention, "core", core)


def test_prompt_and_answer_each_have_their_attention(
    subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subjects["clm"]
    texts = [subject.corpus.tokens_at(start, n + NEW).tolist() for start, n in zip((40, 3000), PROMPTS, strict=True)]
    model, _ = load_model(subject.checkpoint)
    last = []
    for prefill, decode in MODES:
        decoder = Decoder(subject.model.stage, [len(text) for text in texts], decode, prefill)
        hidden = [decoder.prefill([text[:n] for text, n in zip(texts, PROMPTS, strict=True)])]
        hidden += [decoder.step([[text[n + i]] for text, n in zip(texts, PROMPTS, strict=True)]) for i in range(NEW)]
        found = torch.stack([part for part in hidden if part is not None], dim=1)  # [documents, 1 + NEW, H]
        for text, n, mine in zip(texts, PROMPTS, found, strict=True):
            with monkeypatch.context() as patch, torch.no_grad():
                kinds_by_position(patch, n, prefill, decode)
                expected = model.hidden_states(batch_of([text], "cpu"))[n - 1 :]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        last.append(found[:, -1])
    for i, one in enumerate(last):
        for other in last[:i]:
            assert (one - other).abs().max() > 1e-3


def test_an_answer_is_that_of_its_modes(subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subjects["clm"]
    text = subject.corpus.tokens_at(40, PROMPTS[1]).tolist()
    for prefill, decode in MODES:
        monkeypatch.setattr(subject.model, "prefill", prefill)
        monkeypatch.setattr(subject.model, "decode", decode)
        decoder = Decoder(subject.model.stage, [len(text) + NEW], decode, prefill)
        hidden, expected = decoder.prefill([text]), []
        for _ in range(NEW):
            expected += subject.model.stage.best_tokens(hidden, 1)
            hidden = decoder.step([expected[-1:]])
        assert subject.model.generate([text], NEW) == [expected]

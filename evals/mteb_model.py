"""A checkpoint as an encoder of the mteb package: a text's vector is the mean of its last hidden states.

Every rank runs mteb with the same texts; the workers share them out and all get all vectors, so that any layout and
number of ranks gives the same scores.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from evals.load import Subject
from evals.work import Item
from neomoba_dist.generate.stage import batch_of


class Encoder(AbsEncoder):
    """max_tokens: longer texts lose their end. texts, cut: how many there were, and were cut, by (task, split)."""

    def __init__(self, subject: Subject, max_tokens: int) -> None:
        self.subject, self.max_tokens = subject, max_tokens
        self.texts: Counter[tuple[str, str]] = Counter()
        self.cut: Counter[tuple[str, str]] = Counter()
        # vectors do not belong in a journal of JSON lines; mteb begins a task anew in any case
        self._workers = dataclasses.replace(subject.workers, journal=None)
        model = subject.config.model
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"neomoba/{subject.config.phase.name}",
            revision=subject.identity,
            release_date=None,
            languages=None,
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=max_tokens,
            embed_dim=model.hidden_size,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=None,
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Unit vectors float32 [texts, H]. inputs: a DataLoader of {"text": [...]}, as mteb makes it."""
        tokenizer, name = self.subject.tokenizer, (task_metadata.name, hf_split)
        texts = [text for batch in inputs for text in batch["text"]]
        head, tail = tokenizer.document_borders
        room = self.max_tokens - len(head) - len(tail)
        encoded = tokenizer.encode_batch(texts)
        documents = [head + ids[:room] + tail or [tokenizer.special.padding] for ids in encoded]
        self.texts[name] += len(texts)
        self.cut[name] += sum(len(ids) > room for ids in encoded)
        items = [Item(self.subject.key("mteb", ids), len(ids), ids) for ids in documents]
        found = self._workers.run(f"mteb {name[0]} {hf_split}", items, self._vectors)
        return np.stack([entry["vector"] for entry in found])

    def _vectors(self, documents: list[list[int]]) -> list[dict[str, Any]]:
        vectors = self.subject.model.text_outputs(batch_of(documents, "cpu"), embed="mean").numpy()
        return [{"vector": vector} for vector in vectors]

"""The one scoring core: log-likelihoods, choices and greedy text of a checkpoint on any layout.

A model-parallel group (tp x cp x pp) is one worker; all its ranks call the same methods with the same arguments and get
the same answers. Where experts lie on several workers, these call together, each with its own documents. Full logits
never exist: what is held is the hidden states and the logits of one chunk of tokens.

Legend: T tokens of a batch, n places in it, H hidden size, v vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from neomoba_dist.config import ModelConfig
from neomoba_dist.data.batch import IGNORE_LABEL, Batch
from neomoba_dist.generate.decode import generate
from neomoba_dist.generate.stage import Stage, rows_at
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.cross_entropy import vocab_parallel_scores
from neomoba_dist.model.init import shard_of
from neomoba_dist.model.text_heads import pool
from neomoba_dist.parallel.comm import all_reduce, broadcast
from neomoba_dist.parallel.context_split import local_share, padded_split
from neomoba_dist.parallel.mesh import Mesh


@dataclass
class ShardedModel:
    """This rank's stage of a model in eval mode. prefill, decode: what MoBA layers run, "moba" or "full".

    `prefill` holds for scoring and for prompts, `decode` for tokens after a prompt.
    """

    stage: Stage
    prefill: str = "moba"
    decode: str = "full"

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.stage.config

    @property
    def mesh(self) -> Mesh:
        """The layout."""
        return self.stage.mesh

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.stage.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.stage.parameters()).device

    def use(self, attention: str) -> None:
        """Let the sparse layers run `attention` wherever whole texts pass: "full", or their own kind."""
        self.prefill = "full" if attention == "full" else "moba"
        set_full_attention(self.stage, attention == "full")

    @torch.inference_mode()
    def log_likelihoods(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p(label) in nats, whether the label is the model's first choice) of every token of a whole batch.

        [T] float32 (float64 for float64) and bool [T] on the CPU; 0 and False where the label is -100.
        """
        share = local_share(batch.to(self.device), self.mesh, self.config)
        hidden = self.stage.run(share, memory=self.stage.read(share.encoder))
        split = padded_split(len(batch.input_ids), self.mesh, self.config) if self.mesh["cp"].size > 1 else None
        total = split.num_tokens if split else len(batch.input_ids)
        found = torch.zeros(2, total, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        if hidden is not None:
            local = (share.labels != IGNORE_LABEL).nonzero().squeeze(1)
            where = local if split is None else split.global_index(self.mesh["cp"].index, self.device)[local]
            head = self.stage.head
            scores, first = vocab_parallel_scores(
                head.transform(hidden[local]), head.weight, share.labels[local], self.mesh, head.bias
            )
            found[0, where], found[1, where] = scores, first.to(found.dtype)
            found = all_reduce(found, self.mesh, "cp")
        broadcast(found, self.mesh, "pp", source=self.mesh["pp"].size - 1)
        found = found[:, : len(batch.input_ids)].cpu()
        return found[0], found[1].bool()

    @torch.inference_mode()
    def choices(self, batch: Batch, places: Sequence[int], candidates: Sequence[int]) -> tuple[list[int], list[int]]:
        """What the model puts after (MLM: at) some `places` of a batch.

        Returns for each place the number of the likeliest of `candidates`, and the likeliest token of the vocabulary.
        """
        mesh, n = self.mesh, len(places)
        share = local_share(batch.to(self.device), mesh, self.config)
        hidden = self.stage.run(share)
        logits_nc = torch.zeros(n, len(candidates), dtype=torch.promote_types(self.dtype, torch.float32))
        rows = None
        if hidden is not None:
            at = torch.tensor(places, dtype=torch.int64, device=self.device)
            if mesh["cp"].size > 1:
                rows = rows_at(hidden, at, mesh, padded_split(len(batch.input_ids), mesh, self.config))
            else:
                rows = hidden[at]
            shard = shard_of(self.stage.output_matrix)
            local = torch.tensor(candidates, device=self.device) - shard.start[0]
            owned = (local >= 0) & (local < shard.extent[0])
            logits_nc = self.stage.logits(rows)[:, local.where(owned, 0)].where(owned, 0)
            logits_nc = all_reduce(logits_nc, mesh, "tp")
        chosen = logits_nc.argmax(-1).to(self.device)
        broadcast(chosen, mesh, "pp", source=mesh["pp"].size - 1)
        return chosen.tolist(), self.stage.best_tokens(rows, n)

    @torch.inference_mode()
    def text_outputs(self, batch: Batch, embed: str | None = None) -> torch.Tensor:
        """What a fine-tuned model's head says of every document, [D, K] float32 on the CPU.

        embed: how to pool ("mean", "cls"), for the documents' own vectors of length one, [D, H], of any model.
        """
        mesh, head, pp = self.mesh, self.stage.text_head, self.mesh["pp"]
        how = embed or (head.head.pooling if head else "mean")
        share = local_share(batch.to(self.device), mesh, self.config)
        hidden = self.stage.run(share)
        found = None
        if hidden is not None:
            total = len(batch.input_ids)
            places = torch.arange(total, device=self.device)
            if mesh["cp"].size > 1:
                split = padded_split(total, mesh, self.config)
                places = split.global_index(mesh["cp"].index, self.device)
                hidden, places = hidden[places < total], places[places < total]
            whole = batch.to(self.device)
            pooled = all_reduce(pool(hidden, places, whole.position_ids, whole.cu_seqlens, how), mesh, "cp")
            found = F.normalize(pooled, dim=-1) if embed or head is None else head.outputs(pooled.to(hidden.dtype))
        width = torch.tensor([0 if found is None else found.shape[1]], device=self.device)
        broadcast(width, mesh, "pp", source=pp.size - 1)
        documents = int((batch.position_ids == 0).sum())
        result = torch.empty(documents, int(width), device=self.device) if found is None else found.float()
        return broadcast(result.contiguous(), mesh, "pp", source=pp.size - 1).cpu()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        stop_id: int | None = None,
        stop: Callable[[int, list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """The greedy continuation of every prompt; see generate.decode.generate."""
        return generate(
            self.stage, prompts, max_new_tokens, decode=self.decode, prefill=self.prefill, stop_id=stop_id, stop=stop
        )

"""Heads on whole texts: the documents of a batch are pooled, then classified, scored or compared with each other.

A batch with such a head carries one label per document, at its first token: a class, a score in SCORE_UNITs, or for an
embedder's query the number of its match among the documents without a label. What a head computes is small, so every
tp rank does all of it: weights and their gradients are alike on all of them.

Legend: T tokens, S tokens of this rank, D documents that are no padding, H hidden size, K outputs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.config.text_tasks import HeadConfig
from neomoba_dist.model.block import State
from neomoba_dist.model.init import Initializer
from neomoba_dist.parallel.comm import gather_rows
from neomoba_dist.parallel.tensor import gather_tokens

HEAD_NAME = "text_head"  # what the logical names of its weights begin with
SCORE_UNIT = 1e-6  # of a regressor's labels, which are integers in a Batch
IGNORE_INDEX = -100


def pool(
    hidden_NH: torch.Tensor, places_N: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, how: str
) -> torch.Tensor:
    """Every document's mean of its hidden states ("mean") or the first of them ("cls"): [D, H], at least float32.

    hidden_NH: of the tokens at `places_N`, ascending; where these are not all, the result is this rank's part of the
    sum. position_ids: of all T tokens, negative in padding.
    """
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    real = (lengths > 0) & (position_ids[starts.clamp(max=len(position_ids) - 1)] >= 0)
    exact = torch.promote_types(hidden_NH.dtype, torch.float32)
    document_N = torch.searchsorted(cu_seqlens, places_N.to(cu_seqlens.dtype), right=True) - 1
    if how == "cls":
        first = places_N == starts[document_N]
        hidden_NH, document_N = hidden_NH[first], document_N[first]
        lengths = torch.ones_like(lengths)
    counts = torch.bincount(document_N, minlength=len(starts))
    # adds in order of the tokens, unlike index_add on a GPU: the same bits every time
    sums_DH = torch.segment_reduce(hidden_NH.to(exact), "sum", lengths=counts, axis=0, initial=0)
    return sums_DH[real] / lengths[real, None]


class TextHead(nn.Module):
    """State -> outputs [D, K]; with labels int64 [T] the losses of the labelled documents, at least float32."""

    def __init__(self, config: ModelConfig, init: Initializer, head: HeadConfig) -> None:
        super().__init__()
        self.mesh, self.head = init.mesh, head

    def forward(self, state: State, labels_T: torch.Tensor | None = None) -> torch.Tensor:
        hidden_SH, _, position_ids, cu_seqlens, _ = state
        hidden_TH = gather_tokens(hidden_SH, self.mesh)
        places = torch.arange(len(hidden_TH), device=hidden_TH.device)
        pooled_DH = pool(hidden_TH, places, position_ids, cu_seqlens, self.head.pooling)
        outputs_DK = self.outputs(pooled_DH.to(hidden_SH.dtype))
        if labels_T is None:
            return outputs_DK
        first = (position_ids == 0).nonzero().squeeze(1)
        return self.losses(outputs_DK, labels_T[first])

    def outputs(self, pooled_DH: torch.Tensor) -> torch.Tensor:
        """[D, K], at least float32."""
        raise NotImplementedError

    def losses(self, outputs_DK: torch.Tensor, labels_D: torch.Tensor) -> torch.Tensor:
        """Of the documents whose label is not -100."""
        raise NotImplementedError


class Classifier(TextHead):
    """Dense, tanh, linear, as in BERT (arXiv 1810.04805) and RoBERTa; cross entropy."""

    def __init__(self, config: ModelConfig, init: Initializer, head: HeadConfig) -> None:
        super().__init__(config, init, head)
        size = config.hidden_size
        self.dense = init.weight(f"{HEAD_NAME}.dense.weight", (size, size))
        self.dense_bias = init.weight(f"{HEAD_NAME}.dense.bias", (size,), scale=0.0)
        self.output = init.weight(f"{HEAD_NAME}.output.weight", (head.outputs, size))
        self.output_bias = init.weight(f"{HEAD_NAME}.output.bias", (head.outputs,), scale=0.0)

    def outputs(self, pooled_DH: torch.Tensor) -> torch.Tensor:
        inner_DH = torch.tanh(F.linear(pooled_DH, self.dense, self.dense_bias))
        logits_DK = F.linear(inner_DH, self.output, self.output_bias)
        return logits_DK.to(torch.promote_types(logits_DK.dtype, torch.float32))

    def losses(self, outputs_DK: torch.Tensor, labels_D: torch.Tensor) -> torch.Tensor:
        counted = labels_D != IGNORE_INDEX
        return F.cross_entropy(outputs_DK[counted], labels_D[counted], reduction="none")


class Regressor(Classifier):
    """The same with one output; squared error."""

    def losses(self, outputs_DK: torch.Tensor, labels_D: torch.Tensor) -> torch.Tensor:
        counted = labels_D != IGNORE_INDEX
        return (outputs_DK[counted, 0] - labels_D[counted] * SCORE_UNIT) ** 2


class Embedder(TextHead):
    """Unit vectors [D, H]. A query's loss is the cross entropy of its match among the candidates of all dp ranks:
    in-batch negatives (InfoNCE, arXiv 1807.03748) on cosines divided by the temperature."""

    def outputs(self, pooled_DH: torch.Tensor) -> torch.Tensor:
        return F.normalize(pooled_DH.to(torch.promote_types(pooled_DH.dtype, torch.float32)), dim=-1)

    def losses(self, outputs_DK: torch.Tensor, labels_D: torch.Tensor) -> torch.Tensor:
        query = labels_D != IGNORE_INDEX
        candidates_CK = gather_rows(outputs_DK[~query], self.mesh, "dp")
        own = int((~query).sum())
        cosines = outputs_DK[query] @ candidates_CK.t()
        target = labels_D[query] + own * self.mesh["dp"].index
        return F.cross_entropy(cosines / self.head.temperature, target, reduction="none")


TEXT_HEADS: dict[str, type[TextHead]] = {"classifier": Classifier, "regressor": Regressor, "embedder": Embedder}

"""What the loss of a run is made of: that of tokens alone, or also whether the texts of pairs belong together.

Both are means over what they count in the whole update. The engine divides by the tokens that count; losses of pairs
are first multiplied by (tokens that count) / (pairs that have a label).
"""

from collections.abc import Sequence

import torch

from neomoba_dist.data.batch import Batch
from neomoba_dist.model.segments import next_sentence_sums


class TokenLoss:
    """The mean over the tokens that count."""

    PARTS: tuple[str, ...] = ()  # of the loss, for the log

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """What the sum of each part over an update is divided by."""
        return ()

    def total(self, sums: torch.Tensor, per_pair: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, to be divided by the tokens that count, and the sums of its parts, of `NeoBERT.forward`'s sums."""
        return sums, sums.new_zeros(0)

    def targets(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """What the last pipeline stage is told of a micro-batch beside the labels of its tokens."""
        return ()

    def joined(
        self, token_sum: torch.Tensor, made: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, parts) as `total` has them, there. made: by heads before the last one."""
        return self.total(token_sum, 1.0)


class PairLoss(TokenLoss):
    """The sum of that mean and of the mean over the pairs (arXiv 1810.04805, section A.2)."""

    PARTS = ("token_loss", "next_sentence_loss", "next_sentence_accuracy")

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return batch.num_valid, batch.num_pairs, batch.num_pairs

    def total(self, sums: torch.Tensor, per_pair: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sums[0] + sums[1] * per_pair, sums.detach()

    def targets(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        assert batch.next_sentence_labels is not None
        assert batch.pairs is not None
        labels = batch.next_sentence_labels.index_select(0, batch.pairs)
        return labels, torch.full((), tokens_per_pair(batch), device=labels.device)

    def joined(
        self, token_sum: torch.Tensor, made: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (logits,), (labels, per_pair) = made, targets
        return self.total(torch.cat((token_sum[None], next_sentence_sums(logits, labels))), per_pair)


def means(names: Sequence[str], sums: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Each sum divided by what it counts, by name, if that is anything."""
    return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}


def tokens_per_pair(batch: Batch) -> float:
    """What the loss of a pair weighs in losses of tokens. Where an update has no pair, there is none to weigh."""
    return batch.num_valid / max(1, batch.num_pairs)


LOSSES: dict[bool, type[TokenLoss]] = {False: TokenLoss, True: PairLoss}  # by next_sentence_prediction

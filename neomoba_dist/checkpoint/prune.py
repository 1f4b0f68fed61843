"""Magnitude pruning (arXiv 1506.02626): of every matrix of the blocks the smallest weights become zero."""

import re
from pathlib import Path

import torch
from torch.nn.utils.prune import L1Unstructured

from neomoba_dist.checkpoint.convert import FILE_BYTES, read_whole, write_run
from neomoba_dist.checkpoint.load import CheckpointReader

# projections of attention, feed-forward layers and experts; routers choose, and embeddings are looked up
PRUNED = re.compile(r"blocks\.\d+\..*_proj")


def prune(name: str, weight: torch.Tensor, share: float) -> torch.Tensor:
    """A logical tensor with `share` of each matrix in it zero, exactly but for rounding to a whole number; one that is
    not pruned as it is. Experts, [experts, ...], are matrices of their own."""
    if not PRUNED.fullmatch(name):
        return weight
    matrices = weight.unbind() if weight.dim() == 3 else (weight,)
    pruned = [L1Unstructured(share).prune(matrix) for matrix in matrices]
    return torch.stack(pruned) if weight.dim() == 3 else pruned[0]


def prune_checkpoint(reader: CheckpointReader, output: Path, share: float, file_bytes: int = FILE_BYTES) -> Path:
    """Write the pruned weights as a run folder that holds one export; returns the export. Raises CheckpointError."""
    return write_run(reader, output, lambda name, weight: prune(name, weight, share), file_bytes)


def count_zeros(reader: CheckpointReader) -> float:
    """Share of zeros among the weights that pruning would look at."""
    names = [name for name in reader.tensors if PRUNED.fullmatch(name.removeprefix("model."))]
    zeros = numbers = 0
    for name in names:
        weight = read_whole(reader, name)
        zeros, numbers = zeros + int((weight == 0).sum()), numbers + weight.numel()
    return zeros / numbers

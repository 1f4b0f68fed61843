"""int8 for inference on a CPU, by torchao: weights per output feature, activations per token as they come.

What is quantised are the projections of attention and dense feed-forward layers, where nearly all the work of a small
model is. Embedding, output matrix, norms, routers and experts stay as they are. On one process: a mesh of ones.
"""

import logging

import torch
from torch import nn

from neomoba_dist.model.attention.cross import CrossAttention
from neomoba_dist.model.attention.layer import Attention
from neomoba_dist.model.mlp import GatedMLP, PlainMLP

PROJECTIONS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (Attention, ("qkv_proj", "o_proj")),
    (CrossAttention, ("q_proj", "kv_proj", "o_proj")),
    (GatedMLP, ("gate_up_proj", "down_proj")),
    (PlainMLP, ("up_proj", "down_proj")),
)


def quantize_projections(model: nn.Module) -> None:
    """In place; a model in eval mode, which is not trained or saved any more."""
    for module in model.modules():
        for name in (name for kind, names in PROJECTIONS if isinstance(module, kind) for name in names):
            setattr(module, name, int8_weight(getattr(module, name)))


def int8_weight(weight: torch.Tensor) -> nn.Parameter:
    """[O, I] float32 as int8 numbers with a scale for each row, which `F.linear` multiplies as such."""
    for name in ("torchao", "torch.utils._pytree"):  # at import: kernels for GPUs that are not here, a deprecation
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantize_(linear, Int8DynamicActivationInt8WeightConfig())
    return linear.weight


def num_bytes(weight: torch.Tensor) -> int:
    """Of a weight as it lies in memory, quantised or not."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(num_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])

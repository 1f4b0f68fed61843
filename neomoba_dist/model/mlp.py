"""Feed-forward layers: of two matrices as in the first transformer, or gated (arXiv 2002.05202)."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.init import Initializer
from neomoba_dist.parallel.tensor import column_linear, row_linear


class GatedMLP(nn.Module):
    """down(f(gate(x)) * up(x)), intermediate features split over tp. x: [T, hidden_size].

    intermediate_size: where it is not the config's. activation: f. kept: tensors of the intermediate width that the
    backward pass wants, the product's two halves among them.
    """

    kept: ClassVar[int] = 4
    activation: Callable[[torch.Tensor], torch.Tensor]

    def __init__(
        self, name: str, config: ModelConfig, init: Initializer, *, intermediate_size: int | None = None
    ) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, intermediate_size or config.intermediate_size
        self.mesh = init.mesh
        # one matrix product, hence one gather and one gradient reduction for both
        wide = (intermediate, hidden)
        self.gate_up_proj = init.stacked({f"{name}.gate_proj": wide, f"{name}.up_proj": wide}, shard_dim=0)
        self.down_proj = _down_proj(name, (hidden, intermediate), config, init)

    def forward(self, x_SH: torch.Tensor) -> torch.Tensor:
        gate, up = column_linear(x_SH, self.gate_up_proj, self.mesh).chunk(2, dim=-1)
        return row_linear(self.activation(gate) * up, self.down_proj, self.mesh)


class SwiGLU(GatedMLP):
    """f(x) = x sigmoid(x)."""

    activation = staticmethod(F.silu)


class GeGLU(GatedMLP):
    """f(x) = x P(N(0, 1) < x), exact."""

    activation = staticmethod(F.gelu)


class PlainMLP(nn.Module):
    """down(f(up(x))), otherwise as `GatedMLP`."""

    kept: ClassVar[int] = 2
    activation: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, name: str, config: ModelConfig, init: Initializer) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.mesh = init.mesh
        self.up_proj = init.weight(f"{name}.up_proj", (intermediate, hidden), shard_dim=0)
        self.down_proj = _down_proj(name, (hidden, intermediate), config, init)

    def forward(self, x_SH: torch.Tensor) -> torch.Tensor:
        return row_linear(self.activation(column_linear(x_SH, self.up_proj, self.mesh)), self.down_proj, self.mesh)


class ReLU(PlainMLP):
    """f(x) = max(x, 0), as in the first transformer (arXiv 1706.03762, section 3.3), without biases."""

    kept = 1  # its gradient is told from its result, which the second product keeps
    activation = staticmethod(F.relu)


class GELU(PlainMLP):
    """f(x) = x P(N(0, 1) < x), exact (arXiv 1606.08415), as in BERT, without biases."""

    activation = staticmethod(F.gelu)


class SiLU(PlainMLP):
    """f(x) = x sigmoid(x) (arXiv 1702.03118)."""

    activation = staticmethod(F.silu)


MLP = GatedMLP | PlainMLP
MLPS: Mapping[str, type[GatedMLP] | type[PlainMLP]] = {  # by mlp_activation
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "relu": ReLU,
    "gelu": GELU,
    "silu": SiLU,
}


def _down_proj(name: str, shape: tuple[int, int], config: ModelConfig, init: Initializer) -> nn.Parameter:
    # residual outputs start smaller so that the stream's variance does not grow with depth (GPT-2, section 2.3)
    scale = (2 * config.num_hidden_layers) ** -0.5
    return init.weight(f"{name}.down_proj", shape, shard_dim=1, scale=scale)

"""The layers of one pipeline stage, for decoding; on a mesh without pipeline parallelism the whole model.

Training's pipeline belongs to DeepSpeed; decoding needs neither its schedule nor its engine.
"""

from typing import Self

import torch
from torch import nn

from neomoba_dist.config import ModelConfig
from neomoba_dist.model.block import Block
from neomoba_dist.model.init import Initializer
from neomoba_dist.model.neobert import Embedding, FinalNorm, Head, NeoBERT, layer_list
from neomoba_dist.model.positions import PositionEmbedding
from neomoba_dist.parallel.mesh import Mesh


class Stage(nn.Module):
    """Blocks first..last of the model; the first stage has the embedding too, the last one the final norm and the head.

    `kinds`: attention of its blocks.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, layers: list[nn.Module], first_block: int) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        self.layers = nn.ModuleList(layers)
        self.blocks = [layer for layer in layers if isinstance(layer, Block)]
        self.kinds = config.layer_attentions[first_block : first_block + len(self.blocks)]

    @classmethod
    def of(cls, model: NeoBERT) -> Self:
        """The whole model as the only stage."""
        positions = [] if model.positions is None else [model.positions]
        layers = [model.embedding, *positions, *model.blocks, model.final_norm, model.head]
        return cls(model.config, model.mesh, layers, 0)

    @classmethod
    def build(cls, config: ModelConfig, mesh: Mesh, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Self:
        """This rank's stage with fresh weights; blocks are spread evenly over pp."""
        pp = mesh["pp"]
        if pp.size == 1:
            return cls.of(NeoBERT(config, mesh, seed=seed, dtype=dtype))
        layers = layer_list(config, Initializer(mesh, seed, config.initializer_range, dtype))
        blocks = [i for i, layer in enumerate(layers) if layer.cls is Block]
        first, stop = (len(blocks) * index // pp.size for index in (pp.index, pp.index + 1))
        start = 0 if pp.index == 0 else blocks[first]
        end = len(layers) if pp.index == pp.size - 1 else blocks[stop]
        return cls(config, mesh, [layer.cls(**layer.kwargs) for layer in layers[start:end]], first)

    @property
    def is_first(self) -> bool:
        """Whether tokens enter here."""
        return self.mesh["pp"].index == 0

    @property
    def is_last(self) -> bool:
        """Whether tokens are chosen here."""
        return self.mesh["pp"].index == self.mesh["pp"].size - 1

    @property
    def embedding(self) -> Embedding:
        """First stage only."""
        layer = self.layers[0]
        assert isinstance(layer, Embedding)
        return layer

    @property
    def positions(self) -> PositionEmbedding | None:
        """Added positions, first stage only."""
        return next((layer for layer in self.layers if isinstance(layer, PositionEmbedding)), None)

    @property
    def final_norm(self) -> FinalNorm:
        """Last stage only."""
        layer = self.layers[-2]
        assert isinstance(layer, FinalNorm)
        return layer

    @property
    def output_matrix(self) -> nn.Parameter:
        """Vocabulary rows of this rank, [v, H]; last stage only. The head, or an embedding that is tied to it."""
        layer = self.layers[-1]
        assert isinstance(layer, Head | Embedding)
        return layer.weight

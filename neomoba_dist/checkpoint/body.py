"""Start fine-tuning or distillation from any weights: their body, with new weights for what only these have."""

import torch

from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.checkpoint.rank_file import Slice
from neomoba_dist.config import Config
from neomoba_dist.model.distill import PROJECTION_NAME
from neomoba_dist.model.init import Initializer, ShardedTensorSpec
from neomoba_dist.model.text_heads import HEAD_NAME
from neomoba_dist.parallel.mesh import Mesh

NEW = (HEAD_NAME, PROJECTION_NAME)


class BodyReader(CheckpointReader):
    """`body`, ours or a folder of the hub, read as the first weights of the model that `config` describes."""

    def __init__(self, body: CheckpointReader, config: Config) -> None:
        self.body, self.folder, self.index, self.tensors = body, body.folder, body.index, body.tensors
        self.has_checksums = body.has_checksums
        self._init = Initializer(Mesh.single(), config.phase.seed, config.model.initializer_range)

    def read(self, kind: str, shard: ShardedTensorSpec) -> torch.Tensor:
        if not shard.name.startswith(NEW):
            return self.body.read(kind, shard)
        if len(shard.shape) == 1:  # a bias
            return torch.zeros(shard.extent)
        return self._init.draw(shard)

    def stored(
        self, kind: str, shard: ShardedTensorSpec, start: int, out: torch.Tensor
    ) -> list[tuple[str, Slice]] | None:
        return None if shard.name.startswith(NEW) else self.body.stored(kind, shard, start, out)

"""What a frozen teacher adds to the plan of its student: weights, what it says of a micro-batch, and its forward pass.

Not counted: the matrix that takes the student's states to another width, and the teacher's messages in a pipeline.
"""

from dataclasses import dataclass

import torch

from neomoba_dist.config import BatchPlan, Config, ConfigError
from neomoba_dist.config.distill import as_teacher, teacher_problems
from neomoba_dist.config.rules import check_rules
from neomoba_dist.model.cross_entropy import CHUNK_TOKENS
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.flops import step_flops
from neomoba_dist.train.layer_memory import Tokens
from neomoba_dist.train.memory_plan import MAX_LIVE_PARAMETERS, Beside, Stage
from neomoba_dist.train.step_plan import counted_tokens


@dataclass(frozen=True)
class PlannedTeacher:
    """A model, and whether it runs full attention; its source names it in messages."""

    config: Config

    @property
    def full(self) -> bool:
        """As in train/distill.py."""
        return self.config.phase.full_attention_fraction == 1.0

    def beside(self, student: Config) -> Config:
        """The teacher's configuration on the layout of its student. Raises ConfigError where it cannot teach there."""
        for problem in teacher_problems(student, self.config.model):
            raise ConfigError(f"{self.config.source}: {problem}")
        config = as_teacher(student, self.config.model, self.config.source)
        check_rules(config)
        return config

    def flops(self, config: Config, plan: BatchPlan) -> float:
        """Operations of its forward passes in an update whose rows are one document each."""
        length = config.phase.sequence_length
        model, row = self.config.model, torch.tensor([length])
        return plan.rows_per_update * step_flops(model, row, counted_tokens(config), self.full) / 3

    def memory(self, config: Config, plan: BatchPlan, mesh: Mesh, stage: Stage) -> Beside:
        """On the rank at `mesh`. config: of the student. stage: of the teacher."""
        tokens, size = Tokens.of(config, mesh), self.config.model.hidden_size
        weights = stage.head_rows * size if config.zero_stage == 3 else 0  # the output matrix is kept whole there
        for group in stage.groups:
            held = group.partition(mesh[group.axis].size, 3) if config.zero_stage == 3 else sum(group.sizes)
            weights += held
        compared = config.model.num_hidden_layers // mesh["pp"].size * (config.distill.hidden_weight > 0)
        # states, and in float32 their difference from the student's
        kept: int = compared * tokens.between * size * (tokens.element + 4)
        kept += tokens.element * tokens.counted * size * (stage.head_rows > 0)
        kept *= min(mesh["pp"].size - mesh["pp"].index, plan.gradient_accumulation_steps)
        if config.zero_stage == 3:  # gathered weights stay, as the student's do
            live = config.deepspeed["zero_optimization"].get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS)
            kept += tokens.element * min(sum(sum(group.sizes) for group in stage.groups), live)
        # of a chunk two more tensors of logits in float32
        passing = 8 * min(CHUNK_TOKENS, tokens.counted) * stage.head_rows
        return Beside(tokens.element * weights, kept, passing)

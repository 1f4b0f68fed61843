"""What takes seconds to import, once in the parent, so that forked ranks and programs find it.

The last three are imported by deepspeed.initialize, in every rank.
"""

import torch.utils.tensorboard  # noqa: F401

import neomoba_dist.train.engine  # noqa: F401

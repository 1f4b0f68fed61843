"""What takes seconds to import, once in the parent, so that forked ranks and programs find it.

The first three are imported by deepspeed.initialize, in every rank.
"""
# ruff: noqa: F401

import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.original_muon
import megatron.core.parallel_state
import megatron.core.tensor_parallel
import torch.utils.tensorboard

import neomoba_dist.train.engine

"""What takes seconds to import or to load, once in the parent, so that forked ranks and programs find it.

The first five are imported by deepspeed.initialize, in every rank. Packing's compiled loops make numba fill its tables.
"""
# ruff: noqa: F401

import deepspeed.comm.mori
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.muon.original_muon
import megatron.core.parallel_state
import megatron.core.tensor_parallel
import numpy as np
import torch.utils.tensorboard

import neomoba_dist.train.engines
from neomoba_dist.data.pack import Packing, plan_rows

for method in ("best_fit", "concat"):
    plan_rows(np.array([0]), np.array([4]), Packing(length=8, max_documents=2, method=method))

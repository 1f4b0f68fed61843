"""Imported once in the parent, so that forked ranks do not each spend seconds on it."""

import megatron.core.parallel_state
import megatron.core.tensor_parallel  # noqa: F401

import neomoba_dist.train.engine  # noqa: F401

"""The one table of optional kernels: what may be missing, how it is probed, and what replaces it.

Nothing here is imported until it is asked for, and a missing kernel never stops the program: the reason is logged once
and plain torch takes over. triton and flash_attn are imported below attention/kernels only.
"""

from __future__ import annotations

import functools
import importlib
import logging

import torch

logger = logging.getLogger(__name__)

# name -> (module whose import proves that the compiled kernel works, what runs without it)
OPTIONAL_KERNELS: dict[str, tuple[str, str]] = {
    "triton": ("triton.language", "the torch implementation of MoBA"),
    "apex_norm": ("fused_layer_norm_cuda", "torch's RMSNorm"),  # the registry's "apex" is another project
    "quack": ("quack.gemm_interface", "torch's grouped products"),
    "flash_attn_4": ("flash_attn.cute.interface", "the next of model/attention/kernels/choice.py"),
    "flash_attn": ("flash_attn.flash_attn_interface", "torch's own attention"),
}


@torch.compiler.assume_constant_result
def is_available(name: str) -> bool:
    """True when the optional package `name` (a key of OPTIONAL_KERNELS) imports; logs once with the reason if not."""
    return _probe(name)


@functools.cache
def _probe(name: str) -> bool:
    module, replacement = OPTIONAL_KERNELS[name]
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # what a broken CUDA build raises
        logger.info("%s is not usable (%s: %s); using %s", name, type(error).__name__, error, replacement)
        return False
    return True


@functools.cache
def log_choice(what: str, choice: str) -> None:
    """Log once which implementation was chosen for `what`."""
    logger.info("%s: %s", what, choice)


def apex_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """NVIDIA apex's fused RMSNorm over the last dimension; only where `is_available("apex_norm")`."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, weight.shape, eps)

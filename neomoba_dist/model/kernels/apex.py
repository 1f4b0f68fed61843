"""NVIDIA apex's fused AdamW and RMSNorm, imported only where their compiled modules work (see `is_available`)."""

from apex.normalization.fused_layer_norm import fused_rms_norm_affine
from apex.optimizers import FusedAdam

__all__ = ["FusedAdam", "fused_rms_norm_affine"]

"""NVIDIA apex's fused RMSNorm, imported only where its compiled module works (see `is_available`)."""

from apex.normalization.fused_layer_norm import fused_rms_norm_affine

__all__ = ["fused_rms_norm_affine"]

"""NVIDIA apex's fused AdamW, imported only where its compiled module works (see `is_available`)."""

from apex.optimizers import FusedAdam

__all__ = ["FusedAdam"]

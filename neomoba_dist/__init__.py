"""NeoMoBA-Dist: distributed training of long-context transformers with Mixture of Block Attention (MoBA)."""

__version__ = "0.1.0"

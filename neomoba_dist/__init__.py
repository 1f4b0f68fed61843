"""NeoMoBA-Dist: distributed training of long-context transformers whose attention is MoBA (Mixture of Block Attention)."""

__version__ = "0.1.0"

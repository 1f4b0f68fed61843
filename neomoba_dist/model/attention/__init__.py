"""Attention: projections, MoBA and its kernels, windows, caches, context parallelism."""

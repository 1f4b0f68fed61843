"""MoBA's Triton kernels."""

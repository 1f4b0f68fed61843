"""Attention by libraries: full attention and MoBA's parts through kernels for packed sequences."""

"""Attention over the tokens of several context-parallel ranks."""

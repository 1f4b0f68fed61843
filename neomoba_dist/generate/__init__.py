"""Text from a causal model, on any tensor- and pipeline-parallel layout."""

"""Who talks to whom: process groups, collectives, tensor and pipeline parallelism. Knows nothing of the model."""

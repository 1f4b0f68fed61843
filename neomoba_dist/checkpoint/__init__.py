"""Checkpoints that any layout can read: safetensors and JSON, tensors under logical names. Nothing is pickled."""

"""Checkpoints that any layout can read: safetensors and JSON, every tensor under its logical name. Nothing is pickled."""

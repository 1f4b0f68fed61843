"""The shipped batch scripts in a real SLURM."""

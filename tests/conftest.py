"""Settings for the whole suite: one thread per process, DeepSpeed on the CPU, a bounded time per test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

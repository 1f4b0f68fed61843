"""Benchmarks of `python -m evals bench NAME`: a module each, with `add_arguments(parser)` and `run(args) -> int`."""

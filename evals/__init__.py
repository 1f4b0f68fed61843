"""Evaluation of trained checkpoints: `python -m evals run | report | bench`, see `__main__.py`."""

"""Benchmarks of the operators, one file a room; `tilewright bench OP` is the runner in run.py."""

"""Comparison of deqcore with other libraries: `python -m benchmarks --help`."""

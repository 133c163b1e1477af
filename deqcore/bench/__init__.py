"""Measuring solvers: problems, machines, interleaved timing, comparison. Imports no framework.

`deqcore bench` and the comparison with other libraries in `benchmarks/` both use it.
"""

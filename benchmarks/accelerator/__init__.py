"""Comparison of deqcore with other libraries on a CUDA device: `python -m benchmarks.accelerator`."""

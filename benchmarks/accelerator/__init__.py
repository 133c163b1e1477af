"""deqcore beside its peers on a CUDA device: `python -m benchmarks.accelerator`."""

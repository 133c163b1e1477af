"""Native steps: by Numba for the CPU (`pip install "deqcore[native]"`), by Triton, which comes with torch, for GPUs."""

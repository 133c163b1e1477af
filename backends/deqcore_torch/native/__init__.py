"""Native steps: by Numba for the CPU, by Triton, which comes with torch, for GPUs."""

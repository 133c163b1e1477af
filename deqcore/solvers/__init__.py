"""Fixed-point methods, one file each."""

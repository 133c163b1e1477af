"""Fixed-point layers for every framework."""

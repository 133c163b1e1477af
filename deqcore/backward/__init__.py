"""Backward strategies, one file each."""

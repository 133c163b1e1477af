"""Contracts: what a backend, a solver and a backward strategy must offer."""

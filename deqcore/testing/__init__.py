"""What checks a backend, a solver, a strategy or a model: problems with known answers, and comparisons."""

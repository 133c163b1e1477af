"""A backward strategy for deqcore: damped iteration on the adjoint equation."""

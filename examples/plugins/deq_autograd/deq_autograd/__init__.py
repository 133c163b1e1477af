"""HIPS autograd as a backend of deqcore."""

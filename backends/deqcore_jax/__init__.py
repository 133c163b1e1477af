"""The jax backend of deqcore."""

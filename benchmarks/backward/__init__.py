"""Time of the backward pass beside its vjps."""

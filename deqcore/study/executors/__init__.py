"""Where cells are trained: processes of this machine, or a Ray cluster."""

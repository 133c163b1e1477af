"""Training of one cell: the loop, what a backend offers to it, and its memory."""

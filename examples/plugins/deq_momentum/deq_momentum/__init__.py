"""A solver for deqcore: heavy-ball iteration."""

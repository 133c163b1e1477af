"""A sink for deqcore's monitor: a table of SQLite."""

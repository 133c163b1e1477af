"""The suite for `pytest -p deqcore.testing.plugin --pyargs deqcore.testing.suite`."""

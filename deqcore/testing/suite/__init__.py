"""The suite for `pytest -p deqcore.testing.plugin --pyargs deqcore.testing.suite`."""

from deqcore.errors import MissingExtraError

try:
    import pytest as pytest
except ImportError as error:
    raise MissingExtraError.of("The conformance suite", "pytest", None) from error

import pytest

pytest_plugins = ["deqcore.testing.plugin"]


def pytest_collection_modifyitems(items):
    """Expect what autograd cannot do: products of its tape leave the range of float32 at cotangents of 2^83."""
    for item in items:
        if "cotangent_may_be_of_the_size_of_the_states" in item.name and "float32" in item.name:
            item.add_marker(pytest.mark.xfail(strict=True, reason="products of autograd's tape leave the range"))

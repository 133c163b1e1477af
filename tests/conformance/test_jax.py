"""JAX passes the suite of backends; its solvers and strategies are compiled in `make faults`, which has the time."""

from __future__ import annotations

import pytest

pytest.importorskip("jax")

from deqcore.testing import BackendTests


class TestBackend(BackendTests):
    backends = ("jax",)

"""The strict backend refuses what JAX refuses, and lets pass what JAX can trace."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.testing import strict
from deqcore.testing.strict.array import StrictArray, StrictError
from deqcore.types import LoopVars

FILE = Path(__file__).with_name("bad_solvers.py")
spec = importlib.util.spec_from_file_location("conformance_bad_solvers", FILE)
bad = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bad
spec.loader.exec_module(bad)


@pytest.fixture(autouse=True)
def _registry():
    strict.register()
    bad.register()
    yield
    plugins.reset()


def solve(backend: str, solver: str):
    be = deqcore.get_backend(backend=backend)
    z0 = be.asarray(np.ones((2, 3)), dtype="float32")
    return deqcore.fixed_point(lambda z: 0.5 * z + 1.0, z0, forward__solver=solver, forward__on_failure="ignore")


@pytest.mark.parametrize("name", list(bad.BAD))
def test_what_strict_refuses_with_a_reason_jax_refuses_too(name):
    solve("numpy", "picard")
    with pytest.raises(StrictError, match=bad.BAD[name][1]):
        solve("strict", name)
    pytest.importorskip("jax")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever JAX says, in whatever type of its own
        solve("jax", name)


def test_without_their_vices_they_pass_everywhere():
    plugins.register(plugins.SolverSpec("plain", "conformance_bad_solvers:Plain"))
    for backend in ("numpy", "strict", *(["jax"] if importlib.util.find_spec("jax") else [])):
        sol = solve(backend, "plain")
        assert np.allclose(sol.backend.to_numpy(sol.value), 2.0, atol=1e-3)


@pytest.mark.parametrize("solver", ["auto", "picard", "anderson", "broyden", "newton-krylov"])
def test_every_built_in_solver_passes_and_finds_the_same(solver):
    strictly, plainly = solve("strict", solver), solve("numpy", solver)
    assert np.allclose(strictly.backend.to_numpy(strictly.value), plainly.value, rtol=1e-6)
    assert list(strictly.backend.to_numpy(strictly.steps)) == list(plainly.steps)


@pytest.mark.parametrize(
    "look",
    [bool, float, int, complex, list, hash, range, np.asarray, np.linalg.norm, lambda x: np.ones(3) + x],
    ids=lambda look: getattr(look, "__name__", "?"),
)
def test_an_array_refuses_to_be_looked_at(look):
    with pytest.raises(StrictError):
        look(StrictArray(np.ones(1 if look in (bool, float, int, complex, range) else 3)))


def test_an_array_computes_as_numpy_does():
    a, b = np.arange(6.0).reshape(2, 3), np.full((2, 3), 2.0)
    x, y = StrictArray(a), StrictArray(b)
    for op in ("__add__", "__rsub__", "__mul__", "__truediv__", "__pow__", "__lt__", "__eq__"):
        assert np.array_equal(getattr(x, op)(y).hidden, getattr(a, op)(b)), op
    assert np.array_equal((2.0 - x).hidden, 2.0 - a)
    assert np.array_equal((x @ y.T).hidden, a @ b.T)
    assert np.array_equal(x[:, None, 1:].hidden, a[:, None, 1:])
    assert np.array_equal((-abs(x)).hidden, -a)


def test_the_namespace_has_the_standard_and_nothing_else():
    xp = deqcore.get_backend(backend="strict").xp
    assert np.array_equal(xp.concat([StrictArray(np.ones(1)), StrictArray(np.zeros(1))]).hidden, [1.0, 0.0])
    for name, reason in (("einsum", "array API"), ("nonzero", "depends on values"), ("asarray", "backend.asarray")):
        with pytest.raises(StrictError, match=reason):
            getattr(xp, name)
    with pytest.raises(StrictError, match=r"linalg\.lstsq"):
        _ = xp.linalg.lstsq
    with pytest.raises(StrictError, match="NumPy array"):
        xp.sum(np.ones(3))


def test_a_loop_is_traced_even_if_it_never_runs():
    be = deqcore.get_backend(backend="strict")

    def body(carry: LoopVars) -> LoopVars:
        raise AssertionError("traced")

    with pytest.raises(AssertionError, match="traced"):
        be.loop(lambda c: c[0] > 0, body, (be.asarray(0.0),), 0)


@pytest.mark.parametrize("value", ["text", 1.5, {"a": "text"}])
def test_a_loop_carries_arrays_only(value):
    be = deqcore.get_backend(backend="strict")
    with pytest.raises(StrictError, match="only arrays"):
        be.loop(lambda c: c[0] > 0, lambda c: c, (be.asarray(1.0), value), 3)


def test_a_condition_must_be_one_truth_value():
    be = deqcore.get_backend(backend="strict")
    with pytest.raises(StrictError, match="condition"):
        be.loop(lambda c: c[0] > 0, lambda c: c, (be.asarray([1.0, 2.0]),), 3)

"""Kinds of NumPy arrays other than plain arrays of float32 or float64: solved right, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConfigError, InitialIterateError, ProblemError

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")


def solve(z0, **settings):
    return deqcore.fixed_point(lambda z: 0.5 * np.tanh(z) + 1, z0, **settings)


@pytest.mark.parametrize("batch", [True, False])
def test_matrices_and_masked_arrays_are_refused(batch):
    with pytest.raises(InitialIterateError, match=r"holds a numpy\.matrix.*pass numpy\.asarray"):
        solve(np.asmatrix(np.zeros((3, 4))), forward__batch=batch)
    with pytest.raises(InitialIterateError, match=r"holds a masked array.*pass its `filled"):
        solve({"a": np.ma.zeros((3, 4))}["a"], forward__batch=batch)


def test_values_of_these_kinds_are_refused():
    z0 = np.zeros((3, 4))
    with pytest.raises(ProblemError, match="f must not return a numpy.matrix"):
        deqcore.fixed_point(lambda z: np.asmatrix(0.5 * z), z0)
    with pytest.raises(ProblemError, match="f must not return a masked array"):
        deqcore.fixed_point(lambda z: np.ma.masked_less(0.5 * z + 1, 0), z0)


def test_other_subclasses_are_solved(tmp_path):
    z0 = np.memmap(tmp_path / "state", np.float64, "w+", shape=(3, 4))
    z = solve(z0).value
    assert np.allclose(z, 0.5 * np.tanh(z) + 1, rtol=1e-5)


@pytest.mark.skipif(np.finfo(np.longdouble).eps >= 2.0**-52, reason="long double is double here")
def test_arrays_inside_arrays_get_no_gradient_silently():
    """Arrays of objects and of records; those without floating-point numbers pass."""
    z, x = np.zeros((1, 2)), np.ones((1, 2))
    objects = np.empty(2, object)
    objects[0] = x
    for given in (objects, np.ones(1, [("a", "f8"), ("b", "i4")])):
        with pytest.raises(ProblemError, match="ndarray that holds arrays"):
            deqcore.vjp(lambda z, p: 0.5 * z + p[0][0], z, given, cotangent=x)
    for given in (np.array(["a", None], object), np.ones(1, [("b", "i4")])):
        assert deqcore.vjp(lambda z, p: 0.5 * z + 1.0, z, given, cotangent=x)[1] == (None,)


def test_what_is_wider_than_float64_is_refused():
    with pytest.raises(InitialIterateError, match="Cast z0 and the arrays of f to float64"):
        solve(np.zeros((3, 4), np.longdouble))


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_a_history_of_more_slots_than_can_be_counted_is_refused(solver):
    with pytest.raises(ConfigError, match="history_size must be at most .*got 1000"):
        solve(np.ones((1, 1)), forward__solver=solver, forward__options={"history_size": 10**20})

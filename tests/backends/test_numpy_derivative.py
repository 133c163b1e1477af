"""Derivatives of the NumPy backend: against closed forms over many scales, and SciPy's differences."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings

import numpy as np
import pytest
from deqcore_numpy.backend import NumpyBackend
from deqcore_numpy.derivative import batched_jacobian, jacobian
from deqcore_numpy.differences import DOWN, UP, Differences
from deqcore_numpy.scales import SCAN

import deqcore
from deqcore.errors import DerivativeWarning, ProblemError

SCALES = [1e-200, 1e-100, 1e-30, 1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e30, 1e100, 1e200]
Z = np.array([[0.3, -0.7, 0.9, 0.0], [1.1, 0.2, -0.4, 0.5]])
NEEDS = {"complex": lambda z: z, "real": lambda z: z if z.dtype == np.float64 else 1 / 0}


def diagonal(f, z):
    return np.einsum("bii->bi", batched_jacobian(f, z))


@pytest.fixture(params=NEEDS)
def needs(request):
    """F takes complex numbers, or raises if it gets any."""
    return NEEDS[request.param]


@pytest.mark.parametrize("s", SCALES)
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_tanh_in_any_unit(needs, s, at):
    found = diagonal(lambda z: 0.5 * s * np.tanh(needs(z) / s), at * s * Z)
    assert found == pytest.approx(0.5 / np.cosh(at * Z) ** 2, rel=1e-8)


@pytest.mark.parametrize("s", [1e-3, 1e-6, 1e-7])
def test_a_feature_much_smaller_than_the_state(needs, s):
    """F = s/2·tanh((z − c)/s) + x at its steepest place, where z is of size 1."""
    x = np.array([[1.0, -2.0, 0.5]])
    found = diagonal(lambda z: 0.5 * s * np.tanh((needs(z) - x) / s) + x, x)
    assert found == pytest.approx(0.5 * np.ones((1, 3)), rel=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_wrong_is_reported(needs, seed):
    """Features of all sizes down to 1e-9 of the state, at random places, with kinks between them."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((3, 4)) * 10.0 ** rng.uniform(-3, 3, (3, 4)) * 10.0 ** rng.uniform(-50, 50, (3, 1))
    s = np.abs(z) * 10.0 ** rng.uniform(-9, 2, (3, 4))
    a, b, c, t, k = rng.standard_normal((5, 3, 4))
    t, k = z + s * t, z + s * k
    f = lambda z: a * z + b * s * np.tanh((needs(z) - t) / s) + 0.3 * c * np.abs(needs(z) - k)
    expected = a + b / np.cosh((z - t) / s) ** 2 + 0.3 * c * np.sign(z - k)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = diagonal(f, z)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3) or caught


def test_a_right_complex_step_is_not_rejected_for_a_bad_difference():
    """The feature of size 1e-12 is below what differences resolve."""
    x = np.array([[1.0, -2.0, 0.5]])
    found = diagonal(lambda z: z + 1e-12 * np.tanh((z - x) / 1e-12), x)
    assert found == pytest.approx(2 * np.ones((1, 3)), rel=1e-10)


@pytest.mark.parametrize("x", [1e-3, 1e-4, 1e-6, 1e-9, -1e-4, -1e-9])
@pytest.mark.parametrize("f", [np.abs, lambda z: np.maximum(z, 0.0)], ids=["abs", "relu"])
def test_a_kink_near_by(needs, f, x):
    found = diagonal(lambda z: f(needs(z)), np.array([[x, 1.0, -2.0]]))
    slope = {1: 1.0, -1: f(np.array(-1.0)) * -1.0}
    assert found == pytest.approx(np.array([[slope[np.sign(each)] for each in (x, 1.0, -2.0)]]), abs=1e-9)


@pytest.mark.parametrize("f", [np.abs, lambda z: np.maximum(z, 0.0)], ids=["abs", "relu"])
def test_a_kink_at_the_point_is_reported_and_gives_the_mean(needs, f):
    with pytest.warns(DerivativeWarning, match="kink"):
        found = diagonal(lambda z: f(needs(z)), np.array([[0.0, 1.0]]))
    assert found == pytest.approx(np.array([[(f(np.array(1.0)) - f(np.array(-1.0))) / 2, 1.0]]))


@pytest.mark.parametrize("s", [1e-250, 1e-200, 1e-100, 1.0, 1e150])
def test_neither_z_nor_f_shows_a_scale(needs, s):
    """All are 0. Steps of 1 are too long for f: it is flat there, or its squares overflow."""
    z = np.zeros((1, 3))
    length = lambda t: np.sqrt(np.sum(t * t, axis=1, keepdims=True))
    assert diagonal(lambda z: s * (t := needs(z) / s) / (1.0 + length(t)), z) == pytest.approx(1.0)
    assert diagonal(lambda z: s * (t := needs(z) / s) / np.sqrt(1e-6 + length(t) ** 2), z) == pytest.approx(1e3)
    assert diagonal(lambda z: s * np.tanh(needs(z) / s) ** 3, z) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("s", [1e-250, 1e-100, 1.0, 1e150])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 0.0), (-2.0, np.inf)])
def test_longer_steps_do_not_smooth_a_kink(needs, s, ends):
    """ReLU6 at 0: far away, f is flat on both sides."""
    kink = 0.0 in ends
    with pytest.warns(DerivativeWarning, match="kink") if kink else contextlib.nullcontext():
        found = diagonal(lambda z: 0.5 * s * np.clip(needs(z) / s, *ends), np.zeros((2, 2)))
    assert found == pytest.approx(0.25 if kink else 0.5)


def test_a_value_of_f_far_from_a_solution_is_no_scale(needs):
    found = diagonal(lambda z: np.expm1(0.3 * needs(z)), np.array([[900.0, 2.0]]))
    assert found == pytest.approx(0.3 * np.exp(0.3 * np.array([[900.0, 2.0]])), rel=1e-6)


@pytest.mark.parametrize("mate", [1e6, 1e100, 1e-6, np.nan, np.inf])
def test_a_batch_mate_chooses_nothing(needs, mate):
    """Both as samples that are independent, and as one state."""
    z = np.array([[1e-6, 2e-6, -1e-6], [mate, 2 * mate, mate]])
    f = lambda z: 0.5e-6 * np.tanh(needs(z) / 1e-6) + 0.1 * z
    expected = 0.5 / np.cosh(z[0] / 1e-6) ** 2 + 0.1
    assert diagonal(f, z)[0] == pytest.approx(expected, rel=1e-8)
    assert np.diag(jacobian(f, z, state=True))[:3] == pytest.approx(expected, rel=1e-8)
    v = np.ones_like(z)
    assert NumpyBackend().autodiff.jvp(f, z)(v)[0] == pytest.approx(expected, rel=1e-8)


def test_coupled_samples_of_different_size(needs):
    f = lambda z: 0.5e-6 * np.tanh(needs(z) / 1e-6) + 0.1 * z[::-1] * 1e-6
    z = np.array([[1e-6, 2e-6], [1e6, 2e6]])
    found = NumpyBackend().autodiff.jvp(f, z)(np.ones_like(z))
    assert found[0] == pytest.approx(0.5 / np.cosh(z[0] / 1e-6) ** 2 + 1e-7, rel=1e-6)


def test_float32_states_are_differentiated_in_float64(needs):
    z = Z.astype(np.float32)
    found = diagonal(lambda z: np.tanh(needs(z)), z)
    assert found == pytest.approx(1 / np.cosh(z.astype(float)) ** 2, rel=1e-9)


def test_float32_inside_f_costs_digits_and_no_more():
    f = lambda z: np.tanh(z.astype(np.float32)).astype(np.float64)
    assert diagonal(f, Z) == pytest.approx(1 / np.cosh(Z) ** 2, rel=1e-4)


def test_f_of_plain_numbers():
    def f(z):
        return np.array([[math.tanh(2 * each) for each in row] for row in z])

    assert diagonal(f, Z) == pytest.approx(2 / np.cosh(2 * Z) ** 2, rel=1e-8)


def test_noise_is_reported():
    rng = np.random.default_rng(0)
    with pytest.warns(DerivativeWarning, match="not reliable"):
        batched_jacobian(lambda z: np.abs(z) + 1e-3 * rng.standard_normal(z.shape), Z + 2.0)


@pytest.mark.parametrize("seed", range(5))
def test_against_scipy(needs, seed):
    from scipy.optimize._numdiff import approx_derivative

    rng = np.random.default_rng(seed)
    w, z = rng.standard_normal((6, 6)), rng.standard_normal(6) * 10.0 ** rng.integers(-2, 3, 6)
    f = lambda z: np.sin(w @ needs(z)) + np.exp(-(z**2)) + np.sqrt(1 + np.abs(z))
    assert jacobian(f, z) == pytest.approx(approx_derivative(f, z, method="3-point"), rel=1e-4, abs=1e-4)


def test_evaluations_are_as_written():
    counts = []
    for f in (np.tanh, lambda z: np.tanh(NEEDS["real"](z)), lambda z: np.sign(z - 1e-30) * 1e-9 * np.abs(z) ** 0.1):
        calls = [0]

        def counted(z, f=f, calls=calls):
            calls[0] += 1
            return f(z)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DerivativeWarning)
            batched_jacobian(counted, Z[:, :3] + 1.0)
        counts.append(calls[0])
    assert counts[0] <= 12 + 3
    assert counts[1] <= 12 + 3 * 8
    most = 4 * (DOWN + UP)
    assert counts[2] <= 1 + 4 * most + 2 * DOWN + 6

    calls = [0]

    def in_another_unit(z):
        calls[0] += 1
        return 1e-30 * np.tanh(1e30 * z)

    batched_jacobian(in_another_unit, np.zeros((2, 3)))
    assert calls[0] <= 4 + 4 * len(SCAN) + 12 + 3


def test_the_gradient_of_a_solve_in_any_unit():
    """z* = s·t with t = tanh(t)/2 + x/s, so dz*/dx = 1/(1 − sech²(t)/2)."""
    for s in (1e-100, 1e-6, 1.0, 1e100):
        x = s * np.array([[0.3, -1.2]])
        f = lambda z, x, s=s: 0.5 * s * np.tanh(z / s) + x
        z, (dx,) = deqcore.vjp(f, x, x, cotangent=np.ones_like(x), forward__rtol=1e-12, forward__solver="picard")
        assert dx == pytest.approx(1 / (1 - 0.5 / np.cosh(z / s) ** 2), rel=1e-6)


@pytest.mark.parametrize("x", [np.zeros((0, 3)), np.zeros((2, 0)), np.zeros(0)])
def test_nothing_to_differentiate(x):
    assert Differences(np.tanh, x).slope(x).value.shape == x.shape
    assert jacobian(np.tanh, x).shape == (0, 0)


# -- memory that is the user's ------------------------------------------------------------------------------------


def views():
    yield "plain", np.zeros((2, 3))
    with contextlib.suppress(ImportError):
        import torch

        yield "torch", torch.zeros(2, 3, dtype=torch.float64).numpy()
        yield "dlpack", np.from_dlpack(torch.zeros(2, 3, dtype=torch.float64))
    yield "bytes", np.frombuffer(bytes(48), np.float64).reshape(2, 3)
    yield "bytearray", np.frombuffer(bytearray(48), np.float64).reshape(2, 3)
    locked = np.zeros((2, 3))
    locked.flags.writeable = False
    yield "read-only", locked


@pytest.mark.parametrize(("kind", "z0"), list(views()))
def test_flags_of_the_users_array_stay(kind, z0):
    before = z0.flags.writeable
    seen = []

    def f(z):
        seen.append(z0.flags.writeable)
        return 0.5 * np.tanh(z) + 1.0

    assert deqcore.fixed_point(f, z0).status.all()
    with pytest.raises(ZeroDivisionError):
        deqcore.fixed_point(lambda z: 1 / 0, z0)
    with pytest.raises(ProblemError, match="in place"):
        deqcore.fixed_point(lambda z: z.__iadd__(1.0), z0)
    assert set(seen) == {before}
    assert z0.flags.writeable == before
    assert not z0.any()


def test_threads_that_read_one_array():
    """A flag that one thread sets and another restores would stay, or fail where it must not."""
    z, backend, problems = np.zeros((2, 3)), NumpyBackend(), []

    def work():
        for _ in range(2000):
            with backend.guards.guard_inplace(z) as seen:
                if seen.flags.writeable or not z.flags.writeable:
                    problems.append("flags")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert z.flags.writeable

"""The example pages of jaxopt and optimistix, rewritten: each runs, and its numbers have closed forms."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
FOLDER = Path(__file__).parents[2] / "examples" / "coming_from"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fixed_point_resolution():
    plain, anderson, jacobian, several = load("jaxopt_fixed_point").main()
    root = np.array([0.5, -1.0, 2.0])
    for sol in (plain, anderson):
        assert np.allclose(sol.value, root, atol=1e-4)
        assert bool(sol.converged.all())
    assert int(anderson.steps[0]) < int(plain.steps[0])
    assert np.allclose(jacobian, 0.5 * np.eye(3), atol=1e-5)
    assert np.allclose(several.value, [root, -root], atol=1e-4)


def test_implicit_differentiation():
    module = load("jaxopt_implicit")
    x, y = (np.asarray(a, np.float64) for a in module.data())
    gram = x.T @ x / len(y) + 0.1 * np.eye(3)
    truth = -np.linalg.solve(gram, np.linalg.solve(gram, x.T @ y / len(y)))
    for found in module.main():
        assert np.allclose(found, truth, rtol=1e-3)


def test_deep_equilibrium_model():
    pytest.importorskip("equinox")
    assert load("jaxopt_deq").main() > 0.95


def test_fixed_points_and_norms():
    y1, slope, with_aux, stopped, failed = load("optimistix_fixed_point").main()
    y = 1.0
    for _ in range(60):
        y = 1.0 + 0.1 * np.tanh(y)
    assert float(y1) == pytest.approx(y, abs=1e-5)
    assert float(slope) == pytest.approx(np.tanh(y) / (1 - 0.1 / np.cosh(y) ** 2), abs=1e-4)
    z = 0.4501836
    assert float(with_aux.aux["energy"]) == pytest.approx(2 * z**2, abs=1e-4)
    assert int(stopped.steps[0]) == 7  # the larger residual is 2^-k
    assert not failed.converged.any()
    assert "5 steps" in repr(failed)


def test_steps_by_hand_and_without_jit():
    lines = []
    stepped, debugged = load("optimistix_steps").main(lines.append)
    for sol in (stepped, debugged):
        assert np.allclose(sol.value, 0.4501836, atol=1e-5)
    assert lines[0].startswith("after 0 steps")
    assert sum(line.startswith("f at") for line in lines) == int(debugged.evaluations.max())

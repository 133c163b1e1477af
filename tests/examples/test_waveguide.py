"""The nonlinear waveguide: SciPy's field on real and imaginary parts, gradients by differences."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

PROGRAM = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "waveguide" / "waveguide.py"))
pytestmark = pytest.mark.usefixtures("quick_compiles")


def power(contrast):
    """|ψ(L)|² by SciPy's Newton method on 2n real unknowns."""
    g, start = PROGRAM["green"](), PROGRAM["incoming"]()[0]
    n = len(start)

    def residual(parts):
        psi = parts[:n] + 1j * parts[n:]
        left = start + g @ (PROGRAM["WAVE"] ** 2 * (contrast + PROGRAM["KERR"] * np.abs(psi) ** 2) * psi) - psi
        return np.concatenate([left.real, left.imag])

    found = scipy.optimize.fsolve(residual, np.concatenate([start.real, start.imag]), xtol=1e-13)
    return found[n - 1] ** 2 + found[2 * n - 1] ** 2


def test_the_transmission_and_its_gradient_are_those_of_scipy(every):
    value, gradient = PROGRAM["transmission"](every.name)
    contrast = PROGRAM["profile"]()
    assert value == pytest.approx(power(contrast), rel=1e-7)
    for i in (0, 11, 23):
        step = np.zeros_like(contrast)
        step[i] = 1e-5
        difference = (power(contrast + step) - power(contrast - step)) / 2e-5
        assert gradient[i] == pytest.approx(difference, rel=1e-4, abs=1e-7)


def test_without_the_nonlinear_term_the_field_is_that_of_a_linear_system(monkeypatch):
    monkeypatch.setitem(PROGRAM["field"].__globals__, "KERR", 0.0)
    g, start, contrast = PROGRAM["green"](), PROGRAM["incoming"]()[0], PROGRAM["profile"]()
    psi = np.linalg.solve(np.eye(len(start)) - g * (PROGRAM["WAVE"] ** 2 * contrast), start)
    assert PROGRAM["transmission"]("numpy")[0] == pytest.approx(abs(psi[-1]) ** 2, rel=1e-8)

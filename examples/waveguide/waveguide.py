"""The field in a nonlinear layer, a complex fixed point, and the gradient of the transmission for the profile."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import deqcore

POINTS = 24
LENGTH = 2.0  # of the layer
WAVE = 2.0  # k, the wave number outside
KERR = 0.05  # χ


def green() -> Any:
    """Return G `(POINTS, POINTS)`, by the midpoint rule."""
    h = LENGTH / POINTS
    x = (np.arange(POINTS) + 0.5) * h
    return 1j * h / (2 * WAVE) * np.exp(1j * WAVE * np.abs(x[:, None] - x[None, :]))


def incoming() -> Any:
    """Return the plane wave ψ₀ `(1, POINTS)`."""
    x = (np.arange(POINTS) + 0.5) * LENGTH / POINTS
    return np.exp(1j * WAVE * x)[None]


def profile() -> Any:
    """Return ε − 1 `(POINTS,)`: a smooth layer of higher index."""
    x = (np.arange(POINTS) + 0.5) / POINTS
    return 0.3 * np.sin(np.pi * x) ** 2


def field(backend: Any) -> Any:
    """Return f(ψ, ε − 1) on arrays of the backend."""
    xp, start = backend.xp, backend.asarray(incoming())
    turned = backend.asarray(green().T)

    def f(psi: Any, contrast: Any) -> Any:
        intensity = xp.real(psi * xp.conj(psi))
        return start + (WAVE**2 * (contrast + KERR * intensity) * psi) @ turned

    return f


def transmission(name: str) -> tuple[float, Any]:
    """Return |ψ|² at the end of the layer, and its gradient for ε `(POINTS,)`."""
    backend = deqcore.get_backend(backend=name)
    f, z0, contrast = field(backend), backend.asarray(incoming()), backend.asarray(profile())
    settings = {"forward__solver": "anderson", "forward__rtol": 1e-10}
    psi = backend.to_numpy(deqcore.fixed_point(f, z0, contrast, **settings).value)
    cotangent = np.zeros_like(psi)
    cotangent[0, -1] = 2 * psi[0, -1]  # of |ψ|², as ∂/∂Re + i ∂/∂Im
    if backend.autodiff.conjugates:  # JAX writes cotangents as ∂/∂Re − i ∂/∂Im
        cotangent = np.conj(cotangent)
    _, (gradient,) = deqcore.vjp(f, z0, contrast, cotangent=backend.asarray(cotangent), **settings)
    return float(np.abs(psi[0, -1]) ** 2), backend.to_numpy(gradient)


def main(name: str) -> tuple[float, Any]:
    """Print both."""
    if name == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    power, gradient = transmission(name)
    print(f"{name}: transmission {power:.6f}, gradient for the profile of norm {np.linalg.norm(gradient):.6f}")
    return power, gradient


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "numpy")

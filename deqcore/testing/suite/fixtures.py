"""What conformance tests compute with: arrays on the backend under test, and simple problems with known answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

import deqcore
from deqcore.abc.backend import Backend
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.solution import Solution
from deqcore.testing.problem import rebuild
from deqcore.testing.problems import Golden
from deqcore.types import Array, Map, Tree


@dataclass(frozen=True)
class Affine:
    """f(z) = A z + b per sample, and what follows from it, in NumPy and float64.

    Attributes:
        a: `(batch, n, n)`.
        b: `(batch, n)`.
    """

    a: Any
    b: Any

    @property
    def root(self) -> Any:
        """z* = (I − A)^-1 b."""
        return np.linalg.solve(np.eye(self.a.shape[1]) - self.a, self.b[..., None])[..., 0]

    def adjoint(self, g: Any) -> Any:
        """u = (I − A)^-T g."""
        return np.linalg.solve(np.eye(self.a.shape[1]) - self.a.swapaxes(1, 2), g[..., None])[..., 0]

    def residual(self, u: Any, g: Any) -> Any:
        """‖g + Aᵀu − u‖ / ‖g‖ per sample."""
        left = g + np.einsum("bij,bi->bj", self.a, u) - u
        return np.linalg.norm(left, axis=1) / np.linalg.norm(g, axis=1)


def affine(batch: int = 3, n: int = 6, *, norm: float = 0.7, seed: int = 0) -> Affine:
    """Make a random non-symmetric problem with ‖A‖₂ = norm in every sample."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((batch, n, n))
    a *= norm / np.linalg.norm(a, 2, axis=(1, 2))[:, None, None]
    return Affine(a, rng.standard_normal((batch, n)))


@dataclass(frozen=True)
class Tokens:
    """f(z) = M z W + b for z `(batch, units, n)`, where M is lower triangular: unit i reads units up to i only.

    Attributes:
        m: M `(units, units)`.
        w: W `(n, n)`.
        b: `(batch, units, n)`.
    """

    m: Any
    w: Any
    b: Any

    @property
    def jacobian(self) -> Any:
        """∂f/∂z of a sample `(units·n, units·n)`."""
        return np.kron(self.m, self.w.T)

    @property
    def root(self) -> Any:
        """z* `(batch, units, n)`."""
        return self._solved(np.eye(len(self.jacobian)) - self.jacobian, self.b)

    def adjoint(self, g: Any) -> Any:
        """u = (I − J)^-T g `(batch, units, n)`."""
        return self._solved(np.eye(len(self.jacobian)) - self.jacobian.T, g)

    def _solved(self, a: Any, b: Any) -> Any:
        return np.linalg.solve(a, b.reshape(len(b), -1, 1)).reshape(b.shape)

    def later(self) -> Tokens:
        """Return the same problem with another last unit."""
        b = self.b.copy()
        b[:, -1] += 3.0
        return Tokens(self.m, self.w, b)


def tokens(batch: int = 2, units: int = 4, n: int = 3, *, norm: float = 0.6, seed: int = 0) -> Tokens:
    """Make a random causal problem with ‖J‖₂ = norm in every sample."""
    rng = np.random.default_rng(seed)
    m, w = np.tril(rng.standard_normal((units, units))), rng.standard_normal((n, n))
    m *= norm / (np.linalg.norm(m, 2) * np.linalg.norm(w, 2))
    return Tokens(m, w, rng.standard_normal((batch, units, n)))


@dataclass(frozen=True)
class Kit:
    """A backend and a device.

    Attributes:
        backend: under test.
        device: where its arrays go.
    """

    backend: Backend
    device: str = "cpu"

    def array(self, a: Any, dtype: str = "float64") -> Array:
        """Host data on the device; float64 becomes float32 where the backend has nothing wider."""
        if dtype == "float64" and not self.backend.capabilities.float64:
            dtype = "float32"
        result = self.backend.asarray(np.asarray(a), dtype=dtype)
        return result if self.device == "cpu" else self.backend.to_device(result, self.device)

    def complex_array(self, a: Any) -> Array:
        """Host data as complex numbers on the device, of the widest precision."""
        return self.array(a, "complex128" if self.backend.capabilities.float64 else "complex64")

    def numpy(self, x: Array) -> Any:
        """Back on the host."""
        return self.backend.to_numpy(x)

    def tree(self, tree: Tree, dtype: str) -> Tree:
        """Copy a tree of floating-point host data to the device."""
        return rebuild(tree, lambda leaf: self.array(leaf, dtype))

    def data(self, golden: Golden, dtype: str) -> tuple[Callable[..., Tree], Tree, tuple[Tree, Tree]]:
        """f, z0 and (params, inputs) of a golden problem."""
        problem = golden.problem
        args = self.tree(problem.params, dtype), self.tree(problem.inputs, dtype)
        return problem.bound(self.backend), self.tree(problem.z0, dtype), args

    def map(self, problem: Affine, dtype: str = "float64") -> Map:
        """f of an affine problem; rows are summed one by one, so that no sample sees another."""
        a, b = self.array(problem.a, dtype), self.array(problem.b, dtype)
        return lambda z: self.backend.xp.sum(a * z[:, None, :], axis=2) + b

    def token_map(self, problem: Tokens, dtype: str = "float64") -> Callable[[Array, Array], Array]:
        """f(z, b) of a causal problem; sums in a fixed order, so that no unit sees a bit of a later one."""
        xp, m, w = self.backend.xp, self.array(problem.m, dtype), self.array(problem.w, dtype)

        def f(z: Array, b: Array) -> Array:
            turned = xp.sum(z[:, :, :, None] * w[None, None, :, :], axis=2)
            return xp.sum(m[None, :, :, None] * turned[:, None, :, :], axis=2) + b

        return f

    def vjp(self, a: Array) -> Map:
        """u ↦ Aᵀu for A `(batch, n, n)`."""
        return lambda u: self.backend.xp.sum(a * u[:, :, None], axis=1)

    def solve(
        self, f: Callable[..., Tree], z0: Tree, *args: Tree, solver: str, rtol: float, **settings: Any
    ) -> Solution:
        """`deqcore.fixed_point` with complete settings, silent about failure."""
        return deqcore.fixed_point(f, z0, *args, config=self.config(solver=solver, rtol=rtol, **settings))

    def config(
        self,
        *,
        solver: str = "broyden",
        rtol: float = 1e-10,
        max_steps: int = 500,
        options: Mapping[str, object] | None = None,
        strategy: str = "exact-ift",
        strategy_options: Mapping[str, object] | None = None,
        check_every: int | str = "auto",
        batch: bool | Literal[2] = True,
    ) -> deqcore.Config:
        """Complete settings, so that no environment variable has a say."""
        if not self.backend.capabilities.float64:
            rtol = max(rtol, 1e-5)
        forward = {"solver": solver, "rtol": rtol, "max_steps": max_steps, "options": dict(options or {})}
        return deqcore.Config(
            backend=self.backend.name,
            forward={**forward, "check_every": check_every, "batch": batch, "on_failure": "ignore"},
            backward={"strategy": strategy, "options": dict(strategy_options or {}), "on_failure": "ignore"},
        )

    @property
    def eager(self) -> bool:
        """Whether a Python function inside a loop runs once per step (and not once per trace)."""
        return self.backend.known_all(self.array([1.0]) > 0)

    @property
    def eps(self) -> float:
        """Of the widest dtype."""
        return float(np.finfo("float64" if self.backend.capabilities.float64 else "float32").eps)


@dataclass(frozen=True)
class DenseEstimate(InverseJacobian):
    """Any matrices as an inverse-Jacobian estimate.

    Attributes:
        kit: where the arrays live.
        h: H `(batch, n, n)`, an array of the framework.
    """

    kit: Kit
    h: Array

    def apply(self, v: Array) -> Array:
        """H v."""
        return self.kit.backend.xp.sum(self.h * v[:, None, :], axis=2)

    def apply_transpose(self, v: Array) -> Array:
        """Hᵀ v."""
        return self.kit.vjp(self.h)(v)


def close(actual: Any, expected: Any, tolerance: float, what: str) -> None:
    """Fail where two NumPy arrays differ, relative to the larger of 1 and the expected norm."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: the shape must be {expected.shape} (got {actual.shape})"
    error = np.linalg.norm(actual - expected)
    allowed = tolerance * max(1.0, float(np.linalg.norm(expected)))
    assert error <= allowed, f"{what}: off by {error:.2e}, allowed {allowed:.2e}"

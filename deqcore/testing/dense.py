"""A reference for a user's own function: dense Newton and a dense adjoint solve in float64.

Only products Jᵀv and derivatives of a single evaluation of f are taken from the framework; no solver, no strategy and
no implicit gradient of deqcore has a part in it. The same Jacobian gives the condition number for the error bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.errors import ProblemError
from deqcore.solve.flatten import RavelSpec
from deqcore.solve.verification import leak_everywhere
from deqcore.testing.jobs import Job, data_of, solve
from deqcore.testing.problem import Problem, rebuild, walk
from deqcore.testing.problems import unraveled
from deqcore.types import Array, Tree

LIMIT: Final = 3_000_000  # numbers in the dense Jacobians of a batch
POLISH: Final = 20
PROBES: Final = 4


class Dense:
    """f of one problem in one framework, with dense derivatives as NumPy arrays."""

    def __init__(self, backend: Backend, problem: Problem, job: Job, f: Callable[..., Tree]) -> None:
        self.backend = backend
        self.params, self.inputs, self.z0, cotangent = data_of(problem, job, backend)
        self.space = RavelSpec.of(backend, self.z0, problem.batch)
        self.f = self.space.wrap(f)
        self.start = self.space.ravel(self.z0)
        self.g = backend.to_numpy(self.space.ravel(cotangent))
        batch, n = self.g.shape
        if not self.g.size:
            raise ProblemError("The state holds no numbers, so no gradient can be checked. Give at least one sample.")
        if batch * n * n > LIMIT:
            raise ProblemError(
                f"The state has {batch} samples of {n} numbers: a dense reference holds {batch * n * n:.1e} numbers, "
                f"above {LIMIT:.0e}. Check a smaller batch or a smaller layer; the mathematics is the same."
            )

    def value(self, z: Any) -> Any:
        """F at z `(batch, n)`."""
        return self.backend.to_numpy(self.f(self._array(z), self.params, self.inputs))

    def jacobian(self, z: Any) -> Any:
        """J per sample, `(batch, n, n)`; if f couples the samples, `(1, batch n, batch n)` of the whole."""
        _, vjp = self.backend.autodiff.linearize(lambda v: self.f(v, self.params, self.inputs), self._array(z))
        n = z.shape[1]
        coupled = leak_everywhere(self.backend, vjp, self._array(z)) > 0
        rows = []
        for i in range(z.size if coupled else n):
            unit = np.zeros_like(z)
            if coupled:
                unit.flat[i] = 1.0
            else:
                unit[:, i] = 1.0
            rows.append(self._vjp(vjp, unit))
        return np.stack([row.ravel() for row in rows])[None] if coupled else np.stack(rows, axis=1)

    def gradients(self, z: Any) -> tuple[dict[str, Any], Any]:
        """Return the gradients of ⟨g, z*⟩ linearised at z, and I − J."""
        jacobian = self.jacobian(z)
        a = np.eye(jacobian.shape[1]) - jacobian
        g = self.g.reshape(len(a), -1, 1)
        u = np.linalg.solve(np.swapaxes(a, 1, 2), g).reshape(self.g.shape)
        return {"cotangent": u, **self.products(z, u)}, a

    def products(self, z: Any, u: Any) -> dict[str, Any]:
        """(∂f/∂leaf)ᵀ u at z for each leaf, by one recorded evaluation of f."""
        at = self._array(z)
        result = self.backend.autodiff.vjp(
            lambda p, x: (self.f(at, p, x), None), (self.params, self.inputs), self._array(u)
        )
        named = [*walk(result[2][0], "params"), *walk(result[2][1], "inputs")]
        return {name: self.backend.to_numpy(leaf) for name, leaf in named if leaf is not None}

    def solution(self, z: Any) -> Any:
        """Newton from z until the residual no longer falls."""
        residual = self.value(z) - z
        for _ in range(POLISH):
            jacobian = self.jacobian(z)
            n = jacobian.shape[1]
            a = np.eye(n) - jacobian
            step = np.linalg.solve(a, residual.reshape(-1, n, 1)).reshape(z.shape)
            moved = z + step
            result = self.value(moved) - moved
            if not np.linalg.norm(result) < np.linalg.norm(residual):
                break
            z, residual = moved, result
        return z

    def _array(self, z: Any) -> Array:
        return self.backend.asarray(np.asarray(z), like=self.start)

    def _vjp(self, vjp: Callable[[Array], Array], u: Any) -> Any:
        return self.backend.to_numpy(vjp(self._array(u)))


def dense(backend: Backend, problem: Problem, job: Job, f: Callable[..., Tree]) -> dict[str, Any]:
    """z*, gradients and sensitivities of a problem, by name.

    Newton starts where deqcore's solver ended, so that of several solutions the same one is meant.
    """
    reference = Dense(backend, problem, job, f)
    quiet = replace(job, rtol=0.0, max_steps=max(job.max_steps, 50), strategy="jacobian-free", strategy_options={})
    near = solve(backend, problem, quiet, f)
    start = np.concatenate([near[name].reshape(len(reference.g), -1) for name, _ in walk(problem.z0, "z")], axis=1)
    z = reference.solution(start)
    result, a = reference.gradients(z)
    result = {name: np.asarray(value) for name, value in result.items()}
    inverse = float(np.linalg.norm(np.linalg.inv(a), 2, axis=(1, 2)).max(initial=0.0))
    jacobian = float(np.linalg.norm(np.eye(a.shape[1]) - a, 2, axis=(1, 2)).max(initial=0.0))
    condition = float(np.linalg.norm(a, 2, axis=(1, 2)).max(initial=0.0)) * inverse
    u = result["cotangent"]
    norms = [float(np.linalg.norm(value)) for value in (z, reference.g, u)]
    arrays = {"sensitivity": np.array([inverse, jacobian, condition, *norms]), "n": np.array(a.shape[1])}
    arrays["residual"] = np.array(np.linalg.norm(reference.value(z) - z))
    for name, slope in slopes(reference, z, result).items():
        arrays[f"slope:{name}"] = np.array(slope)
    z_tree, u_tree = unraveled_like(problem, z), unraveled_like(problem, u)
    arrays |= dict([*walk(z_tree, "z"), *walk(u_tree, "cotangent")])
    return arrays | {name: value for name, value in result.items() if name != "cotangent"}


def unraveled_like(problem: Problem, matrix: Any) -> Tree:
    """Return a raveled state as a tree like z0."""
    host = rebuild(problem.z0, np.asarray)
    return unraveled(matrix, host) if problem.batch else unraveled_whole(matrix, host)


def unraveled_whole(matrix: Any, host: Tree) -> Tree:
    """Return the same where the whole state is one row."""
    sizes = [leaf.size for _, leaf in walk(host, "")]
    pieces = iter(np.split(matrix[0], np.cumsum(sizes)[:-1]))
    return rebuild(host, lambda leaf: next(pieces).reshape(leaf.shape))


def slopes(reference: Dense, z: Any, gradients: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """‖∂f/∂leaf‖ and ‖d gradient / dz‖ for each gradient, in the Frobenius norm, from random probes.

    For a standard normal v, E‖Mᵀv‖² = ‖M‖_F², which is no less than ‖M‖².
    """
    rng = np.random.default_rng(3)
    products: dict[str, list[float]] = {name: [] for name in gradients}
    curves: dict[str, list[float]] = {name: [] for name in gradients}
    h = 1e-5 * (float(np.abs(z).max(initial=0.0)) or 1.0)  # in the unit of z
    for _ in range(PROBES):
        for name, value in reference.products(z, rng.standard_normal(z.shape)).items():
            products[name].append(float(np.linalg.norm(value)))
        direction = rng.standard_normal(z.shape)
        moved, _ = reference.gradients(z + h * direction)
        for name, value in moved.items():
            curves[name].append(float(np.linalg.norm(value - gradients[name])) / h)
    products["cotangent"] = [1.0]
    return {name: (_rms(products[name]), _rms(curves[name])) for name in gradients}


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))

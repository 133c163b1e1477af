"""Compute and store the golden problems: `python -m deqcore.testing.golden_values.make`.

Nothing of deqcore's numerics is used. Affine problems are solved in closed form with 40 digits (mpmath). Elsewhere z*
comes from `scipy.optimize.root`, refined by Newton steps whose residual is taken in extended precision; Jacobians are
dense, by the complex step; gradients follow from the implicit function theorem by a dense solve; their change with z
by central differences of all this. Hessian–vector products are fourth-order differences of gradients at solutions of
the moved problems.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.linalg import eigvals, norm, solve
from scipy.optimize import root

from deqcore.testing.problem import rebuild, walk
from deqcore.testing.problems import FOLDER, FUNCTIONS, raveled

STEP = 1e-100  # complex step: no subtraction, so as small as it likes
HESSIAN_STEP = 2.0**-10  # over ‖A⁻¹‖; fourth order: h⁴ = 1e-12, and rounding over h about the same


def rounded(a: Any) -> Any:
    """Float64 numbers that float32 represents exactly."""
    return np.asarray(a, np.float32).astype(np.float64)


def draw(name: str) -> tuple[dict[str, Any], Any, Any]:
    """Return the parameters, inputs and z0 of a problem."""
    rng = np.random.default_rng(sum(map(ord, name)))

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return scale * rng.standard_normal(shape)

    def radius(n: int, value: float) -> Any:
        w = normal(n, n)
        return value * w / np.abs(eigvals(w)).max()

    if name == "mlp":
        p = {"W": normal(8, 6, scale=0.4), "U": normal(8, 4, scale=0.5), "b": normal(8, scale=0.2)}
        return p | {"V": normal(6, 8, scale=0.3), "c": normal(6, scale=0.5)}, normal(3, 4), np.zeros((3, 6))
    if name == "conv":
        p = {"K": normal(2, 2, 3, 3, scale=0.2), "b": normal(2, scale=0.2)}
        return p, normal(2, 2, 3, 3), np.zeros((2, 2, 3, 3))
    if name == "ring":
        p = {"c": np.array([0.5, -0.25, 0.375]), "b": np.asarray(0.25)}
        return p, normal(2, 16), np.zeros((2, 16))
    if name == "tree":
        p = {"A": radius(3, 0.5), "B": normal(3, 3, scale=0.3), "s": np.asarray(0.3)}
        z0 = {"maps": [np.zeros((2, 3, 2)), np.zeros((2, 3))], "mean": np.zeros((2, 3))}
        return p, {"drive": normal(2, 3), "field": normal(2, 3, 2)}, z0
    if name == "monotone":
        p = {"A": normal(6, 6, scale=0.3), "B": normal(6, 6, scale=0.7), "m": np.asarray(0.5)}
        return p | {"U": normal(6, 4, scale=0.15)}, normal(3, 4), np.zeros((3, 6))
    if name == "expansive":
        q = np.linalg.qr(normal(6, 6))[0]
        return {"W": q @ np.diag(np.linspace(0.8, 2.0, 6)) @ q.T}, normal(3, 6), np.zeros((3, 6))
    if name == "overshoot":
        q = np.linalg.qr(normal(6, 6))[0]
        x = rng.uniform(1.0, 1.5, (3, 6)) * rng.choice([-1.0, 1.0], (3, 6))  # Newton for tanh diverges beyond 1.09
        return {"W": q @ np.diag(np.linspace(0.7, 1.3, 6)) @ q.T}, x, np.zeros((3, 6))
    if name == "walled":
        p = {"W": np.eye(6) + rng.uniform(0.0, 0.1, (6, 6)), "c": np.asarray(2.0)}
        return p, -rng.uniform(1.5, 2.5, (3, 6)), np.ones((3, 6))
    if name in ("divergent", "nan"):
        x = normal(4, 4)
        x[:, 0] = [0.0, 0.0, 1.0, 0.0] if name == "divergent" else [1.0, 4.0, -1.0, 0.25]
        return {"W": radius(6, 0.6), "U": normal(6, 4, scale=0.5)}, x, np.zeros((4, 6))
    n = {"affine": 6, "ill-conditioned": 8, "slow-modes": 24}[name]
    w = radius(n, 0.6)
    if name == "ill-conditioned":  # singular values of I − W from 1 down to 1e-4
        left, right = np.linalg.qr(normal(n, n))[0], np.linalg.qr(normal(n, n))[0]
        w = np.eye(n) - left @ np.diag(np.logspace(0, -4, n)) @ right.T
    if name == "slow-modes":
        q = np.linalg.qr(normal(n, n))[0]
        w = q @ np.diag([*np.linspace(0.9, 0.99, 5), *rng.uniform(-0.5, 0.5, n - 5)]) @ q.T
    return {"W": w, "U": normal(n, 4, scale=0.5), "b": normal(n, scale=0.5)}, normal(3, 4), np.zeros((3, n))


class Flat:
    """A problem as a function of one vector of everything, in any precision."""

    def __init__(self, name: str, params: Any, inputs: Any, z0: Any) -> None:
        self.name = name
        self.f = FUNCTIONS[name]
        self.z0 = z0
        self.batch = next(walk(z0, ""))[1].shape[0]
        self.start = np.ravel(raveled(z0, self.batch))
        self.data = [*walk(params, "params"), *walk(inputs, "inputs")]
        self.params, self.inputs = params, inputs

    def __call__(self, z: Any, changed: str = "", value: Any = None) -> Any:
        """F at the vector z, with one leaf of the data changed."""
        leaves = iter([value if name == changed else leaf for name, leaf in self.data])
        params = rebuild(self.params, lambda _: next(leaves))
        inputs = rebuild(self.inputs, lambda _: next(leaves))
        return np.ravel(raveled(self.f(np, params, self.unravel(z), inputs), self.batch))

    def unravel(self, z: Any) -> Any:
        """Return the tree of a vector."""
        rows = z.reshape(self.batch, -1)
        offsets = iter(np.cumsum([0, *(leaf[0].size for _, leaf in walk(self.z0, ""))]))
        ends = iter(np.cumsum([leaf[0].size for _, leaf in walk(self.z0, "")]))
        return rebuild(self.z0, lambda leaf: rows[:, next(offsets) : next(ends)].reshape(leaf.shape))

    def moved(self, size: float, direction: dict[str, Any]) -> Flat:
        """Return the problem with all its data moved by `size` along a direction."""
        leaves = iter([leaf + size * direction[name] for name, leaf in self.data])
        params = rebuild(self.params, lambda _: next(leaves))
        inputs = rebuild(self.inputs, lambda _: next(leaves))
        return Flat(self.name, params, inputs, self.z0)

    def hessian_product(self, g: Any, direction: dict[str, Any], inverse: float) -> dict[str, Any]:
        """Return the change of the gradients of ⟨g, z*⟩ along a direction; error about 1e-12 times the condition."""
        results: dict[str, Any] = {}
        h = HESSIAN_STEP / max(1.0, inverse)
        for weight, size in ((8.0, 1.0), (-8.0, -1.0), (-1.0, 2.0), (1.0, -2.0)):
            near = self.moved(size * h, direction)
            for name, value in near.gradients(near.solution(), g)[1].items():
                results[name] = results.get(name, 0.0) + weight * value / (12 * h)
        return results

    def solution(self) -> Any:
        """z*, to rounding."""

        def residual(z: Any) -> Any:
            return self(z) - z

        start = self.start
        if self.name == "overshoot":  # Newton steps from z0 lead away, which is the point of it
            for _ in range(60):
                start = self(start)
        if self.name == "walled":  # f is NaN beyond the wall, so start from the closed form
            start = np.ravel(solve(self.params["W"], np.exp(self.inputs).T).T)
        result = root(residual, start, tol=1e-13)
        z = result.x.astype(np.longdouble)
        for _ in range(5):
            jacobian = derivative(self, np.asarray(z, np.float64))
            z = z + solve(np.eye(z.size) - jacobian, np.asarray(self(z) - z, np.float64))
        if not norm(np.asarray(self(z) - z, np.float64)) < 1e-14 * (1 + norm(np.asarray(z, np.float64))):
            raise RuntimeError(f"no solution: {result.message}")
        return np.asarray(z, np.float64)

    def gradients(self, z: Any, g: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """J, the gradients of ⟨g, z*⟩ for all leaves, and ∂f/∂leaf, all linearised at z."""
        jacobian = derivative(self, z)
        u = solve(np.eye(z.size) - jacobian.T, g)
        products: dict[str, Any] = {"cotangent": np.eye(z.size)}
        for name, leaf in self.data:
            products[name] = derivative(partial(self, z, name), leaf)
        return jacobian, {name: product.T @ u for name, product in products.items()}, products


def derivative(f: Callable[[Any], Any], x: Any) -> Any:
    """Return dense Jacobian by the complex step: `(f(x).size, x.size)`."""
    columns = []
    for i in range(x.size):
        moved = x.astype(np.complex128)
        moved.flat[i] += 1j * STEP
        columns.append(np.ravel(f(moved)).imag / STEP)
    return np.stack(columns, axis=1)


def curvatures(flat: Flat, z: Any, g: Any) -> dict[str, float]:
    """‖d gradient / dz‖ for each leaf, by central differences."""
    columns: dict[str, list[Any]] = {}
    h = 1e-5 * max(1.0, float(np.abs(z).max()))
    for i in range(z.size):
        dz = h * (np.arange(z.size) == i)
        high, low = flat.gradients(z + dz, g)[1], flat.gradients(z - dz, g)[1]
        for name, value in high.items():
            columns.setdefault(name, []).append((value - low[name]) / (2 * h))
    return {name: float(norm(np.stack(parts, axis=1), 2)) for name, parts in columns.items()}


def exact_affine(params: Any, x: Any, g: Any) -> tuple[Any, dict[str, Any]]:
    """z* and gradients of ⟨g, z*⟩ for z = W z + U x + b, in closed form with 40 digits."""
    import mpmath as mp

    mp.mp.dps = 40
    w, u, b = (mp.matrix(params[name].tolist()) for name in ("W", "U", "b"))
    a = mp.eye(w.rows) - w
    solutions, adjoints = [], []
    for row, cotangent in zip(x.tolist(), g.tolist(), strict=True):
        solutions.append([float(v) for v in mp.lu_solve(a, u * mp.matrix(row) + b)])
        adjoints.append([float(v) for v in mp.lu_solve(a.T, mp.matrix(cotangent))])
    z, adjoint = np.array(solutions), np.array(adjoints)
    gradients = {"params['W']": adjoint.T @ z, "params['U']": adjoint.T @ x, "params['b']": adjoint.sum(0)}
    return z, gradients | {"inputs": adjoint @ params["U"], "cotangent": adjoint}


def inverse_facts(a: Any, v: Any) -> tuple[Any, Any]:
    """H v and Hᵀ v for H = (J − I)⁻¹ = −A⁻¹, refined with residuals in extended precision."""
    result = []
    for matrix in (a, a.T):
        x = solve(matrix, -v)
        for _ in range(2):
            residual = -v - matrix.astype(np.longdouble) @ x.astype(np.longdouble)
            x = x + solve(matrix, np.asarray(residual, np.float64))
        result.append(x)
    return result[0], result[1]


def compute(name: str) -> dict[str, Any]:
    """Return everything that is stored for one problem."""
    params, inputs, z0 = draw(name)
    params, inputs = rebuild(params, rounded), rebuild(inputs, rounded)
    rng = np.random.default_rng(7)
    direction = rebuild(z0, lambda leaf: rounded(rng.standard_normal(leaf.shape)))
    healthy = np.ones(next(walk(z0, ""))[1].shape[0], bool)
    if name in ("divergent", "nan"):
        healthy[2] = False

    def well(tree: Any) -> Any:
        return rebuild(tree, lambda leaf: leaf[healthy])

    def everyone(leaf: Any) -> Any:
        full = np.full((healthy.size, *leaf.shape[1:]), np.nan)
        full[healthy] = leaf
        return full

    flat = Flat(name, params, well(inputs), well(z0))
    g = np.ravel(raveled(well(direction), flat.batch))
    z = flat.solution()
    jacobian, gradients, products = flat.gradients(z, g)
    if FUNCTIONS[name] is FUNCTIONS["affine"]:
        rows, exact = exact_affine(params, inputs, direction)
        gap = max(norm(np.ravel(exact[key]) - gradients[key]) / norm(gradients[key]) for key in exact)
        if not gap < 1e-14 * norm(np.linalg.inv(np.eye(z.size) - jacobian), 2) ** 2:
            raise RuntimeError(f"{name}: closed form and dense solve differ by {gap}")
        z, gradients = np.ravel(rows), {key: np.ravel(value) for key, value in exact.items()}
    a = np.eye(z.size) - jacobian
    n = z.size // flat.batch
    blocks = np.stack([jacobian[i : i + n, i : i + n] for i in range(0, z.size, n)])
    bends = curvatures(flat, z, g)
    shapes = {key: leaf.shape for key, leaf in flat.data} | {"cotangent": (flat.batch, n)}
    per_sample = {key for key in shapes if not key.startswith("params")}
    stored: dict[str, Any] = dict([*walk(params, "params"), *walk(inputs, "inputs"), *walk(z0, "z0")])
    stored |= dict(walk(direction, "direction"))
    stored |= {key: everyone(leaf) for key, leaf in walk(flat.unravel(z), "solution")}
    for key, value in gradients.items():
        shaped = value.reshape(shapes[key])
        stored[f"gradient:{key}"] = everyone(shaped) if key in per_sample else shaped
        stored[f"slope:{key}"] = np.array([norm(products[key], 2), bends[key]])
    inverse = norm(np.linalg.inv(a), 2)
    facts = [inverse, norm(jacobian, 2), norm(a, 2) * inverse, norm(z), norm(g), norm(gradients["cotangent"])]
    radius = np.abs(eigvals(jacobian)).max()
    bent = {key: rounded(rng.standard_normal(leaf.shape)) / 8 for key, leaf in flat.data}
    for key, value in flat.hessian_product(g, bent, float(inverse)).items():
        shaped = value.reshape(shapes[key])
        stored[f"hessian:{key}"] = everyone(shaped) if key in per_sample else shaped
    stored |= {f"bend:{key}": everyone(leaf) if key in per_sample else leaf for key, leaf in bent.items()}
    probe = rounded(rng.standard_normal(z.shape))
    for key, value in zip(("probe", "inverse", "transposed"), (probe, *inverse_facts(a, probe)), strict=True):
        stored[key] = everyone(value.reshape(flat.batch, n))
    return stored | {
        "jacobian": blocks,
        "healthy": healthy,
        "radius": radius,
        "sensitivity": np.array(facts),
    }


def main() -> None:
    """Compute and store all problems, or those named on the command line."""
    for name in sys.argv[1:] or FUNCTIONS:
        stored = compute(name)
        np.savez_compressed(FOLDER / f"{name}.npz", **stored)
        inverse, jacobian, condition, *_ = stored["sensitivity"]
        print(f"{name:16} ρ {stored['radius']:.3f}  ‖J‖ {jacobian:.3g}  ‖A⁻¹‖ {inverse:.3g}  κ {condition:.3g}")


if __name__ == "__main__":
    main()

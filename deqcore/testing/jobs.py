"""One solve with its gradients in one framework: what is asked for, its data, and how deqcore does it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from deqcore.abc.arrays import is_inexact, precision_of
from deqcore.abc.backend import Backend
from deqcore.api import vjp
from deqcore.config import Config
from deqcore.testing.problem import Problem, rebuild, walk
from deqcore.types import Array, Tree


@dataclass(frozen=True)
class Job:
    """One solve with its gradients, or the dense reference of a problem.

    Attributes:
        kind: "solve"; "dense", for z* and gradients by dense linear algebra.
        problem: name of a golden problem, or `path/to/file.py:name`.
        dtype: of the arithmetic.
        data: dtype that the data are rounded to first (what a run in that dtype would see).
        jitter: seed of a change of all data by one unit in the last place; 0 for none.
    """

    kind: str
    problem: str
    dtype: str
    solver: str = "broyden"
    strategy: str = "exact-ift"
    solver_options: Mapping[str, object] = field(default_factory=dict)
    strategy_options: Mapping[str, object] = field(default_factory=dict)
    rtol: float = 0.0
    max_steps: int = 0
    data: str = ""
    jitter: int = 0

    @property
    def key(self) -> str:
        """The same for the same work."""
        return json.dumps(asdict(self), sort_keys=True)

    def config(self, backend: str, batch: bool) -> Config:
        """Complete settings, so that no environment variable has a say."""
        return Config(
            backend=backend,
            forward={
                "solver": self.solver,
                "options": self.solver_options,
                "rtol": self.rtol,
                "max_steps": self.max_steps,
                "batch": batch,
                "on_failure": "raise" if self.rtol else "ignore",
            },
            backward={"strategy": self.strategy, "options": self.strategy_options, "on_failure": "ignore"},
        )


def data_of(problem: Problem, job: Job, backend: Backend) -> tuple[Tree, Tree, Tree, Tree]:
    """Return parameters, inputs, z0 and cotangent as arrays of the backend."""
    rng = np.random.default_rng(job.jitter)

    def convert(leaf: Any) -> Array:
        host = np.asarray(leaf)
        kind = host.dtype.name
        if is_inexact(kind):
            host = host.astype(precision_of(kind, job.data or job.dtype))
            if job.jitter:
                signs = rng.integers(-1, 2, host.shape).astype(host.dtype)
                host = (host * (1 + np.finfo(host.dtype).eps * signs)).astype(host.dtype)
            host = host.astype(precision_of(kind, job.dtype))
        return backend.asarray(host)

    trees = (problem.params, problem.inputs, problem.z0, problem.direction())
    params, inputs, z0, g = (rebuild(tree, convert) for tree in trees)
    return params, inputs, z0, g


def shifted(backend: Backend, f: Callable[..., Tree]) -> Callable[..., Tree]:
    """f(z, params, inputs) + shift, so that the gradient for the shift is u = (I − J)^-T g itself."""

    def moved(z: Tree, params: Tree, inputs: Tree, shift: Tree) -> Tree:
        out = f(z, params, inputs)
        leaves, structure = backend.flatten(out)
        shifts, expected = backend.flatten(shift)
        if structure != expected or any(not backend.is_array(leaf) for leaf in leaves):
            return out  # the solve itself says what is wrong with it
        if any(tuple(a.shape) != tuple(b.shape) for a, b in zip(leaves, shifts, strict=True)):
            return out
        return backend.unflatten(structure, [a + b for a, b in zip(leaves, shifts, strict=True)])

    return moved


def solve(backend: Backend, problem: Problem, job: Job, f: Callable[..., Tree]) -> dict[str, Any]:
    """z* and all gradients by deqcore."""
    params, inputs, z0, g = data_of(problem, job, backend)
    zero = rebuild(z0, lambda leaf: 0 * leaf)
    moved = shifted(backend, f)
    config = job.config(backend.name, problem.batch)
    z, gradients = vjp(moved, z0, params, inputs, zero, cotangent=g, config=config)
    at_start = f(z0, params, inputs)
    named = [*walk(at_start, "f(z0)"), *walk(z, "z"), *walk(gradients[2], "cotangent")]
    named += [*walk(gradients[0], "params"), *walk(gradients[1], "inputs")]
    return {name: backend.to_numpy(leaf) for name, leaf in named if leaf is not None}

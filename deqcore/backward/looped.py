"""The looped recipe: a random number of plain steps without a gradient, then a few recorded ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from deqcore.abc.backend import Backend
from deqcore.abc.backward import StepStrategy
from deqcore.abc.solver import Solver
from deqcore.backward.depth import RANGE, SIGMA, draw
from deqcore.linear.norms import residual_norms, unmeasured
from deqcore.solve.termination import greater
from deqcore.types import Array, Map, Reached, SolveResult


@dataclass(frozen=True)
class Looped(StepStrategy):
    """Train as looped (recurrent-depth) models are: n steps without a gradient, then k recorded ones.

    Each step is z ← z + β (f(z) − z) + noise. Their total number, the depth, is drawn for each training step, so that
    the model works at many depths; the last `recorded` steps of it carry a gradient (truncated backpropagation). With
    a depth of at most `recorded` all steps carry it, and it reaches z0, as a learnt start needs; otherwise it does not.

    Random numbers depend on `seed` and the setting `backward.step` alone: all ranks take the same depth, and a
    restarted training draws what it would have drawn. The depth is the same in all frameworks, the noise is not. In JAX
    pass `backward__step` as an array: it is traced, so that another depth compiles nothing.

    `forward.solver`, `forward.max_steps` and the tolerances change nothing but the status. `sol.steps` is the depth.
    The residual is NaN unless `measure` is set.

    Cost: the depth in evaluations of f, of which `recorded` are recorded; two more with `measure`.

    Args:
        depth: mean total depth, at least 1; a whole number for "fixed", half of a whole number for "uniform".
        recorded: steps that are recorded, k, at least 1.
        distribution: "fixed": always `depth`. "uniform": on 1, …, 2·depth − 1. "poisson": 1 + Poisson(depth − 1).
            "log-normal-poisson": the same with a log-normal rate, whose long tail trains deep loops as well.
        sigma: standard deviation of the logarithm of that rate; default 0.5.
        max_depth: the largest depth; larger draws become it.
        damping: β in (0, 1].
        noise: standard deviation of the normal noise that each step adds, in units of the state; None: none.
        start_noise: the same for z0, once: a random start.
        seed: from 0 to 2³² − 2; random depths and noise need it.
        measure: evaluate f at the start and at the value as well, for `sol.residual` and `sol.status`.

    Raises:
        ValueError: an option is out of its range. From settings it is the ConfigError that names the setting.

    Source: Geiping et al. (2025), "Scaling up test-time compute with latent reasoning", arXiv:2502.05171, §3.3.

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(
        ...     lambda z: 0.5 * z + 0.5, np.zeros((1, 1)), backward__strategy="looped", backward__step=7,
        ...     backward__options={"depth": 8, "distribution": "log-normal-poisson", "seed": 0})
        >>> float(sol.value[0, 0]) == 1 - 0.5 ** int(sol.steps[0])
        True
    """

    depth: float = 8.0
    recorded: int = 4
    distribution: Literal["fixed", "uniform", "poisson", "log-normal-poisson"] = "fixed"
    sigma: float | None = None
    max_depth: int | None = None
    damping: float = 1.0
    noise: float | None = None
    start_noise: float | None = None
    seed: int | None = None
    measure: bool = False

    def __post_init__(self) -> None:
        if not 1.0 <= self.depth <= 1e5:
            raise ValueError(f"depth must be from 1 to 100000 (got {self.depth}).")
        parts = {"fixed": 1, "uniform": 2}.get(self.distribution)
        if parts is not None and not float(parts * self.depth).is_integer():
            raise ValueError(f"depth must be a whole number / {parts} for {self.distribution!r} (got {self.depth}).")
        for name, least in (("recorded", 1), ("max_depth", 1), ("sigma", 0.0), ("noise", 0.0), ("start_noise", 0.0)):
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{name} must be at least {least} (got {value}).")
        if self.sigma is not None and self.distribution != "log-normal-poisson":
            raise ValueError(
                f"sigma belongs to 'log-normal-poisson' (got sigma = {self.sigma}, {self.distribution!r})."
            )
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping must be above 0 and at most 1 (got {self.damping}).")
        random = self.distribution != "fixed" or self.noise is not None or self.start_noise is not None
        if random and self.seed is None:
            raise ValueError("seed must be set for random depths and noise (got None).")
        if self.seed is not None and not 0 <= self.seed < RANGE - 1:
            raise ValueError(f"seed must be from 0 to {RANGE - 2} (got {self.seed}).")

    def solves(self) -> bool:
        """Return False: the steps are the solve."""
        return False

    def truncates(self) -> bool:
        """Return whether a depth may exceed the recorded steps."""
        return self.distribution != "fixed" or self.depth > self.recorded

    def value(self, backend: Backend, f: Map, z0: Array, forward: SolveResult | None, solver: Solver) -> Reached:
        """Return the value at training step 0."""
        return self.value_at(backend, f, z0, forward, solver, 0)

    def value_at(
        self, backend: Backend, f: Map, z0: Array, forward: SolveResult | None, solver: Solver, step: Any
    ) -> Reached:
        """Return the last state."""
        total = self.total(backend, step, z0)
        if self.start_noise is not None:
            z0 = z0 + self.start_noise * backend.numbers.normal(z0, self.seed or 0, (step, 0))

        def body(f: Map, z: Array, i: Any) -> Array:
            return self._step(backend, f, z, step, i)

        if isinstance(total, int):
            first = max(total - self.recorded, 0)
            z = backend.autodiff.repeat(body, f, z0, first) if first else z0
            for i in range(first, total):
                z = body(f, z, i)
        else:
            z = self._traced(backend, f, z0, total, body)
        return self._reached(backend, f, z0, z, total)

    def total(self, backend: Backend, step: Any, like: Array) -> Any:
        """Return the total depth at a training step: an integer, or a traced scalar where `step` is one."""
        if self.distribution == "fixed":
            return int(self.depth) if self.max_depth is None else min(int(self.depth), self.max_depth)
        sigma = SIGMA if self.sigma is None else self.sigma
        total = draw(backend, self.distribution, self.depth, sigma, self.seed or 0, step, like)
        if self.max_depth is None:
            return total
        return min(total, self.max_depth) if isinstance(total, int) else backend.xp.clip(total, max=self.max_depth)

    def _traced(self, backend: Backend, f: Map, z0: Array, total: Array, body: Any) -> Array:
        """Take a traced number of steps: a loop, and a fixed number of recorded ones, which may be idle at the end."""
        xp = backend.xp
        first = xp.clip(total - self.recorded, min=0)
        z = xp.where(first > 0, backend.autodiff.repeat(body, f, z0, first), z0)

        def recorded(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            z, i = carry
            return xp.where(i < total, body(f, z, i), z), i + 1

        value: Array = backend.scan(recorded, (z, first), self.recorded)[0]
        return value

    def _step(self, backend: Backend, f: Map, z: Array, step: Any, i: Any) -> Array:
        fz = f(z)
        z = fz if self.damping == 1.0 else z + self.damping * (fz - z)
        return z if self.noise is None else z + self.noise * backend.numbers.normal(z, self.seed or 0, (step, i + 1))

    def _reached(self, backend: Backend, f: Map, z0: Array, z: Array, total: Any) -> Reached:
        begin = backend.detach(z0)
        unknown = unmeasured(backend, begin)
        steps = backend.xp.zeros_like(unknown, dtype=backend.xp.int32) + total
        if not self.measure:
            return Reached(z, None, steps, unknown, unknown, None, steps)
        size = backend.norm(begin)
        first, fz = (backend.autodiff.repeat(lambda f, z, _: f(z), f, z, 1) for z in (begin, backend.detach(z)))
        residual, grown = residual_norms(backend, begin, first)
        return Reached(z, fz, steps + 2, greater(backend.xp, size, grown), residual, None, steps)

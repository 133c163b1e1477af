"""The implicit gradient for a solver of your own, and a solve step by step.

`custom_fixed_point` and `custom_root` attach the gradient to what your own function returns, whatever it does inside.
`Stepper` takes the steps of deqcore's solvers one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeAlias

from deqcore.abc.backend import Backend
from deqcore.api import fixed_point
from deqcore.config import Config
from deqcore.errors import ConvergenceError, ConvergenceWarning, ProblemError, described
from deqcore.solution import Solution
from deqcore.solve.dispatch import pick_backend, plan_call
from deqcore.solve.leaves import is_carried
from deqcore.solve.user_line import warn
from deqcore.types import SolveResult, Status, Tree

Solve: TypeAlias = Callable[..., Any]


def custom_fixed_point(
    f: Callable[..., Tree], *, has_aux: bool = False, config: Config | None = None, **overrides: object
) -> Callable[[Solve], Solve]:
    """Give a solver of your own the implicit gradient of z* = f(z*, *args).

    The solver runs on inputs without gradients, so loops and branches inside need not be differentiable. Its result
    gets the gradient that `backward.strategy` finds; f is evaluated once there, and once in the backward pass. A result
    that misses `forward.rtol` warns, or raises if `forward.on_failure` is "raise": the gradient is then that of f at
    this point. The tolerance is relative to f there, whatever its size is.

    Args:
        f: `f(z, *args)` returns a tree like z.
        has_aux: the solver returns `(z, aux)`, and so does the decorated one; aux carries no gradient.
        config: as in `fixed_point`.
        **overrides: as in `fixed_point`, such as `forward__batch=False` or `backward__options={"rtol": 1e-8}`.

    Returns:
        A decorator of `solver(z0, *args, **kwargs)`; keyword arguments get no gradient.

    Raises:
        ProblemError: (when called) with has_aux the solver did not return a pair. Otherwise as `fixed_point`.
        ConvergenceError: (when called) `on_failure = "raise"`, and a sample misses the tolerance.

    Source: Blondel et al. (2022), "Efficient and modular implicit differentiation".

    Example:
        >>> import torch, deqcore
        >>> @deqcore.custom_fixed_point(lambda z, a: a * torch.cos(z), forward__rtol=1e-5)
        ... def solver(z0, a):
        ...     for _ in range(60):
        ...         z0 = a * torch.cos(z0)
        ...     return z0
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> solver(torch.zeros(1, 1), a).sum().backward()
        >>> round(float(a.grad), 4)  # cos z / (1 + a sin z)
        0.7395
    """

    def decorate(solver: Solve) -> Solve:
        @wraps(solver)
        def solved(z0: Tree, *args: Any, **kwargs: Any) -> Any:
            plan = plan_call(config, overrides, z0, args)
            result = _without_gradient(plan.backend, lambda z0, *args: solver(z0, *args, **kwargs), z0, args)
            if has_aux and not (isinstance(result, tuple) and len(result) == 2):
                raise ProblemError(f"With has_aux = true the solver must return (z, aux) (got {described(result)}).")
            z, aux = result if has_aux else (result, None)
            given: dict[str, Any] = {**overrides, "forward__max_steps": 0}
            if not plan.backend.is_traced(z, args):  # traced code reports as fixed_point does
                given["forward__on_failure"] = "ignore"
            solution = fixed_point(f, z, *args, config=config, **given)
            if plan.forward.on_failure != "ignore":
                _report(solution, plan.forward.on_failure)
            return (solution.value, aux) if has_aux else solution.value

        return solved

    return decorate


def custom_root(
    residual: Callable[..., Tree], *, has_aux: bool = False, config: Config | None = None, **overrides: object
) -> Callable[[Solve], Solve]:
    """Give a solver of your own the implicit gradient of the root of `residual(z, *args) = 0`.

    It is `custom_fixed_point` with f(z) = z − residual(z), whose I − J is the Jacobian of the residual.

    Args:
        residual: `residual(z, *args)` returns a tree like z.
        has_aux: as in `custom_fixed_point`.
        config: as in `fixed_point`.
        **overrides: as in `fixed_point`.

    Returns:
        A decorator of `solver(z0, *args, **kwargs)`.

    Raises:
        ProblemError: as `custom_fixed_point`.

    Example:
        >>> import torch, deqcore
        >>> @deqcore.custom_root(lambda z, a: z**2 - a, forward__rtol=1e-5)
        ... def square_root(z0, a):
        ...     return a.sqrt() + 0 * z0
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> square_root(torch.ones(1, 1), a).sum().backward()
        >>> round(float(a.grad), 6)  # 1 / (2 √a)
        0.25
    """

    def f(z: Tree, *args: Any) -> Tree:
        return _difference(z, residual(z, *args))

    f.__wrapped__ = residual  # type: ignore[attr-defined] # backward passes are counted for the residual
    return custom_fixed_point(f, has_aux=has_aux, config=config, **overrides)


@dataclass(frozen=True)
class Stepper:
    """A solve that your own loop takes step by step.

    Each `update` continues the solve with new steps: it evaluates f once to see whether f is still the same, and once
    or more for each step. Samples that have converged stay as they are. Inside `jax.jit` a solution is a tree, so it
    can be the carry of `jax.lax.while_loop`; outside, each step is a call of its own.

    Args:
        f: as in `fixed_point`.
        config: as in `fixed_point`.
        overrides: as in `fixed_point`, as a dictionary.

    Example:
        >>> import numpy as np, deqcore
        >>> stepper = deqcore.Stepper(np.cos, overrides={"forward__solver": "anderson", "forward__rtol": 1e-8})
        >>> sol = stepper.init(np.ones((1, 1)))
        >>> while not sol.converged.all():
        ...     sol = stepper.update(sol)
        >>> sol.value.round(6).tolist(), int(sol.steps[0]) < 10
        ([[0.739085]], True)
    """

    f: Callable[..., Tree]
    config: Config | None = None
    overrides: dict[str, Any] | None = None

    def init(self, z0: Tree, *args: Any) -> Solution:
        """Evaluate f at z0; the result has taken no step.

        Args:
            z0: as in `fixed_point`.
            *args: as in `fixed_point`.
        """
        return self._call(z0, args, None, 0)

    def update(self, solution: Solution, *args: Any, steps: int = 1) -> Solution:
        """Take steps from a solution, with the implicit gradient at the result.

        Args:
            solution: of `init` or `update`.
            *args: as in `fixed_point`; they may change, and a sample whose f changes begins at its best iterate.
            steps: the number of steps.
        """
        return self._call(solution.z, args, solution.state, steps)

    def _call(self, z0: Tree, args: tuple[Any, ...], state: Any, steps: int) -> Solution:
        here = {"forward__max_steps": steps, "forward__on_failure": "ignore"}
        given = (self.overrides or {}) | here
        return fixed_point(self.f, z0, *args, config=self.config, state=state, **given)


def _without_gradient(backend: Backend, solver: Solve, z0: Tree, args: tuple[Any, ...]) -> Any:
    """Return `solver(z0, *args)` on values without gradients, and record none."""
    leaves, structure = backend.flatten((z0, args))
    z0, args = backend.unflatten(structure, [backend.detach(x) if backend.is_array(x) else x for x in leaves])
    kept: list[Any] = []

    def run(*_: Any) -> SolveResult:
        kept.append(solver(z0, *args))
        return SolveResult(zero, None, None, None, None, None, None)

    zero = backend.asarray(0.0)
    with backend.errstate():
        if backend.capabilities.eager:
            backend.autodiff.forward_only(lambda z: z, zero, (), run)
        else:
            run()
    returned, structure = backend.flatten(kept[0])
    return backend.unflatten(structure, [backend.detach(x) if backend.is_array(x) else x for x in returned])


def _difference(a: Tree, b: Tree) -> Tree:
    """Return a − b leaf by leaf, and what is carried along in `a` as it is; b if it is another tree."""
    backend = pick_backend(Config(), a, ())
    (leaves, structure), (others, other_structure) = backend.flatten(a), backend.flatten(b)
    if other_structure != structure:
        return b  # the caller raises the error
    pairs = zip(leaves, others, strict=True)
    return backend.unflatten(structure, [x if is_carried(backend, x) else x - y for x, y in pairs])


def _report(solution: Solution, action: str) -> None:
    """Warn or raise if a sample that your solver returned misses the tolerance. Traced code cannot know."""
    backend = solution.backend
    if backend.is_traced(solution.status, solution.residual):
        return
    missed = backend.to_numpy(solution.status) != int(Status.CONVERGED)
    if missed.any():
        largest = float(backend.to_numpy(solution.residual)[missed].max())
        text = (
            f"The solver returned a point that misses the tolerance for {int(missed.sum())} of {missed.size} samples "
            f"(residual ‖f(z) − z‖ up to {largest:.2g}): their gradient is that of f at this point. Let the solver run "
            f"longer, or loosen forward.rtol of custom_fixed_point (forward__on_failure='ignore' silences this)."
        )
        if action == "raise":
            raise ConvergenceError(text)
        warn(text, ConvergenceWarning)

"""One call of `fixed_point` or `vjp`, once its settings are resolved: solve, attach the gradient, report.

A compiler of Python code does not trace this module, see `CallGuards.untraced`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from deqcore.errors import ProblemError, described
from deqcore.solution import Solution
from deqcore.solve import by_hand
from deqcore.solve.mask import checked, masked
from deqcore.solve.opaque import opened
from deqcore.solve.plan import Plan
from deqcore.solve.report import report_failure, report_nondeterminism
from deqcore.types import Tree


def without_aux(f: Callable[..., Any]) -> Callable[..., Tree]:
    """Return f without the second of the pair that it returns.

    Raises:
        ProblemError: (when called) f did not return a pair.
    """

    def first(z: Tree, *args: Any) -> Tree:
        pair = f(z, *args)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ProblemError(f"With has_aux = true f must return (z, aux) (got {described(pair)}).")
        return pair[0]

    first.__wrapped__ = f  # type: ignore[attr-defined] # backward passes are counted for f
    return first


def _masked(plan: Plan, f: Callable[..., Tree], z0: Tree, mask: Any) -> tuple[Plan, Callable[..., Tree]]:
    """Return the plan and f for the units of the mask."""
    if mask is None:
        return plan, f
    units = checked(plan.space, mask)
    return plan._replace(mask=units), masked(plan.backend, f, z0, units)


def solve(
    plan: Plan,
    f: Callable[..., Tree],
    z0: Tree,
    args: tuple[Any, ...],
    state: Any,
    batched_args: tuple[int, ...],
    mask: Any = None,
) -> Solution:
    """Solve, and report what an observer, a warning or an error needs."""
    start = time.perf_counter()
    plan, f = _masked(plan, f, z0, mask)
    raveled = plan.space.wrap(f, batched_args)
    value, forward, record = plan.run(raveled, plan.space.ravel(z0), args, state)
    solution = plan.solution(value, forward, record)
    if plan.observed is not None:
        plan.observed(solution, time.perf_counter() - start, f, z0, args)
    report_nondeterminism(plan, raveled, args, forward, record)
    report_failure(plan, raveled, forward)
    return solution


def differentiate(
    plan: Plan,
    f: Callable[..., Tree],
    z0: Tree,
    args: tuple[Any, ...],
    cotangent: Tree,
    batched_args: tuple[int, ...],
    mask: Any = None,
) -> tuple[Tree, tuple[Any, ...]]:
    """Solve, map the cotangent, and report as `solve` does."""
    plan, f = _masked(plan, f, z0, mask)
    g = plan.space.ravel_cotangent(cotangent)
    trees, closed = opened(plan.backend, args)
    raveled = plan.space.wrap(lambda z, *trees: f(z, *closed(trees)), batched_args)
    run = Plan.differentiate if plan.backend.capabilities.autodiff else by_hand.differentiate
    began = time.perf_counter()
    value, gradients, forward, record = run(plan, raveled, plan.space.ravel(z0), trees, g)
    if plan.observed is not None:
        solution = plan.solution(plan.backend.detach(value), forward, record)
        plan.observed(solution, time.perf_counter() - began, f, z0, args)
    report_nondeterminism(plan, raveled, trees, forward, record)
    report_failure(plan, raveled, forward)
    return plan.space.unravel(value), closed(gradients)

"""The sentences about adjoint solves that fail and about rows that f couples, the same ones in every backend."""

from __future__ import annotations

import math
from typing import Final

from deqcore.abc.backward import Strategy
from deqcore.options import option_values
from deqcore.solution import Tally
from deqcore.types import Status

TOLERANCES: Final = ("rtol", "max_relative_error")
BUDGETS: Final = ("max_steps", "max_refine_vjps", "terms", "steps")

ADVICE: Final = {
    Status.MAX_STEPS: "raise {budget}, loosen {tolerance}, or choose another backward.strategy",
    Status.STALLED: (
        "loosen {tolerance}, use a wider dtype, or regularize the Jacobian of f, since I − J is singular or nearly so "
        "at this solution"
    ),
    Status.DIVERGED: "{contraction}",
    Status.NONFINITE: "look for NaN or inf in f and in its derivative at the solution",
}


def promises(strategy: Strategy) -> bool:
    """Return whether a strategy promises an accuracy: it is exact, or one of its options is a tolerance."""
    return strategy.exact or any(option_values(strategy).get(name) is not None for name in TOLERANCES)


def failure(tally: Tally, strategy: Strategy, name: str, on_failure: str, wrong: int = 0) -> str:
    """Describe the samples whose adjoint solve failed.

    Args:
        tally: of a backward pass, on the host; its `steps` are vector–Jacobian products. Samples that did not fail, as
            `deqcore.solve.verification.failing` decides, count as CONVERGED.
        strategy: that made the report.
        name: under which the strategy is registered.
        on_failure: the setting.
        wrong: samples whose measured residual contradicts what the strategy reported.

    Returns:
        What failed, with numbers, and what helps.
    """
    kinds = [kind for kind in Status if kind is not Status.CONVERGED and int(tally.samples[int(kind)])]
    counts = ", ".join(f"{int(tally.samples[int(kind)])} {kind.name}" for kind in kinds)
    failed = sum(int(tally.samples[int(kind)]) for kind in kinds)
    vjps = max((int(tally.steps[int(kind)]) for kind in kinds), default=0)
    largest = max((float(tally.residual[int(kind)]) for kind in kinds), default=-math.inf)
    residual = f", relative adjoint residual at most {largest:.2g}" if largest >= 0 else ""
    contradicted = (
        f" The strategy reported convergence for {wrong} of them, which the measured residual contradicts."
        if wrong
        else ""
    )
    advice = "; ".join(ADVICE[kind].format(**_options(strategy)) for kind in kinds if kind in ADVICE)
    return (
        f"The adjoint solve did not converge for {failed} of {int(tally.samples.sum())} samples ({counts} after at "
        f"most {vjps} vector–Jacobian products{residual}): the gradient of these samples is inaccurate.{contradicted} "
        f"To fix it, {advice} (backward.strategy = {name!r}; backward.on_failure = {on_failure!r} decides what "
        f"happens now)."
    )


def _options(strategy: Strategy) -> dict[str, str]:
    """Return the names and values of the options to change after a failed solve."""

    def named(names: tuple[str, ...]) -> str:
        options = option_values(strategy)
        option = next((name for name in names if name in options), None)
        if option is None:
            return f"the {'budget' if names is BUDGETS else 'tolerance'} of the strategy"
        return f"{option} = {options[option]!r} in backward.options"

    contraction = "use solver = 'gmres' in backward.options, which needs no contraction"
    if option_values(strategy).get("solver") in ("gmres", "auto"):
        contraction = "regularize the Jacobian of f, since I − J is singular or nearly so at this solution"
    return {"budget": named(BUDGETS), "tolerance": named(TOLERANCES), "contraction": contraction}


def coupling(pair: tuple[int, int] | None, wrong: int = 0, batch: int = 0, residual: float = float("nan")) -> str:
    """Say that f couples the rows of the state.

    Args:
        pair: (i, j) if it is known that row i of f(z) changes when row j of z does.
        wrong: samples whose adjoint residual contradicts what the strategy reported.
        batch: number of samples.
        residual: the largest of those residuals.
    """
    which = "another row" if pair is None else f"row {pair[1]}"
    changed = "a row" if pair is None else f"row {pair[0]}"
    measured = f" The true adjoint residual of {wrong} of {batch} samples is up to {residual:.2g}." if wrong else ""
    return (
        f"The rows of the state are coupled by f: {changed} of f(z) changes when {which} of z does.{measured} With "
        f"forward.batch = true each row counts as a sample of its own, so that residuals, statuses and gradients are "
        f"not those of the whole state. Set forward.batch = false to solve the whole state as one system. If the rows "
        f"are meant to be samples, look in f for batch normalization in training mode, attention or a mean over the "
        f"first axis."
    )

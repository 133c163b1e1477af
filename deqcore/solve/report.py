"""What a call says about its solve: an f that is not deterministic, samples that did not converge."""

from __future__ import annotations

from typing import Any

from deqcore.errors import (
    ConvergenceError,
    ConvergenceWarning,
    NonDeterministicWarning,
)
from deqcore.solution import MASKED, SAMPLES, UNITS, Tally, failed, summarize
from deqcore.solve.flatten import FlatFunction
from deqcore.solve.plan import Plan, evaluate_once
from deqcore.solve.traced_failures import Failures
from deqcore.solve.user_line import due, warn
from deqcore.types import (
    BackwardRecord,
    SolveResult,
    Status,
)


def report_nondeterminism(
    plan: Plan, f: FlatFunction, args: tuple[Any, ...], forward: SolveResult, record: BackwardRecord | None
) -> None:
    """Warn if f is not deterministic, or if samples have stopped and f of them has changed since.

    The gradient's own evaluation at z* shows it at no cost; without one, a failed solve pays for one more, and so does
    one of `backward.verify_every` solves whose samples stopped at different steps.
    """
    backend, xp = plan.backend, plan.backend.xp
    if forward.carry is None or plan.forward.on_failure == "ignore":
        return
    if not backend.capabilities.eager and backend.is_traced(forward.z, forward.status):
        return
    nondeterminism = None if record is None else record.nondeterminism
    if nondeterminism is None:
        if _all_converged(plan, forward):
            if not _frozen_rows_are_due(plan, f, forward):
                return
        elif not backend.capabilities.eager:
            return
        with backend.errstate(), backend.guards.keep_random_state(forward.z):
            again = backend.autodiff.forward_only(f, forward.z, args, evaluate_once).z
            nondeterminism = backend.norm(again - forward.fz)
    size = backend.to_accum_dtype(backend.norm(forward.fz))
    share = backend.to_accum_dtype(nondeterminism) / xp.where(size > 0, size, xp.ones_like(size))
    measured = xp.isfinite(share) & (forward.status != int(Status.NONFINITE))
    most = xp.max(xp.where(measured, share, xp.zeros_like(share))) if share.shape[0] else None
    largest = 0.0 if most is None else float(backend.to_numpy(most).max())
    if largest > backend.guards.output_eps(forward.z) ** (2 / 3):
        if _report_coupling(plan, f, args, forward):
            return
        warn(
            f"f is not deterministic: at the same z and arguments it gave values that differ by up to "
            f"{largest:.2g} of their norm, so that it has no fixed point, and its gradient is that of another "
            f"function. Switch dropout and noise off (eval()), draw them once before the solve and pass them as "
            f"an argument, and let f change no state of its own.",
            NonDeterministicWarning,
        )


def _frozen_rows_are_due(plan: Plan, f: FlatFunction, forward: SolveResult) -> bool:
    """Return whether to look at samples that stopped while others moved, which would show if f couples them."""
    every, steps = plan.backward.verify_every, forward.steps
    if not every or len(steps) < 2 or plan.backend.guards.holds(plan.backend.xp.all(steps == steps[:1])):
        return False
    counts = plan.account(f).ledger
    counts.uneven += 1
    return (counts.uneven - 1) % every == 0 or counts.suspect


def _report_coupling(plan: Plan, f: FlatFunction, args: tuple[Any, ...], forward: SolveResult) -> bool:
    """Warn if values differ because the rows of other samples moved, and f itself is deterministic."""
    return plan.watch(f).coupled_forward(lambda: plan.coupled_pair(f, args, forward.z))


def report_failure(plan: Plan, f: FlatFunction, forward: SolveResult) -> None:
    """Raise each time, or warn at the 1st, 10th, 100th, … failed solve of f, about samples that did not converge.

    With a strategy of fixed steps a sample fails where it is not finite; only `"raise"` waits for a device to see it.
    Traced code does it by `CallGuards.watch`.
    """
    action = plan.forward.on_failure
    if action == "ignore" or (forward.carry is None and action == "warn" and _would_wait(plan, forward)):
        return
    xp, noun = plan.backend.xp, UNITS if len(plan.space.rows_shape) > 1 else SAMPLES
    status = plan.counted(forward.status, MASKED)
    figures = (status, forward.steps, forward.residual)
    if plan.backend.is_traced(*figures):
        if forward.status.shape[0]:
            failures = Failures(action, f" {_circumstances(plan)}", repr(plan.solver), noun)
            compiled = action == "raise" or plan.is_set("forward.on_failure")
            plan.backend.guards.watch(failures, Tally.of(xp, *figures), compiled=compiled)
        return
    if plan.backend.guards.holds(xp.all(~failed(forward.status))):
        return
    status, steps, residual = (plan.backend.to_numpy(x).ravel() for x in figures)
    solver = repr(plan.solver)
    text = f"{summarize(status, residual, steps, solver, failed_first=True, noun=noun)} {_circumstances(plan)}"
    if action == "raise":
        raise ConvergenceError(text)
    counts = plan.account(f).ledger
    counts.unsolved += 1
    if due(counts.unsolved - 1):
        more = (
            f" This is the {counts.unsolved}th solve of this layer or function that failed."
            if counts.unsolved > 1
            else ""
        )
        warn(text + more, ConvergenceWarning)


def _all_converged(plan: Plan, forward: SolveResult) -> bool:
    return plan.backend.guards.holds(plan.backend.xp.all(forward.status == int(Status.CONVERGED)))


def _would_wait(plan: Plan, forward: SolveResult) -> bool:
    """Return whether reading the status waits for a device, which a strategy of fixed steps does nowhere else."""
    backend = plan.backend
    eager = backend.capabilities.eager and backend.capabilities.accelerator
    return eager and str(backend.device_of(forward.status)) != "cpu"


def _circumstances(plan: Plan) -> str:
    """Return the settings that a failed solve ran with, for its message."""
    numbers = {"rtol": plan.control.rtol, "max_steps": plan.control.max_steps}
    shown = [f", forward.{name} = {value}" for name, value in numbers.items() if not plan.backend.is_traced(value)]
    return (
        f"(solver {plan.forward.solver!r}{''.join(shown)}; forward.on_failure = "
        f"{plan.forward.on_failure!r} decides what happens now)"
    )

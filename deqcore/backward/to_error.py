"""What strategies share that solve the adjoint equation to an estimated error."""

from __future__ import annotations

from typing import Literal, TypeAlias

from deqcore.abc.backend import Backend
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.linear.certified import Certified, solve_certified
from deqcore.types import Array, Map, Status

Reuse: TypeAlias = Literal["none", "witness", "precondition"]
"""What the forward solve's estimate does: nothing; it judges the error; it judges and preconditions GMRES."""


def solve_to_error(
    backend: Backend,
    vjp: Map,
    g: Array,
    estimate: InverseJacobian | None,
    reuse: Reuse,
    *,
    max_relative_error: float,
    max_vjps: int,
) -> Certified:
    """Solve for the cotangent `g` `(batch, n)` by GMRES from zero, with or without the estimate."""
    return solve_certified(
        backend,
        vjp,
        g,
        # −M: a preconditioner's sign changes nothing
        estimate.prepared().apply_transpose if estimate is not None and reuse == "precondition" else None,
        max_relative_error=max_relative_error,
        max_vjps=max_vjps,
        witness=None if reuse == "none" else estimate,
    )


def statuses(backend: Backend, found: Certified) -> Array:
    """CONVERGED where the target was met, MAX_STEPS elsewhere, NONFINITE without numbers: `(batch,)` int32."""
    xp = backend.xp
    code = xp.zeros_like(found.vjps)
    missed = xp.where(xp.isfinite(found.residual), code + int(Status.MAX_STEPS), code + int(Status.NONFINITE))
    return xp.where(found.met, code + int(Status.CONVERGED), missed)


def target_of(value: float | Literal["none"] | None) -> float | None:
    """Read the option `max_relative_error`.

    Raises:
        ValueError: it is neither None, nor "none" (as a TOML file, which has no null, says it), nor in (0, 1).
    """
    if value is None or value == "none":
        return None
    if not 0.0 < float(value) < 1.0:
        raise ValueError(f"max_relative_error must be a number between 0 and 1, or none (got {value}).")
    return float(value)


def check_reuse(value: object) -> None:
    """Raise ValueError unless `value` is one of `Reuse`."""
    if value not in ("none", "witness", "precondition"):
        raise ValueError(f"reuse = {value!r}. It must be 'none', 'witness' or 'precondition'.")

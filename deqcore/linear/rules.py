"""How far the error estimated by a Krylov space is raised, so that it is seldom too small."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from deqcore.types import Array


class Rule(NamedTuple):
    """How the estimate by the least singular value is raised (docs/notes/certificates.md). Compiled code reads it, too.

    Attributes:
        least: dimensions of the Krylov space before its estimate counts: one or two have seen nothing of a mode that
            the cotangent shows little of.
        spread: factor on the estimate.
        youth: a space of k dimensions has its estimate raised by 1 + youth · min(1/σ, deepest) / k^aging: σ falls
            until the slow modes have been met, and a space with a slow mode may hide a slower one.
        deepest: most that 1/σ counts there.
        aging: see `youth`.
        fall: exponent of ρ, by which the last step reduced the residual.
        rise: exponent of ρ/ρ', where ρ' is the best ratio of the steps before.
        most: most that ρ/ρ' counts: at rounding level the residual does not fall at all.
        witness: factor on the estimate ‖M' r‖.
        mean: factor on the geometric mean of ‖r‖/σ and ‖M' r‖, which is multiplied by ρ (ρ/ρ')^rise. Their errors are
            hardly related, so that the mean misses by less than either. 0 leaves it out.
    """

    least: int
    spread: float
    youth: float
    deepest: float
    aging: float
    fall: float
    rise: float
    most: float
    witness: float = 2.5
    mean: float = 0.0


ALONE = Rule(least=4, spread=1.5, youth=4.0, deepest=3.0, aging=1.0, fall=0.5, rise=2.0, most=8.0)
"""Where the Krylov space is all that is known."""

DEFLATED = Rule(least=3, spread=1.2, youth=2.0, deepest=5.0, aging=1.0, fall=1.0, rise=1.0, most=4.0)
"""With a preconditioner, which has taken the slow modes out that the forward solve has met."""

WITNESSED = Rule(
    least=3, spread=1.2, youth=5.0, deepest=5.0, aging=1.5, fall=1.0, rise=0.5, most=2.0, witness=1.8, mean=2.6
)
"""Where M' has a say: the forward solve has met the slow modes that a young space has not."""


TIGHTER: Final = (0.7, 0.9)
"""Least and largest factor on the residual of a sample whose estimated error missed the target."""


def tighter(xp: Any, target: float, error: Array) -> Array:
    """Return the factor on a residual whose estimated error missed the target."""
    return xp.clip(target / error, *TIGHTER)


def estimates(
    xp: Any, rule: Rule, eps: float, size: Array, whole: Array, reach: Array, residual: Array, norm: Array,
    steps: Array, inverse_norm: Array, column_norm: Array, latest: Array, best: Array,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Return relative figures, `(batch,)`.

    Returns:
        The residual by the recurrence; what rounding may hide of it; the error; and what `witnessed` multiplies by the
        estimate ‖M' r‖ / ‖u‖ before it takes the root.
    """
    rounding = eps * xp.maximum(column_norm * size, whole)  # of a later space that adds little to a large u, too
    age = xp.where(steps > 0, steps, xp.ones_like(steps)) ** rule.aging
    youth = rule.youth * xp.clip(inverse_norm, 1.0, rule.deepest) / age
    slower = xp.clip(latest / best, 1.0, rule.most)
    caution = rule.spread * (1.0 + youth) * latest**rule.fall * slower**rule.rise
    plain = xp.maximum(reach, rounding) * inverse_norm / whole
    other = plain * (rule.mean * latest * slower**rule.rise) ** 2
    return residual / norm, rounding / norm, plain * caution, other  # a cotangent of zero is not judged


def witnessed(xp: Any, rule: Rule, error: Array, other: Array, reach: Array) -> Array:
    """Raise the estimated `error` by what M' says: `reach` is ‖M' r‖ / ‖u‖, `other` comes from `estimates`."""
    return xp.maximum(error, xp.maximum(rule.witness * reach, xp.sqrt(other * reach)))

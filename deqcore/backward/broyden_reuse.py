"""Reuse of the forward solver's inverse-Jacobian estimate: plain, certified, refined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy, relative, report
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.backward.to_error import Reuse, check_reuse, solve_to_error, statuses, target_of
from deqcore.errors import StrategyError
from deqcore.linear.certified import SAFETY
from deqcore.linear.gmres import gmres
from deqcore.linear.norms import default_rtol
from deqcore.types import AdjointReport, Array, Map


@dataclass(frozen=True)
class BroydenReuse(Strategy):
    """u ≈ (I − J)^-T g from the secant pairs that the forward solve left behind.

    *Plain* (`certify=False, max_relative_error=None, fallback="none"`): u = −Hᵀg with the solver's own H, as published.
    One low-rank product. It is right if the secant pairs saw the directions that the cotangent needs. Elsewhere it is
    silently wrong, most of all with several slow modes and tight forward tolerances. A sample whose solver kept no pair
    (`auto`, while it does not accelerate) gets u = g, and is reported in `fallback`.

    *Certified* (`certify=True, max_relative_error=None`): the same u, and one vjp that measures its adjoint residual.
    The error that it reports is the estimate's own: it does not contain a mode that the forward solve has not met.

    *Refined* (`max_relative_error` set, the default): GMRES on (I − Jᵀ) from zero, per sample, until residual *and
    estimated error* are at most `max_relative_error`. The multi-secant estimate M = −Hᵀ of all pairs is the witness:
    it has met the slow modes that a young Krylov space has not, so that fewer vjps are needed before the error can be
    believed. The error is an estimate, not a bound. A sample is certified after three vjps at the earliest, unless its
    residual vanishes before.

    Cost: plain, two passes over the solver's history; certified, one vjp more; refined, as many vjps as it takes,
    `max_refine_vjps` at most, as many history vectors, and two passes over the solver's history whenever a sample may
    be certified.

    Args:
        certify: measure and report the adjoint residual.
        max_relative_error: target for the estimated relative error of u, in (0, 1), or None ("none" in a file) for no
            refinement.
        max_refine_vjps: vjps per sample at most, at least 1; fewer than 3 certify only what they solve.
        reuse: "witness"; "precondition" also makes M the right preconditioner of GMRES, which takes fewer vjps with
            many pairs (0.5 to 0.8 times as many from 30 pairs on) and two passes over the pairs at each of them: for
            an f whose vjp costs more than about four passes for each pair; "none" leaves the estimate alone.
        fallback: what a sample gets that misses the target: "jacobian-free" (u = g, where its adjoint residual is
            smaller), "exact-ift" (GMRES to the dtype's default tolerance) or "none" (the best u found).

    Raises:
        ValueError: an option is out of its range. From settings it is the ConfigError that names the setting.

    Source: plain: Ramzi et al. (2022), "SHINE: SHaring the INverse Estimate from the forward pass for bi-level
    optimization and implicit models", eq. (5). Certificate and multi-secant refinement: docs/notes.

    Example:
        >>> import numpy as np, deqcore
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 1)), np.ones((1, 1)),
        ...                        cotangent=np.ones((1, 1)), backward__strategy="broyden-reuse")
        >>> dx.round(6).tolist()
        [[2.0]]
    """

    certify: bool = True
    max_relative_error: float | Literal["none"] | None = 0.1
    max_refine_vjps: int = 60
    reuse: Reuse = "witness"
    fallback: Literal["jacobian-free", "exact-ift", "none"] = "jacobian-free"
    needs: ClassVar[Literal["nothing", "vjp", "estimate"]] = "estimate"
    causal: ClassVar[bool] = True
    cost_bounds: ClassVar[Mapping[str, int]] = {
        "affine": 4,
        "conv": 4,
        "expansive": 3,
        "ill-conditioned": 8,
        "ring": 5,
        "slow-modes": 17,
        "tree": 3,
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_relative_error", target_of(self.max_relative_error))
        check_reuse(self.reuse)
        if self.max_refine_vjps < 1:
            raise ValueError(f"max_refine_vjps must be at least 1 (got {self.max_refine_vjps}).")
        if self.fallback not in ("jacobian-free", "exact-ift", "none"):
            raise ValueError(f"fallback must be 'jacobian-free', 'exact-ift' or 'none' (got {self.fallback!r}).")
        if self.fallback != "none" and self.max_relative_error is None and self.certify:
            raise ValueError(
                f"fallback = {self.fallback!r} needs a target that a sample can miss: set max_relative_error"
            )

    def uses_vjp(self) -> bool:
        """Return whether a check or a target needs products; the plain method needs none."""
        return self.certify or self.max_relative_error is not None

    def wants_secants(self) -> bool:
        """Refinement works with the estimate that keeps all pairs."""
        return self.max_relative_error is not None

    def solve_adjoint(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None
    ) -> tuple[Array, AdjointReport]:
        """Return u for the cotangent `g` `(batch, n)`."""
        if estimate is None:
            raise StrategyError(
                "broyden-reuse was called without the estimate that its solver declares. "
                "Pass the solver's `inverse_jacobian` as `estimate`."
            )
        if self.max_relative_error is None:
            return self._plain(backend, vjp, g, estimate)
        return self._refined(backend, vjp, g, estimate, float(self.max_relative_error))

    def _plain(self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian) -> tuple[Array, AdjointReport]:
        u = estimate.solve_transpose(g)
        known = estimate.known()
        fallback = None if known is None else ~known  # without pairs u is g, the first step from zero
        if not self.certify:
            return u, report(backend, g, fallback=fallback)
        r = g + vjp(u) - u
        error = SAFETY * relative(backend, backend.norm(estimate.apply_transpose(r)), backend.norm(u))
        residual = relative(backend, backend.norm(r), backend.norm(g))
        return u, report(backend, g, vjps=1, residual=residual, error=error, fallback=fallback)

    def _refined(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian, max_relative_error: float
    ) -> tuple[Array, AdjointReport]:
        xp = backend.xp
        refined = solve_to_error(
            backend,
            vjp,
            g,
            estimate,
            self.reuse,
            max_relative_error=max_relative_error,
            max_vjps=self.max_refine_vjps,
        )
        u, vjps, residual, error = refined.u, refined.vjps, refined.residual, refined.error
        status = statuses(backend, refined)
        replaced = vjps < 0
        if self.fallback != "none":
            u, vjps, residual, replaced = self._fall_back(backend, vjp, g, u, vjps, residual, refined.met)
            error = xp.where(replaced, xp.full_like(error, float("nan")), error)
        return u, report(backend, g, status=status, vjps=vjps, residual=residual, error=error, fallback=replaced)

    def _fall_back(
        self, backend: Backend, vjp: Map, g: Array, u: Array, vjps: Array, residual: Array, met: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Replace what missed the target."""
        xp = backend.xp

        def replace(carry: tuple[Array, ...]) -> tuple[Array, ...]:
            u, vjps, residual, replaced = carry
            if self.fallback == "exact-ift":
                # Samples that are done ask for nothing: their right-hand side is zero.
                wanted = backend.select(met, xp.zeros_like(g), g)
                solution = gmres(
                    backend, vjp, wanted, rtol=default_rtol(backend, g), max_steps=self.max_refine_vjps, shifted=True
                )
                other, products = solution.x, solution.products
                left = relative(backend, solution.residual, backend.norm(g))
            else:
                other, products = g, xp.ones_like(vjps)
                left = relative(backend, backend.norm(vjp(g)), backend.norm(g))
            better = ~met & ~(residual <= backend.cast(left, residual))
            return (
                backend.select(better, other, u),
                xp.where(met, vjps, vjps + products),
                xp.where(better, backend.cast(left, residual), residual),
                replaced | better,
            )

        return backend.cond(~met, replace, (u, vjps, residual, xp.zeros_like(met)))

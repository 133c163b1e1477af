"""The gradient audit: how good is this layer's gradient, here and now?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.config import Config
from deqcore.diagnostics import adjoint
from deqcore.diagnostics.linearization import host
from deqcore.errors import ConfigError
from deqcore.solve.dispatch import plan_call
from deqcore.types import Array, Tree


@dataclass(frozen=True)
class Audit:
    """A strategy's gradient against the exact one of the same solution; NumPy arrays on the host.

    Attributes:
        rows: which samples of the batch were audited `(samples,)`.
        cosine: of u with the exact u = (I − J)^-T g, per sample.
        norm_ratio: ‖u‖ / ‖exact u‖, per sample.
        error: ‖u − exact u‖ / ‖exact u‖, per sample.
        gradient_cosine: of the gradients of all arguments, as one vector; NaN if no argument has one.
        gradient_norm_ratio: quotient of the norms of the gradients of all arguments.
        vjps: that the strategy spent, per sample; NaN for one that differentiates steps.
        residual: adjoint residual ‖g + Jᵀu − u‖ / ‖g‖ of the strategy's u, measured, per sample; NaN for a strategy
            that differentiates steps without a solve.
        reported: the relative error that the strategy estimated, per sample; NaN where it gives none.
        exact_vjps: that the reference spent, per sample.
        exact_residual: relative adjoint residual of the reference, per sample: what is above it in `error` is real.
        coupling: how much of Jᵀu lands in samples where u is zero; 0 where f treats each sample alone. Anything else
            makes all gradients above wrong, the reference too: set ``forward.batch = false``.

    Example:
        >>> import numpy as np
        >>> from deqcore.diagnostics import gradient_audit
        >>> z0, x, g = np.zeros((2, 3)), np.ones((2, 3)), np.ones((2, 3))
        >>> found = gradient_audit(lambda z, x: 0.5 * z + x, z0, x, cotangent=g, backward__strategy="jacobian-free")
        >>> found.norm_ratio.round(3).tolist(), round(found.gradient_cosine, 3)
        ([0.5, 0.5], 1.0)
    """

    rows: Any
    cosine: Any
    norm_ratio: Any
    error: Any
    gradient_cosine: float
    gradient_norm_ratio: float
    vjps: Any
    residual: Any
    reported: Any
    exact_vjps: Any
    exact_residual: Any
    coupling: float

    def summary(self) -> str:
        """Return a summary in one line."""
        if not len(self.rows):
            return "The batch is empty."
        warning = f"; f COUPLES THE SAMPLES ({self.coupling:.2g}): set forward.batch = false" if self.coupling else ""
        return (
            f"gradient of {len(self.rows)} samples against the exact one: cosine {np.min(self.cosine):.4f} (worst), "
            f"norm ratio {np.min(self.norm_ratio):.3g} to {np.max(self.norm_ratio):.3g}, {np.nanmax(self.error):.2g} "
            f"relative error (worst), adjoint residual {np.max(self.residual):.2g} (worst); the audit itself cost one "
            f"solve and {int(np.max(self.exact_vjps)) + 2 + 2 * (len(self.rows) - 1).bit_length()} vjps"
            f"{warning}"
        )


def gradient_audit(
    f: Callable[..., Tree],
    z0: Tree,
    *args: Any,
    cotangent: Tree,
    samples: int | None = None,
    turn: int = 0,
    batched_args: Sequence[int] = (),
    max_vjps: int = 100,
    config: Config | None = None,
    **overrides: object,
) -> Audit:
    """Compare the configured strategy's gradient with the exact one, on a sample of the batch.

    Cost: one forward solve, the strategy's own backward pass, and one GMRES solve to rounding (`exact_vjps`
    vector–Jacobian products, as many vectors of memory), all for the audited samples only, one product more to
    measure the strategy's residual, and 1 + 2 log₂(samples) to see whether f couples samples. In training, every few
    hundred steps on four samples is cheap and enough to see a gradient
    go wrong. Not for traced code.

    Args:
        f: as in `fixed_point`.
        z0: as in `fixed_point`. Starting from a solution saves the steps, but a strategy that reuses the solver's
            estimate needs them.
        *args: as in `fixed_point`.
        cotangent: dL/dz*, a tree like z0.
        samples: how many samples, spread evenly over the batch; default: all.
        turn: number of the audit. Each turn takes other samples, and `batch / samples` of them take all.
        batched_args: positions in `args` whose leaves have the batch as first axis, so that they can be cut to the
            samples. An f that closes over a batch of inputs cannot be cut.
        max_vjps: of the reference.
        config: as in `fixed_point`.
        **overrides: as in `fixed_point`.

    Returns:
        Figures per audited sample `(samples,)`, see `Audit`.

    Raises:
        ConfigError: samples or max_vjps is out of range, or a position in batched_args does not exist.
        InitialIterateError: the cotangent is not like z0. Otherwise as `fixed_point`.

    Example:
        >>> import numpy as np
        >>> found = gradient_audit(lambda z, x: 0.5 * z + x, np.zeros((2, 1)), np.ones((2, 1)),
        ...                        cotangent=np.ones((2, 1)), backward__strategy="jacobian-free")
        >>> found.cosine.tolist(), found.norm_ratio.tolist()  # u = g, but 2 g is exact
        ([1.0, 1.0], [0.5, 0.5])
    """
    _check(samples, batched_args, max_vjps, args)
    plan = plan_call(config, overrides, z0, args)
    backend = plan.backend
    units = plan.space.units  # figures are those of samples, whose units f may couple
    rows = np.arange(plan.space.batch // units)
    if samples is not None and samples < len(rows):
        rows = rotated(len(rows), samples, turn)
        z0, cotangent = _cut(backend, z0, rows), _cut(backend, cotangent, rows)
        args = tuple(_cut(backend, a, rows) if i in batched_args else a for i, a in enumerate(args))
        plan = plan_call(config, overrides, z0, args)
    g = plan.space.ravel_cotangent(cotangent)
    raveled, start = plan.space.wrap(f), backend.detach(plan.space.ravel(z0))
    forward = adjoint.solve(plan, raveled, start, args)
    own = adjoint.by_strategy(plan, raveled, start, args, g, forward)
    vjp = adjoint.vjp_at(plan, raveled, args, forward)
    exact, residual, vjps = adjoint.by_reference(plan, raveled, args, g, forward, vjp, max_vjps)
    u, truth = (
        backend.to_numpy(item.u).astype(np.float64).reshape(len(rows), -1 if len(rows) else 0) for item in (own, exact)
    )
    cosine, ratio, error = compare(u, truth)
    total = [flat(backend, item.gradients)[None] for item in (own, exact)]
    whole = [float(item[0]) for item in compare(*total)] if total[0].size else [np.nan, np.nan]
    unknown = np.full(len(rows), np.nan)
    report = own.report
    return Audit(
        rows=rows,
        cosine=cosine,
        norm_ratio=ratio,
        error=error,
        gradient_cosine=whole[0],
        gradient_norm_ratio=whole[1],
        vjps=unknown if report is None else backend.to_numpy(report.vjps).astype(np.float64)[::units],
        residual=backend.to_numpy(own.residual).astype(np.float64),
        reported=unknown if report is None else backend.to_numpy(report.error).astype(np.float64)[::units],
        exact_vjps=vjps,
        exact_residual=residual,
        coupling=adjoint.coupling(plan, vjp, forward),
    )


def rotated(batch: int, samples: int, turn: int) -> Any:
    """Return `samples` rows of a batch, spread evenly; turn 0, 1, … take others, until all have been taken."""
    if not turn:
        return np.linspace(0, batch - 1, samples).round().astype(int)
    return np.unique((np.arange(samples) * batch // samples + turn) % batch)


def compare(a: Any, b: Any) -> tuple[Any, Any, Any]:
    """Return the cosine, ratio of norms and relative difference of the rows of `a` to those of `b`.

    Two zero rows agree: 1, 1, 0. A zero row against another one has cosine 0.
    """
    largest = np.maximum(np.abs(a).max(axis=1, initial=0.0), np.abs(b).max(axis=1, initial=0.0))
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)[:, None]  # squares stay in range
    a, b = a / scale, b / scale
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    gap = np.linalg.norm(a - b, axis=1)
    both, neither = norms[0] * norms[1], (norms[0] == 0) & (norms[1] == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(both == 0, 0.0, np.sum(a * b, axis=1) / both)
        ratio, error = norms[0] / norms[1], gap / norms[1]
    return np.where(neither, 1.0, cosine), np.where(neither, 1.0, ratio), np.where(neither, 0.0, error)


def flat(backend: Backend, gradients: tuple[Any, ...]) -> Any:
    """Return all gradients as one vector, in float64 on the host, complex ones as pairs."""
    parts = [host(backend, leaf).ravel() for leaf in backend.flatten(gradients)[0] if leaf is not None]
    return np.concatenate(parts) if parts else np.zeros(0)


def _cut(backend: Backend, tree: Tree, rows: Any) -> Tree:
    """Return these rows of every array in a tree."""
    leaves, structure = backend.flatten(tree)

    def cut(leaf: Array) -> Array:
        return backend.take(leaf, backend.asarray(rows)) if backend.is_array(leaf) else leaf

    return backend.unflatten(structure, [cut(leaf) for leaf in leaves])


def _check(samples: int | None, batched_args: Sequence[int], max_vjps: int, args: tuple[Any, ...]) -> None:
    if samples is not None and samples < 1:
        raise ConfigError.bad_value("gradient_audit", "samples", samples, "at least 1, or None for all")
    if max_vjps < 1:
        raise ConfigError.bad_value("gradient_audit", "max_vjps", max_vjps, "at least 1")
    for position in batched_args:
        if not 0 <= position < len(args):
            raise ConfigError.bad_value(
                "gradient_audit", "batched_args", tuple(batched_args), f"positions from 0 to {len(args) - 1}"
            )

"""Rows that belong together: the units of a sample as one row of a wider matrix.

`(batch·units, n)` and `(batch, units·n)` are the same numbers in the same order, so that a change between them is a
reshape. The backward pass uses it where f couples the units of a sample: the adjoint equation is one equation for all
of them, and a Krylov method takes one set of coefficients for it.
"""

from __future__ import annotations

from typing import NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.types import AdjointReport, Array, Map, PassInputs


class Groups(NamedTuple):
    """Groups of `units` consecutive rows.

    Attributes:
        backend: whose arrays these are.
        units: rows in a group.
    """

    backend: Backend
    units: int

    def join(self, v: Array) -> Array:
        """Return `v` `(batch·units, n)` as `(batch, units·n)`."""
        return self.backend.xp.reshape(v, (v.shape[0] // self.units, self.units * v.shape[1]))

    def split(self, v: Array) -> Array:
        """Undo `join`."""
        return self.backend.xp.reshape(v, (v.shape[0] * self.units, v.shape[1] // self.units))

    def joined(self, fn: Map) -> Map:
        """Return a map of rows as a map of groups."""
        return lambda v: self.join(fn(self.split(v)))

    def estimate(self, inner: InverseJacobian) -> InverseJacobian:
        """Return an estimate for each row as a block-diagonal one for each group."""
        return _GroupedInverse(self, inner)

    def inputs(self, inputs: PassInputs) -> PassInputs:
        """Return what a strategy with state gets: a group has converged when all its rows have."""
        xp, parameter_vjp = self.backend.xp, inputs.parameter_vjp
        return inputs._replace(
            converged=xp.all(self._table(inputs.converged), axis=1),
            residual=self.backend.norm(self._table(inputs.residual)),
            parameter_vjp=None if parameter_vjp is None else lambda u: parameter_vjp(self.split(u)),
        )

    def spread(self, report: AdjointReport) -> AdjointReport:
        """Return the report of each group for each of its rows."""
        spread = {name: self._spread(leaf) for name, leaf in report._asdict().items() if leaf is not None}
        spread["per_sample"] = spread["vjps"] >= 0  # all
        return report._replace(**spread)

    def any(self, rows: Array) -> Array:
        """Return which groups have a row among `rows`, `(batch,)` of bool."""
        return self.backend.xp.any(self._table(rows), axis=1)

    def _table(self, figures: Array) -> Array:
        return self.backend.xp.reshape(figures, (figures.shape[0] // self.units, self.units))

    def _spread(self, figures: Array) -> Array:
        xp = self.backend.xp
        table = xp.broadcast_to(figures[:, None], (figures.shape[0], self.units))
        return xp.reshape(table, (figures.shape[0] * self.units,))


class _GroupedInverse(InverseJacobian):
    def __init__(self, groups: Groups, inner: InverseJacobian) -> None:
        self.groups = groups
        self.inner = inner

    def apply(self, v: Array) -> Array:
        return self.groups.joined(self.inner.apply)(v)

    def apply_transpose(self, v: Array) -> Array:
        return self.groups.joined(self.inner.apply_transpose)(v)

    def apply_transpose_unregularised(self, v: Array) -> Array:
        return self.groups.joined(self.inner.apply_transpose_unregularised)(v)

    def known(self) -> Array | None:
        known = self.inner.known()
        return None if known is None else self.groups.any(known)

    def prepared(self) -> InverseJacobian:
        return _GroupedInverse(self.groups, self.inner.prepared())

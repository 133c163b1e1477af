"""Reduced-rank extrapolation in cycles of two differences: three evaluations of f a step, and nothing to remember."""

from dataclasses import dataclass

from deqcore import Solver
from deqcore.abc.scaling import divide_rows, row_scale


@dataclass(frozen=True)
class ReducedRank(Solver):
    """z₁ = f(z), z₂ = f(z₁), z₃ = f(z₂), then z ← the combination of z₁, z₂, z₃ with the least residual.

    Source: Eddy (1979), "Extrapolating to the limit of a vector sequence"; Smith, Ford & Sidi (1987), "Extrapolation
    methods for vector sequences".
    """

    evaluations_per_step = 3

    def init(self, backend, z, fz):
        return ()

    def step(self, backend, f, z, fz, state):
        xp = backend.xp
        z1 = fz
        z2 = f(z1)
        u0, u1, u2 = z1 - z, z2 - z1, f(z2) - z2
        scale = row_scale(backend, backend.norm(u0), z)
        a, b = self.weights(backend, *(divide_rows(backend, u, scale) for u in (u0, u1 - u0, u2 - u1)))
        better = z1 + backend.cast(a, z)[:, None] * u1 + backend.cast(b, z)[:, None] * u2
        moves = xp.any(u0 != 0.0, axis=1)  # a sample at residual 0 stays, see Solver.restarted
        z = backend.select(moves, better, z)
        return z, f(z), state

    def weights(self, backend, u, w0, w1):
        """Minimize ‖u + a w₀ + b w₁‖ for each sample: Gram–Schmidt, in the dtype of the backend's norms."""
        xp = backend.xp
        u, w0, w1 = (backend.to_accum_dtype(v) for v in (u, w0, w1))

        def dot(x, y):
            return xp.sum(x * y, axis=1)

        def share(x, y, floor):
            """Return <x, y> / <y, y>, and 0 where y is nothing but rounding."""
            size = dot(y, y)
            kept = size > floor
            return xp.where(kept, dot(x, y) / xp.where(kept, size, xp.ones_like(size)), xp.zeros_like(size))

        rounding = (100 * backend.eps(w1)) ** 2
        c = share(w1, w0, 0.0 * dot(w0, w0))
        rest = w1 - c[:, None] * w0
        b = -share(u, rest, rounding * dot(w1, w1))
        return -share(u, w0, 0.0 * dot(w0, w0)) - b * c, b

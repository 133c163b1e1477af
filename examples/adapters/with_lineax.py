"""lineax: its GMRES solves the adjoint equation of the whole batch as one system. JAX only."""

from dataclasses import dataclass
from typing import ClassVar

from deqcore import Strategy
from deqcore.abc.backward import report
from deqcore.types import Status


@dataclass(frozen=True)
class LineaxGMRES(Strategy):
    """(I − Jᵀ) u = g by `lineax.GMRES`.

    Attributes:
        rtol: tolerance of lineax; the residual of each sample is measured by one more product.
        restart: dimension of the Krylov space.
        max_steps: restarts.
    """

    needs: ClassVar = "vjp"

    rtol: float = 1e-8
    restart: int = 20
    max_steps: int = 20

    def solve_adjoint(self, backend, vjp, g, estimate):
        import jax
        import lineax

        like = jax.ShapeDtypeStruct(g.shape, g.dtype)
        operator = lineax.FunctionLinearOperator(lambda u: u - vjp(u), like)
        solver = lineax.GMRES(rtol=self.rtol, atol=0.0, restart=self.restart, max_steps=self.max_steps)
        solution = lineax.linear_solve(operator, g, solver, throw=False)
        xp, u = backend.xp, solution.value
        size = backend.norm(g)
        left = backend.norm(g + vjp(u) - u) / xp.where(size > 0, size, xp.ones_like(size))
        done = left <= self.rtol
        status = xp.where(done, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = xp.astype(xp.where(xp.isfinite(left), status, int(Status.NONFINITE)), xp.int32)
        spent = xp.astype(xp.zeros_like(left), xp.int32) + solution.stats["num_steps"] * self.restart + 1
        return u, report(backend, g, status=status, vjps=xp.astype(spent, xp.int32), residual=left)

"""jaxopt: one problem with an absolute tolerance, and implicit differentiation by default."""

from dataclasses import dataclass, field

from common import JaxSolver


@dataclass(frozen=True)
class FixedPoint(JaxSolver):
    """`FixedPointIteration` and `AndersonAcceleration` on f, `Broyden` on f(z) − z."""

    packages = ("jaxopt", "jax")
    claims = frozenset({"status", "batch", "gradient", "second"})

    method: str = field(default="FixedPointIteration", kw_only=True)

    def one(self, f, z0, args, rtol, max_steps):
        import jaxopt

        root = self.method == "Broyden"
        fun = (lambda z, *args: f(z, *args) - z) if root else f
        solver = getattr(jaxopt, self.method)(fun, maxiter=max_steps, tol=rtol, **self.settings())
        z, state = solver.run(z0, *args)
        return z, state.error <= rtol, None

    def settings(self):
        return {}


@dataclass(frozen=True)
class Anderson(FixedPoint):
    best = {"ridge": 1e-12}  # noqa: RUF012 - the default is absolute, 1e-5

    method: str = field(default="AndersonAcceleration", kw_only=True)
    ridge: float = field(default=1e-5, kw_only=True)

    def settings(self):
        return {"ridge": self.ridge}


@dataclass(frozen=True)
class Broyden(FixedPoint):
    method: str = field(default="Broyden", kw_only=True)

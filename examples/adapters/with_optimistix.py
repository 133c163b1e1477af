"""optimistix: `fixed_point` with its own iteration, or Newton's method; implicit differentiation by default."""

from dataclasses import dataclass, field

from common import JaxSolver


@dataclass(frozen=True)
class FixedPoint(JaxSolver):
    """`optimistix.fixed_point`: f(z) − z is compared with atol + rtol ‖z‖."""

    packages = ("optimistix", "lineax", "jax")
    claims = frozenset({"status", "batch", "gradient", "second", "units"})

    method: str = field(default="FixedPointIteration", kw_only=True)

    def one(self, f, z0, args, rtol, max_steps):
        import optimistix

        solver = getattr(optimistix, self.method)(rtol=rtol, atol=1e-30)
        result = optimistix.fixed_point(lambda z, args: f(z, *args), solver, z0, args, max_steps=max_steps, throw=False)
        return result.value, result.result == optimistix.RESULTS.successful, None


@dataclass(frozen=True)
class Newton(FixedPoint):
    method: str = field(default="Newton", kw_only=True)

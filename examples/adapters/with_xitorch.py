"""xitorch: `equilibrium` on one problem, whose parameters are arguments, with implicit differentiation."""

import warnings
from dataclasses import dataclass, field

from common import TorchSolver

from deqcore.abc.external import ExternalResult


@dataclass(frozen=True)
class Equilibrium(TorchSolver):
    """`xitorch.optimize.equilibrium`; rows are solved one after the other. A warning is how it reports a failure.

    It stops when the step is below its default `x_tol` as well.
    """

    packages = ("xitorch", "torch")
    claims = frozenset({"status", "gradient", "second"})

    method: str = field(default="broyden1", kw_only=True)

    def solve(self, f, z0, args, *, rtol, max_steps):
        import torch

        if not args:
            z, done = self._one(f, z0, (), rtol, max_steps)
            return ExternalResult(z, torch.full((len(z0),), done))
        rows = range(len(z0))
        found = [self._one(f, z0[i : i + 1], [x[i : i + 1] for x in args], rtol, max_steps) for i in rows]
        z, done = zip(*found, strict=True)
        return ExternalResult(torch.cat(z), torch.tensor(done))

    def _one(self, f, z0, args, rtol, max_steps):
        from xitorch.optimize import equilibrium

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            z = equilibrium(f, z0, params=tuple(args), method=self.method, maxiter=max_steps, f_tol=rtol)
        failed = any("converge" in str(each.category.__name__ + str(each.message)).lower() for each in caught)
        return z, not failed


@dataclass(frozen=True)
class Anderson(Equilibrium):
    method: str = field(default="anderson_acc", kw_only=True)

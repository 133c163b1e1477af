"""Any function `solver(f, z0, **settings)` of a checkout: `deqcore check solver checkout --path DIR`."""

from dataclasses import dataclass, field
from importlib import import_module

from common import TorchSolver

from deqcore.abc.external import ExternalResult


@dataclass(frozen=True)
class Checkout(TorchSolver):
    """A function of published code, on torch's arrays.

    Attributes:
        target: "module:function" below the folder that `--path` names.
        tolerance: name of its argument for the tolerance; "" if it has none.
        budget: name of its argument for the number of steps.
        result_key: key of the solution in what it returns; "" if it returns the solution, alone or first in a tuple.
    """

    claims = frozenset({"batch"})

    target: str = field(default="", kw_only=True)
    tolerance: str = field(default="tol", kw_only=True)
    budget: str = field(default="max_iter", kw_only=True)
    result_key: str = field(default="", kw_only=True)

    def solve(self, f, z0, args, *, rtol, max_steps):
        module, _, name = self.target.partition(":")
        if not name:
            raise ValueError(f"target must be 'module:function' (got {self.target!r}). Set it with --options.")
        settings = {self.budget: max_steps} | ({self.tolerance: rtol} if self.tolerance else {})
        found = getattr(import_module(module), name)(lambda z: f(z, *args), z0, **settings)
        z = found[self.result_key] if self.result_key else found[0] if isinstance(found, tuple) else found
        return ExternalResult(z)

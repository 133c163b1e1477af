"""SciPy: `scipy.optimize.root` on f(z) − z, one problem at a time, with an absolute tolerance."""

from dataclasses import dataclass, field

import numpy as np

from deqcore.abc.external import ExternalResult, ExternalSolver


@dataclass(frozen=True)
class Root(ExternalSolver):
    """`root(method=…)`; rows are solved one after the other."""

    backend = "numpy"
    packages = ("scipy", "numpy")
    claims = frozenset({"status", "evaluations"})

    method: str = field(default="hybr", kw_only=True)

    def solve(self, f, z0, args, *, rtol, max_steps):
        if not args:  # f closes over the data of all rows, so they are one problem
            z, done, count = self._one(f, z0, args, rtol, max_steps)
            return ExternalResult(z.reshape(z0.shape), np.full(len(z0), done), count)
        found = [self._one(f, z0[i : i + 1], [x[i : i + 1] for x in args], rtol, max_steps) for i in range(len(z0))]
        z, done, count = zip(*found, strict=True)
        return ExternalResult(np.stack(z).astype(z0.dtype), np.array(done), np.array(count, np.int32))

    def _one(self, f, z0, args, rtol, max_steps):
        from scipy.optimize import root

        n = z0.size
        options = {"maxfev": (n + 2) * max_steps} if self.method == "hybr" else {"maxiter": max_steps}
        with np.errstate(all="ignore"):
            result = root(
                lambda z: f(z.reshape(z0.shape), *args).ravel() - z, z0.ravel(), method=self.method, tol=rtol,
                options=options,
            )  # fmt: skip
        return result.x, bool(result.success), result.nfev


@dataclass(frozen=True)
class Krylov(Root):
    method: str = field(default="krylov", kw_only=True)


@dataclass(frozen=True)
class Anderson(Root):
    method: str = field(default="anderson", kw_only=True)


@dataclass(frozen=True)
class Broyden(Root):
    method: str = field(default="broyden1", kw_only=True)

"""Adapters of a plain iteration in NumPy: one that is right, and others with one vice each."""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np

from deqcore.abc.external import ExternalResult, ExternalSolver
from deqcore.plugins import SolverSpec, hookimpl


@dataclass(frozen=True)
class Right(ExternalSolver):
    backend = "numpy"
    packages = ("numpy",)
    claims = frozenset({"status", "evaluations", "batch", "gradient", "second", "units"})

    def solve(self, f, z0, args, *, rtol, max_steps):
        z, fz = z0, f(z0, *args)
        count, running = np.ones(len(z), np.int32), self._far(z, fz, rtol)
        with np.errstate(all="ignore"):
            for _ in range(max_steps):
                if not running.any():
                    break
                z = np.where(running[:, None], fz, z)
                fz = np.where(running[:, None], f(z, *args), fz)
                count, running = count + running, running & self._far(z, fz, rtol)
        return ExternalResult(z, ~running & (np.abs(z) < 1e9).all(axis=1), count)

    def _far(self, z, fz, rtol):
        return ~(np.linalg.norm(fz - z, axis=1) <= rtol * np.linalg.norm(fz, axis=1))

    def gradient(self, f, z0, args, g, *, rtol, max_steps):
        return (self._difference(lambda b: self.solve(f, z0, (b,), rtol=1e-12, max_steps=3000).z, args[0], 1e-5),)

    def second(self, f, z0, args, g, *, rtol, max_steps):
        first = lambda b: self.gradient(f, z0, (b,), g, rtol=rtol, max_steps=max_steps)[0]
        return self._difference(first, args[0], 1e-3)

    def _difference(self, fn, b, h):
        columns = [(fn(b + h * unit) - fn(b - h * unit)).sum(axis=1) / (2 * h) for unit in np.eye(b.shape[1])]
        return np.stack(columns, axis=1)


class Liar(Right):
    def solve(self, f, z0, args, **numbers):
        return super().solve(f, z0, args, **numbers)._replace(evaluations=1)


class Optimist(Right):
    """Reports a stall as success."""

    def solve(self, f, z0, args, **numbers):
        result = super().solve(f, z0, args, **numbers)
        return result._replace(converged=np.ones(len(z0), bool))


class Hangs(Right):
    def solve(self, f, z0, args, *, rtol, max_steps):
        while rtol == 1e-2:
            time.sleep(0.1)
        return super().solve(f, z0, args, rtol=rtol, max_steps=max_steps)


class Dies(Right):
    """By an exit status, and by a signal."""

    def solve(self, f, z0, args, *, rtol, max_steps):
        if rtol == 1e-2:
            os._exit(3)
        if rtol == 1e-8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().solve(f, z0, args, rtol=rtol, max_steps=max_steps)


class AlwaysDies(Right):
    def solve(self, f, z0, args, *, rtol, max_steps):
        os._exit(1)


class Prints(Right):
    def solve(self, f, z0, args, **numbers):
        print("iteration 1")
        return super().solve(f, z0, args, **numbers)


class Plots(Right):
    def solve(self, f, z0, args, **numbers):
        import matplotlib.pyplot as plt

        plt.figure()
        return super().solve(f, z0, args, **numbers)


class Meddles(Right):
    def solve(self, f, z0, args, **numbers):
        np.seterr(over="raise")
        random.seed(0)
        os.environ["OMP_NUM_THREADS"] = "3"
        return super().solve(f, z0, args, **numbers)


class Mutes(Right):
    def solve(self, f, z0, args, **numbers):
        sys.stdout = io.StringIO()
        return super().solve(f, z0, args, **numbers)


class Misshapes(Right):
    def solve(self, f, z0, args, **numbers):
        result = super().solve(f, z0, args, **numbers)
        return result._replace(z=result.z[:, 0])


class Words(Right):
    def solve(self, f, z0, args, **numbers):
        return super().solve(f, z0, args, **numbers)._replace(evaluations="many")


class Modest(Right):
    """A library that promises nothing, and returns nothing but a solution."""

    claims = frozenset()

    def solve(self, f, z0, args, **numbers):
        return ExternalResult(super().solve(f, z0, args, **numbers).z)


@hookimpl
def deqcore_solvers():
    for cls in (Right, *Right.__subclasses__()):
        yield SolverSpec(cls.__name__.lower(), f"external_adapters:{cls.__name__}")

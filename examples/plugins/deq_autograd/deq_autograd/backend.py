"""A whole backend for deqcore over HIPS autograd: NumPy arrays, and a tape while gradients are taken."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import autograd.numpy as anp
import numpy as np
import optree
from autograd.core import make_vjp
from autograd.extend import defvjp, primitive
from autograd.tracer import getval, isbox

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.autodiff import Autodiff
from deqcore.abc.backend import Backend
from deqcore.abc.linalg import SmallLinalg
from deqcore.errors import StrategyError
from deqcore.types import BackwardRecord, Capabilities


class Namespace(SimpleNamespace):
    """autograd.numpy, with the names of the array API standard that it lacks or does not differentiate."""

    def __getattr__(self, name: str) -> Any:
        return getattr(anp, name)


def where(mask: Any, x: Any, y: Any) -> Any:
    """Select by addition, because autograd's own `where` does not sum the gradient of a broadcast argument."""
    shape = np.broadcast_shapes(*map(np.shape, (mask, x, y)))
    zero = np.zeros(shape, np.result_type(*(getattr(a, "dtype", a) for a in (x, y))))  # x or y may be a plain number
    return anp.where(mask, *(a if np.shape(a) == shape else a + zero for a in (x, y)))


class AutogradLinalg(SmallLinalg):
    def solve(self, a: Any, b: Any) -> Any:
        many, bare = b if b.ndim == 3 else b[..., None], np.nan_to_num(self.be.detach(a)).astype("float64")
        bad = (np.linalg.cond(bare) > 1e300 if a.size else np.zeros(len(bare), bool))[:, None, None]
        found = anp.linalg.solve(anp.where(bad, np.eye(a.shape[-1]), a), many)
        found = anp.where(bad, np.nan, found).astype(b.dtype)
        return found if b.ndim == 3 else found[..., 0]

    def eye(self, like: Any, rows: int, columns: int | None = None) -> Any:
        return np.eye(rows, columns, dtype=like.dtype)


class AutogradAutodiff(Autodiff):
    def pullback(self, f: Callable[[Any], Any], leaves: tuple[Any, ...]) -> tuple[Any, Callable[[Any], Any]]:
        vjp, value = make_vjp(f, leaves)
        return value, vjp

    def implicit(self, f: Any, z0: Any, args: Any, solve: Any, adjoint: AdjointSolver) -> tuple[Any, Any, Any]:
        """Return z*, with a gradient: one more evaluation of f at z* is recorded, and its cotangent is routed."""
        forward, record = self.forward_only(f, z0, args, solve), BackwardRecord()
        with self.be.errstate():
            value = f(forward.z, *args)
        if not isbox(value):
            return forward.z, forward, record  # no gradient is taken
        # Now, and not in the backward pass: autograd distinguishes traces only while the outer one is open.
        _, vjp = self.linearize(lambda z: f(z, *optree.tree_map(self.be.detach, args)), forward.z)

        def solve_adjoint(g: Any) -> Any:
            u, report = adjoint(lambda v: self.be.detach(vjp(v)), self.be.detach(g), forward.carry.state)
            record.add(report)
            return u

        return routed(value, forward.z, solve_adjoint), forward, record


class AutogradBackend(Backend):
    name: ClassVar[str] = "autograd"
    capabilities: Capabilities = Capabilities()
    linalg_class = AutogradLinalg
    autodiff_class = AutogradAutodiff
    xp = Namespace(
        where=where,
        concat=anp.concatenate,
        permute_dims=anp.transpose,
        astype=lambda x, dtype: x.astype(dtype),
        pow=anp.power,
        abs=anp.absolute,
    )

    def is_array(self, leaf: object) -> bool:
        return isinstance(getval(leaf), np.ndarray | np.generic)

    def asarray(self, a: object, *, dtype: str | None = None, like: Any = None) -> Any:
        a = np.asarray(getval(a))
        return a.astype(dtype or (a.dtype if like is None or a.dtype == bool else like.dtype), copy=False)

    def to_numpy(self, x: Any) -> Any:
        return np.array(getval(x))

    def detach(self, x: Any) -> Any:
        while isbox(x):
            x = getval(x)
        return x

    def known_all(self, mask: Any) -> bool:
        return bool(np.all(getval(mask)))

    def errstate(self) -> Any:
        return np.errstate(all="ignore")


@primitive
def routed(value: Any, solved: Any, solve_adjoint: Callable[[Any], Any]) -> Any:
    """Return z* as solved; its gradient is that of the evaluation `value`, with u as the cotangent."""
    return solved


def _routed_vjp(ans: Any, value: Any, solved: Any, solve_adjoint: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def back(g: Any) -> Any:
        if isbox(g) or isbox(value):
            raise StrategyError(
                "deq-autograd has first derivatives only: the gradient of a fixed point was differentiated again. "
                "Use the torch or jax backend with backward.strategy = 'exact-ift' for second derivatives."
            )
        with np.errstate(all="ignore"):
            return solve_adjoint(g)

    return back


defvjp(routed, _routed_vjp, None, None)

"""A whole backend for deqcore over HIPS autograd: NumPy arrays, and a tape while gradients are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import autograd
import autograd.numpy as anp
import numpy as np
import optree
from autograd.core import make_vjp
from autograd.extend import defvjp, primitive
from autograd.tracer import getval, isbox

from deq_autograd.history import TapeHistory
from deqcore.backend import Backend, BackwardRecord, Capabilities
from deqcore.errors import StrategyError


class Namespace(SimpleNamespace):
    """autograd.numpy, with the names of the array API standard that it lacks or does not differentiate."""

    def __getattr__(self, name: str) -> Any:
        return getattr(anp, name)


def where(mask: Any, x: Any, y: Any) -> Any:
    """autograd's own forgets to sum the gradient of what was broadcast; its addition does not."""
    shape = np.broadcast_shapes(*map(np.shape, (mask, x, y)))
    return anp.where(mask, *(a if np.shape(a) == shape else a + np.zeros(shape, a.dtype) for a in map(arrayed, (x, y))))


def arrayed(a: Any) -> Any:
    return a if hasattr(a, "dtype") else np.asarray(a)


xp = Namespace(
    where=where,
    concat=anp.concatenate,
    permute_dims=anp.transpose,
    astype=lambda x, dtype: x.astype(dtype),
    pow=anp.power,
    abs=anp.absolute,
)


class AutogradBackend(Backend):
    name: ClassVar[str] = "autograd"
    capabilities: Capabilities = Capabilities()
    xp = xp

    # -- arrays and trees ---------------------------------------------------------------------------------------

    def is_array(self, leaf: object) -> bool:
        return isinstance(getval(leaf), np.ndarray | np.generic)

    def asarray(self, a: object, *, dtype: str | None = None, like: Any = None) -> Any:
        return np.asarray(getval(a), dtype or (like.dtype if like is not None else None))

    def to_numpy(self, x: Any) -> Any:
        return np.array(getval(x))

    def flatten(self, tree: Any) -> tuple[list[Any], Any]:
        return optree.tree_flatten(tree)

    def unflatten(self, structure: Any, leaves: Sequence[Any]) -> Any:
        return optree.tree_unflatten(structure, leaves)

    def dtype_name(self, x: Any) -> str:
        return str(x.dtype)

    def device_of(self, x: Any) -> str:
        return "cpu"

    def is_traced(self, *leaves: Any) -> bool:
        return False

    def astype(self, x: Any, dtype: str) -> Any:
        return x.astype(dtype)

    # -- rows ---------------------------------------------------------------------------------------------------

    def wide(self, x: Any) -> Any:
        return x.astype("float64")

    def cast(self, x: Any, like: Any) -> Any:
        return x.astype(like.dtype)

    def norm(self, v: Any) -> Any:
        wide = v.astype(np.promote_types(v.dtype, np.float32))
        return anp.sqrt(anp.sum(wide * wide, axis=1))

    def inner(self, a: Any, b: Any) -> Any:
        return anp.sum(self.wide(a) * self.wide(b), axis=1)

    def select(self, mask: Any, new: Any, old: Any) -> Any:
        return anp.where(anp.reshape(mask, (-1, *[1] * (new.ndim - 1))), new, old)

    def all_known(self, mask: Any) -> bool:
        return bool(np.all(getval(mask)))

    def solve(self, a: Any, b: Any) -> Any:
        many = b if b.ndim == 3 else b[..., None]
        bad = (
            np.linalg.cond(np.nan_to_num(getval(a)).astype("float64")) > 1e300
            if a.size
            else np.zeros(len(getval(a)), bool)
        )
        found = anp.linalg.solve(anp.where(bad[:, None, None], np.eye(a.shape[-1]), a), many)
        found = anp.where(bad[:, None, None], np.nan, found).astype(b.dtype)
        return found if b.ndim == 3 else found[..., 0]

    def history(self, like: Any, memory: int, dtype: str | None = None) -> TapeHistory:
        return TapeHistory.empty(like, memory, dtype)

    def eye(self, like: Any, rows: int, columns: int | None = None) -> Any:
        return np.eye(rows, columns, dtype=like.dtype)

    def quiet(self) -> Any:
        return np.errstate(all="ignore")

    def loop(self, running: Any, body: Any, carry: Any, steps: Any, check_every: int | str = "auto") -> Any:
        every = 1 if check_every == "auto" else int(check_every)
        with self.quiet():
            for step in range(int(steps)):
                if step % every == 0 and not bool(getval(running(carry))):
                    break
                carry = body(carry)
        return carry

    # -- differentiation ----------------------------------------------------------------------------------------

    def linearize(self, f: Callable[[Any], Any], z: Any) -> tuple[Any, Callable[[Any], Any]]:
        pull, value = make_vjp(f, z)
        return value, pull

    def forward_only(self, f: Any, z0: Any, args: tuple[Any, ...], solve: Any) -> Any:
        still = optree.tree_map(bare, args)
        with self.quiet():
            return solve(lambda z: bare(f(z, *still)), bare(z0))

    def implicit(self, f: Any, z0: Any, args: Any, solve: Any, adjoint: Any) -> tuple[Any, Any, Any]:
        """Value and gradient of z*: one more evaluation of f at z* is recorded, and its cotangent is routed."""
        forward, record = self.forward_only(f, z0, args, solve), BackwardRecord()

        with self.quiet():
            value = f(forward.z, *args)
        if not isbox(value):
            return forward.fz, forward, record  # nobody takes a gradient
        # Now, and not in the backward pass: autograd tells traces apart only while the outer one is open.
        _, pull = self.linearize(lambda z: f(z, *optree.tree_map(bare, args)), forward.z)

        def route(g: Any) -> Any:
            u, report = adjoint(lambda v: bare(pull(v)), bare(g), forward.carry.state)
            record.add(report)
            return u

        return routed(value, forward.fz, route), forward, record

    def detach(self, x: Any) -> Any:
        return bare(x)

    def vjp(self, value: Any, args: tuple[Any, ...], cotangent: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        leaves, structure = self.flatten(args)
        moving = [i for i, leaf in enumerate(leaves) if self.is_array(leaf) and leaf.dtype.kind == "f"]
        kept: list[Any] = []

        def of_leaves(moved: Any) -> Any:
            merged = list(leaves)
            for i, leaf in zip(moving, moved, strict=True):
                merged[i] = leaf
            found, aux = value(*self.unflatten(structure, merged))
            kept[:] = [aux]
            return found

        pull, found = make_vjp(of_leaves, tuple(leaves[i] for i in moving))
        gradients: list[Any] = [None] * len(leaves)
        for i, gradient in zip(moving, pull(cotangent), strict=True):
            gradients[i] = gradient
        return found, kept[0], self.unflatten(structure, gradients)

    def grad(self, fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return autograd.grad(fn)


@primitive
def routed(value: Any, solved: Any, route: Callable[[Any], Any]) -> Any:
    """What the solver found for f(z*); its gradient is that of the evaluation `value`, with u for the cotangent."""
    return solved


def _routed_vjp(ans: Any, value: Any, solved: Any, route: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def back(g: Any) -> Any:
        if isbox(g) or isbox(value):
            raise StrategyError(
                "deq-autograd has first derivatives only: the gradient of a fixed point was differentiated again. "
                "Use the torch or jax backend with backward.strategy = 'exact-ift' for second derivatives."
            )
        with np.errstate(all="ignore"):
            return route(g)

    return back


defvjp(routed, _routed_vjp, None, None)


def bare(x: Any) -> Any:
    """The numbers, without any tape."""
    while isbox(x):
        x = getval(x)
    return x

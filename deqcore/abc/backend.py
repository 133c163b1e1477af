"""The contract of a backend: PyTorch, JAX, NumPy and any fourth framework fulfil it.

Read this file first, `solver.py` second, `backward.py` third. The contract has three layers. Ordinary array mathematics
goes through the **array namespace** `Backend.xp` (the array API standard). Operations outside that standard are methods
of **Backend**: frozen rows, loops, transfers to the host, and histories. What only some readers need is in **parts** of
a backend, a file each: `autodiff`, `linalg`, `guards`, `numbers`, `host`, `kernels` and `harness`. The **History** is
the only large object in a solver, and its products are the only hot loops outside f, so a backend owns its storage.

Requirements that every backend keeps, and that `deqcore.testing` checks:

1. States inside the core are matrices `(batch, n)`; the user's state, any tree, is raveled at the boundary.
2. Norms, inner products and coefficients are float32 or better, whatever the state's dtype.
3. Rows are independent: what happens to one sample (NaN, a singular system) changes no bit of another's result. On the
   host, products with a history have the same bits in any batch, at any place in it, and whatever slots others use.
4. Nothing is copied to the host, and no device is waited for, except in `loop` (every `check_every` steps),
   `known_all` (which returns False if it would have to wait) and `to_numpy`.
5. Operations are functional: they return new values. A backend may write in place if no other code can observe it.

A method that is not abstract has a default, right for an eager framework with NumPy-like arrays on the host. Of the
classes of its parts only `linalg_class` and `autodiff_class` have none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, ClassVar

from deqcore import abc
from deqcore.abc.autodiff import Autodiff
from deqcore.abc.guards import CallGuards
from deqcore.abc.harness import Harness
from deqcore.abc.history import History
from deqcore.abc.host import HostViews
from deqcore.abc.linalg import SmallLinalg
from deqcore.abc.numbers import NumberOps
from deqcore.abc.scaling import guarded_norm
from deqcore.errors import BackendError
from deqcore.types import Array, Capabilities, LoopVars, Tree

_dtype_name = cache(str)  # NumPy takes longer to build a name than for most operations on small arrays


class Backend(ABC):
    """One framework behind one interface. A subclass is final: it is instantiated, never subclassed again.

    Example:
        >>> import deqcore
        >>> be = deqcore.get_backend(backend="numpy")
        >>> be.norm(be.asarray([[3.0, 4.0], [0.0, 2.0]])).tolist()
        [5.0, 2.0]
    """

    name: ClassVar[str]
    registration: ClassVar[str] = "optree.dataclasses.dataclass with namespace = 'deqcore'"
    """How a user registers a class as a tree, as errors show it."""
    capabilities: Capabilities
    xp: Any

    linalg_class: ClassVar[type[SmallLinalg]]
    autodiff_class: ClassVar[type[Autodiff]]
    guards_class: ClassVar[type[CallGuards]] = CallGuards
    numbers_class: ClassVar[type[NumberOps]] = NumberOps
    host_class: ClassVar[type[HostViews]] = HostViews
    kernels_class: ClassVar[type[abc.FusedKernels] | None] = None
    harness_class: ClassVar[type[Harness]] = Harness

    def __init__(self) -> None:
        """Make the parts. A subclass with an `__init__` of its own calls this one."""
        self.linalg: SmallLinalg = self.linalg_class(self)
        self.autodiff: Autodiff = self.autodiff_class(self)
        self.guards: CallGuards = self.guards_class(self)
        self.numbers: NumberOps = self.numbers_class(self)
        self.host: HostViews = self.host_class(self)
        self.kernels: abc.FusedKernels | None = None if self.kernels_class is None else self.kernels_class(self)
        self.harness: Harness = self.harness_class(self)

    # -- arrays and trees ----------------------------------------------------------------------------------------------

    @abstractmethod
    def is_array(self, leaf: object) -> bool:
        """Return whether `leaf` is an array of this framework."""

    @abstractmethod
    def asarray(self, a: object, *, dtype: str | None = None, like: Array | None = None) -> Array:
        """Convert host data (NumPy arrays, numbers, lists) to this framework.

        Args:
            a: the data. Floating data keeps its dtype unless `dtype` is given.
            dtype: a dtype's name, as in ``"float32"``.
            like: an array whose device (and, without `dtype`, whose dtype) is taken.
        """

    @abstractmethod
    def to_numpy(self, x: Array) -> Any:
        """Copy to a NumPy array on the host (waits for the device). Dtypes that NumPy lacks become float32."""

    def flatten(self, tree: Tree) -> tuple[list[Any], Any]:
        """Split a tree into its leaves and a structure that compares with `==`."""
        import optree  # 15 ms, which backends with trees of their own do not need

        return optree.tree_flatten(tree, namespace="deqcore")

    def unflatten(self, structure: Any, leaves: Sequence[Any]) -> Tree:
        """Undo `flatten`."""
        return structure.unflatten(leaves)

    def dtype_name(self, x: Array) -> str:
        """Return the dtype's name, as in ``"float32"``, ``"bfloat16"``, ``"int64"``."""
        return _dtype_name(x.dtype)

    def device_of(self, x: Array) -> Any:
        """Return an object that compares equal for arrays on the same device; None if that is unknown (tracing)."""
        return "cpu"

    def is_traced(self, *leaves: Any) -> bool:
        """Return whether any leaf is abstract (inside jit, grad or vmap of a tracing framework)."""
        return False

    def astype(self, x: Array, dtype: str) -> Array:
        """Cast to the dtype of this name; gradients pass."""
        return x.astype(dtype)

    def to_device(self, x: Array, device: str) -> Array:
        """Move `x` to the device of this name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

        Raises:
            BackendError: the device does not exist.
        """
        if device != "cpu":
            raise BackendError(f"device must be 'cpu' for the backend {self.name!r} (got {device!r}).")
        return x

    @abstractmethod
    def detach(self, x: Array) -> Array:
        """Return the same numbers without a gradient."""

    # -- rows ----------------------------------------------------------------------------------------------------------

    def to_accum_dtype(self, x: Array) -> Array:
        """Cast to the dtype of coefficients: float64 if the framework has it enabled, else float32."""
        return self.astype(x, "float64" if self.capabilities.float64 else "float32")

    def cast(self, x: Array, like: Array) -> Array:
        """Cast `x` to the dtype of `like`."""
        return self.astype(x, self.dtype_name(like))

    def eps(self, x: Array) -> float:
        """Return the machine epsilon of the dtype of `x`."""
        return float(self.xp.finfo(x.dtype).eps)

    def norm(self, v: Array) -> Array:
        """Return the 2-norm of each row of `v` `(batch, n)`: `(batch,)`, accumulated in float32 or better.

        It is correct for rows of any scale, also if squares overflow or vanish. A backend that sums squares passes the
        root of the sum to `deqcore.abc.scaling.guarded_norm`.
        """
        xp, square = self.xp, self.inner(v, v)
        zero = square == 0  # the root's derivative there is infinite
        return guarded_norm(self, v, xp.where(zero, square, xp.sqrt(xp.where(zero, xp.ones_like(square), square))))

    def inner(self, a: Array, b: Array) -> Array:
        """Return the inner product of each row of `a` with that of `b`: `(batch,)` in the wide dtype."""
        return self.xp.sum(self.to_accum_dtype(a) * self.to_accum_dtype(b), axis=1)

    def select(self, mask: Array, new: Array, old: Array) -> Array:
        """Return rows of `new` where `mask` `(batch,)` holds, of `old` elsewhere, without arithmetic (0·NaN)."""
        return self.xp.where(self.xp.reshape(mask, (-1, *[1] * (new.ndim - 1))), new, old)

    def rows(self, mask: Array) -> Array:
        """Return the indices `(k,)` of the rows where `mask` holds. Waits for the device; with `compaction` only."""
        return self.xp.nonzero(mask)[0]

    def take(self, x: Array, rows: Array) -> Array:
        """Return the rows of `x` with these indices, in separate storage."""
        return self.xp.take(x, rows, axis=0)

    def put(self, x: Array, rows: Array, part: Array) -> Array:
        """Return a copy of `x` with the rows of these indices replaced by those of `part`. With `compaction` only."""
        raise NotImplementedError(f"The backend {self.name!r} does not offer compaction.")

    def known_all(self, mask: Array) -> bool:
        """Return True only if all of `mask` holds *and* reading it costs no wait; False may also mean unknown."""
        view = self.host.numpy_view(mask)
        return view is not None and bool(view.all())

    def history(self, like: Array, history_size: int, dtype: str | None = None) -> History:
        """Return an empty history for vectors like `like` `(batch, n)`, stored in `dtype` (default: the vectors' own).

        While a gradient is recorded through `like`, nothing is written in place, because steps need the old vectors.
        """
        from deqcore.abc.functional_history import FunctionalHistory

        return FunctionalHistory.empty(self, like, history_size, dtype)

    # -- loops ---------------------------------------------------------------------------------------------------------

    def loop(
        self,
        running: Callable[[LoopVars], Array | bool],
        body: Callable[[LoopVars], LoopVars],
        carry: LoopVars,
        steps: int | Array,
        check_every: int | str = "auto",
    ) -> LoopVars:
        """Apply `body` while `running(carry)` (a scalar) holds, `steps` times at most.

        Args:
            running: called before the first step and then every `check_every` steps.
            body: must be harmless when applied after `running` became False.
            carry: structure, shapes and dtypes stay the same from step to step.
            steps: never exceeded, for any `check_every`; may be a traced scalar.
            check_every: ``"auto"`` is 1 if a check costs no wait, and more on devices where it waits.
        """
        every = 1 if check_every == "auto" else int(check_every)
        with self.errstate():
            for step in range(int(steps)):
                if step % every == 0 and not bool(running(carry)):
                    break
                carry = body(carry)
        return carry

    def cond(self, wanted: Array, body: Callable[[LoopVars], LoopVars], carry: LoopVars) -> LoopVars:
        """Apply `body` if any of `wanted` `(batch,)` of bool holds: a condition that can be traced."""
        return self.loop(lambda _: self.xp.any(wanted), body, carry, 1, 1)

    def choose(
        self, wanted: Array, body: Callable[[Any], LoopVars], otherwise: Callable[[Any], LoopVars], carry: Any
    ) -> LoopVars:
        """Return `body(carry)` if any of `wanted` `(batch,)` of bool holds, and `otherwise(carry)` if none does.

        Both return the same structure, shapes and dtypes, which may differ from those of `carry`. Only one runs.
        """
        return (body if bool(self.xp.any(wanted)) else otherwise)(carry)

    def scan(self, body: Callable[[LoopVars], LoopVars], carry: LoopVars, times: int) -> LoopVars:
        """Apply `body` a fixed number of times; gradients pass. A tracing backend traces it once."""
        for _ in range(times):
            carry = body(carry)
        return carry

    def errstate(self) -> AbstractContextManager[object]:
        """Silence the framework's warnings of NaN and inf inside the block, where they are statuses."""
        return nullcontext()

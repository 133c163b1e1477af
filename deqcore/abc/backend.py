"""The contract of a backend: PyTorch, JAX, NumPy and any fourth framework fulfil it.

Read this file first, `solver.py` second, `backward.py` third.

The contract has two layers. Ordinary array mathematics goes through the **array namespace** `Backend.xp` (the array
API standard). Operations outside that standard are methods of **Backend**: loops, differentiation, frozen rows,
transfers to the host, and histories. The **History** is the only large object in a solver, and its products are the
only hot loops outside f, so a backend owns its storage.

Requirements that every backend keeps, and that `deqcore.testing` checks:

1. States inside the core are matrices `(batch, n)`; the user's state, any tree, is raveled at the boundary.
2. Norms, inner products and coefficients are float32 or better, whatever the state's dtype.
3. Rows are independent: what happens to one sample (NaN, a singular system) changes no bit of another's result. On the
   host, products with a history have the same bits in any batch, at any place in it, and whatever slots others use.
4. Nothing is copied to the host, and no device is waited for, except in `loop` (every `check_every` steps),
   `known_all` (which returns False if it would have to wait) and `to_numpy`.
5. Operations are functional: they return new values. A backend may write in place if no other code can observe it.

A method that is not abstract has a default, right for an eager framework whose arrays behave like NumPy's and live on
the host. A backend implements the abstract methods first, and overrides the defaults that its framework does
differently or faster.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import optree

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.functional_history import FunctionalHistory
from deqcore.abc.history import History
from deqcore.errors import BackendError
from deqcore.types import (
    Array,
    BackwardRecord,
    Capabilities,
    Figures,
    LoopVars,
    Map,
    SolveResult,
    StepResult,
    Tree,
)

CANCELLED = 0.5**0.5
"""Part of a norm that a projection must leave. If it leaves less, the rounding of what it took away is large relative
to the rest, and errors of orthogonality grow from step to step."""


class Backend(ABC):
    """One framework behind one interface. A subclass is final: it is instantiated, never subclassed again.

    Example:
        >>> import deqcore
        >>> be = deqcore.get_backend(backend="numpy")
        >>> be.norm(be.asarray([[3.0, 4.0], [0.0, 2.0]])).tolist()
        [5.0, 2.0]
    """

    name: ClassVar[str]
    capabilities: Capabilities
    xp: Any

    # -- arrays and trees ---------------------------------------------------------------------------------------

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
        return optree.tree_flatten(tree)

    def unflatten(self, structure: Any, leaves: Sequence[Any]) -> Tree:
        """Undo `flatten`."""
        return optree.tree_unflatten(structure, leaves)

    def unfit(self, x: Array) -> str | None:
        """Say why an array of this framework (a subclass) cannot be a state, and what to pass; None if it can."""
        return None

    def dtype_name(self, x: Array) -> str:
        """Return the dtype's name, as in ``"float32"``, ``"bfloat16"``, ``"int64"``."""
        return str(x.dtype)

    def device_of(self, x: Array) -> Any:
        """Return an object that compares equal for arrays on the same device; None if that is unknown (tracing)."""
        return "cpu"

    def is_traced(self, *leaves: Any) -> bool:
        """Return whether any leaf is abstract (inside jit, grad or vmap of a tracing framework)."""
        return False

    def autocasting(self, x: Array) -> bool:
        """Return whether f runs under automatic mixed precision, so that its output may be narrower than the state."""
        return False

    def in_extended_precision(self) -> bool:
        """Return whether f is being evaluated in a wider dtype than the state's, to differentiate it by differences."""
        return False

    def owned(self, leaves: list[Any]) -> list[Any]:
        """Copy each array in f's result that f or the user keeps: a reused buffer, an argument, z itself.

        Only a framework with writable arrays needs it. `leaves` and one container, or one name, may hold the arrays
        beside their owner.
        """
        return leaves

    def unshared(self, x: Array, other: Array) -> Array:
        """Return `x`, or a copy if it is writable and shares memory with `other`."""
        return x

    def guard_inplace(self, z: Array) -> AbstractContextManager[Array]:
        """Pass `z` to f so that a write to it is detected, without a pass over the array.

        `z` may be the user's own memory, in several threads at once, so the block changes no property of it.

        Returns:
            A context whose value is an array like `z`, on the same memory.

        Raises:
            ProblemError: (from the block) f wrote to that array.
        """
        return nullcontext(z)

    def keep_random_state(self, x: Array) -> AbstractContextManager[None]:
        """Restore the framework's global random state, on the host and the device of `x`, after the block.

        Evaluations of f that only check something run in it, so that they change no random number of the user's.
        """
        return nullcontext()

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

    # -- rows ---------------------------------------------------------------------------------------------------

    def to_accum_dtype(self, x: Array) -> Array:
        """Cast to the dtype of coefficients: float64 if the framework has it enabled, else float32."""
        return self.astype(x, "float64" if self.capabilities.float64 else "float32")

    def cast(self, x: Array, like: Array) -> Array:
        """Cast `x` to the dtype of `like`."""
        return self.astype(x, self.dtype_name(like))

    def norm(self, v: Array) -> Array:
        """Return the 2-norm of each row of `v` `(batch, n)`: `(batch,)`, accumulated in float32 or better.

        It is correct for rows of any scale, also if squares overflow or vanish. A backend that sums squares passes the
        root of the sum to `guarded`.
        """
        xp, square = self.xp, self.inner(v, v)
        zero = square == 0  # the root's derivative there is infinite
        return self.guarded(v, xp.where(zero, square, xp.sqrt(xp.where(zero, xp.ones_like(square), square))))

    def guarded(self, v: Array, plain_norm: Array) -> Array:
        """Correct `plain_norm` `(batch,)`, norms of the rows of `v` by plain sums, where squares left the range.

        Rows whose norm is too extreme to be squared are scaled and summed a second time. Without such a row (almost
        always) this costs a comparison of `(batch,)` numbers; with zero rows, a search for their largest entry.
        """
        xp = self.xp
        low = float(xp.finfo(plain_norm.dtype).smallest_normal) ** (1 / 3)
        safe = (plain_norm > low) & (plain_norm < 1 / low)
        if self.known_all(safe):
            return plain_norm

        def again(plain_norm: Array) -> Array:
            largest = self._largest(v, plain_norm)
            lost = ~safe & (largest > 0) & xp.isfinite(largest)
            return self.cond(lost, lambda old: xp.where(lost, self._scaled_norm(v, largest), old), plain_norm)

        return self.cond(~safe, again, plain_norm)

    def _largest(self, v: Array, like: Array) -> Array:
        """Return the largest |v_i| of each row, in the dtype of `like`."""
        xp = self.xp
        return self.cast(xp.max(xp.abs(self.detach(v)), axis=1), like) if v.shape[1] else xp.zeros_like(like)

    def _scaled_norm(self, v: Array, largest: Array) -> Array:
        """Return the 2-norm of each row of `v` in the dtype of `largest` `(batch,)`, from entries divided by it."""
        xp = self.xp
        sound = (largest > 0) & xp.isfinite(largest)
        one = xp.ones_like(largest)
        tiny = float(xp.finfo(largest.dtype).smallest_normal)
        scale = xp.clip(self.power_of_two(xp.where(sound, largest, one)), tiny, 1 / tiny)
        scaled = self.cast(v, scale) * (1.0 / scale)[:, None]
        square = xp.sum(scaled * scaled, axis=1)
        zero = square == 0  # the root's derivative there is infinite
        return scale * xp.where(zero, square, xp.sqrt(xp.where(zero, xp.ones_like(square), square)))

    def row_scale(self, norm: Array, like: Array) -> Array | None:
        """Return powers of two `(batch,)` that scale rows with these norms to about 1; None if surely none needs it.

        Products of vectors overflow or vanish long before the vectors do: at 1e-25 in float32 all of them are 0. A
        method that stores vectors and forms their products divides them by this scale (`divide_rows`), which changes
        no digit, and multiplies its result by it (`multiply_rows`). The scale is 1 if squares are far from the ends of
        the range, and if the norm is 0 or not finite.

        Args:
            norm: `(batch,)`, as `norm` gives it.
            like: vectors `(batch, n)` of the dtype that will be scaled.
        """
        xp = self.xp
        norm = self.detach(norm)
        low = float(xp.finfo(norm.dtype).smallest_normal) ** 0.125
        usable = (norm > 0) & xp.isfinite(norm)
        plain = ((norm > low) & (norm < 1 / low)) | ~usable
        if self.known_all(plain):
            return None
        kind = xp.finfo(like.dtype)
        bound = 2.0 ** (math.floor(math.log2(min(1 / float(kind.smallest_normal), float(kind.max)))) - 1)
        one = xp.ones_like(norm)
        return xp.clip(self.power_of_two(xp.where(plain, one, norm)) * one, 1 / bound, bound)

    def power_of_two(self, x: Array) -> Array:
        """Return the largest power of two that is at most x > 0; exact to the bit if the backend overrides it."""
        return 2.0 ** self.xp.floor(self.xp.log2(x))

    def divide_rows(self, v: Array, scale: Array | None) -> Array:
        """Divide each row of `v` `(batch, k)` by its `scale` `(batch,)`, a power of two; None divides by 1."""
        return v if scale is None else v * self.cast(1.0 / scale, v)[:, None]

    def multiply_rows(self, v: Array, scale: Array | None) -> Array:
        """Multiply each row of `v` `(batch, k)` by its `scale` `(batch,)`, a power of two; None multiplies by 1."""
        return v if scale is None else v * self.cast(scale, v)[:, None]

    def inner(self, a: Array, b: Array) -> Array:
        """Return the inner product of each row of `a` with that of `b`: `(batch,)` in the wide dtype."""
        return self.xp.sum(self.to_accum_dtype(a) * self.to_accum_dtype(b), axis=1)

    def invert(self, x: Array, floor: Array) -> Array:
        """Return 1/x where |x| > floor, 0 elsewhere (also for NaN); `x` and `floor` have shape `(batch,)`."""
        xp = self.xp
        sound = xp.abs(x) > floor
        return xp.where(sound, 1.0 / xp.where(sound, x, xp.ones_like(x)), xp.zeros_like(x))

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

    def numpy_view(self, x: Array) -> Any | None:
        """Return `x` as a NumPy array that shares its memory, or None if that would cost a wait or a copy.

        The loop's own decisions, a dozen operations on `(batch,)`, cost a fifth as much on such views.
        """
        return None

    def from_numpy_view(self, x: Any) -> Array:
        """Undo `numpy_view`: return an array that shares the memory of the NumPy array `x`."""
        raise NotImplementedError(f"The backend {self.name!r} has no NumPy views.")

    def known_all(self, mask: Array) -> bool:
        """Return True only if all of `mask` holds *and* reading it costs no wait; False may also mean unknown."""
        view = self.numpy_view(mask)
        return view is not None and bool(view.all())

    @abstractmethod
    def solve(self, a: Array, b: Array) -> Array:
        """Solve the small systems `a` `(batch, k, k)` for `b` `(batch, k)` or `(batch, k, r)`.

        A singular system gives non-finite numbers in its own row; it neither raises nor touches another row.
        """

    def solve_upper(self, a: Array, b: Array) -> Array:
        """Solve as `solve` does for upper triangular `a`; worth overriding if elimination costs more than f."""
        return self.solve(a, b)

    def solve_positive(self, a: Array, b: Array) -> Array:
        """Solve as `solve` does for `a` that is symmetric and positive definite to rounding."""
        return self.solve(a, b)

    def least_singular_value(self, a: Array, columns: Array) -> Array:
        """Return the least singular value of each of the matrices `a` `(batch, m, k)`, m ≥ k: `(batch,)`.

        From index `columns` (a scalar int32) on, column j is c·e_{j+1}, with c at least the norm of any other column
        and all other columns zero in that row. Traced code, whose shapes cannot shrink, may skip these columns.
        """
        return self.xp.min(self.xp.linalg.svdvals(a), axis=1)

    def history(self, like: Array, history_size: int, dtype: str | None = None) -> History:
        """Return an empty history for vectors like `like` `(batch, n)`, stored in `dtype` (default: the vectors' own).

        If the framework records a gradient through `like`, the history is functional: nothing is written in place, so
        that steps can be differentiated through. The default is always functional.
        """
        return FunctionalHistory.empty(self, like, history_size, dtype)

    def fused_step(self, solver: object, f: Map, z: Array, fz: Array, state: Any) -> StepResult | None:
        """`solver.step(self, f, z, fz, state)` by compiled code, where this backend has some for it; None elsewhere.

        To rounding it is the same step on the same state, so that histories, estimates and continued solves do not
        depend on which one ran. The choice must not depend on the values of any sample.
        """
        return None

    def fused_update(
        self, carry: Any, result: StepResult, residual: Array, size: Array | None, limits: Any
    ) -> Any | None:
        """Update the loop state after a step by compiled code; return None if this backend has none for it.

        Args:
            carry: the loop state before the step.
            result: the result of the step.
            residual: ‖f(z) − z‖ `(batch,)`.
            size: ‖f(z)‖ `(batch,)`, or None if it is unknown and `limits.rtol` is 0.
            limits: `deqcore.solve.termination.Limits`; the verdict is `deqcore.solve.termination.verdict`.

        Returns:
            The loop state after the step, but with the solver's state from before it.
        """
        return None

    def fused_arnoldi(self, space: Any, w: Array, goal: Array, twice: bool) -> Any | None:
        """Do the part of a GMRES step after the product by compiled code; return None if this backend has none for it.

        Args:
            space: `deqcore.linear.gmres.Krylov`.
            w: the product with its latest vector, `(batch, n)`.
            goal: residual at which a sample is done `(batch,)`.
            twice: project twice.

        Returns:
            The space with one more dimension.
        """
        return None

    def residual_norms(self, z: Array, fz: Array) -> tuple[Array, Array]:
        """Return ‖f(z) − z‖ and ‖f(z)‖ of each row `(batch,)`, as `norm` gives them."""
        return self.norm(fz - z), self.norm(fz)

    def orthogonalize(self, basis: History, w: Array, twice: bool) -> tuple[Array, Array, Array, Array]:
        """Return `w` `(batch, n)` without its components h in the orthonormal `basis`, and h, ‖w‖ before, ‖w‖ after.

        With `twice` it is projected once more where less than `CANCELLED` of its norm is left, so that the rest is
        orthogonal to rounding. A backend that must wait to know where that is may project all of them. h
        `(batch, history_size)` and the norms `(batch,)` are in the wide dtype.

        Source: Daniel, Gragg, Kaufman & Stewart (1976), "Reorthogonalization and stable algorithms for updating the
        Gram-Schmidt QR factorization".
        """
        before = self.to_accum_dtype(self.norm(w))
        h = basis.dot(w)
        w = w - basis.combine(h)
        after = self.to_accum_dtype(self.norm(w))
        if twice and not self.known_all(after >= CANCELLED * before):
            enough = after >= CANCELLED * before
            more = basis.dot(w)
            w = self.select(enough, w, w - basis.combine(more))
            h = self.select(enough, h, h + more)
            after = self.to_accum_dtype(self.norm(w))
        return w, h, before, after

    def eye(self, like: Array, rows: int, columns: int | None = None) -> Array:
        """Return the identity `(rows, columns)` in the dtype and on the device of `like` (which traced arrays hide)."""
        return self.xp.eye(rows, columns, dtype=like.dtype, device=like.device)

    def eps(self, x: Array) -> float:
        """Return the machine epsilon of the dtype of `x`."""
        return float(self.xp.finfo(x.dtype).eps)

    def errstate(self) -> AbstractContextManager[object]:
        """Silence the framework's warnings of NaN and inf inside the block, where they are statuses."""
        return nullcontext()

    def output_eps(self, x: Array) -> float:
        """Return the machine epsilon of f's output for a state like `x`: coarser than `eps` under mixed precision."""
        return self.eps(x)

    def default_rtol(self, x: Array) -> float:
        """Return the value of rtol = "auto": √eps, at most 1e-4, but at least 2·eps.

        float64 1.5e-8, float32 1e-4, float16 2e-3, bfloat16 1.6e-2.
        """
        eps = float(self.output_eps(x))
        return float(max(2 * eps, min(1e-4, eps**0.5)))

    def as_scalar(self, value: Any, like: Array) -> Any:
        """Convert a tolerance or step budget to the form that the loops of this backend take.

        Eager backends keep the Python number. A tracing backend makes it an array (an integer stays an integer, a float
        takes the dtype of norms of `like`), so that another value recompiles nothing.
        """
        return value

    # -- loops --------------------------------------------------------------------------------------------------

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

    def scan(self, body: Callable[[LoopVars], LoopVars], carry: LoopVars, times: int) -> LoopVars:
        """Apply `body` a fixed number of times; gradients pass. A tracing backend traces it once."""
        for _ in range(times):
            carry = body(carry)
        return carry

    def watch(self, report: Callable[[Any], None], figures: Figures, *, compiled: bool) -> None:  # noqa: B027
        """Call `report` with what traced `figures` turn out to be, whenever they are notable.

        Only a tracing backend is asked to; an eager one has no traced arrays. It calls at once where values are known
        (eager transformations), and by a callback from compiled code only if `compiled`, since a callback has a price
        there. Under a vectorising transformation it calls once, with the figures of all lanes, see `Figures.merged`.
        """

    # -- differentiation ----------------------------------------------------------------------------------------

    def pullback(
        self, f: Callable[[tuple[Array, ...]], Array], leaves: tuple[Array, ...]
    ) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
        """Evaluate f once at a tuple of arrays; return its value and the map from its cotangent to theirs.

        The default `linearize` and `vjp` use it.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `pullback`, or `linearize` and `vjp`.")

    def linearize(self, f: Map, z: Array) -> tuple[Array, Map]:
        """Evaluate f once at `z`; return `(f(z), vjp)` with `vjp(u) = Jᵀu`, callable many times."""
        value, vjp = self.pullback(lambda leaves: f(leaves[0]), (z,))
        return value, lambda u: vjp(u)[0]

    def jvp(self, f: Map, z: Array) -> Map | None:
        """Return forward products `v ↦ J v` at `z`, or None if the framework has none."""
        return None

    def differentiable_vjp(self, f: Map, z: Array) -> Map:
        """Return products `u ↦ Jᵀu` at `z` that are themselves recorded: gradients flow to z and to all inputs of f.

        The default is for backends whose `linearize` composes with differentiation, or that have no tape.
        """
        return self.linearize(f, z)[1]

    def forward_only(
        self, f: Callable[..., Array], z0: Array, args: tuple[Any, ...], solve: Callable[[Map, Array], SolveResult]
    ) -> SolveResult:
        """Run `solve(lambda z: f(z, *args), z0)` without recording a gradient."""
        leaves, structure = self.flatten(args)
        still = self.unflatten(structure, [self.detach(leaf) if self.is_array(leaf) else leaf for leaf in leaves])
        with self.errstate():
            return solve(lambda z: self.detach(f(z, *still)), self.detach(z0))

    @abstractmethod
    def implicit(
        self,
        f: Callable[..., Array],
        z0: Array,
        args: tuple[Any, ...],
        solve: Callable[[Map, Array], SolveResult],
        adjoint: AdjointSolver,
    ) -> tuple[Array, SolveResult, BackwardRecord | None]:
        """Solve, and attach the implicit gradient to the value.

        Args:
            f: `f(z, *args)` on raveled states; may close over differentiable values.
            z0: initial iterate `(batch, n)`. It gets no gradient, because the fixed point does not depend on it.
            args: pytrees; their arrays get gradients.
            solve: the loop with solver and tolerances bound.
            adjoint: finds `u ≈ (I − J)^-T g`.

        Returns:
            The value z* `(batch, n)`, which equals `forward.z` to the last bit, with gradients attached whenever the
            framework records them; the result of the solver; and a record that the backward pass will fill (None if
            the framework cannot fill one).
        """

    def differentiate_through(
        self,
        f: Callable[..., Array],
        z0: Array,
        args: tuple[Any, ...],
        steps: Callable[[Map, Array, SolveResult | None], Any],
        forward: SolveResult | None,
    ) -> Any:
        """Run `steps(lambda z: f(z, *args), z0, forward)` and record its gradient; a tracing backend calls f once."""
        return steps(lambda z: f(z, *args), z0, forward)

    @abstractmethod
    def detach(self, x: Array) -> Array:
        """Return the same numbers without a gradient."""

    def straight_through(self, value: Array, carrier: Array) -> Array:
        """Return `value` `(batch, n)` with the derivative of `carrier` `(batch, n)`.

        A backend may override this to save the passes, and to keep NaN in `carrier` out of the value.
        """
        return value + (carrier - self.detach(carrier)) if self.grad_enabled() else value

    def checkpoint(self, f: Map) -> Map:
        """Wrap f so that the backward pass evaluates it again instead of keeping its intermediate results."""
        return f

    def grad_enabled(self) -> bool:
        """Return whether a gradient may be requested later. A backend without a tape may return False."""
        return True

    def vjp(
        self, value: Callable[..., tuple[Array, Any]], args: tuple[Any, ...], cotangent: Array
    ) -> tuple[Array, Any, tuple[Any, ...]]:
        """Return the cotangents of `args` for `value(*args) -> (array, aux)`, by the framework's own differentiation.

        Returns:
            The value, aux, and for each argument a tree like it, with None for leaves without a derivative (integers,
            strings).
        """
        leaves, structure = self.flatten(args)
        moving = [i for i, leaf in enumerate(leaves) if self.is_array(leaf) and "float" in self.dtype_name(leaf)]
        kept: list[Any] = []

        def of_leaves(moved: tuple[Array, ...]) -> Array:
            changed = dict(zip(moving, moved, strict=True))
            primal, aux = value(*self.unflatten(structure, [changed.get(i, leaf) for i, leaf in enumerate(leaves)]))
            kept.append(aux)
            return primal

        primal, vjp = self.pullback(of_leaves, tuple(leaves[i] for i in moving))
        gradients = dict(zip(moving, vjp(cotangent), strict=True))
        return primal, kept[0], self.unflatten(structure, [gradients.get(i) for i in range(len(leaves))])

    def grad(self, fn: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """Return the gradient of a scalar function of one array; it may be nested if `second_derivatives` is set."""

        def gradient(x: Array) -> Array:
            one = self.asarray(1.0, like=x)
            return self.vjp(lambda moved: (fn(moved), None), (x,), one)[2][0]

        return gradient

    # -- measuring and checking ---------------------------------------------------------------------------------

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `fn` compiled if the backend has the capability `jit`, otherwise `fn` itself."""
        return fn

    def high_precision(self) -> AbstractContextManager[object]:
        """Enter the precision of the conformance suite: double precision enabled, and no product shortened (TF32)."""
        return nullcontext()

    def synchronize(self) -> None:
        """Wait until all devices have finished. Only measurements call it."""
        return None

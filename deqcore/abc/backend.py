"""What a framework must offer: the contract that PyTorch, JAX, NumPy and any fourth backend fulfil.

Read this file first, `solver.py` second, `strategy.py` third.

Two layers, nothing more. Ordinary array mathematics goes through the **array namespace** `Backend.xp` (the array
API standard). What that standard refuses to have is a method of **Backend**: loops, differentiation, rows that must
stay as they are, transfers to the host, and histories. The **History** is the only large object in a solver, and its
products are the only hot loops outside f, so a backend owns its storage.

Requirements that every backend keeps, and that `deqcore.testing` checks:

1. States inside the core are matrices `(batch, n)`; whatever the user's state looks like is raveled at the boundary.
2. Norms, inner products and coefficients are float32 or better, whatever the state's dtype.
3. Rows are independent: what happens to one sample (NaN, a singular system) changes no bit of another's result.
4. Nothing is copied to the host, and no device is waited for, except in `loop` (every `check_every` steps),
   `known_all` (which answers False where it would have to wait) and `to_numpy`.
5. Operations are functional: they return what changed. A backend may write in place where nobody else can see it.

What is no abstract method has a default, right for an eager framework whose arrays behave like NumPy's and live on the
host. A backend starts with the rest, and overrides what its framework does otherwise, or faster.
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
        """Whether `leaf` is an array of this framework."""

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
        """Why an array of this framework cannot be a state, and what to pass; None if it can. For array subclasses."""
        return None

    def dtype_name(self, x: Array) -> str:
        """The dtype's name, as in ``"float32"``, ``"bfloat16"``, ``"int64"``."""
        return str(x.dtype)

    def device_of(self, x: Array) -> Any:
        """Something that compares equal for arrays on the same device; None where that is not known (tracing)."""
        return "cpu"

    def is_traced(self, *leaves: Any) -> bool:
        """Whether any leaf is abstract (inside jit, grad or vmap of a tracing framework)."""
        return False

    def autocasting(self, x: Array) -> bool:
        """Whether f runs under automatic mixed precision, so that its output may be narrower than the state."""
        return False

    def in_extended_precision(self) -> bool:
        """Whether f is being evaluated in a wider dtype than the state's, to differentiate it by differences."""
        return False

    def owned(self, leaves: list[Any]) -> list[Any]:
        """What f returned, with a copy of each array that f or the user keeps: a reused buffer, an argument, z itself.

        Only a framework whose arrays can be written to needs it. `leaves` and one container, or one name, may hold
        the arrays beside their owner.
        """
        return leaves

    def unshared(self, x: Array, other: Array) -> Array:
        """`x`, copied if it shares memory with `other` and can be written to."""
        return x

    def guard_inplace(self, z: Array) -> AbstractContextManager[Array]:
        """Give f what it reads `z` from. Where arrays can be written to, a write is found out without a pass over them.

        `z` may be the user's own memory, in several threads at once: the block changes no property of it.

        Returns:
            A context whose value is an array like `z`, on the same memory.

        Raises:
            ProblemError: (from the block) f wrote to that array.
        """
        return nullcontext(z)

    def astype(self, x: Array, dtype: str) -> Array:
        """Cast to the dtype of this name; gradients pass."""
        return x.astype(dtype)

    def to_device(self, x: Array, device: str) -> Array:
        """Move `x` to the device of this name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

        Raises:
            BackendError: there is no such device.
        """
        if device != "cpu":
            raise BackendError(f"The backend {self.name!r} has arrays on the host only, but device = {device!r}.")
        return x

    # -- rows ---------------------------------------------------------------------------------------------------

    def to_accum_dtype(self, x: Array) -> Array:
        """Cast to the dtype of coefficients: float64 where the framework has it at hand, else float32."""
        return self.astype(x, "float64" if self.capabilities.float64 else "float32")

    def cast(self, x: Array, like: Array) -> Array:
        """Cast `x` to the dtype of `like`."""
        return self.astype(x, self.dtype_name(like))

    def norm(self, v: Array) -> Array:
        """2-norm of each row of `v` `(batch, n)`: `(batch,)`, accumulated in float32 or better.

        Correct for rows of any scale: squares that overflow or vanish do not spoil it. A backend that sums squares
        passes the sum's root to `guarded`.
        """
        return self.guarded(v, self.xp.sqrt(self.inner(v, v)))

    def guarded(self, v: Array, found: Array) -> Array:
        """Correct `found` `(batch,)`, norms of the rows of `v` by plain sums of squares, where these left the range.

        Rows whose norm is too extreme to be squared are scaled and summed a second time. Where there is none (almost
        always) this costs a comparison of `(batch,)` numbers; where rows are zero, a search for their largest entry.
        """
        xp = self.xp
        low = float(xp.finfo(found.dtype).smallest_normal) ** (1 / 3)
        safe = (found > low) & (found < 1 / low)
        if self.known_all(safe):
            return found

        def again(found: Array) -> Array:
            largest = self._largest(v, found)
            lost = ~safe & (largest > 0) & xp.isfinite(largest)
            return self.cond(lost, lambda old: xp.where(lost, self._scaled_norm(v, largest), old), found)

        return self.cond(~safe, again, found)

    def _largest(self, v: Array, like: Array) -> Array:
        """The largest |v_i| of each row, in the dtype of `like`."""
        xp = self.xp
        return self.cast(xp.max(xp.abs(self.detach(v)), axis=1), like) if v.shape[1] else xp.zeros_like(like)

    def _scaled_norm(self, v: Array, largest: Array) -> Array:
        """2-norm of each row of `v` in the dtype of `largest` `(batch,)`, from entries over the largest one."""
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
        """Powers of two `(batch,)` that bring rows with these norms to about 1; None if known that no row needs it.

        Products of vectors overflow or vanish long before the vectors do: at 1e-25 in float32 all of them are 0. A
        method that stores vectors and forms their products divides them by this scale (`divide_rows`), which changes
        no digit, and multiplies what it found (`multiply_rows`). The scale is 1 where squares are far from the ends
        of the range, and where the norm is 0 or not finite.

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
        """The largest power of two that is at most x > 0, 1 for 1; exact to the bit where the backend overrides it."""
        return 2.0 ** self.xp.floor(self.xp.log2(x))

    def divide_rows(self, v: Array, scale: Array | None) -> Array:
        """`v` `(batch, k)` with each row divided by its `scale` `(batch,)`, a power of two; None divides by 1."""
        return v if scale is None else v * self.cast(1.0 / scale, v)[:, None]

    def multiply_rows(self, v: Array, scale: Array | None) -> Array:
        """`v` `(batch, k)` with each row multiplied by its `scale` `(batch,)`, a power of two; None multiplies by 1."""
        return v if scale is None else v * self.cast(scale, v)[:, None]

    def inner(self, a: Array, b: Array) -> Array:
        """Inner product of each row of `a` with that of `b`: `(batch,)` in the wide dtype."""
        return self.xp.sum(self.to_accum_dtype(a) * self.to_accum_dtype(b), axis=1)

    def invert(self, x: Array, floor: Array) -> Array:
        """1/x where |x| > floor, 0 elsewhere (where either is NaN, too); `x` and `floor` have shape `(batch,)`."""
        xp = self.xp
        sound = xp.abs(x) > floor
        return xp.where(sound, 1.0 / xp.where(sound, x, xp.ones_like(x)), xp.zeros_like(x))

    def select(self, mask: Array, new: Array, old: Array) -> Array:
        """Rows of `new` where `mask` `(batch,)` holds, of `old` elsewhere; never arithmetic with the mask (0·NaN)."""
        return self.xp.where(self.xp.reshape(mask, (-1, *[1] * (new.ndim - 1))), new, old)

    def rows(self, mask: Array) -> Array:
        """Indices `(k,)` of the rows where `mask` holds. Waits for the device; with `compaction` only."""
        return self.xp.nonzero(mask)[0]

    def take(self, x: Array, rows: Array) -> Array:
        """The rows of `x` with these indices, in storage of their own."""
        return self.xp.take(x, rows, axis=0)

    def put(self, x: Array, rows: Array, part: Array) -> Array:
        """`x` with the rows of these indices replaced by those of `part`; `x` itself stays. With `compaction` only."""
        raise NotImplementedError(f"The backend {self.name!r} does not offer compaction.")

    def numpy_view(self, x: Array) -> Any | None:
        """`x` as a NumPy array sharing its memory, where looking costs neither a wait nor a copy; None elsewhere.

        The loop's own decisions, a dozen operations on `(batch,)`, cost a fifth as much on such views.
        """
        return None

    def from_numpy_view(self, x: Any) -> Array:
        """Undo `numpy_view`: an array that shares the memory of the NumPy array `x`, which nobody else writes to."""
        raise NotImplementedError(f"The backend {self.name!r} looks at nothing on the host.")

    def known_all(self, mask: Array) -> bool:
        """True only if all of `mask` holds *and* finding out costs no wait; False says nothing."""
        seen = self.numpy_view(mask)
        return seen is not None and bool(seen.all())

    @abstractmethod
    def solve(self, a: Array, b: Array) -> Array:
        """Solve the small systems `a` `(batch, k, k)` for `b` `(batch, k)` or `(batch, k, r)`.

        A singular system gives non-finite numbers in its own row; it neither raises nor touches another row.
        """

    def solve_upper(self, a: Array, b: Array) -> Array:
        """`solve` where `a` is upper triangular; worth an implementation where elimination costs more than f."""
        return self.solve(a, b)

    def solve_positive(self, a: Array, b: Array) -> Array:
        """`solve` where `a` is symmetric and positive definite to rounding."""
        return self.solve(a, b)

    def least_singular_value(self, a: Array, columns: Array) -> Array:
        """Least singular value of each of the matrices `a` `(batch, m, k)`, m ≥ k: `(batch,)`.

        Of the columns from `columns` (a scalar int32) on it is known that column j is c·e_{j+1}, with c no less than
        the norm of any other column and all others zero in that row: traced code, whose shapes cannot shrink, may
        spare them.
        """
        return self.xp.min(self.xp.linalg.svdvals(a), axis=1)

    def history(self, like: Array, history_size: int, dtype: str | None = None) -> History:
        """An empty history for vectors like `like` `(batch, n)`, stored in `dtype` (default: the vectors' own).

        Where the framework is recording a gradient through `like`, the history is functional: nothing is written in
        place, so that steps can be differentiated through. The default is functional always.
        """
        return FunctionalHistory.empty(self, like, history_size, dtype)

    def fused_step(self, solver: object, f: Map, z: Array, fz: Array, state: Any) -> StepResult | None:
        """`solver.step(self, f, z, fz, state)` by compiled code, where this backend has some for it; None elsewhere.

        To rounding it is the same step on the same state, so that histories, estimates and continued solves do not
        know which one ran. The choice must not depend on the values of any sample.
        """
        return None

    def fused_update(
        self, carry: Any, found: StepResult, residual: Array, size: Array | None, limits: Any
    ) -> Any | None:
        """What the loop keeps of a step, by compiled code where this backend has some for it; None elsewhere.

        Args:
            carry: the loop's, before the step.
            found: what the step led to.
            residual: ‖f(z) − z‖ `(batch,)`.
            size: ‖f(z)‖ `(batch,)`, or None where it is not known and `limits.rtol` is 0.
            limits: `deqcore.solve.termination.Limits`; the verdict is `deqcore.solve.termination.verdict`.

        Returns:
            The carry after the step, but with the solver's state of before.
        """
        return None

    def fused_arnoldi(self, space: Any, w: Array, goal: Array, twice: bool) -> Any | None:
        """What GMRES does with a product, by compiled code where this backend has some for it; None elsewhere.

        Args:
            space: `deqcore.linear.gmres.Krylov`.
            w: the product with its latest vector, `(batch, n)`.
            goal: residual at which a sample is done, `(batch,)`.
            twice: project twice.

        Returns:
            The space with one more dimension.
        """
        return None

    def residual_norms(self, z: Array, fz: Array) -> tuple[Array, Array]:
        """‖f(z) − z‖ and ‖f(z)‖ of each row `(batch,)`, as `norm` gives them."""
        return self.norm(fz - z), self.norm(fz)

    def orthogonalize(self, basis: History, w: Array, twice: bool) -> tuple[Array, Array, Array, Array]:
        """`w` `(batch, n)` without its components h in the orthonormal `basis`, and h, ‖w‖ before, ‖w‖ after.

        With `twice` it is projected once more, so that what is left is orthogonal to rounding. h `(batch, history_size)`
        and the norms `(batch,)` are in the wide dtype.
        """
        before = self.to_accum_dtype(self.norm(w))
        h = basis.dot(w)
        w = w - basis.combine(h)
        if twice:
            more = basis.dot(w)
            w = w - basis.combine(more)
            h = h + more
        return w, h, before, self.to_accum_dtype(self.norm(w))

    def eye(self, like: Array, rows: int, columns: int | None = None) -> Array:
        """Identity matrix `(rows, columns)` in the dtype and on the device of `like` (which traced arrays hide)."""
        return self.xp.eye(rows, columns, dtype=like.dtype, device=like.device)

    def eps(self, x: Array) -> float:
        """Machine epsilon of the dtype of `x`."""
        return float(self.xp.finfo(x.dtype).eps)

    def errstate(self) -> AbstractContextManager[object]:
        """Inside it the framework does not warn of NaN and inf: here they are statuses."""
        return nullcontext()

    def output_eps(self, x: Array) -> float:
        """Machine epsilon of what f returns for a state like `x`: coarser than `eps` under mixed precision."""
        return self.eps(x)

    def default_rtol(self, x: Array) -> float:
        """Rtol = "auto": what the dtype can reach, at most 1e-4 where it can: √eps, but at least 2·eps.

        float64 1.5e-8, float32 1e-4, float16 2e-3, bfloat16 1.6e-2.
        """
        eps = float(self.output_eps(x))
        return float(max(2 * eps, min(1e-4, eps**0.5)))

    def as_scalar(self, value: Any, like: Array) -> Any:
        """A tolerance or step budget in the form that the loops of this backend want.

        Eager backends keep the Python number. A tracing backend makes it an array (an integer stays one, a float
        takes the dtype in which norms of `like` are measured), so that another value recompiles nothing.
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
            running: asked before the first step and then every `check_every` steps.
            body: must be harmless when applied after `running` became False.
            carry: structure, shapes and dtypes stay the same from step to step.
            steps: never exceeded, whatever `check_every` is; may be a traced scalar.
            check_every: ``"auto"`` is 1 where a check is free, and more on devices where it waits.
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

        What `linearize` and `vjp` are made of where a backend does not write them itself.
        """
        raise NotImplementedError(f"{type(self).__name__} offers neither `pullback` nor `linearize` and `vjp`.")

    def linearize(self, f: Map, z: Array) -> tuple[Array, Map]:
        """Evaluate f once at `z`; return `(f(z), vjp)` with `vjp(u) = Jᵀu`, callable many times."""
        value, vjp = self.pullback(lambda leaves: f(leaves[0]), (z,))
        return value, lambda u: vjp(u)[0]

    def jvp(self, f: Map, z: Array) -> Map | None:
        """Forward products `v ↦ J v` at `z`, or None where the framework has none."""
        return None

    def differentiable_vjp(self, f: Map, z: Array) -> Map:
        """Products `u ↦ Jᵀu` at `z` that are themselves recorded: gradients flow to z and to what f depends on.

        The default is for backends whose `linearize` composes with differentiation, or that have no tape at all.
        """
        return self.linearize(f, z)[1]

    def forward_only(
        self, f: Callable[..., Array], z0: Array, args: tuple[Any, ...], solve: Callable[[Map, Array], SolveResult]
    ) -> SolveResult:
        """Run `solve(lambda z: f(z, *args), z0)` with no gradient recorded."""
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
            z0: initial state `(batch, n)`. It gets no gradient: the fixed point does not depend on it.
            args: pytrees; their arrays get gradients.
            solve: the loop with solver and tolerances bound.
            adjoint: finds `u ≈ (I − J)^-T g`.

        Returns:
            The value z* `(batch, n)`, which is `forward.z` to the last bit, with gradients attached whenever the
            framework records them, what the solver did, and a record that the backward pass will fill (None where
            there is no such path).
        """

    def differentiate_through(
        self,
        f: Callable[..., Array],
        z0: Array,
        args: tuple[Any, ...],
        steps: Callable[[Map, Array, SolveResult | None], Any],
        forward: SolveResult | None,
    ) -> Any:
        """`steps(lambda z: f(z, *args), z0, forward)` with its gradient recorded; tracing, f is called once."""
        return steps(lambda z: f(z, *args), z0, forward)

    @abstractmethod
    def detach(self, x: Array) -> Array:
        """The same numbers, without a gradient."""

    def straight_through(self, value: Array, carrier: Array) -> Array:
        """`value` `(batch, n)` with the derivative of `carrier` `(batch, n)`.

        A backend may override this to spare the passes, and to keep NaN in `carrier` out of the value.
        """
        return value + (carrier - self.detach(carrier)) if self.grad_enabled() else value

    def checkpoint(self, f: Map) -> Map:
        """f, evaluated again in the backward pass in place of keeping what it computed."""
        return f

    def grad_enabled(self) -> bool:
        """Whether a gradient may be asked for later. A backend without a tape answers False."""
        return True

    def vjp(
        self, value: Callable[..., tuple[Array, Any]], args: tuple[Any, ...], cotangent: Array
    ) -> tuple[Array, Any, tuple[Any, ...]]:
        """Cotangents of `args` for `value(*args) -> (array, aux)`, by the framework's own differentiation.

        Returns:
            The value, aux, and for each argument a tree like it; None in place of leaves without a derivative
            (integers, strings).
        """
        leaves, structure = self.flatten(args)
        moving = [i for i, leaf in enumerate(leaves) if self.is_array(leaf) and "float" in self.dtype_name(leaf)]
        kept: list[Any] = []

        def of_leaves(moved: tuple[Array, ...]) -> Array:
            changed = dict(zip(moving, moved, strict=True))
            found, aux = value(*self.unflatten(structure, [changed.get(i, leaf) for i, leaf in enumerate(leaves)]))
            kept.append(aux)
            return found

        found, vjp = self.pullback(of_leaves, tuple(leaves[i] for i in moving))
        gradients = dict(zip(moving, vjp(cotangent), strict=True))
        return found, kept[0], self.unflatten(structure, [gradients.get(i) for i in range(len(leaves))])

    def grad(self, fn: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """The gradient of a scalar function of one array; may be nested where `second_derivatives` is promised."""

        def gradient(x: Array) -> Array:
            one = self.asarray(1.0, like=x)
            return self.vjp(lambda moved: (fn(moved), None), (x,), one)[2][0]

        return gradient

    # -- measuring and checking ---------------------------------------------------------------------------------

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` compiled, on a backend that promises `jit`; elsewhere `fn` itself."""
        return fn

    def high_precision(self) -> AbstractContextManager[object]:
        """What the conformance suite runs in: double precision at hand, and no product shortened (TF32)."""
        return nullcontext()

    def synchronize(self) -> None:
        """Wait until all devices have finished. Only measurements call it."""
        return None

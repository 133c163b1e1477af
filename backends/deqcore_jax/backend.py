"""The JAX backend: everything is traced, so that `fixed_point` works inside jit, grad, vmap, scan and checkpoint.

Eager calls work the same way: f is traced, and the compiled solve for its structure is reused (`jit_cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import PyTreeDef
from jax.typing import ArrayLike
from numpy.typing import NDArray

from deqcore.abc.backend import Backend
from deqcore.abc.guards import CallGuards
from deqcore.abc.linalg import SmallLinalg
from deqcore.abc.numbers import NumberOps
from deqcore.abc.scaling import least_plain_norm, scaled_norm
from deqcore.errors import BackendError
from deqcore.types import Capabilities, Figures, LoopVars, Tree
from deqcore_jax import batched_linalg, failures, pytrees
from deqcore_jax.autodiff import JaxAutodiff
from deqcore_jax.closure import is_traced
from deqcore_jax.dtypes import single, wide
from deqcore_jax.harness import JaxHarness
from deqcore_jax.history import JaxHistory
from deqcore_jax.kernels import JaxKernels, root
from deqcore_jax.loop import anywhere, is_recorded, loop

pytrees.register()


class JaxLinalg(SmallLinalg):
    """Small systems by elimination over the whole batch, which XLA compiles."""

    def solve(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return batched_linalg.solve(a, b)

    def solve_upper(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return batched_linalg.solve_upper(a, b)

    def solve_positive(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return batched_linalg.solve_positive(a, b)

    def least_singular_value(self, a: jax.Array, columns: jax.Array) -> jax.Array:
        return batched_linalg.least_singular_value(a, columns)

    def eye(self, like: jax.Array, rows: int, columns: int | None = None) -> jax.Array:
        return jnp.eye(rows, columns, dtype=like.dtype)


class JaxGuards(CallGuards):
    """Arrays cannot be written to, so only traced figures need care."""

    def watch(self, report: Callable[[Figures], None], figures: Figures, *, compiled: bool) -> None:
        failures.watch(report, figures, compiled=compiled)


class JaxNumbers(NumberOps):
    """Exponents by their bits, traced scalars, and random numbers by keys."""

    def power_of_two(self, x: jax.Array) -> jax.Array:
        kind = jnp.finfo(x.dtype)
        bits = jnp.dtype(f"int{kind.bits}")
        exponent = jnp.asarray(((1 << kind.nexp) - 1) << kind.nmant, bits)  # three operations, where frexp takes thirty
        return lax.bitcast_convert_type(lax.bitcast_convert_type(x, bits) & exponent, x.dtype)

    def from_pairs(self, x: jax.Array) -> jax.Array:
        return lax.complex(x[..., 0], x[..., 1])

    def normal(self, like: jax.Array, seed: int, index: Sequence[ArrayLike]) -> jax.Array:
        key = jax.random.key(seed)
        for number in index:
            key = jax.random.fold_in(key, jnp.asarray(number).astype(jnp.uint32))
        return jax.random.normal(key, like.shape, like.dtype)

    def as_scalar(self, value: ArrayLike, like: jax.Array) -> jax.Array:
        if isinstance(value, int) or jnp.issubdtype(jnp.result_type(value), jnp.integer):
            return jnp.asarray(value).astype(jnp.int32)
        return jnp.asarray(value).astype(single(like.dtype))


class JaxBackend(Backend):
    """JAX arrays on any device, concrete or traced."""

    name: ClassVar[str] = "jax"
    xp = jnp
    registration = "jax.tree_util.register_dataclass"
    linalg_class = JaxLinalg
    autodiff_class = JaxAutodiff
    numbers_class = JaxNumbers
    guards_class = JaxGuards
    kernels_class = JaxKernels
    harness_class = JaxHarness

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """The capabilities now: double precision is a switch of the process, and recorded loops have fixed lengths."""
        return replace(_CAPABILITIES, float64=bool(jax.config.jax_enable_x64), nested_loops=not is_recorded())

    def is_array(self, leaf: object) -> bool:
        return isinstance(leaf, jax.Array)

    def asarray(self, a: object, *, dtype: str | None = None, like: jax.Array | None = None) -> jax.Array:
        kind = dtype or (like.dtype if like is not None else None)
        if like is None or isinstance(like, jax.core.Tracer) or not _one_device(like):
            return jnp.asarray(a, kind)
        return jnp.asarray(a, kind, device=like.sharding)

    def to_numpy(self, x: jax.Array) -> NDArray[Any]:
        array = np.asarray(x)
        return array.astype(np.float32) if array.dtype.kind == "V" else array

    def flatten(self, tree: Tree) -> tuple[list[Tree], PyTreeDef]:
        return jax.tree.flatten(tree)

    def unflatten(self, structure: PyTreeDef, leaves: Sequence[Tree]) -> Tree:
        return jax.tree.unflatten(structure, leaves)

    def device_of(self, x: jax.Array) -> str | None:
        if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
            return None
        return ", ".join(sorted(str(device) for device in x.devices()))

    def is_traced(self, *leaves: Tree) -> bool:
        return is_traced(leaves)

    def to_device(self, x: jax.Array, device: str) -> jax.Array:
        kind, _, index = device.partition(":")
        try:
            return jax.device_put(x, jax.devices(kind)[int(index or 0)])
        except (RuntimeError, IndexError, ValueError) as error:
            raise BackendError(f"jax cannot use the device {device!r}: {error}") from error

    def astype(self, x: jax.Array, dtype: str) -> jax.Array:
        return x.astype(dtype)

    # -- rows ---------------------------------------------------------------------------------------------------

    def to_accum_dtype(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(x).astype(wide())

    def cast(self, x: jax.Array, like: jax.Array) -> jax.Array:
        return x.astype(like.dtype)

    def norm(self, v: jax.Array) -> jax.Array:
        length: jax.Array = _norm(self, v)
        return length

    def inner(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(self.to_accum_dtype(a) * self.to_accum_dtype(b), axis=1)

    def select(self, mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
        # XLA would compute the mask again for each number of a row, except if its last operation counts as expensive.
        once = jnp.sqrt(mask.astype(jnp.float32)) != 0
        return jnp.where(once.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    def take(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.take(x, rows, axis=0, mode="clip")  # the default tests each index and fills with NaN

    def history(self, like: jax.Array, history_size: int, dtype: str | None = None) -> JaxHistory:
        return JaxHistory.empty(like, history_size, jnp.dtype(dtype) if dtype else None, wide())

    # -- loops --------------------------------------------------------------------------------------------------

    def loop(
        self,
        running: Callable[[LoopVars], jax.Array | bool],
        body: Callable[[LoopVars], LoopVars],
        carry: LoopVars,
        steps: ArrayLike,
        check_every: int | str = "auto",
    ) -> LoopVars:
        return loop(running, body, carry, steps, check_every)

    def choose(
        self, wanted: jax.Array, body: Callable[[Any], LoopVars], otherwise: Callable[[Any], LoopVars], carry: Any
    ) -> LoopVars:
        chosen: LoopVars = lax.cond(anywhere(jnp.any(wanted)), body, otherwise, carry)
        return chosen

    def scan(self, body: Callable[[LoopVars], LoopVars], carry: LoopVars, times: int) -> LoopVars:
        if times == 0:
            return carry  # a scan traces its body even so, and the body may do what must not be done
        end: LoopVars = lax.scan(lambda state, _: (body(state), None), carry, length=times)[0]
        return end

    def detach(self, x: jax.Array) -> jax.Array:
        return lax.stop_gradient(x)


_CAPABILITIES = Capabilities(
    jvp=True, jit=True, vmap=True, bfloat16=True, complex=True, accelerator=True, second_derivatives=True, eager=False
)


@partial(jax.jit, static_argnums=0, inline=True)  # eagerly one program, not one for each of thirty operations
def _norm(backend: JaxBackend, v: jax.Array) -> jax.Array:
    """Return the 2-norm of each row."""
    if jax.default_backend() != "cpu":
        return _norm_by_ranges(v.astype(single(v.dtype)))
    # No condition: with a batch over several devices each would be a collective in every step.
    return scaled_norm(backend, v, backend.numbers.max_abs(v, jnp.zeros_like(v, single(v.dtype), shape=v.shape[:1])))


def _norm_by_ranges(v: jax.Array) -> jax.Array:
    """Return the 2-norm of each row by sums of squares of v, v·2^k and v·2^-k, which XLA fuses into one pass.

    On an accelerator the host would wait for the predicate of a second pass. Source: Blue (1978), "A portable Fortran
    program to find the Euclidean norm of a vector".
    """
    factor = 2.0 ** (jnp.finfo(v.dtype).maxexp // 2)
    low = least_plain_norm(jnp, v.dtype)
    plain, up, down = (root(jnp.sum(jnp.square(v * scale), axis=1)) for scale in (1.0, factor, 1 / factor))
    return jnp.where(plain > 1 / low, down * factor, jnp.where(plain < low, up / factor, plain))


def _one_device(x: jax.Array) -> bool:
    return len(x.devices()) == 1

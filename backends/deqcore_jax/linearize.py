"""f linearised once at z*: products with J, with its transpose, and with the derivatives of the leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Never

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from deqcore.abc.backward import refuse_vjp
from deqcore.errors import BackendError, StrategyError
from deqcore.types import Map
from deqcore_jax.closure import Program, calls


class Traced:
    """A function of one array as a jaxpr `(*consts, x) -> y`, with its constants."""

    def __init__(self, jaxpr: core.Jaxpr, consts: list[jax.Array]) -> None:
        self.jaxpr, self.consts = jaxpr, consts

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the value at `x`."""
        return self.at(x, self.consts)

    def at(self, x: jax.Array, consts: list[jax.Array]) -> jax.Array:
        """Return the value at `x` with these constants."""
        value: jax.Array = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, ()))(*consts, x)[0]
        return value


class Linear:
    """df = J dz + Σ_i (∂f/∂leaf_i) dleaf_i, in both modes where f has both.

    Products with J are traced here, once, however often a strategy calls them, because transposing takes time.

    Attributes:
        jvp: J v for `v` `(batch, n)`.
        vjp: Jᵀu for `u` `(batch, n)`; raises StrategyError where f has no reverse mode.
        reversible: whether f has a reverse mode in z and in the leaves that may move.

    Args:
        program: f.
        z: the point `(batch, n)`.
        leaves: the other inputs of f.
        moved: positions of the leaves that may move.
    """

    jvp: Traced
    vjp: Map

    def __init__(self, program: Program, z: jax.Array, leaves: list[jax.Array], moved: list[int]) -> None:
        self.z = z
        self.moved = [leaves[i] for i in moved]
        f = _of_moved(program, leaves, moved)
        self._in_leaves = lambda *at: f(z, *at)
        self._linear: Callable[..., jax.Array] | None = None
        self.vjp = _refuse_reverse
        try:
            linear = jax.linearize(f, z, *self.moved)[1]
        except ValueError:  # values and tangents come from one operation, such as a loop whose end depends on z
            self.jvp = _traced(lambda v: jax.jvp(lambda z: f(z, *self.moved), (z,), (v,))[1], z)
            self.reversible = False
            return
        self._linear = linear
        zeros = [jnp.zeros_like(leaf) for leaf in self.moved]

        # The derivative of the linear map in its first argument only: the leaves' part of it drops out.
        def jvp(v: jax.Array) -> jax.Array:
            return jax.jvp(lambda dz: linear(dz, *zeros), (jnp.zeros_like(v),), (v,))[1]

        self.jvp = _traced(jvp, z)
        self.reversible = self._transpose(program)

    def _transpose(self, program: Program) -> bool:
        """Make `vjp`, if f supports reverse mode."""
        try:
            transposed = jax.linear_transpose(self.jvp, self.z)
            self.vjp = _traced(lambda u: transposed(u)[0], self.z)
            if program.calls("while"):  # its transpose in the leaves is taken by JAX, too late for an error of ours
                jax.eval_shape(self.vjp_leaves, self.z)
        except (ValueError, NotImplementedError):
            return False
        return True

    def jvp_leaves(self, d: list[jax.Array]) -> jax.Array:
        """Return Σ_i (∂f/∂leaf_i) d_i, `(batch, n)`."""
        linear = self._linear
        if linear is None:
            return jax.jvp(self._in_leaves, self.moved, d)[1]
        zeros = [jnp.zeros_like(leaf) for leaf in self.moved]
        return jax.jvp(lambda *d: linear(jnp.zeros_like(self.z), *d), zeros, d)[1]

    def vjp_leaves(self, u: jax.Array) -> list[jax.Array]:
        """Return (∂f/∂leaf_i)ᵀ u for each leaf that moves."""
        return list(jax.linear_transpose(lambda *d: self.jvp_leaves(list(d)), *self.moved)(u))


class Reverse:
    """Jᵀu and (∂f/∂leaf_i)ᵀ u by reverse mode alone, the only mode of `jax.custom_vjp` functions inside f.

    Attributes:
        vjp: Jᵀu for `u` `(batch, n)`.

    Args:
        program: f.
        z: the point `(batch, n)`.
        leaves: the other inputs of f.
        moved: positions of the leaves that may move.
        products: whether to make products with Jᵀ; without them z is held fixed.

    Raises:
        StrategyError: f has no reverse mode (`lax.while_loop`).
    """

    vjp: Map

    def __init__(
        self, program: Program, z: jax.Array, leaves: list[jax.Array], moved: list[int], *, products: bool = True
    ) -> None:
        f = _of_moved(program, leaves, moved)
        at = [leaves[i] for i in moved]
        try:
            if not products:
                self._vjp = jax.vjp(lambda *at: f(z, *at), *at)[1]
                self._first, self.vjp = 0, refuse_vjp
                return
            self._vjp, self._first = jax.vjp(f, z, *at)[1], 1
            self.vjp = _traced(lambda u: self._vjp(u)[0], z)
        except (ValueError, NotImplementedError) as error:
            raise no_reverse_mode(error) from error

    def vjp_leaves(self, u: jax.Array) -> list[jax.Array]:
        """Return (∂f/∂leaf_i)ᵀ u for each leaf that moves."""
        try:
            return list(self._vjp(u)[self._first :])
        except (ValueError, NotImplementedError) as error:
            raise no_reverse_mode(error) from error

    def jvp(self, v: jax.Array) -> jax.Array:
        """Return J v, the transpose of `vjp`."""
        try:
            return jax.linear_transpose(self.vjp, v)(v)[0]
        except (ValueError, NotImplementedError, TypeError) as error:
            raise StrategyError(
                f"f calls a jax.custom_vjp function whose backward rule is not linear in the cotangent, so that it "
                f"has first derivatives only ({_first_line(error)}). Write a linear rule for second derivatives."
            ) from error


def product(f: Map, z: jax.Array) -> Map:
    """Return `v ↦ J v` at z `(batch, n)`.

    Raises:
        BackendError: f calls a `jax.custom_vjp` function whose backward rule is not linear.
    """
    try:
        products: Map = jax.linearize(f, z)[1]
    except ValueError:  # as in Linear
        return lambda v: jax.jvp(f, (z,), (v,))[1]
    if not calls(jax.make_jaxpr(products)(z), "custom_lin"):
        return products
    vjp = jax.vjp(f, z)[1]  # such a function has only a transpose; the transpose of that is the product
    try:
        transposed = jax.linear_transpose(lambda u: vjp(u)[0], z)
        return _traced(lambda v: transposed(v)[0], z)
    except (ValueError, NotImplementedError, TypeError) as error:
        reason = "f calls a jax.custom_vjp function whose backward rule is not linear in the cotangent."
        raise BackendError.no_products(reason) from error


def no_reverse_mode(error: Exception | None = None) -> StrategyError:
    """Return the error for an f that JAX cannot differentiate in reverse mode."""
    reason = f" ({_first_line(error)})" if error is not None else ""
    return StrategyError(
        f"f cannot be differentiated in reverse mode{reason}. Replace lax.while_loop and lax.fori_loop with traced "
        f"bounds by lax.scan or lax.fori_loop with constant bounds, give the function a jax.custom_vjp rule, or use "
        f"forward mode (jax.jvp, jax.jacfwd) with backward.strategy = 'exact-ift'."
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(". ")


def _of_moved(program: Program, leaves: list[jax.Array], moved: list[int]) -> Callable[..., jax.Array]:
    """Return f as a function of z and of the leaves that may move."""

    def f(z: jax.Array, *at: jax.Array) -> jax.Array:
        merged = list(leaves)
        for i, leaf in zip(moved, at, strict=True):
            merged[i] = leaf
        return program(z, merged)

    return f


def _traced(f: Map, example: jax.Array) -> Traced:
    """Trace f for an input like `example`, without what its output does not need.

    The JVP rule of `lax.custom_linear_solve` fails if an input that no product uses has a tangent while the products
    themselves are constant, as for an affine f.
    """
    closed = jax.make_jaxpr(f)(example)
    pure = closed.jaxpr.replace(constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars])
    jaxpr, used = pe.dce_jaxpr(pure, [True], [False] * len(closed.consts) + [True])
    consts = [const for const, needed in zip(closed.consts, used, strict=False) if needed]
    return Traced(jaxpr, consts)


def _refuse_reverse(*_: object) -> Never:
    raise no_reverse_mode()


def forward_only(dz: jax.Array) -> jax.Array:
    """Return the same tangent; taking its transpose, as reverse mode does, raises StrategyError."""
    return _forward_only.bind(dz)


_forward_only = core.Primitive("deqcore_forward_only")
_forward_only.def_impl(lambda x: x)
_forward_only.def_abstract_eval(lambda aval: aval)
ad.deflinear2(_forward_only, _refuse_reverse)
batching.defvectorized(_forward_only)
mlir.register_lowering(_forward_only, lambda _, x: [x])

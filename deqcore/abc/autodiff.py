"""Differentiation: products with the Jacobian of f, and the implicit gradient of a fixed point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.arrays import ArrayOps, is_inexact
from deqcore.types import Array, BackwardRecord, BoundMap, Map, SolveResult

if TYPE_CHECKING:
    from deqcore.abc.two_state import TwoState


class Autodiff(ABC):
    """Differentiates as the framework does. `implicit`, and `pullback` or `linearize` with `vjp`, have no default.

    Example:
        >>> import deqcore
        >>> be = deqcore.get_backend(backend="numpy")
        >>> value, vjp = be.autodiff.linearize(lambda z: 3.0 * z, be.asarray([[1.0, 2.0]]))
        >>> vjp(be.asarray([[1.0, 0.0]])).tolist()
        [[3.0, 0.0]]
    """

    conjugates: ClassVar[bool] = False
    """Whether a cotangent g of a complex z stands for Re(g dz), as in JAX, or for Re(conj(g) dz), as in PyTorch."""

    def __init__(self, be: ArrayOps) -> None:
        """Make the part of the backend `be`."""
        self.be = be

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
        leaves, structure = self.be.flatten(args)
        still = self.be.unflatten(
            structure, [self.be.detach(leaf) if self.be.is_array(leaf) else leaf for leaf in leaves]
        )
        with self.be.errstate():
            return solve(lambda z: self.be.detach(f(z, *still)), self.be.detach(z0))

    def staged(
        self, f: Callable[..., Array], z0: Array, args: tuple[Any, ...], body: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return `run(*data) = body(bind, *data)` without gradients, for many calls with data of the same shapes.

        `bind(args)`, called once in a run, is `lambda z: f(z, *args)`. A tracing backend traces f here, once, and
        compiles `run` in its first call. From then on f and what it closes over are fixed, as are Python numbers in
        `args`.

        Args:
            f: `f(z, *args)` on raveled states.
            z0: a state `(batch, n)` like those that `body` will pass to f.
            args: arguments like those that `body` will bind.
            body: hashable; equal ones may share compiled code. It and `data` see arrays and trees of arrays only.
        """

        def run(*data: Any) -> Any:
            bound: list[tuple[Any, ...]] = []

            def solve(g: Map, _: Array) -> Any:
                def bind(args: tuple[Any, ...]) -> Map:
                    bound.append(args)
                    return g

                return body(bind, *data)

            return self.forward_only(lambda z: f(z, *bound[-1]), z0, (), solve)

        return run

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
        steps: Callable[[Map, Array, SolveResult | None, Any], Any],
        forward: SolveResult | None,
        step: Any = 0,
    ) -> Any:
        """Run `steps(lambda z: f(z, *args), z0, forward, step)` and record its gradient.

        A tracing backend calls f once, and another training step `step` compiles nothing.
        """
        return steps(BoundMap(f, args), z0, forward, step)

    def repeat(self, body: Callable[[Map, Array, Any], Array], f: Map, z: Array, times: Any) -> Array:
        """Apply `z ← body(f, z, i)` for i = 0, …, `times` − 1 without recording a gradient.

        Args:
            body: takes f, the state `(batch, n)` and the index.
            f: the map.
            z: the start `(batch, n)`.
            times: an integer, or a traced scalar.
        """
        z = self.be.detach(z)
        for i in range(int(times)):
            z = self.be.detach(body(f, z, i))
        return z

    def reversible(self, f: Map, z0: Array, rule: TwoState, steps: int) -> tuple[Array, Array, Array]:
        """Return the second state of `rule` after `steps` steps from z0, differentiable; f at z0, and f at the value.

        The default records every step. A backend with a tape undoes them in the backward pass instead, so that memory
        does not grow with `steps`; it gets all inputs of f from `f.args` and from what f closes over.
        """
        first = f(z0)
        pair = rule.step(f, rule.start(z0), first)
        _, z = self.be.scan(lambda pair: rule.step(f, pair), pair, steps - 1)
        value = rule.down(z)
        return value, self.be.detach(first), self.be.detach(f(self.be.detach(value)))

    def straight_through(self, value: Array, carrier: Array) -> Array:
        """Return `value` `(batch, n)` with the derivative of `carrier` `(batch, n)`.

        A backend may override this to save the passes, and to keep NaN in `carrier` out of the value.
        """
        return value + (carrier - self.be.detach(carrier)) if self.grad_enabled() else value

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
        leaves, structure = self.be.flatten(args)
        moving = [i for i, leaf in enumerate(leaves) if self.be.is_array(leaf) and is_inexact(self.be.dtype_name(leaf))]
        kept: list[Any] = []

        def of_leaves(moved: tuple[Array, ...]) -> Array:
            changed = dict(zip(moving, moved, strict=True))
            primal, aux = value(*self.be.unflatten(structure, [changed.get(i, leaf) for i, leaf in enumerate(leaves)]))
            kept.append(aux)
            return primal

        primal, vjp = self.pullback(of_leaves, tuple(leaves[i] for i in moving))
        gradients = dict(zip(moving, vjp(cotangent), strict=True))
        return primal, kept[0], self.be.unflatten(structure, [gradients.get(i) for i in range(len(leaves))])

    def grad(self, fn: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """Return the gradient of a scalar function of one array; it may be nested if `second_derivatives` is set."""

        def gradient(x: Array) -> Array:
            one = self.be.asarray(1.0, like=x)
            return self.vjp(lambda moved: (fn(moved), None), (x,), one)[2][0]

        return gradient

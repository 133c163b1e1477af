"""The implicit gradient under `torch.func` (grad, vjp, jvp) and in forward mode.

The tape of `autograd.py` is not available here: several transformations may track a tensor at once, and none of them
exposes its leaves. So the value is attached by its derivative alone. With y = f(z, θ) and A = I − J,

    out = root(y, z):    d out = A^-1 (dy − J dz),    in reverse  (g_y, g_z) = (u, g − u),  u = A^-T g,

which is one Newton step z + A^-1 (y − z) at its fixed point: right in θ to first order for any dependence of z on θ,
and to third order if z is such an `out` itself. Every derivative that may be differentiated again takes the step twice.
u and the tangent are attached as solutions of their own linear equations, by the same rule.

`torch.func.vjp` gives Jᵀu, and transposing it once more gives J v, which needs no forward-mode formula inside f.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.backend import Backend
from deqcore.abc.backward import refuse_vjp
from deqcore.errors import ProblemError, StrategyError
from deqcore.types import Map, SolveResult, Tree
from deqcore_torch.checkpoints import CURE, largest
from deqcore_torch.disable_dynamo import untraced
from deqcore_torch.eval_context import Ambient, nothing_recorded
from deqcore_torch.jvp import NEAR_ZERO
from deqcore_torch.lanes import Lanes
from deqcore_torch.wrappers import alive, outlasting

_vjp: Any = torch.func.vjp  # its annotation also has the auxiliary output, which does not exist here
AGAIN = "torch.func evaluates f again in the backward pass."
MOST = 2  # the order of derivatives, and the nested levels: PyTorch fails inside a third one
ORDER = (
    "Derivatives of order 3 and more through a fixed point are not supported in PyTorch: use JAX, where exact-ift "
    "nests to any order."
)


def active() -> bool:
    """Return whether `torch.func` or forward mode tracks computations here."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def is_tracked(x: Tensor) -> bool:
    """Return whether autograd, `torch.func` or forward mode records what is computed from x."""
    return (torch.is_grad_enabled() and x.requires_grad) or active()


def refuse_vmap(what: str, remedy: str) -> None:
    """Raise inside `torch.func.vmap`.

    Raises:
        StrategyError: `what` cannot run there.
    """
    if TransformType.Vmap in _levels():
        raise StrategyError(f"{what} cannot run inside torch.func.vmap. {remedy}")


def refuse_batched(g: Tensor) -> None:
    """Raise for a batched cotangent of a solve that autograd's tape recorded.

    Raises:
        StrategyError: a batched tensor cannot decide when a loop ends.
    """
    if is_legacy_batchedtensor(g) or TransformType.Vmap in _levels():
        raise StrategyError(
            "The backward pass of a solve outside of torch.func cannot run with batched cotangents (is_grads_batched "
            "= True, vectorize = True, or vmap of torch.autograd.grad), because the loop of its adjoint solve needs "
            "values. Use torch.func.jacrev, or vectorize = False."
        )


def to_numpy(x: Tensor) -> Any:
    """Return the values of `x` (on the host) without the wrappers of grad, vjp and jvp, as a NumPy array."""
    if not active():
        return x.numpy()
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    x = x.detach()
    with torch._C._DisableFuncTorch():
        return x.numpy()


def vjp_of(f: Map, z: Tensor) -> tuple[Tensor, Map]:
    """Return f(z), and u ↦ Jᵀu."""
    y, vjp = _vjp(f, z)
    return y, lambda u: vjp(u)[0]


def jvp_of(f: Map, z: Tensor) -> tuple[Tensor, Map]:
    """Return f(z), and V ↦ J v."""
    y, vjp = vjp_of(f, z)
    _, jvp = vjp_of(vjp, torch.full_like(y, NEAR_ZERO))
    return y, jvp


def unrecorded(f: Map) -> Map:
    """Return f without a derivative for the transformations that are active here; later ones differentiate it.

    Outer transformations would record every step of a solve, which `torch.no_grad` does not prevent. A product J v that
    the solve takes is itself a transformation, and must see f's derivative.
    """
    outer = len(_levels())

    def run(z: Tensor) -> Tensor:
        value = f(z)
        return value if len(_levels()) > outer else value.detach()

    return run


def attach(
    backend: Backend, f: Callable[..., Tensor], forward: SolveResult, args: tuple[Tree, ...], adjoint: AdjointSolver
) -> Tensor:
    """z* `(batch, n)` with its implicit gradient for all transformations that are active.

    Args:
        backend: the backend of these tensors.
        f: `f(z, *args)` on `(batch, n)`.
        forward: the solution, without gradients.
        args: arguments of f.
        adjoint: maps a cotangent to u.

    Raises:
        StrategyError: the transformations nest too deeply for right derivatives.
    """
    _refuse_depth()
    z = forward.z.detach()
    again = Ambient.now(z).around(outlasting(lambda z: f(z, *args)))
    state = forward.carry.state if adjoint.uses_state else None
    rows = z.shape[0] * math.prod(Lanes.now().sizes)
    return _attach(_Equation(backend, again, adjoint, state, rows=rows), z, f(z, *args), z)


def _attach(equation: _Equation, z: Tensor, y: Tensor, value: Tensor) -> Tensor:
    out: Tensor = _Root.apply(y, z, value, equation)
    if not equation.adjoint.exact:
        return out
    out = _Root.apply(equation.f(out), out, value, equation)
    return out


def _levels() -> list[Any]:
    return [interpreter.key() for interpreter in get_interpreter_stack() or []]


def _refuse_depth() -> None:
    levels = [level for level in _levels() if level != TransformType.Vmap]
    if levels.count(TransformType.Jvp) > 1:
        raise StrategyError(
            "Forward mode inside forward mode through a fixed point is not supported in PyTorch. Use jvp of grad "
            "(forward over reverse), grad of jvp, or JAX."
        )
    if len(levels) > MOST:
        raise StrategyError(ORDER)


@dataclass(frozen=True, eq=False)
class _Equation:
    """z = f(z), the strategy for its adjoint, and the forward solver's state.

    No tensor may be kept across levels of transformations: `_Root.forward` runs below its caller's level, and the
    record of `vjp` ends with its level. So f is linearised again at each use.
    """

    backend: Backend
    f: Map
    adjoint: AdjointSolver
    state: Any
    order: int = 1  # of the derivative that its own is
    rows: int = 0  # of the state

    def vjp(self, z: Tensor) -> Map:
        """Return u ↦ Jᵀu at z."""
        return vjp_of(self.f, z)[1] if self.adjoint.uses_vjp else refuse_vjp

    def jvp(self, z: Tensor) -> Map:
        """Return v ↦ J v at z: the transpose of `vjp`."""
        return jvp_of(self.f, z)[1]

    @untraced  # the engine calls it from outside of the solve, in code that torch.compile may run
    def solve(self, z: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """Return u = g + Jᵀu at z, where f(z) was y at the call."""
        u = self._plain(self.adjoint, self._linearized, z, y, g)
        if not self.adjoint.exact or not (torch.is_grad_enabled() or active()):
            return u
        return self._attached(lambda v: alive(g) + self.vjp(alive(z))(v), u, self.adjoint.transposed())

    @untraced
    def solve_forward(self, z: Tensor, y: Tensor, dy: Tensor, dz: Tensor | None) -> Tensor:
        """Return v = b + J v with b = dy − J dz, where f(z) was y at the call."""
        b = dy if dz is None else dy - self.jvp(z)(dz)
        turned = self.adjoint.transposed()
        v = self._plain(turned, self._pushed, z, y, b)
        return self._attached(lambda w: alive(b) + self.jvp(alive(z))(w), v, turned)

    def _attached(self, f: Map, solution: Tensor, adjoint: AdjointSolver) -> Tensor:
        return _attach(
            _Equation(self.backend, f, adjoint, self.state, self.order + 1, self.rows), solution, f(solution), solution
        )

    def _linearized(self, z: Tensor) -> tuple[Tensor | None, Map]:
        return vjp_of(self.f, z) if self.adjoint.uses_vjp else (None, refuse_vjp)

    def _pushed(self, z: Tensor) -> tuple[Tensor | None, Map]:
        return jvp_of(self.f, z)

    def _plain(
        self, adjoint: AdjointSolver, product: Callable[[Tensor], tuple[Any, Map]], z: Tensor, y: Tensor, b: Tensor
    ) -> Tensor:
        with nothing_recorded():
            again, at = product(z.detach())
            if again is not None:
                _check_same(again.detach(), y.detach(), self.backend.guards.output_eps(y))
            lanes = Lanes.now()
            if lanes:
                return lanes.solve_linear(lambda v: at(v).detach(), b, self._on_rows(adjoint))
            u, _ = adjoint(lambda v: at(v).detach(), b.detach(), self.state)
        solution: Tensor = u.detach()
        return solution

    def _on_rows(self, adjoint: AdjointSolver) -> Callable[[Map, Tensor], Tensor]:
        def solve(product: Map, b: Tensor) -> Tensor:
            if self.state is not None and b.shape[0] != self.rows:
                raise StrategyError(
                    f"{adjoint.name} cannot take batched cotangents (vmap of a vjp, as in jacrev), because the "
                    f"estimate of the forward solve belongs to its own samples. Use backward.strategy = 'exact-ift', "
                    f"or give jacrev chunk_size = 1."
                )
            u: Tensor = adjoint(product, b, self.state)[0]
            return u

        return solve


class _Root(torch.autograd.Function):
    """The solution's value as a function of y = f(z, θ) and z."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, z: Tensor, value: Tensor, equation: _Equation) -> Tensor:
        return value.clone()  # the tangent of a view would have to be a view

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, z, _, ctx.equation = inputs
        ctx.save_for_backward(y, z)
        ctx.save_for_forward(y, z)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (g,) = cotangents
        y, z = ctx.saved_tensors
        equation: _Equation = ctx.equation
        if equation.order > MOST:
            raise StrategyError(ORDER)
        try:
            u = equation.solve(z, y, g)
        except RuntimeError as error:
            if "escaped?" in str(error):  # PyTorch's own assertion: a tape around two levels of torch.func
                raise StrategyError(ORDER) from error
            raise
        if not equation.adjoint.exact:
            u = Refuse.apply(u, y, approximate(equation.adjoint, "differentiated again"))
        return u, g - u if ctx.needs_input_grad[1] else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        dy, dz, _, _ = tangents
        equation: _Equation = ctx.equation
        if equation.order > MOST:
            raise StrategyError(ORDER)
        if not equation.adjoint.exact:
            raise StrategyError(approximate(equation.adjoint, "asked for in forward mode"))
        y, z = ctx.saved_tensors
        return equation.solve_forward(z, y, torch.zeros_like(y) if dy is None else dy, dz)


class Refuse(torch.autograd.Function):
    """Identity that may not be differentiated; y ties it to everything that u depends on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, y: Tensor, reason: str) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.reason = inputs[2]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise StrategyError(ctx.reason)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise StrategyError(ctx.reason)


def approximate(adjoint: AdjointSolver, what: str) -> str:
    """Return why an approximate strategy cannot do this."""
    return (
        f"The gradient of {adjoint.name} was {what}, but it approximates the gradient in reverse "
        f"mode, and the derivative of an approximation is not a second derivative. Use backward.strategy = 'exact-ift'."
    )


def _check_same(again: Tensor, before: Tensor, precision: float) -> None:
    """Raise if the value of f has changed since the call, because something that f reads has changed.

    Args:
        again: the value now.
        before: the value at the call; the first axis of both is the batch.
        precision: the machine epsilon of the computation.

    Raises:
        ProblemError: the value is another one.
    """
    # Largest entries and no squares: these leave the range of the dtype.
    lanes = Lanes.now()
    if lanes:
        again, before = lanes.flat(again), lanes.flat(before)
    size = largest(before)
    off = largest(again - before)
    if bool((off > precision ** (2 / 3) * size).any()):
        raise ProblemError(
            f"f returned another value in the backward pass than at the call (at the same z, a difference of up to "
            f"{float(off.max()):.2g} for values of up to {float(size.max()):.2g}). {AGAIN} {CURE}"
        )

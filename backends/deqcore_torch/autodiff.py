"""Differentiation by autograd, and by functorch inside its transformations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.autodiff import Autodiff
from deqcore.abc.backend import Backend
from deqcore.abc.two_state import TwoState
from deqcore.errors import ConfigError, InitialIterateError
from deqcore.solve.loop import BoundSolve
from deqcore.solve.opaque import arrays_in
from deqcore.types import BackwardRecord, Map, SolveResult, Tree
from deqcore_torch import functorch, jvp, reversible
from deqcore_torch.autograd import attach
from deqcore_torch.checkpoints import checkpoint
from deqcore_torch.disable_dynamo import refuse_tracing, untraced
from deqcore_torch.eval_context import nothing_recorded
from deqcore_torch.gradients import straight_through
from deqcore_torch.lanes import Lanes
from deqcore_torch.module_hooks import hooks_made, muted


class TorchAutodiff(Autodiff):
    """Gradients by autograd."""

    def __init__(self, be: Backend) -> None:
        super().__init__(be)
        self.backend = be

    def linearize(self, f: Map, z: Tensor) -> tuple[Tensor, Map]:
        if functorch.active():
            return functorch.vjp_of(f, z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            made = hooks_made()
            y = f(z)
        return y.detach(), _products(y, z, made, create_graph=False)

    def differentiable_vjp(self, f: Map, z: Tensor) -> Map:
        if not torch.is_grad_enabled():
            return self.linearize(f, z)[1]
        z = z if z.requires_grad else z.detach().requires_grad_()
        made = hooks_made()
        y = f(z)
        return _products(y, z, made, create_graph=True)

    def jvp(self, f: Map, z: Tensor) -> Map:
        if functorch.active():
            product = functorch.jvp_of(f, z)[1]
            return product if torch.is_grad_enabled() else functorch.unrecorded(product)
        return jvp.jvp(f, z)

    @untraced
    def forward_only(
        self,
        f: Callable[..., Tensor],
        z0: Tensor,
        args: tuple[Tree, ...],
        solve: Callable[[Map, Tensor], SolveResult],
    ) -> SolveResult:
        _refuse_split(z0)
        refuse_tracing(z0)
        run: Map = lambda z: _untracked(f(z, *args))  # noqa: E731
        if functorch.active():
            run = functorch.unrecorded(lambda z: f(z, *args))
            if lanes := Lanes.now():
                _refuse_compact(solve)
                with nothing_recorded():
                    return lanes.solve(lambda z: f(z, *args), z0, _of_rows(solve, lanes))
        with nothing_recorded():
            return solve(run, z0.clone() if z0.is_inference() else z0.detach())

    @untraced
    def implicit(
        self,
        f: Callable[..., Tensor],
        z0: Tensor,
        args: tuple[Tree, ...],
        solve: Callable[[Map, Tensor], SolveResult],
        adjoint: AdjointSolver,
    ) -> tuple[Tensor, SolveResult, BackwardRecord | None]:
        forward = self.forward_only(f, z0, args, solve)
        if not torch.is_grad_enabled() and not functorch.active():
            return forward.z, forward, None
        record = BackwardRecord()
        tensors = list(arrays_in(self.backend, args)) if adjoint.exact else []
        value = attach(self.backend, f, forward, args, tensors, adjoint, record)
        return value, forward, record if value.requires_grad else None

    @untraced
    def differentiate_through(
        self,
        f: Callable[..., Tensor],
        z0: Tensor,
        args: tuple[Tree, ...],
        steps: Callable[[Map, Tensor, SolveResult | None, Any], Any],
        forward: SolveResult | None,
        step: Any = 0,
    ) -> Any:
        if functorch.active():
            functorch.refuse_vmap(
                "A strategy that differentiates through steps (phantom, unrolled, looped)",
                "Use backward.strategy = 'exact-ift', or make the mapped axis a part of the batch.",
            )
        return super().differentiate_through(f, z0, args, steps, forward, step)

    @untraced
    def repeat(self, body: Callable[[Map, Tensor, Any], Tensor], f: Map, z: Tensor, times: Any) -> Tensor:
        with nothing_recorded():
            return super().repeat(body, f, z, times)

    @untraced
    def reversible(self, f: Map, z0: Tensor, rule: TwoState, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        if functorch.active():
            functorch.refuse_vmap(
                "The strategy reversible",
                "Use backward.strategy = 'exact-ift', or make the mapped axis a part of the batch.",
            )
        parent = super()
        return reversible.iterate(self.backend, f, z0, rule, steps, lambda: parent.reversible(f, z0, rule, steps))

    def straight_through(self, value: Tensor, carrier: Tensor) -> Tensor:
        return straight_through(value, carrier) if carrier.requires_grad or functorch.active() else value

    def checkpoint(self, f: Map) -> Map:
        def checkpointed(z: Tensor) -> Any:
            if functorch.active():
                return f(z)  # evaluated again outside of forward mode it saves fewer tensors: an error in torch
            return checkpoint(f, z)

        return checkpointed

    def grad_enabled(self) -> bool:
        return torch.is_grad_enabled() or functorch.active()

    def vjp(
        self, value: Callable[..., tuple[Tensor, Tree]], args: tuple[Tree, ...], cotangent: Tensor
    ) -> tuple[Tensor, Tree, tuple[Tree, ...]]:
        leaves, structure = self.be.flatten(args)
        moved = [_leaf(leaf) for leaf in leaves]
        with torch.enable_grad():
            primal, aux = value(*self.be.unflatten(structure, moved))
        wanted = [leaf for leaf in moved if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients = iter(_gradients(primal, wanted, cotangent))
        results = [next(gradients) if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in moved]
        return primal.detach(), aux, self.be.unflatten(structure, results)

    def grad(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def gradient(x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                (derivative,) = torch.autograd.grad(fn(x), x, create_graph=True)
            return derivative

        return gradient


def _products(y: Tensor, z: Tensor, made: int, *, create_graph: bool) -> Map:
    """Return u ↦ Jᵀu for y = f(z), without the hooks that f has set since `made`, see `muted`."""
    mute = muted(y, made)

    def vjp(u: Tensor) -> Tensor:
        if not y.requires_grad:
            return torch.zeros_like(u)
        with mute:
            (product,) = torch.autograd.grad(y, z, u, retain_graph=True, create_graph=create_graph, allow_unused=True)
        return torch.zeros_like(u) if product is None else product

    return vjp


def _refuse_split(z0: Tensor) -> None:
    """Refuse a DTensor: its rows are on several ranks, each with its own histories and loop."""
    if type(z0) is not Tensor and hasattr(z0, "full_tensor"):
        raise InitialIterateError(
            "The initial iterate z0 must be a plain tensor, because each rank solves for its own tensors (got a "
            "DTensor). Pass z0.full_tensor(), or z0.to_local() if the batch is split. Parameters may be DTensors "
            "(tensor-parallel modules): the cell must then take and return plain tensors, the same on each rank of the "
            "tensor-parallel group."
        )


def _refuse_compact(solve: object) -> None:
    if getattr(solve, "narrow", None) is not None:
        raise ConfigError(
            "forward.compact must be false inside torch.func.vmap, where rows of several lanes share one solve (got "
            "true). Set forward.compact = false."
        )


def _of_rows(solve: Callable[[Map, Tensor], SolveResult], lanes: Lanes) -> Callable[[Map, Tensor], SolveResult]:
    """Return `solve` with the tolerances of the rows of all lanes, where each sample has one of its own."""
    if not isinstance(solve, BoundSolve) or not isinstance(solve.control.atol, Tensor) or not solve.control.atol.ndim:
        return solve
    return replace(solve, control=solve.control._replace(atol=lanes.flat(solve.control.atol)))


def _untracked(y: Tensor) -> Tensor:
    """Return y without a history if no gradient is recorded: f may return one of its arguments."""
    return y.detach() if y.requires_grad and not torch.is_grad_enabled() else y


def _leaf(leaf: Any) -> Any:
    differentiable = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    return leaf.detach().requires_grad_() if differentiable else leaf


def _gradients(value: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    if not value.requires_grad or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(value, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]

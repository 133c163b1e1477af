"""Attach the implicit gradient to a solution in PyTorch.

One recorded evaluation y = f(z*, …) is enough: it carries the parameters' gradients by ordinary autograd, so closures,
modules and hooks need no registration, and its graph gives the vjps Jᵀu. `_Attach` follows y and turns the cotangent g
of the value into u; autograd then continues through y with u.

z* enters f through a `_Gate`, which drops the part of the cotangent that would flow into z*: u already contains it.

Second derivatives (`exact` strategies) come from the same evaluation: see `second_order.py`. They need the tensors
that f depends on: those in args, and leaves, found by walking the graph of y (`graph.py`). Three cases are refused: a
tensor that f closes over and that has its own history, a Function that is differentiable only once, and compiled code,
whose backward PyTorch does not differentiate. Gradients that leave compiled code are replaced by gradients that raise,
because PyTorch's own error does not say how to fix it.

`torch.func` and forward mode have no such tape: see `functorch.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.backend import Backend
from deqcore.types import BackwardRecord, PassInputs, SolveResult, Status, Tree
from deqcore_torch import functorch
from deqcore_torch.functorch import Refuse, approximate
from deqcore_torch.graph import Outside, outside, refuse_compiled, sequence, sources_of
from deqcore_torch.module_hooks import Mute, hooks_made, muted
from deqcore_torch.saved_tensors import Recording, recording
from deqcore_torch.second_order import Recorded, Twice, distinct


def attach(
    backend: Backend,
    f: Callable[..., Tensor],
    forward: SolveResult,
    args: tuple[Tree, ...],
    tensors: Sequence[Tensor],
    adjoint: AdjointSolver,
    record: BackwardRecord,
) -> Tensor:
    """Return the value z* `(batch, n)` with its implicit gradient.

    Args:
        backend: the backend of these tensors.
        f: `f(z, *args)` on `(batch, n)`.
        forward: the solution, without gradients.
        args: arguments of f.
        tensors: the tensors among the leaves of args.
        adjoint: turns a cotangent into u.
        record: filled in by each backward pass.
    """
    if functorch.active():
        return functorch.attach(backend, f, forward, args, adjoint)
    job = _Job(adjoint, record, forward.carry.state if adjoint.uses_state else None)
    exact = adjoint.exact
    start = sequence() if exact or adjoint.remembers else 0
    z = forward.z.detach()
    job.records_z = adjoint.next_uses_vjp()
    if job.records_z:
        z = _Gate.apply(z.requires_grad_())
    made = hooks_made()
    with recording() as job.saved:
        y = f(z, *args)
    record.nondeterminism = backend.norm(y.detach() - forward.fz)
    if not y.requires_grad:
        return forward.z
    if z.grad_fn is not None:
        job.mute = muted(y, made, z.grad_fn._sequence_nr())
    tensors_outside: list[Tensor] = []
    if adjoint.remembers:
        job.forward, job.made = (forward.status == int(Status.CONVERGED), forward.residual), range(start, sequence())
    if exact:
        y = _own(y, start)
        sources = distinct(tensors)
        job.outside = outside(y, z, sources, range(start, sequence()))
        if not job.outside.leaves and not sources and job.outside.hidden is None:
            return forward.z  # y depends only on z*: nothing to differentiate
        tensors_outside = [*sources, *job.outside.leaves]
    value: Tensor = _Attach.apply(y, z, forward.z, job, *tensors_outside)
    # Later code may write in place (relu_), but not into the solve's state or tensors that second derivatives need.
    return value.clone()


def _own(y: Tensor, start: int) -> Tensor:
    """Return y as the output of a node that f made, also if f returned a tensor from outside."""
    return y.view_as(y) if y.grad_fn is None or y.grad_fn._sequence_nr() < start else y


class _Job:
    """The data that a backward pass needs in addition to tensors.

    It refers neither to f nor to arguments nor to an output, because the graph would keep them alive.
    """

    def __init__(self, adjoint: AdjointSolver, record: BackwardRecord, state: Any, linear: bool = False) -> None:
        self.adjoint = adjoint
        self.linear = linear  # whether y is linear in z: then the solution is all that second derivatives need
        self.record = record
        self.state = state
        self.outside = Outside()
        self.saved = Recording()
        self.mute = Mute()
        self.forward: tuple[Tensor, Tensor] | None = None  # what a strategy with state gets of the forward solve
        self.made = range(0)
        self.records_z = adjoint.uses_vjp

    def _inputs(self, y: Tensor, z: Tensor) -> PassInputs | None:
        """Return what a strategy with state gets; the graph is walked only if it asks for products."""
        if self.forward is None:
            return None
        if not self.records_z:
            return PassInputs(None, *self.forward, None, has_vjp=False)
        sources = sources_of(y, z, self.made)

        def parameter_vjp(u: Tensor) -> tuple[Tensor, ...]:
            gradients = torch.autograd.grad(y, sources, u, retain_graph=True, allow_unused=True)
            return tuple(part.to_dense() for part in gradients if part is not None)

        return PassInputs(None, *self.forward, parameter_vjp if sources else None)

    def solve_adjoint(self, y: Tensor, z: Tensor, g: Tensor) -> Tensor:
        def vjp(u: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(y, z, u, retain_graph=True, allow_unused=True)
            return torch.zeros_like(u) if product is None else product

        start = time.perf_counter()
        with self.mute:
            u, report = self.adjoint(vjp, g, self.state, None, self._inputs(y, z))
        self.record.add(report, time.perf_counter() - start)
        solution: Tensor = u
        return solution

    def refusal(self) -> str | None:
        """Return why the gradient may not be differentiated again, or None if it may."""
        if not self.adjoint.exact:
            return approximate(self.adjoint, "differentiated again")
        if self.outside.hidden is not None:
            return (
                f"f closes over a tensor that has a history of its own ({self.outside.hidden}): second derivatives "
                f"would silently miss it. Pass it through args, as in fixed_point(f, z0, tensor)."
            )
        if self.outside.compiled:
            return (
                "f is compiled by torch.compile, and PyTorch cannot differentiate the backward pass of compiled code: "
                "give fixed_point the uncompiled f where second derivatives are wanted, or compile it with "
                "backend = 'eager'."
            )
        return None


class _Attach(torch.autograd.Function):
    """Identity on the solver's value; its backward replaces the cotangent g by u."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, value: Tensor, job: _Job, *outside: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.job = job
        out = value.view_as(value)
        ctx.save_for_backward(y, z, out, *outside)
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        (g,) = cotangents
        y, z, out, *outside = ctx.saved_tensors
        job: _Job = ctx.job
        nothing = (None,) * len(outside)
        if g is None:
            return (None, None, None, None, *nothing)
        functorch.refuse_batched(g)
        if job.records_z:
            job.saved.fetch()
        if not torch.is_grad_enabled():
            return (job.solve_adjoint(y, z, g), None, None, None, *nothing)
        if job.linear:
            return (_differentiable(job, y, z, g), None, None, None, *nothing)
        refusal = job.refusal()
        if refusal is None:
            gradients = _second_order(job, y, z, g, out, outside)
            job.mute.finish_pass()
            return (None, None, None, None, *gradients)
        with torch.no_grad():
            u = job.solve_adjoint(y, z, g)
        # Otherwise PyTorch's own error, from inside compiled code, would precede ours.
        refuse_compiled(y, lambda part: Refuse.apply(part, part, refusal))
        return (Refuse.apply(u, y, refusal), None, None, None, *nothing)


def _second_order(job: _Job, y: Tensor, z: Tensor, g: Tensor, out: Tensor, outside: list[Tensor]) -> Any:
    """Return gradients of the tensors outside, as differentiable functions of g, the solution and those tensors."""
    return Twice.apply(Recorded(y, z, lambda g: _differentiable(job, y, z, g)), out, g, *outside)


def _differentiable(job: _Job, y: Tensor, z: Tensor, g: Tensor) -> Tensor:
    """Return the solution u of `job` as that of its own linear equation, whose Jacobian is Jᵀ."""
    with torch.no_grad():
        u = job.solve_adjoint(y, z, g)
    inner = _Job(job.adjoint.transposed(), BackwardRecord(), job.state, linear=True)
    start = _Gate.apply(u.detach().requires_grad_())
    with job.mute:
        (pulled,) = torch.autograd.grad(y, z, start, create_graph=True, allow_unused=True)
    attached: Tensor = _Attach.apply(g if pulled is None else g + pulled, start, u, inner)
    return attached


class _Gate(torch.autograd.Function):
    """Identity whose backward returns no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None

"""Attach the implicit gradient to a solution in PyTorch.

One recorded evaluation y = f(z*, …) is enough: it carries the parameters' gradients by ordinary autograd, so closures,
modules and hooks need no registration, and its graph gives the vjps Jᵀu. `_Attach` turns the cotangent g of the value
into u, and takes a last pass through the graph of y with u. Its inputs are the tensors outside f, so it forms nothing
for z, and the engine gets whole gradients of these tensors: a sum with those of their other uses, one run of each hook.

Where a pass of its own could differ from the engine's, `_Attach` follows y and returns u, and the engine continues
through y. It then forms the gradient of z, too, one vjp more, which a `_Gate` drops: u already contains it. This is so
if

- f closes over a tensor with a history, for which no gradient can be returned;
- an argument with a history depends on a leaf that f reads, or its history is too long to be searched for one;
- such an argument is of a subclass of Tensor or has attributes, so that f must get it and no alias (`aliases.py`);
- f sets hooks, which may sit on nodes that only z needs.

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
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.backend import Backend
from deqcore.types import BackwardRecord, PassInputs, SolveResult, Status, Tree
from deqcore_torch import functorch
from deqcore_torch.aliases import Aliases
from deqcore_torch.functorch import Refuse, approximate
from deqcore_torch.graph import Outside, asked_for, gradients_at, key, leaf_of, outside, refuse_compiled, sequence
from deqcore_torch.module_hooks import Mute, hooks_made, muted, unhooked
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
    z = forward.z.detach()
    job.records_z = adjoint.next_uses_vjp()
    aliases = Aliases()
    start = 0
    if job.records_z:
        args = aliases.replace(backend, args)
        z = _Gate.apply(z.requires_grad_(), *aliases.originals)
        start = z.grad_fn._sequence_nr() + 1
    elif exact:
        start = sequence()
    hooks = hooks_made()
    with recording() as job.saved:
        y = f(z, *args)
    record.nondeterminism = backend.norm(y.detach() - forward.fz)
    if not y.requires_grad:
        return forward.z
    if z.grad_fn is not None:
        job.mute = muted(y, hooks, start)
    if adjoint.remembers:
        job.forward = (forward.status == int(Status.CONVERGED), forward.residual)
    known: list[Tensor] = []
    if job.records_z or exact:
        y = _own(y, start)
        sources = distinct(tensors if exact else aliases.originals)
        made = range(start, y.grad_fn._sequence_nr() + 1)  # type: ignore[union-attr]
        job.outside = outside(y, z, sources, made, aliases.edges)
        known = [tensor for tensor in (*sources, *job.outside.leaves) if key(tensor) in job.outside.ends] or sources
        if exact and not sources and not job.outside.ends:
            return forward.z  # y depends only on z*: nothing to differentiate
        if job.records_z and hooks_made() == hooks and aliases.stay_apart(job.outside, y.numel()):
            job.edges = [job.outside.ends[key(tensor)] for tensor in known]
        elif not exact:
            known = []
    value: Tensor = _Attach.apply(y if job.edges is None else None, (y, z), forward.z, job, *known)
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
        self.records_z = adjoint.uses_vjp
        self.edges: list[GradientEdge] | None = None  # ends of the last pass, if it is one of its own

    def _inputs(self, y: Tensor) -> PassInputs | None:
        """Return what a strategy with state gets."""
        if self.forward is None:
            return None
        if not self.records_z:
            return PassInputs(None, *self.forward, None, has_vjp=False)
        ends = list(self.outside.ends.values())

        def parameter_vjp(u: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.to_dense() for part in _pulled(y, ends, u) if part is not None)

        return PassInputs(None, *self.forward, parameter_vjp if ends else None)

    def last_pass(self, y: Tensor, u: Tensor, outer: Sequence[Any]) -> list[Tensor | None]:
        """Return the gradients of the tensors outside, with nothing for z, which the engine itself would form.

        The graph is kept: f may have put tensors of it elsewhere (an auxiliary loss, a cache of parametrizations), and
        what belongs to y alone is freed with the node of this pass.

        Args:
            y: the value of f.
            u: its cotangent.
            outer: edges from the node of this pass to the tensors outside.
        """
        assert self.edges is not None
        self.saved.release()
        wanted = [i for i, (node, _) in enumerate(outer) if asked_for(node)]
        gradients: list[Tensor | None] = [None] * len(self.edges)
        if wanted:
            for i, part in zip(wanted, _pulled(y, [self.edges[i] for i in wanted], u), strict=True):
                gradients[i] = part
        return gradients

    def solve_adjoint(self, y: Tensor, z: Tensor, g: Tensor) -> Tensor:
        def vjp(u: Tensor) -> Tensor:
            (product,) = gradients_at(y, [z], u)
            return torch.zeros_like(u) if product is None else product

        start = time.perf_counter()
        with self.mute:
            u, report = self.adjoint(vjp, g, self.state, None, self._inputs(y))
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


def _pulled(y: Tensor, edges: Sequence[Any], u: Tensor) -> Sequence[Tensor | None]:
    """Return gradients at the ends of f's graph, where no hook of a parameter runs: it would see a part."""
    with unhooked([y], [leaf for edge in edges if (leaf := leaf_of(edge.node)) is not None]):
        return gradients_at(y, edges, u, create_graph=torch.is_grad_enabled())


class _Attach(torch.autograd.Function):
    """Identity on the solver's value; its backward replaces the cotangent g by u.

    Either `continued` is y, and the engine continues through its graph with u, or it is None, and the backward takes
    that pass itself and returns the gradients of the tensors outside.
    """

    @staticmethod
    def forward(
        ctx: Any, continued: Tensor | None, recorded: tuple[Tensor, Tensor], value: Tensor, job: _Job, *outside: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.job = job
        ctx.count = len(outside)
        out = value.view_as(value)
        # First derivatives do not read the tensors outside, which may be written to in place.
        ctx.save_for_backward(*recorded, out, *(outside if job.adjoint.exact else ()))
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        (g,) = cotangents
        y, z, out, *outside = ctx.saved_tensors
        job: _Job = ctx.job
        u: Tensor | None = None
        gradients: Sequence[Tensor | None] = [None] * ctx.count
        if g is not None:
            functorch.refuse_batched(g)
            if job.records_z:
                job.saved.fetch()
            if torch.is_grad_enabled() and not job.linear and job.refusal() is None:
                gradients = _second_order(job, y, z, g, out, outside)
                job.mute.finish_pass()
            else:
                u = _continued(job, y, z, g)
                if job.edges is not None:
                    gradients, u = job.last_pass(y, u, ctx.next_functions[-ctx.count :]), None
        return (u, None, None, None, *gradients)


def _continued(job: _Job, y: Tensor, z: Tensor, g: Tensor) -> Tensor:
    """Return the cotangent u of y."""
    if job.linear and torch.is_grad_enabled():
        return _differentiable(job, y, z, g)
    with torch.no_grad():
        u = job.solve_adjoint(y, z, g)
    if not torch.is_grad_enabled():
        return u
    refusal = job.refusal()
    # Otherwise PyTorch's own error, from inside compiled code, would precede ours.
    refuse_compiled(y, lambda part: Refuse.apply(part, part, refusal))
    refused: Tensor = Refuse.apply(u, y, refusal)
    return refused


def _second_order(job: _Job, y: Tensor, z: Tensor, g: Tensor, out: Tensor, outside: list[Tensor]) -> Any:
    """Return gradients of the tensors outside, as differentiable functions of g, the solution and those tensors."""
    ends = [job.outside.ends.get(key(tensor)) or get_gradient_edge(tensor) for tensor in outside]
    return Twice.apply(Recorded(y, z, ends, lambda g: _differentiable(job, y, z, g)), out, g, *outside)


def _differentiable(job: _Job, y: Tensor, z: Tensor, g: Tensor) -> Tensor:
    """Return the solution u of `job` as that of its own linear equation, whose Jacobian is Jᵀ."""
    with torch.no_grad():
        u = job.solve_adjoint(y, z, g)
    inner = _Job(job.adjoint.transposed(), BackwardRecord(), job.state, linear=True)
    start = _Gate.apply(u.detach().requires_grad_())
    with job.mute:
        (pulled,) = torch.autograd.grad(y, z, start, create_graph=True, allow_unused=True)
    right = g if pulled is None else g + pulled
    attached: Tensor = _Attach.apply(right, (right, start), u, inner)
    return attached


class _Gate(torch.autograd.Function):
    """Identity on z whose backward returns no gradient.

    It is a function of the arguments, too. To find its way to z the engine then walks no further than to them: it skips
    nodes that have a shorter way to a leaf than z has, and would walk the history of the arguments in each vjp.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.count = len(args)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return (None,) * (1 + ctx.count)

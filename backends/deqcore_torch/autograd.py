"""How the implicit gradient is attached to a solution in PyTorch.

One recorded evaluation y = f(z*, …) serves everything: it carries the parameters' gradients by ordinary autograd, so
closures, modules and hooks need no registration, and its graph gives the pulls Jᵀu. `_Attach` stands behind y and
turns the cotangent g of the value into u; autograd then continues through y with u.

z* enters f through a `_Gate`, which swallows the part of the cotangent that would flow on into z*: it is accounted
for in u already.

Second derivatives (`exact` strategies). In a backward pass that records its own graph, f is evaluated again at z*
*attached* (this very function's output), u is attached as the solution of its linear fixed-point equation, and the
gradients of arguments and parameters are formed explicitly. That needs the tensors that f depends on: those in args,
and leaves, found by walking the graph of y (`graph.py`). A tensor that f closes over and that has a history of its own
is refused, and so are Functions that are differentiable once only, and compiled code, whose backward PyTorch does not
differentiate: the gradients that leave it are replaced by such as refuse, since PyTorch's own error does not say what
to do.

Inside `torch.func` and in forward mode there is no such tape: see `transforms.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from deqcore.backend import BackwardRecord
from deqcore.driver import Forward
from deqcore.linear.transposed import transposed
from deqcore.strategy import Adjoint
from deqcore_torch import transforms
from deqcore_torch.ambient import Ambient
from deqcore_torch.graph import Outside, once_only, outside, refuse_compiled, sequence
from deqcore_torch.transforms import ORDER, Refuse, approximate

if TYPE_CHECKING:
    from collections.abc import Iterator

ONCE_ONLY: Final = (
    "f contains an autograd.Function whose backward is marked @once_differentiable, and its gradient was "
    "differentiated again: write that backward in differentiable operations and remove the mark."
)


def attach(
    f: Callable[..., Tensor],
    forward: Forward,
    args: tuple[Any, ...],
    tensors: Sequence[Tensor],
    adjoint: Adjoint,
    record: BackwardRecord,
) -> Tensor:
    """The value f(z*) `(batch, n)` with its implicit gradient.

    Args:
        f: `f(z, *args)` on `(batch, n)`.
        forward: the solution, without gradients.
        args: arguments of f.
        tensors: the tensors among the leaves of args.
        adjoint: turns a cotangent into u.
        record: filled in by each backward pass.
    """
    if transforms.active():
        transforms.refuse_vmap()
        return transforms.attach(f, forward, args, adjoint)
    job = _Job(f, args, adjoint, record, forward.carry.state if adjoint.uses_state else None, forward.z)
    start = 0
    z = forward.z.detach()
    if adjoint.strategy.exact:
        job.ambient = Ambient.now(z)
        start = sequence()
    if adjoint.uses_pull:
        z = _Gate.apply(z.requires_grad_(), _Switch(blocked=True))
    y = f(z, *args)
    record.drift = adjoint.backend.norm(y.detach() - forward.fz)
    if not y.requires_grad:
        return forward.fz
    tensors_outside: list[Tensor] = []
    if adjoint.strategy.exact:
        sources = [t for t in tensors if t.requires_grad]
        job.outside = outside(y, z, sources, start)
        if not job.outside.leaves and not sources and job.outside.hidden is None:
            return forward.fz  # y depends on z* only: nothing to differentiate
        tensors_outside = [*sources, *job.outside.leaves]
        job.repeated = {i for i, t in enumerate(sources) if any(t is s for s in sources[:i])}
    value: Tensor = _Attach.apply(y, z, forward.fz, job, *tensors_outside)
    # What follows may write in place (relu_): neither into the solve's state, nor into what second derivatives need.
    return value.clone()


class _Job:
    """What a backward pass needs beside tensors. It refers to no output, so there is no reference cycle."""

    def __init__(
        self,
        f: Callable[..., Tensor],
        args: tuple[Any, ...],
        adjoint: Adjoint,
        record: BackwardRecord,
        state: Any,
        z: Tensor,
    ) -> None:
        self.f = f
        self.args = args
        self.adjoint = adjoint
        self.record = record
        self.state = state
        self.z = z
        self.ambient: Ambient | None = None  # in which f is evaluated again
        self.outside = Outside()
        self.repeated: set[int] = set()  # sources that are the same tensor as an earlier one
        self.order = 2  # highest order of derivative that is right

    def route(self, y: Tensor, z: Tensor, g: Tensor) -> Tensor:
        def pull(u: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(y, z, u, retain_graph=True, allow_unused=True)
            return torch.zeros_like(u) if found is None else found

        start = time.perf_counter()
        u, report = self.adjoint(pull, g, self.state)
        self.record.add(report, time.perf_counter() - start)
        found: Tensor = u
        return found

    def refusal(self) -> str | None:
        """Why the gradient may not be differentiated again, if it may not."""
        if not self.adjoint.strategy.exact:
            return approximate(self.adjoint, "differentiated again")
        if self.order < 2:
            return ORDER
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
        transforms.refuse_vmap(g)
        if not torch.is_grad_enabled():
            return (job.route(y, z, g), None, None, None, *nothing)
        refusal = job.refusal()
        if refusal is None:
            return (None, None, None, None, *_second_order(job, g, out, outside))
        with torch.no_grad():
            u = job.route(y, z, g)
        # PyTorch's own error, which comes from inside compiled code, would come before ours.
        refuse_compiled(y, lambda part: Refuse.apply(part, part, refusal))
        return (Refuse.apply(u, y, refusal), None, None, None, *nothing)


def _second_order(job: _Job, g: Tensor, out: Tensor, outside: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the tensors outside, as differentiable functions of g, z* and those tensors."""
    begun = sequence()
    switch = _Switch(blocked=False)
    backend = job.adjoint.backend
    leaves, structure = backend.flatten(job.args)
    gated: list[Tensor] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaves[i] = _Gate.apply(leaf, switch)
            gated.append(leaves[i])
    z = _Gate.apply(out + (job.z - out).detach(), switch)  # the value of z*, the derivative of the solution
    assert job.ambient is not None
    y = job.ambient.around(job.f)(z, *backend.unflatten(structure, leaves))

    def pull(u: Tensor) -> Tensor:
        with switch.closed():
            (found,) = torch.autograd.grad(y, z, u, create_graph=True, allow_unused=True)
        return torch.zeros_like(u) if found is None else found

    with torch.no_grad():
        u = job.route(y, z, g)
    inner = _Job(lambda v: g + pull(v), (), transposed(job.adjoint), BackwardRecord(), job.state, u)
    inner.order = 1
    start = _Gate.apply(u.detach().requires_grad_(), _Switch(blocked=True))
    attached = _Attach.apply(g + pull(start), start, u, inner)
    with switch.closed():
        found = torch.autograd.grad(y, [*gated, *outside], attached, create_graph=True, allow_unused=True)
    passed = found[: len(gated)]
    used: list[Tensor | None] = list(found[len(gated) :])
    for i, part in enumerate(passed):  # f may also close over a tensor that it is passed
        direct = None if i in job.repeated else used[i]
        used[i] = part if direct is None else direct if part is None else part + direct
    if once_only(used, begun):
        used = [part if part is None else Refuse.apply(part, part, ONCE_ONLY) for part in used]
    return used


class _Switch:
    """Whether the gates made with it let a cotangent pass."""

    def __init__(self, blocked: bool) -> None:
        self.blocked = blocked

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.blocked = True
        try:
            yield
        finally:
            self.blocked = False


class _Gate(torch.autograd.Function):
    """Identity whose backward passes nothing while its switch is blocked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: _Switch) -> Tensor:
        ctx.switch = switch
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return (None if ctx.switch.blocked else cotangents[0], None)

"""The backward pass of `TwoState` in PyTorch: each half step is undone, recorded and differentiated.

Between the passes the graph keeps the two last states and the tensors that f depends on. These are found by walking the
graph of one recorded evaluation, so that parameters need no registration. The passes of one half step share one
evaluation of f: its value undoes the step, and its graph gives the vjps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from deqcore.abc.backend import Backend
from deqcore.abc.two_state import TwoState
from deqcore.errors import ProblemError, StrategyError
from deqcore.solve.opaque import arrays_in
from deqcore.types import BoundMap, Map
from deqcore_torch import functorch
from deqcore_torch.checkpoints import CURE
from deqcore_torch.eval_context import Ambient, nothing_recorded
from deqcore_torch.graph import nested, outside, sequence
from deqcore_torch.module_hooks import unhooked
from deqcore_torch.second_order import distinct, partial

Result: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _FusedTwoState(TwoState):
    """The same half steps, each in one pass over the states."""

    def half(self, state: Tensor, value: Tensor) -> Tensor:
        """Return a state moved by f of the other one: state + β (value − state)."""
        return torch.lerp(state, self.up(value), self.damping)

    def half_back(self, state: Tensor, value: Tensor) -> Tensor:
        """Undo `half` in place: value + (state − value) / (1 − β)."""
        return torch.lerp(self.up(value), state, 1.0 / (1.0 - self.damping), out=state)


class _Job:
    """What the backward pass needs besides tensors: the map, the rule, and the context of the call."""

    def __init__(self, backend: Backend, f: Map, rule: TwoState, steps: int, z0: Tensor) -> None:
        self.backend = backend
        self.f = f
        self.rule = rule
        self.steps = steps
        self.z0 = z0
        self.ambient = Ambient.now(z0)

    def recorded(self) -> Tensor:
        """Return the value with every step recorded, for derivatives of the gradient."""
        pair = self.rule.start(self.z0)
        for _ in range(self.steps):
            pair = self.rule.step(self.f, pair)
        return self.rule.down(pair[1])

    def vjp(self, y: Tensor, z: Tensor, g: Tensor, sources: Sequence[Tensor]) -> list[Tensor | None]:
        """Undo all steps; return the gradients of the sources."""
        back = _Pass(self.f, self.rule, sources)
        if back.nested:
            back.cut(self.backend, z)
        size = torch.linalg.vector_norm(z, dim=1)
        gy, gz = torch.zeros_like(g), g.clone()
        y, z = y.clone(), z.clone()
        for _ in range(self.steps):
            back.undo(y, z, gy, gz)
            back.undo(z, y, gz, gy)
        self._check(y, z, size)
        return back.gradients

    def _check(self, y: Tensor, z: Tensor, size: Tensor) -> None:
        """Compare with z0, relative to the larger of its norm and `size`, that of the last state."""
        start = self.rule.up(self.z0)
        size = torch.maximum(size, torch.linalg.vector_norm(start, dim=1))
        off = torch.linalg.vector_norm(torch.stack([y - start, z - start]), dim=2).amax(0)
        far = torch.where(size > 0, off / size, off).nan_to_num(0.0, posinf=0.0)  # statuses report what is not finite
        largest = float(far.max()) if len(far) else 0.0
        if largest > self.rule.far:
            raise ProblemError(
                f"The backward pass did not come back to z0: its reconstruction is off by {largest:.2g} of the state. "
                f"f returns another value in the backward pass than at the call, or rounding is amplified too much. "
                f"{CURE} Switch dropout off inside f. If f is deterministic, lower the damping or the steps."
            )


class _Pass:
    """One backward pass: half steps undone one after the other, and the gradients summed."""

    def __init__(self, f: Map, rule: TwoState, sources: Sequence[Tensor]) -> None:
        self.f = f
        self.rule = rule
        self.sources = sources
        self.gradients: list[Tensor | None] = [None] * len(sources)
        self.nested = nested(sources)

    def cut(self, backend: Backend, z: Tensor) -> None:
        """Give f leaves instead of arguments with a history, if it reads each of them as an argument alone.

        This takes one evaluation of f, at `z` `(batch, n)`. Without it every half step would differentiate the history.
        """
        if not isinstance(self.f, BoundMap):
            return
        leaves, structure = backend.flatten(self.f.args)
        mine = {_edge(source): source.detach().requires_grad_() for source in self.sources if not source.is_leaf}
        given = [mine.get(_edge(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        f = BoundMap(self.f.f, tuple(backend.unflatten(structure, given)))
        sources = [mine.get(_edge(source), source) for source in self.sources]
        start = sequence()
        with torch.enable_grad():
            at = self.rule.down(z).detach().requires_grad_()
            value = f(at)
        if not value.requires_grad or outside(value, at, sources, range(start, sequence())).hidden is None:
            self.f, self.sources, self.nested = f, sources, False

    def undo(self, other: Tensor, moved: Tensor, g_other: Tensor, g_moved: Tensor) -> None:
        """Undo `moved ← (1 − β) moved + β f(other)`.

        `moved` and both cotangents become those before, in place.
        """
        damping = self.rule.damping
        with torch.enable_grad():
            at = self.rule.down(other).detach().requires_grad_()
            value = self.f(at)
        self.rule.half_back(moved, value.detach())
        if value.requires_grad:
            pulled = self._pulled(value, [at, *self.sources], damping * g_moved)
            if pulled[0] is not None:
                g_other += pulled[0]
            self._add(pulled[1:])
        g_moved *= 1.0 - damping

    def _pulled(self, value: Tensor, wanted: list[Tensor], g: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients of f alone, not those by which one source is computed from another."""
        if self.nested:  # the engine runs that computation in each half step
            return partial([value], wanted, [g], create_graph=False)
        with unhooked([value], wanted):
            return torch.autograd.grad(value, wanted, g, allow_unused=True)

    def _add(self, pulled: Sequence[Tensor | None]) -> None:
        for i, part in enumerate(pulled):
            if part is None:
                continue
            own = self.gradients[i]
            # The first one may be memory of the graph that others hold.
            self.gradients[i] = part.clone() if own is None else own.add_(part)


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Return what tells tensors with a history apart; a saved one is another object."""
    return tensor.grad_fn, tensor.output_nr


class _Reversible(torch.autograd.Function):
    """The second of two final states, as a function of the sources."""

    @staticmethod
    def forward(ctx: Any, job: _Job, y: Tensor, z: Tensor, *sources: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.job = job
        ctx.save_for_backward(y, z, *sources)
        value = job.rule.down(z)
        return value.clone() if value is z else value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        (g,) = cotangents
        y, z, *sources = ctx.saved_tensors
        job: _Job = ctx.job
        if g is None:
            return (None, None, None, *[None] * len(sources))
        functorch.refuse_batched(g)
        if torch.is_grad_enabled():
            value = job.ambient.around(job.recorded)()
            gradients: Any = partial([value], sources, [g], create_graph=True)
        else:
            gradients = job.ambient.around(job.vjp)(y, z, g, sources)
        return (None, None, None, *gradients)


def iterate(
    backend: Backend, f: Map, z0: Tensor, rule: TwoState, steps: int, record_all: Callable[[], Result]
) -> Result:
    """Return the value, f(z0) and f of the value, see `deqcore.abc.autodiff.Autodiff.reversible`.

    Args:
        backend: the backend of these tensors.
        f: the map.
        z0: the start `(batch, n)`.
        rule: the iteration.
        steps: how many steps.
        record_all: the same with every step recorded, for `torch.func` and forward mode.
    """
    if functorch.active():
        return record_all()
    rule = _FusedTwoState(**vars(rule))
    with nothing_recorded():
        first = f(z0)
        y, z = rule.step(f, rule.start(z0), first)
        for _ in range(steps - 1):
            y, z = rule.step(f, (y, z))
    value = rule.down(z)
    if not torch.is_grad_enabled():
        return value, first, f(value)
    last, sources = _sources(backend, f, value)
    if sources:
        value = _Reversible.apply(_Job(backend, f, rule, steps, z0), y, z, *sources)
    return value, first, last


def _sources(backend: Backend, f: Map, z: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return f(z), and the tensors with a gradient that f depends on, found by this one recorded evaluation."""
    args = f.args if isinstance(f, BoundMap) else ()
    given = [t for t in distinct(list(arrays_in(backend, args))) if t.requires_grad]
    start = sequence()
    at = z.detach().requires_grad_()
    y = f(at)
    if not y.requires_grad:
        return y, []
    beyond = outside(y, at, given, range(start, sequence()))
    if beyond.hidden is not None:
        raise StrategyError(
            f"f closes over a tensor that has a history of its own ({beyond.hidden}): a reversible backward pass would "
            f"silently miss it. Pass it through args, as in fixed_point(f, z0, tensor)."
        )
    return y.detach(), [*given, *beyond.leaves]

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
from deqcore_torch.aliases import Aliases
from deqcore_torch.checkpoints import CURE
from deqcore_torch.eval_context import Ambient, nothing_recorded
from deqcore_torch.graph import Edge, gradients_at, key, outside, sequence
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
    """What the backward pass needs besides tensors: the map, the rule, and the context of the call.

    Attributes:
        apart: arguments that f reads as arguments alone, so that something else may stand for them.
    """

    def __init__(self, backend: Backend, f: Map, rule: TwoState, steps: int, z0: Tensor, apart: set[Edge]) -> None:
        self.backend = backend
        self.f = f
        self.rule = rule
        self.steps = steps
        self.z0 = z0
        self.apart = apart
        self.ambient = Ambient.now(z0)

    def recorded(self, g: Tensor, sources: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of the sources with every step recorded, for derivatives of these."""
        aliases = Aliases()
        f = _with(self.f, lambda args: aliases.replace(self.backend, args)) if self.apart else self.f
        pair = self.rule.start(self.z0)
        for _ in range(self.steps):
            pair = self.rule.step(f, pair)
        value = self.rule.down(pair[1])
        return partial([value], sources, [g], create_graph=True, ends=aliases.ends(sources))

    def vjp(self, y: Tensor, z: Tensor, g: Tensor, sources: Sequence[Tensor]) -> list[Tensor | None]:
        """Undo all steps; return the gradients of the sources."""
        back = _Pass(self, sources)
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

    def __init__(self, job: _Job, sources: Sequence[Tensor]) -> None:
        self.rule = job.rule
        self.gradients: list[Tensor | None] = [None] * len(sources)
        # Leaves stand for the arguments, or every half step would differentiate what these are computed from.
        leaves = {key(t): t.detach().requires_grad_() for t in sources if key(t) in job.apart}
        self.sources = [leaves.get(key(t), t) for t in sources]
        self.whole = all(t.is_leaf for t in self.sources)
        self.f = _with(job.f, lambda args: _replaced(job.backend, args, leaves)) if leaves else job.f

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
        if not self.whole:  # the engine runs that computation in each half step
            return partial([value], wanted, [g], create_graph=False)
        with unhooked([value], wanted):
            return gradients_at(value, wanted, g, retain_graph=False)

    def _add(self, pulled: Sequence[Tensor | None]) -> None:
        for i, part in enumerate(pulled):
            if part is None:
                continue
            own = self.gradients[i]
            # The first one may be memory of the graph that others hold.
            self.gradients[i] = part.clone() if own is None else own.add_(part)


def _with(f: Map, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Map:
    """Return f with other arguments."""
    assert isinstance(f, BoundMap)
    return BoundMap(f.f, change(f.args))


def _replaced(backend: Backend, args: tuple[Any, ...], instead: dict[Edge, Tensor]) -> tuple[Any, ...]:
    leaves, structure = backend.flatten(args)
    return tuple(backend.unflatten(structure, [instead.get(key(t), t) if isinstance(t, Tensor) else t for t in leaves]))


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
            gradients: Any = job.ambient.around(job.recorded)(g, sources)
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
    last, sources, apart = _sources(backend, f, value)
    if sources:
        value = _Reversible.apply(_Job(backend, f, rule, steps, z0, apart), y, z, *sources)
    return value, first, last


def _sources(backend: Backend, f: Map, z: Tensor) -> tuple[Tensor, list[Tensor], set[Edge]]:
    """Return f(z), the tensors with a gradient that f depends on, and which of them f reads as arguments alone.

    They are found by this one recorded evaluation.
    """
    aliases = Aliases()
    given: list[Tensor] = []
    if isinstance(f, BoundMap):
        given = distinct(list(arrays_in(backend, f.args)))
        f = _with(f, lambda args: aliases.replace(backend, args))
    start = sequence()
    at = z.detach().requires_grad_()
    y = f(at)
    if not y.requires_grad:
        return y, [], set()
    beyond = outside(y, at, given, range(start, sequence()), aliases.edges)
    if beyond.hidden is not None:
        raise StrategyError(
            f"f closes over a tensor that has a history of its own ({beyond.hidden}): a reversible backward pass would "
            f"silently miss it. Pass it through args, as in fixed_point(f, z0, tensor)."
        )
    return y.detach(), [*given, *beyond.leaves], set() if beyond.direct else set(aliases.edges.values())

"""The PyTorch backend: eager loops, histories that grow in place, gradients attached by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import array_api_compat.torch as xp
import numpy as np
import optree
import torch
import torch.utils.checkpoint
from torch import Tensor

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.errors import BackendError, ConfigError, InitialIterateError, ProblemError
from deqcore.solve.opaque import arrays_in
from deqcore.types import BackwardRecord, Capabilities, LoopVars, Map, SolveResult, StepResult
from deqcore_torch import compiled, functorch, jvp
from deqcore_torch.autograd import attach
from deqcore_torch.disable_dynamo import refuse_tracing, untraced
from deqcore_torch.eval_context import nothing_recorded
from deqcore_torch.gradients import straight_through
from deqcore_torch.history import RecordedHistory, TorchHistory, select_rows
from deqcore_torch.ownership import held

LEAF = optree.tree_structure(0)  # the structure of a bare tensor, the usual state: found without optree
DEVICE_CHECK = 4  # steps between host checks where a check waits for the device


class TorchBackend(Backend):
    """PyTorch tensors on any device."""

    name: ClassVar[str] = "torch"
    capabilities: Capabilities = Capabilities(
        jvp=True, bfloat16=True, accelerator=True, second_derivatives=True, compaction=True
    )
    xp = xp

    def is_array(self, leaf: object) -> bool:
        return isinstance(leaf, Tensor)

    def asarray(self, a: object, *, dtype: str | None = None, like: Tensor | None = None) -> Tensor:
        kind = getattr(torch, dtype) if dtype else (like.dtype if like is not None else None)
        if not isinstance(a, Tensor):
            a = torch.from_numpy(np.array(a)) if isinstance(a, np.ndarray | list | np.generic) else torch.tensor(a)
        return a.to(device=like.device if like is not None else None, dtype=kind)

    def to_numpy(self, x: Tensor) -> Any:
        x = x.detach().cpu()
        return functorch.to_numpy(x.float() if x.dtype is torch.bfloat16 else x)

    def flatten(self, tree: Any) -> tuple[list[Any], Any]:
        if isinstance(tree, Tensor):
            return [tree], LEAF
        return optree.tree_flatten(tree)

    def unflatten(self, structure: Any, leaves: Sequence[Any]) -> Any:
        return leaves[0] if structure is LEAF else optree.tree_unflatten(structure, leaves)

    def dtype_name(self, x: Tensor) -> str:
        return str(x.dtype).removeprefix("torch.")

    def device_of(self, x: Tensor) -> torch.device:
        return x.device

    def autocasting(self, x: Tensor) -> bool:
        return torch.is_autocast_enabled(x.device.type)

    def astype(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(getattr(torch, dtype))

    def to_device(self, x: Tensor, device: str) -> Tensor:
        try:
            return x.to(device)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(f"torch cannot use the device {device!r}: {error}") from error

    def output_eps(self, x: Tensor) -> float:
        kind = x.device.type
        narrowed = x.dtype is torch.float32 and torch.is_autocast_enabled(kind)
        return float(torch.finfo(torch.get_autocast_dtype(kind) if narrowed else x.dtype).eps)

    def owned(self, leaves: list[Any]) -> list[Any]:
        return [leaves[0].clone()] if isinstance(leaves[0], Tensor) and held(leaves) else leaves

    def unshared(self, x: Tensor, other: Tensor) -> Tensor:
        if functorch.active() or x.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
            return x
        return x.clone()

    @contextmanager
    def guard_inplace(self, z: Tensor) -> Iterator[Tensor]:
        if z.is_inference():  # which keeps no version
            yield z
            return
        before = z._version
        yield z
        if z._version != before:
            raise ProblemError.in_place()

    def to_accum_dtype(self, x: Tensor) -> Tensor:
        return x.to(_wide(x.device))

    def cast(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype)

    def norm(self, v: Tensor) -> Tensor:
        narrow = v.dtype in (torch.float16, torch.bfloat16)
        if self.numpy_view(v.new_empty(0, dtype=torch.float32) if narrow else v) is not None:
            norms: Tensor = torch.linalg.vector_norm(v, dim=1, dtype=torch.float32 if narrow else None)
            return self.guarded(v, norms)
        steps = self._native(v)  # on other devices reading the norms would wait
        if steps is not None:
            norms = steps.norm(v)
            return norms
        like = v.new_zeros(v.shape[0], dtype=torch.float32 if narrow else None)
        return self._scaled_norm(v, self._largest(v, like))

    def _largest(self, v: Tensor, like: Tensor) -> Tensor:
        largest: Tensor = torch.linalg.vector_norm(v.detach(), float("inf"), dim=1) if v.shape[1] else like
        return largest.to(like.dtype)

    def power_of_two(self, x: Tensor) -> Tensor:
        return x / (2.0 * torch.frexp(x)[0])

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.to_accum_dtype(a) * self.to_accum_dtype(b)).sum(1)

    def invert(self, x: Tensor, floor: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or functorch.active():
            return super().invert(x, floor)
        seen = x.numpy()
        out = np.zeros_like(seen)
        np.divide(1.0, seen, out=out, where=np.abs(seen) > floor.numpy())
        return torch.from_numpy(out)

    def select(self, mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
        eager = not torch.is_grad_enabled() and not functorch.active()
        if eager and mask.device.type == "cpu" and new.dim() > 1:
            return select_rows(mask, new, old)
        return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)

    def put(self, x: Tensor, rows: Tensor, part: Tensor) -> Tensor:
        return x.index_copy(0, rows, part)

    def numpy_view(self, x: Tensor) -> Any | None:
        if x.device.type != "cpu" or functorch.active():
            return None
        return (x.detach() if x.requires_grad else x).numpy()

    def from_numpy_view(self, x: Any) -> Tensor:
        return torch.from_numpy(x)

    def fused_step(self, solver: object, f: Map, z: Tensor, fz: Tensor, state: Any) -> StepResult | None:
        steps = self._native(z)
        result: StepResult | None = None if steps is None else steps.step(self, solver, f, z, fz, state)
        return result

    def fused_update(
        self, carry: Any, result: StepResult, residual: Tensor, size: Tensor | None, limits: Any
    ) -> Any | None:
        steps = self._native(result.z)
        return None if steps is None else steps.keep(carry, result, residual, size, limits)

    def fused_arnoldi(self, space: Any, w: Tensor, goal: Tensor, twice: bool) -> Any | None:
        steps = self._native(w)
        return None if steps is None else steps.arnoldi(space, w, goal, twice)

    def residual_norms(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
        steps = self._native(z)
        norms = None if steps is None else steps.measure(z, fz)
        return super().residual_norms(z, fz) if norms is None else norms

    def orthogonalize(self, basis: History, w: Tensor, twice: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        steps = self._native(w)
        parts = None if steps is None else steps.project(basis, w, twice)
        return super().orthogonalize(basis, w, twice) if parts is None else parts

    def _native(self, x: Tensor) -> Any | None:
        """Return the native steps that can read x; those for the host only if reading x costs no wait."""
        steps = compiled.reading(x)
        return None if steps is None or (x.device.type == "cpu" and self.numpy_view(x) is None) else steps

    def solve(self, a: Tensor, b: Tensor) -> Tensor:
        x, info = torch.linalg.solve_ex(a, b if b.dim() == 3 else b[..., None])
        x = x.masked_fill(info[:, None, None] != 0, float("nan"))
        return x if b.dim() == 3 else x[..., 0]

    def history(self, like: Tensor, history_size: int, dtype: str | None = None) -> History:
        stored = like.dtype if dtype is None else getattr(torch, dtype, None)
        if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
            expected = "float16, bfloat16, float32 or float64"
            raise ConfigError.bad_value("The solver", "history_dtype", dtype, expected)
        if (torch.is_grad_enabled() and like.requires_grad) or functorch.active():
            return RecordedHistory.empty(like, history_size, stored, _wide(like.device))
        return TorchHistory.empty(like, history_size, stored, _wide(like.device))

    def loop(
        self,
        running: Callable[[LoopVars], Tensor | bool],
        body: Callable[[LoopVars], LoopVars],
        carry: LoopVars,
        steps: Any,
        check_every: int | str = "auto",
    ) -> LoopVars:
        every = 0 if check_every == "auto" else int(check_every)
        for step in range(int(steps)):
            if every == 0 or step % every == 0:
                going = running(carry)
                if every == 0:
                    waits = isinstance(going, Tensor) and going.device.type != "cpu"
                    every = DEVICE_CHECK if waits else 1
                if not going:
                    break
            carry = body(carry)
        return carry

    def linearize(self, f: Map, z: Tensor) -> tuple[Tensor, Map]:
        if functorch.active():
            return functorch.vjp_of(f, z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = f(z)

        def vjp(u: Tensor) -> Tensor:
            if not y.requires_grad:
                return torch.zeros_like(u)
            (product,) = torch.autograd.grad(y, z, u, retain_graph=True, allow_unused=True)
            return torch.zeros_like(u) if product is None else product

        return y.detach(), vjp

    def differentiable_vjp(self, f: Map, z: Tensor) -> Map:
        if not torch.is_grad_enabled():
            return self.linearize(f, z)[1]
        z = z if z.requires_grad else z.detach().requires_grad_()
        y = f(z)

        def vjp(u: Tensor) -> Tensor:
            if not y.requires_grad:
                return torch.zeros_like(u)
            (product,) = torch.autograd.grad(y, z, u, create_graph=True, allow_unused=True)
            return torch.zeros_like(u) if product is None else product

        return vjp

    def jvp(self, f: Map, z: Tensor) -> Map:
        if functorch.active():
            return functorch.jvp_of(f, z)
        return jvp.jvp(f, z)

    @untraced
    def forward_only(
        self,
        f: Callable[..., Tensor],
        z0: Tensor,
        args: tuple[Any, ...],
        solve: Callable[[Map, Tensor], SolveResult],
    ) -> SolveResult:
        _refuse_split(z0)
        refuse_tracing(z0)
        run: Map = lambda z: _untracked(f(z, *args))  # noqa: E731
        if functorch.active():
            functorch.refuse_vmap()
            run = lambda z: f(z, *args).detach()  # noqa: E731 (outer transformations would record every step)
        with nothing_recorded():
            return solve(run, z0.clone() if z0.is_inference() else z0.detach())

    @untraced
    def implicit(
        self,
        f: Callable[..., Tensor],
        z0: Tensor,
        args: tuple[Any, ...],
        solve: Callable[[Map, Tensor], SolveResult],
        adjoint: AdjointSolver,
    ) -> tuple[Tensor, SolveResult, BackwardRecord | None]:
        forward = self.forward_only(f, z0, args, solve)
        if not torch.is_grad_enabled() and not functorch.active():
            return forward.z, forward, None
        record = BackwardRecord()
        tensors = list(arrays_in(self, args)) if adjoint.exact else []
        value = attach(self, f, forward, args, tensors, adjoint, record)
        return value, forward, record if value.requires_grad else None

    @untraced
    def differentiate_through(
        self,
        f: Callable[..., Tensor],
        z0: Tensor,
        args: tuple[Any, ...],
        steps: Callable[[Map, Tensor, SolveResult | None], Any],
        forward: SolveResult | None,
    ) -> Any:
        return super().differentiate_through(f, z0, args, steps, forward)

    def detach(self, x: Tensor) -> Tensor:
        return x.detach()

    def straight_through(self, value: Tensor, carrier: Tensor) -> Tensor:
        return straight_through(value, carrier) if carrier.requires_grad or functorch.active() else value

    def checkpoint(self, f: Map) -> Map:
        def checkpointed(z: Tensor) -> Any:
            if functorch.active():
                return f(z)  # evaluated again outside of forward mode it saves fewer tensors: an error in torch
            return torch.utils.checkpoint.checkpoint(f, z, use_reentrant=False)

        return checkpointed

    def grad_enabled(self) -> bool:
        return torch.is_grad_enabled() or functorch.active()

    def vjp(
        self, value: Callable[..., tuple[Tensor, Any]], args: tuple[Any, ...], cotangent: Tensor
    ) -> tuple[Tensor, Any, tuple[Any, ...]]:
        leaves, structure = self.flatten(args)
        moved = [_leaf(leaf) for leaf in leaves]
        with torch.enable_grad():
            found, aux = value(*self.unflatten(structure, moved))
        wanted = [leaf for leaf in moved if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients = iter(_gradients(found, wanted, cotangent))
        results = [next(gradients) if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in moved]
        return found.detach(), aux, self.unflatten(structure, results)

    def grad(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def gradient(x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                (derivative,) = torch.autograd.grad(fn(x), x, create_graph=True)
            return derivative

        return gradient

    @contextmanager
    def high_precision(self) -> Iterator[None]:
        switches = [torch.backends.cuda.matmul, torch.backends.cudnn]
        before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = False
            yield
        finally:
            for switch, allowed in zip(switches, before, strict=True):
                switch.allow_tf32 = allowed

    def synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _refuse_split(z0: Tensor) -> None:
    """Refuse a DTensor: its rows are on several ranks, each with its own histories and loop."""
    if type(z0) is not Tensor and hasattr(z0, "full_tensor"):
        raise InitialIterateError(
            "The initial iterate z0 must be a plain tensor, because each rank solves for its own tensors (got a "
            "DTensor). Pass z0.full_tensor(), or z0.to_local() if the batch is split. Parameters may be DTensors "
            "(tensor-parallel modules): the cell must then take and return plain tensors, the same on each rank of the "
            "tensor-parallel group."
        )


def _untracked(y: Tensor) -> Tensor:
    """Return y without a history if no gradient is recorded: f may return one of its arguments."""
    return y.detach() if y.requires_grad and not torch.is_grad_enabled() else y


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _leaf(leaf: Any) -> Any:
    differentiable = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.detach().requires_grad_() if differentiable else leaf


def _gradients(value: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    if not value.requires_grad or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(value, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]

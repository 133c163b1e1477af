"""The solve as an operator that compilers do not look into: `deqcore::solve` and `deqcore::solve_backward`.

A compiler sees a function of tensors whose results have known shapes. At run time the operator runs the ordinary solve,
which records one evaluation of the cell on a tape of its own. That record stays until the token that represents it is
freed: compiled code saves the token for its backward pass, where `deqcore::solve_backward` looks the record up.

`torch.library` is used rather than `torch._dynamo.decorators.leaf_function` (PyTorch 2.13): a leaf function keeps the
record of its latest call only, so two calls before one backward pass lose the first, and inductor does not take it.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqcore.errors import BackendError, StrategyError
from deqcore_torch.graph import leaf_of, name_of
from deqcore_torch.layout import placeholders
from deqcore_torch.problems import numbered

TWICE = (
    "The gradient of a compiled solve was differentiated again, but PyTorch does not differentiate the backward pass "
    "of compiled code. Leave the model uncompiled where second derivatives are wanted."
)
GATE = "_GateBackward"  # the node before z, which the solve makes itself
REPORTS = 4  # residual, status, steps, evaluations
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class _Record:
    """The tape of one solve: gradients of `values` for `sources`."""

    values: list[Tensor]
    sources: list[Tensor]

    def vjp(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        pairs = [(v, g) for v, g in zip(self.values, cotangents, strict=True) if g is not None and v.requires_grad]
        if not pairs:
            return [None] * len(self.sources)
        values, given = zip(*pairs, strict=True)
        return list(torch.autograd.grad(values, self.sources, given, retain_graph=True, allow_unused=True))


_records: dict[int, _Record] = {}


def _token(record: _Record | None) -> Tensor:
    """Return a tensor whose memory keeps the record: it is forgotten when the last tensor on this memory is freed."""
    key = next(_numbers)
    memory = np.full(1, key, dtype=np.int64)
    if record is not None:
        _records[key] = record
        weakref.finalize(memory, _records.pop, key, None).atexit = False
    return torch.from_numpy(memory)


# Inductor leaves operators with this tag out of CUDA graphs, because the loop of a solve asks the host after each step.
# Older releases of PyTorch do not have the tag.
_ON_HOST = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


def _plain_keys() -> tuple[Any, Any]:
    """Return the dispatch keys of a thread in which nothing is switched off."""
    keys: list[Any] = []

    def read() -> None:
        keys.extend((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    return keys[0], keys[1]


_KEYS = _plain_keys()


def _with_autograd() -> AbstractContextManager[Any]:
    """Let autograd and autocast see the block, which operators run below them."""
    if torch.is_inference_mode_enabled():
        return nullcontext()
    guard: AbstractContextManager[Any] = torch._C._ForceDispatchKeyGuard(*_KEYS)
    return guard


@torch.library.custom_op("deqcore::solve", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded, *_ON_HOST))
def solve(
    anchor: Tensor,
    tensors: list[Tensor],
    problem: int,
    layout: str,
    leaves: int,
    wanted: list[int],
    recording: bool,
    autocast: torch.dtype | None,
    warm: bool,
) -> list[Tensor]:
    """Solve, and return the token, the report and the leaves of the value.

    Args:
        anchor: an empty tensor of its own for each call. Compilers merge calls with equal arguments, but two calls
            start from different equilibria or draw other random numbers. It also shows the device.
        tensors: the leaves of z0, those of the inputs, then parameters and buffers.
        problem: the number of the layer or captured function.
        layout: how the tensors are arranged, see `deqcore_torch.layout`.
        leaves: the number of leaves of z0.
        wanted: positions of the tensors that need gradients.
        recording: whether gradients are recorded; then tensors that the compiler does not see must not need any.
        autocast: the dtype of automatic mixed precision, or None where it is off.
        warm: whether the layer may start from its last equilibrium.
    """
    if problem not in numbered:
        raise BackendError("The layer of this compiled code must exist (it was deleted). Compile the model again.")
    kind, chosen = tensors[0].device.type, set(wanted)
    with _with_autograd(), torch.set_grad_enabled(recording):
        local = [t.detach().requires_grad_() if i in chosen else t.detach() for i, t in enumerate(tensors)]
        with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            solution, values = numbered[problem].run(layout, local, warm)
        if recording:
            _check_leaves(values, local)
    token = _token(_Record(values, [local[i] for i in wanted]) if wanted else None)
    reports = (solution.residual, solution.status, solution.steps, solution.evaluations)
    outputs = [
        token,
        *(report.detach().clone() for report in reports),
        *(v.detach().clone(memory_format=torch.contiguous_format) for v in values),
    ]
    _check_shapes(outputs, tensors[:leaves], numbered[problem].rows(layout, tensors[:leaves]))
    return outputs


def _check_leaves(values: list[Tensor], local: list[Tensor]) -> None:
    """Raise if gradients would have to leave the operator by another way than its arguments.

    Raises:
        BackendError: the cell reads a tensor that needs a gradient and is not an argument.
    """
    known = {id(t) for t in local}
    seen: set[Any] = set()
    stack: list[Any] = [v.grad_fn for v in values]
    while stack:
        node = stack.pop()
        if node is None or node in seen or name_of(node) == GATE:
            continue
        seen.add(node)
        variable = leaf_of(node)
        if variable is not None and id(variable) not in known:
            raise BackendError(
                f"The cell of a compiled model reads a tensor of shape {tuple(variable.shape)} that needs a gradient, "
                f"but torch.compile does not see it. Pass it as an input, or make it a "
                f"parameter of the cell (a module)."
            )
        stack.extend(following for following, _ in node.next_functions)


def _check_shapes(outputs: list[Tensor], state: Sequence[Tensor], rows: tuple[int, ...]) -> None:
    expected = [tuple(t.shape) for t in state]
    shapes = [tuple(t.shape) for t in outputs[1 + REPORTS :]]
    reported = tuple(outputs[1].shape)
    if shapes != expected or reported != rows:
        raise BackendError(
            f"The solve returned leaves of shapes {shapes} and a report of shape {reported}, but compiled code was "
            f"made for {expected} and {rows}. Set forward.batch before compiling, and leave it unchanged."
        )


@solve.register_fake
def _(anchor: Tensor, tensors: list[Tensor], problem: int, layout: str, leaves: int, *_: object) -> list[Tensor]:
    state = tensors[:leaves]
    rows = numbered[problem].rows(layout, state)
    return [*placeholders(state[0], rows), *(t.new_empty(t.shape) for t in state)]


@torch.library.custom_op("deqcore::solve_backward", mutates_args=(), tags=_ON_HOST)
def solve_backward(token: Tensor, cotangents: Sequence[Tensor | None], like: list[Tensor]) -> list[Tensor]:
    """Return the gradients for the tensors that a solve was asked for.

    Args:
        token: the first result of that solve.
        cotangents: one for each leaf of its value.
        like: the tensors that need gradients.
    """
    record = _records.get(int(token))
    if record is None:
        raise BackendError(
            "The record of a compiled solve must be in this process (got results of another). Solve here."
        )
    with _with_autograd():
        gradients = record.vjp(cotangents)
    return [_shaped(g, t) for g, t in zip(gradients, like, strict=True)]


def _shaped(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return a gradient in fresh memory, in the layout that its fake has."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return out.zero_() if gradient is None else out.copy_(gradient)


@solve_backward.register_fake
def _(token: Tensor, cotangents: Sequence[Tensor | None], like: list[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in like]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, tensors, _, _, _, ctx.wanted, *_ = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(output[0], *(tensors[i] for i in ctx.wanted))


def _pull(ctx: Any, cotangents: list[Tensor | None]) -> Any:
    token, *like = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * ctx.count
    if like:
        pulled = torch.ops.deqcore.solve_backward(token, list(cotangents[1 + REPORTS :]), like)
        for i, gradient in zip(ctx.wanted, pulled, strict=True):
            gradients[i] = gradient
    return None, gradients, None, None, None, None, None, None, None


def _refuse(ctx: Any, *cotangents: Any) -> Any:
    raise StrategyError(TWICE)


torch.library.register_autograd(solve._opoverload, _pull, setup_context=_save)
torch.library.register_autograd(solve_backward._opoverload, _refuse)

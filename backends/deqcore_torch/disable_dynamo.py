"""Code that torch.compile must not trace, and code that no tracer can trace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar

import torch

from deqcore.errors import BackendError

P = ParamSpec("P")
R = TypeVar("R")

REASON: Final = (
    "a fixed point is solved by a loop that ends when the samples have converged, which no graph holds, and here the "
    "solve is not one operator of the graph either: this needs PyTorch 2.6, inputs that are tensors, numbers, None, "
    "tuples, lists and dicts, no until, state, config or settings of the call to a layer, and no transform of "
    "torch.func (grad, vmap, jvp, …) around it. Without fullgraph = True what surrounds the solve is compiled, with a "
    "graph break here"
)


def untraced(fn: Callable[P, R]) -> Callable[P, R]:
    """Return `fn` run by Python, even if torch.compile runs its caller.

    If it were traced, each count of secant pairs would give a new graph: 79 graphs for a cell of 4 numbers, against 2
    around it. `torch.compiler.disable` alone would load the compiler (seconds) in every program.
    """
    disabled: Callable[P, R] | None = None

    @wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if not _watched():
            return fn(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(fn)
        return disabled(*args, **kwargs)

    # The mark of `torch.compiler.disable`: the graph break, or the error of fullgraph = True, names the reason.
    call._torchdynamo_disable = True
    call._torchdynamo_disable_msg = REASON
    return call


def _watched() -> bool:
    """Return whether torch.compile sees the frames that Python runs here: only inside compiled code and its breaks."""
    if "torch._dynamo" not in sys.modules:
        return False
    callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    return callback is None or callback() is not None


def refuse_tracing(z0: torch.Tensor) -> None:
    """Raise if tensors have no values, because a loop cannot end without them.

    Raises:
        BackendError: make_fx or torch.jit.trace runs here, or the state is a fake tensor.
    """
    if torch.compiler.is_exporting():
        raise BackendError(
            "An exported solve takes the initial iterate and the inputs alone (got until, mask, ids, changed, state, "
            "config, a call of vjp or trajectory, or settings of the call to a layer). Give the layer its settings "
            "by DEQ(cell, evaluation={...}), and leave the others out."
        )
    proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    if proxy or hasattr(z0, "fake_mode") or torch.jit.is_tracing():
        raise BackendError(
            "fixed_point cannot be traced (by make_fx or torch.jit.trace, or with fake tensors), because "
            "its loop ends when the samples have converged, which needs values. Export the cell alone and solve "
            "around it, use torch.compile, which runs the solve in Python, or torch.export of model.eval(), which "
            "makes a loop of plain operators."
        )

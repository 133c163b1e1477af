"""A solve as plain operators, for `torch.export`: one `while_loop` whose body evaluates f once.

An exported program runs without Python, so it holds neither deqcore's solvers nor its histories. The loop takes the
steps of Anderson mixing over the last `HISTORY` differences (plain iteration for `forward.solver = "picard"`), with
coefficients by an unrolled elimination, which every runtime can execute. Each sample stops at its own
tolerance and stays as it is.

A step that raises a sample's residual far above its best one returns to the best iterate and forgets the differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deqcore import config as settings
from deqcore.config import Config
from deqcore.errors import BackendError
from deqcore.linear.norms import default_rtol
from deqcore.solve.dispatch import backend_named
from deqcore.types import Status
from deqcore_torch.layout import at_trace_time, describe, rebuilt, wide

HISTORY: Final = 4
GROWTH: Final = 4.0  # a residual above this multiple of the best one is a step that failed

Map: TypeAlias = Callable[[Tensor], Tensor]


class Numbers(NamedTuple):
    """The settings of one exported loop."""

    rtol: float
    atol: float
    max_steps: int
    mixing: bool
    batch: bool


@at_trace_time
def numbers(
    config: Config | None, overrides: dict[str, Any], dtype: torch.dtype
) -> tuple[float, float, int, bool, bool]:
    """Return the settings of a call for a state of this dtype; plain numbers, which are constants of the program."""
    forward = settings.resolve(config, overrides)[0].forward
    if forward.batch == 2 and forward.batch is not True:
        raise BackendError(
            "An exported program solves samples, not units, so forward.batch must be true or false (got 2). Set "
            "forward.batch = true before the export."
        )
    like = torch.empty(0, dtype=wide(dtype) if dtype.is_complex else dtype)
    rtol = default_rtol(backend_named("torch"), like) if isinstance(forward.rtol, str) else forward.rtol
    return float(rtol), float(forward.atol), int(forward.max_steps), forward.solver != "picard", bool(forward.batch)


class State(NamedTuple):
    """What the loop carries. `z` and `fz` are `(batch, n)`, histories `(batch, HISTORY, n)`, the rest `(batch,)`."""

    step: Tensor  # of the loop, a scalar
    z: Tensor
    fz: Tensor
    residual: Tensor
    best_z: Tensor
    best_fz: Tensor
    best: Tensor
    values: Tensor  # differences of f(z)
    residuals: Tensor  # differences of f(z) − z
    steps: Tensor
    running: Tensor


def solve(
    f: Callable[..., Any], z0: Any, args: tuple[Any, ...], given: Numbers
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """Return the value like z0, the residuals, the statuses, the steps and the evaluations of f.

    Raises:
        BackendError: f cannot be traced, because its control flow depends on values.
    """
    with torch.no_grad():
        start = _joined(z0, given.batch)
        at: Map = lambda z: _joined(f(_split(z, z0, given.batch), *args), given.batch)  # noqa: E731
        first = _begin(at, start, given)
        carried = torch.while_loop(
            lambda *carry: State(*carry).running.any() & (State(*carry).step < given.max_steps),
            lambda *carry: tuple(_step(at, State(*carry), given)),
            tuple(first),
        )
        end = State(*carried)
        better = end.best < end.residual
        z = torch.where(better[:, None], end.best_z, end.z)
        residual = torch.where(better, end.best, end.residual)
        status = _status(end, residual)
        return _split(z, z0, given.batch), residual, status, end.steps, end.steps + 1


def _begin(at: Map, z: Tensor, given: Numbers) -> State:
    """Evaluate f at the initial iterate."""
    fz = _traced(at, z)
    residual, size = _norm(fz - z), _norm(fz)
    none = z.new_zeros((z.shape[0], HISTORY, z.shape[1]))
    return State(
        step=torch.zeros((), dtype=torch.int64, device=z.device),
        z=z + 0,
        fz=fz + 0,
        residual=residual,
        best_z=z + 0,
        best_fz=fz + 0,
        best=residual + 0,
        values=none,
        residuals=none + 0,
        steps=torch.zeros_like(residual, dtype=torch.int32),
        running=_unfinished(residual, size, given),
    )


def _traced(at: Map, z: Tensor) -> Tensor:
    try:
        return at(z)
    except torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode as error:
        raise BackendError(
            "The cell cannot be exported, because its control flow depends on values of tensors. Write the branch with "
            "torch.where or torch.cond."
        ) from error


def _step(at: Map, old: State, given: Numbers) -> State:
    """Take one step with the samples that run."""
    r = old.fz - old.z
    new = old.fz
    if given.mixing:
        new = new - (_coefficients(old.residuals, r)[:, :, None] * old.values).sum(1)
    run = old.running[:, None]
    z = torch.where(run, new, old.z)
    fz = at(z)
    residual = _norm(fz - z)
    used = (old.residuals != 0).any(2).any(1) if given.mixing else torch.zeros_like(old.running)
    failed = old.running & used & ~(residual <= GROWTH * old.best)
    improved = old.running & (residual < old.best)
    values, residuals = old.values + 0, old.residuals + 0
    if given.mixing:
        values = _shifted(old.values, fz - old.fz, old.running, failed)
        residuals = _shifted(old.residuals, fz - z - r, old.running, failed)
    back, taken = failed[:, None], improved[:, None]
    at_z, at_fz = torch.where(back, old.best_z, z), torch.where(back, old.best_fz, fz)
    return State(
        step=old.step + 1,
        z=at_z,
        fz=at_fz,
        residual=torch.where(failed, old.best, residual),
        best_z=torch.where(taken, z, old.best_z),
        best_fz=torch.where(taken, fz, old.best_fz),
        best=torch.where(improved, residual, old.best),
        values=values,
        residuals=residuals,
        steps=old.steps + old.running.to(torch.int32),
        running=old.running & (failed | _unfinished(residual, _norm(fz), given)),
    )


def _unfinished(residual: Tensor, size: Tensor, given: Numbers) -> Tensor:
    """Return which samples continue. NaN compares as false: a sample whose f is not finite stops."""
    return (residual > given.atol + given.rtol * size) & (residual < float("inf"))


def _status(end: State, residual: Tensor) -> Tensor:
    spent = torch.where(end.running, int(Status.MAX_STEPS), int(Status.CONVERGED))
    finite = (end.residual < float("inf")) & (residual < float("inf"))
    return torch.where(finite, spent, int(Status.NONFINITE)).to(torch.int32)


def _shifted(history: Tensor, new: Tensor, running: Tensor, failed: Tensor) -> Tensor:
    moved = torch.cat([history[:, 1:], new[:, None]], 1)
    kept = torch.where(running[:, None, None], moved, history)
    return torch.where(failed[:, None, None], torch.zeros_like(kept), kept)


def _coefficients(residuals: Tensor, r: Tensor) -> Tensor:
    """Return the γ `(batch, HISTORY)` that minimise ‖r − Σ γᵢ residualsᵢ‖, by regularised normal equations."""
    stored = _wide(residuals)
    gram = stored @ stored.transpose(1, 2)
    size = torch.diagonal(gram, dim1=1, dim2=2).sqrt()[:, :, None]
    scale = torch.where(size > 0, size, 1.0)
    # A difference that is not there yet has a row of zeros with 1 on the diagonal, so its coefficient is zero.
    diagonal = torch.eye(HISTORY, dtype=stored.dtype, device=stored.device)
    ridge = 16.0 * torch.finfo(stored.dtype).eps
    matrix = torch.where(diagonal > 0, 1.0 + ridge, gram / (scale * scale.transpose(1, 2)))
    solved = _solved(matrix, stored @ _wide(r)[:, :, None] / scale, diagonal)
    return (solved / scale)[:, :, 0].to(residuals.dtype)


def _solved(matrix: Tensor, right: Tensor, identity: Tensor) -> Tensor:
    """Solve positive definite equations `(batch, HISTORY, HISTORY)` by Gauss–Jordan elimination, in few operators.

    Pivots are at least 4 eps, because rounding may leave less of a nearly singular matrix.
    """
    floor = torch.where(identity > 0, 4.0 * torch.finfo(matrix.dtype).eps, -float("inf"))
    table = torch.cat([matrix, right], 2)
    for k in range(HISTORY):
        column = torch.maximum(table[:, :, k : k + 1], floor[:, k : k + 1])
        row = table[:, k : k + 1] / column[:, k : k + 1]
        table = table - (column - identity[:, k : k + 1]) * row
    return table[:, :, HISTORY:]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_wide(v), dim=1)


def _joined(tree: Any, batch: bool) -> Tensor:
    leaves: list[Tensor] = []
    describe(tree, leaves)
    leaves = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
    parts = [
        (leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None]) if batch else leaf.reshape(1, -1) for leaf in leaves
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _split(matrix: Tensor, like: Any, batch: bool) -> Any:
    leaves: list[Tensor] = []
    describe(like, leaves)
    found, begin = [], 0
    for leaf in leaves:
        shape = (matrix.shape[0], *leaf.shape[1:]) if batch else tuple(leaf.shape)
        size = 1
        for extent in leaf.shape[1:] if batch else leaf.shape:
            size = size * extent
        if leaf.is_complex():
            pairs = matrix[:, begin : begin + 2 * size].reshape(*shape, 2)
            found.append(torch.complex(pairs[..., 0], pairs[..., 1]))
            size = 2 * size
        else:
            found.append(matrix[:, begin : begin + size].reshape(shape))
        begin = begin + size
    return rebuilt(like, found)

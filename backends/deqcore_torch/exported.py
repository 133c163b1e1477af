"""A solve as plain operators, for `torch.export`: one `while_loop` whose body evaluates f once.

An exported program runs without Python, so it holds neither deqcore's solvers nor its histories. The loop takes the
steps of Anderson mixing over `HISTORY` differences (plain iteration for `forward.solver = "picard"`). Each sample stops
at its own tolerance.

Python runs the operators of a program one by one, so there are as few as possible. The differences of residuals are
kept orthonormal, and those of values follow by linearity, so that coefficients are inner products and no equations are
solved. A step that raises the residual of a sample far above its best one returns to the best iterate and forgets the
differences. A sample that has grown meets the tolerance only if its residual has fallen by more, as in
`deqcore.solve.termination`.

Source: He, Tang, Ho, Saad & Xi (2024), "nlTGCR: a class of nonlinear acceleration procedures based on conjugate
residuals", for orthonormal differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deqcore import config as settings
from deqcore.config import Config
from deqcore.errors import BackendError, ProblemError
from deqcore.linear.norms import default_rtol
from deqcore.solve.dispatch import backend_named
from deqcore.solve.termination import BLOW_UP, DROP, FALL
from deqcore.types import Limits, Status
from deqcore_torch.exported_state import check_state, is_moved, joined, leaves_like, moved_leaves, split
from deqcore_torch.layout import at_trace_time, wide

HISTORY: Final = 8
ROUNDING: Final = 64.0  # a difference below this multiple of eps times the best residual is rounding
GROWTH: Final = 4.0  # a residual above this multiple of the best one is a step that failed

Map: TypeAlias = Callable[[Tensor], Tensor]


class Numbers(NamedTuple):
    """The settings of one exported loop."""

    rtol: float
    atol: float
    max_steps: int
    mixing: bool
    batch: bool
    slack: float  # see `deqcore.types.Limits`, and for the two others
    hidden: float
    tiny: float


@at_trace_time
def numbers(
    config: Config | None, overrides: dict[str, Any], dtype: torch.dtype
) -> tuple[float, float, int, bool, bool, float, float, float]:
    """Return the settings of a call for a state of this dtype; plain numbers, which are constants of the program."""
    forward = settings.resolve(config, overrides)[0].forward
    if forward.batch == 2 and forward.batch is not True:
        raise BackendError(
            "An exported program solves samples, not units, so forward.batch must be true or false (got 2). Set "
            "forward.batch = true before the export."
        )
    like = torch.empty(0, dtype=wide(dtype) if dtype.is_complex else dtype)
    rtol = default_rtol(backend_named("torch"), like) if isinstance(forward.rtol, str) else forward.rtol
    rtol, atol = float(rtol), float(forward.atol)
    limits = Limits.of(None, torch.finfo(like.dtype).eps, rtol, atol, forward.patience)
    method = int(forward.max_steps), forward.solver != "picard", bool(forward.batch)
    return rtol, atol, *method, limits.slack, limits.hidden, limits.tiny


class State(NamedTuple):
    """What the loop carries. A point is f(z) − z, then f(z), `(batch, 2n)`. What names no shape has `(batch,)`."""

    step: Tensor  # of the loop, a scalar
    point: Tensor  # `(batch, 2n)`
    best_point: Tensor  # `(batch, 2n)`
    best: Tensor  # its residual
    peak: Tensor  # the largest residual
    reference: Tensor  # scale of the start, max(‖z0‖, ‖f(z0)‖)
    history: Tensor  # differences of points `(batch, HISTORY, 2n)`, whose halves of residuals are orthonormal
    valid: Tensor  # 1 for the differences that count, 0 for the others, `(batch, HISTORY)`
    inner: Tensor  # products of the latest residual with those halves `(batch, HISTORY)`
    fresh: Tensor  # no difference counts
    steps: Tensor
    running: Tensor
    converged: Tensor


def solve(
    f: Callable[..., Any], z0: Any, args: tuple[Any, ...], given: Numbers
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """Return the value like z0, the residuals, the statuses, the steps and the evaluations of f.

    Raises:
        BackendError: f cannot be traced, because its control flow depends on values.
        InitialIterateError: z0 is not a state.
        ProblemError: f(z) is not a tree like z.
    """
    with torch.no_grad():
        check_state(z0, given.batch)
        start = joined(moved_leaves(z0), given.batch)

        def at(matrix: Tensor) -> Tensor:
            z = split(matrix, z0, given.batch)
            return joined(leaves_like(f(z, *args), z), given.batch)

        carried = torch.while_loop(
            lambda *carry: State(*carry).running.any() & (State(*carry).step < given.max_steps),
            lambda *carry: tuple(_step(at, State(*carry), given)),
            tuple(_begin(at, start, given)),
        )
        end = State(*carried)
        residual, fz = _halves(end.best_point)
        stopped = torch.where(end.running, int(Status.MAX_STEPS), int(Status.NONFINITE))
        status = torch.where(end.converged, int(Status.CONVERGED), stopped).to(torch.int32)
        return split(fz - residual, z0, given.batch), end.best, status, end.steps, end.steps + 1


class _Underivable(torch.autograd.Function):
    """Identity whose derivative is refused while the program is traced."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *sources: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise BackendError(
            "An exported program holds no derivative of a solve (got torch.autograd.grad, or a backward pass, inside "
            "of the exported code). Export the model without it, or compile it by torch.compile instead."
        )


def underivable(value: Tensor, sources: list[Tensor]) -> Tensor:
    """Return a value whose derivative for one of the sources, inside of exported code, is an error instead of zero."""
    tracked = [tensor for tensor in sources if tensor.requires_grad]
    # With strict = True the compiler traces this code, and breaks at a derivative itself.
    if not tracked or not torch.is_grad_enabled() or not is_moved(value) or torch.compiler.is_dynamo_compiling():
        return value
    marked: Tensor = _Underivable.apply(value, *tracked)
    return marked


def _begin(at: Map, z: Tensor, given: Numbers) -> State:
    """Evaluate f at the initial iterate."""
    fz = _traced(at, z)
    point, residual, size = _measured(z, fz)
    reference = torch.maximum(_norm(z, 1).to(size.dtype), size)
    met, going = _judged(residual, size, _Way(reference, residual, residual), given)
    kept = HISTORY if given.mixing else 0
    return State(
        step=torch.zeros((), dtype=torch.int64, device=z.device),
        point=point,
        best_point=point + 0,
        best=residual + 0,
        peak=residual + 0,
        reference=reference,
        history=z.new_zeros((z.shape[0], kept, 2 * z.shape[1])),
        valid=z.new_zeros((z.shape[0], kept)),
        inner=z.new_zeros((z.shape[0], kept)),
        fresh=torch.ones_like(met),
        steps=torch.zeros_like(residual, dtype=torch.int32),
        running=going,
        converged=met,
    )


def _traced(at: Map, z: Tensor) -> Tensor:
    version = 0 if torch.compiler.is_dynamo_compiling() else z._version
    try:
        fz = at(z)
    except torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode as error:
        raise BackendError(
            "The cell cannot be exported, because its control flow depends on values of tensors. Write the branch with "
            "torch.where or torch.cond."
        ) from error
    if not torch.compiler.is_dynamo_compiling() and z._version != version:
        raise ProblemError.in_place()
    return fz


def _step(at: Map, old: State, given: Numbers) -> State:
    """Take one step. Samples that do not run move, too, but keep their best point, which is the result."""
    z = _mixed(old) if given.mixing else _halves(old.point)[1]
    point, residual, size = _measured(z, at(z))
    met, going = _judged(residual, size, _Way(old.reference, old.peak, old.best), given)
    better = old.running & ((residual < old.best) | met)
    sane = BLOW_UP * residual <= old.reference  # a residual far above the start proves no fall
    best_point = torch.where(better[:, None], point, old.best_point)
    if not given.mixing:
        failed, history = torch.zeros_like(met), (old.history + 0, old.valid + 0, old.inner + 0)
    else:
        failed = ~((residual <= GROWTH * old.best) | old.fresh)
        history = _extended(old, point, failed)
        point = torch.where(failed[:, None], best_point, point)
    return State(
        old.step + 1,
        point,
        best_point,
        torch.where(better, residual, old.best),
        torch.where(sane, torch.maximum(residual, old.peak), old.peak),
        old.reference + 0,
        *history,
        fresh=failed,
        steps=old.steps + old.running.to(torch.int32),
        running=old.running & (going | failed),
        converged=old.converged | (old.running & met),
    )


def _mixed(old: State) -> Tensor:
    """Return f(z) − Σ γᵢ valuesᵢ `(batch, n)`, where Σ γᵢ residualsᵢ is the nearest to f(z) − z."""
    (_, fz), (_, values) = _halves(old.point), _halves(old.history)
    return fz - torch.bmm(old.inner.unsqueeze(1), values).squeeze(1)


def _extended(old: State, point: Tensor, failed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return history, `valid` and `inner` with the latest difference, orthogonal to the others, instead of the oldest.

    What rounding leaves of a difference that depends on the others is dropped.
    """
    residuals, _ = _halves(old.history)
    r, _ = _halves(point)
    inner = (residuals * r.unsqueeze(1)).sum(2) * old.valid  # faster on CPUs than the product of a matrix and a vector
    new = point - old.point - torch.bmm((inner - old.inner).unsqueeze(1), old.history).squeeze(1)
    length = _norm(_halves(new)[0], 1).to(new.dtype)
    scale = torch.where(length > ROUNDING * torch.finfo(new.dtype).eps * old.best, length, float("inf"))
    clear = failed.unsqueeze(1)
    new = torch.where(clear, 0.0, new / scale.unsqueeze(1))
    latest = (_halves(new)[0] * r).sum(1, keepdim=True)
    history = torch.cat([old.history.narrow(1, 1, HISTORY - 1), new.unsqueeze(1)], 1)
    valid = torch.cat([old.valid.narrow(1, 1, HISTORY - 1), torch.ones_like(latest)], 1)
    inner = torch.cat([inner.narrow(1, 1, HISTORY - 1), latest], 1)
    return history, torch.where(clear, 0.0, valid), torch.where(clear, 0.0, inner)


def _halves(point: Tensor) -> tuple[Tensor, Tensor]:
    n = point.shape[-1] // 2
    return point.narrow(-1, 0, n), point.narrow(-1, n, n)


def _measured(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the point of z, ‖f(z) − z‖ and ‖f(z)‖."""
    point = torch.cat([fz - z, fz], 1)
    pairs = point.reshape(point.shape[0], 2, z.shape[1])
    residual, size = _norm(pairs, 2).to(wide(z.dtype)).unbind(1)
    return point, residual, size


def _norm(x: Tensor, dim: int) -> Tensor:
    """Return norms, summed in float64: squares of float32 numbers leave the range of float32 from 1e-23 and 1e19 on."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)


class _Way(NamedTuple):
    """What is known of the samples before a point, `(batch,)` each."""

    reference: Tensor
    peak: Tensor
    best: Tensor


def _judged(residual: Tensor, size: Tensor, way: _Way, given: Numbers) -> tuple[Tensor, Tensor]:
    """Return which samples meet the tolerance, and which are finite and do not.

    The rounding of f(z) counts as residual where the iterate has grown, since f(z) = z + 1 is z once z is large enough.
    """
    finite = residual < float("inf")
    goal = given.rtol * torch.maximum(size, given.tiny * way.reference)
    least = torch.maximum(residual, given.hidden * size)
    still = size <= 2.0 * way.reference
    growth = (least / way.peak) * (size / torch.maximum(way.peak, way.reference))
    fallen = (growth <= given.slack) & (residual < way.best)
    bottom = least <= torch.minimum(way.peak / FALL, way.best / DROP)
    met = (residual <= goal) & (still | fallen | bottom)
    if given.atol:
        met = met | ((residual <= goal + given.atol) & still) | (least <= given.atol)
    met = met & finite
    return met, finite ^ met

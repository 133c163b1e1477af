"""The fused kernels: native steps by Numba or Triton, see `deqcore_torch.native`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.host import HostViews
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.kernels import ErrorJudged, ErrorTask, FusedKernels, Krylov, NextJoining
from deqcore.types import Limits, LoopState, Map, StepResult
from deqcore_torch import compiled


def native_steps(host: HostViews, x: Tensor) -> Any | None:
    """Return the native steps that can read x; those for the host only if reading x costs no wait."""
    steps = compiled.reading(x)
    return None if steps is None or (x.is_cpu and host.numpy_view(x) is None) else steps


class TorchKernels(FusedKernels):
    """The native steps that can read a call's tensors."""

    def __init__(self, be: Backend) -> None:
        super().__init__(be)
        self.backend = be

    def first_figures(self, z0: Tensor, fz: Tensor, limits: Limits) -> dict[str, Any] | None:
        steps = native_steps(self.backend.host, z0)
        figures: dict[str, Any] | None = None if steps is None else steps.first_figures(z0, fz, limits)
        return figures

    def step(self, solver: object, f: Map, z: Tensor, fz: Tensor, state: Any) -> StepResult | None:
        steps = native_steps(self.backend.host, z)
        result: StepResult | None = None if steps is None else steps.step(self.backend, solver, f, z, fz, state)
        return result

    def update(
        self, before: LoopState, result: StepResult, residual: Tensor, size: Tensor | None, limits: Limits
    ) -> LoopState | None:
        steps = native_steps(self.backend.host, result.z)
        after: LoopState | None = None if steps is None else steps.keep(before, result, residual, size, limits)
        return after

    def arnoldi(self, space: Krylov, w: Tensor, goal: Tensor, twice: bool, shifted: bool = False) -> Krylov | None:
        w = w.contiguous()  # products of f come in any layout
        steps = native_steps(self.backend.host, w)
        larger: Krylov | None = None if steps is None else steps.arnoldi(space, w, goal, twice, shifted)
        return larger

    def secants(
        self, basis: History, gram: History, pairs: History, whole: Callable[[], InverseJacobian]
    ) -> InverseJacobian | None:
        steps = compiled.loaded("cpu")  # the estimate itself asks what it can read, whenever it is applied
        estimate: InverseJacobian | None = None if steps is None else steps.secants(basis, gram, pairs, whole)
        return estimate

    def grow(
        self,
        space: Krylov,
        image: Map,
        goal: Tensor,
        steps: int,
        *,
        twice: bool,
        shifted: bool,
        together: bool,
        joining: NextJoining | None = None,
    ) -> Krylov | None:
        native = native_steps(self.backend.host, space.v)
        larger: Krylov | None = (
            None
            if native is None
            else native.grow(
                space, image, goal, steps, twice=twice, shifted=shifted, together=together, joining=joining
            )
        )
        return larger

    def plain_step(self, x: Tensor, r: Tensor, image: Tensor, norm: Any, rows: Any) -> Any | None:
        image = image.contiguous()  # products of f come in any layout
        native = native_steps(self.backend.host, image)
        return None if native is None else native.plain_step(x, r, image, norm, rows)

    def certify(self, space: Krylov, image: Map, task: ErrorTask) -> ErrorJudged | None:
        native = native_steps(self.backend.host, space.v)
        judged: ErrorJudged | None = None if native is None else native.certify(space, image, task)
        return judged

    def low_rank(self, basis: History, left: History, right: History, v: Tensor) -> Tensor | None:
        native = native_steps(self.backend.host, v)
        result: Tensor | None = None if native is None else native.low_rank(basis, left, right, v)
        return result

    def least_squares(self, space: Krylov, inverse: Tensor | bool) -> tuple[Tensor, ...] | None:
        steps = native_steps(self.backend.host, space.v)
        fields: tuple[Tensor, ...] | None = None if steps is None else steps.least_squares(space, inverse)
        return fields

    def residual_norms(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor] | None:
        steps = native_steps(self.backend.host, z)
        norms: tuple[Tensor, Tensor] | None = None if steps is None else steps.measure(z, fz)
        return norms

    def orthogonalize(self, basis: History, w: Tensor, twice: bool) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        steps = native_steps(self.backend.host, w)
        parts: tuple[Tensor, Tensor, Tensor, Tensor] | None = None if steps is None else steps.project(basis, w, twice)
        return parts

"""A layer as the problem of an operator: the ordinary solve with the tensors of the compiled code in its cell."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.stateless import _reparametrize_module

import deqcore
from deqcore import config as settings
from deqcore.errors import BackendError

if TYPE_CHECKING:
    from deqcore.layer import LayerSettings


class Solvable(Protocol):
    """What the operator needs of a layer."""

    cell: Any
    settings: LayerSettings
    training: bool

    def start(self, cold: Any) -> Any: ...

    def solve_eagerly(self, *inputs: Any, z0: Any = None) -> deqcore.Solution: ...


class LayerProblem:
    """See `problems.OperatorProblem`. It does not keep the layer alive."""

    def __init__(self, layer: Solvable) -> None:
        self.layer = weakref.ref(layer)

    def _layer(self) -> Solvable:
        layer = self.layer()
        if layer is None:
            raise BackendError("The layer of this compiled code must exist (it was deleted). Compile the model again.")
        return layer

    def rows(self, layout: str, state: Sequence[Tensor]) -> tuple[Any, ...]:
        """See `problems.OperatorProblem`."""
        from deqcore_torch.layout import rows_shape

        layer = self._layer()
        resolved, _ = settings.resolve(*layer.settings.call(layer.training))
        return rows_shape(state[0], int(resolved.forward.batch))

    def run(self, layout: str, tensors: list[Tensor], warm: bool) -> tuple[deqcore.Solution, list[Tensor]]:
        """Solve as `DEQ.solve` does; `warm` leaves the choice of the start to the layer."""
        from deqcore_torch.layout import arrange, describe

        layer = self._layer()
        rest = iter(tensors)
        z0, inputs = arrange(layout, rest)
        with _holding(layer.cell, list(rest)):
            start = layer.start(z0) if warm else z0
            solution = layer.solve_eagerly(*inputs, z0=start)
        values: list[Tensor] = []
        describe(solution.value, values)
        return solution, values


def names(cell: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers of a cell."""
    return [name for name, _ in cell.named_parameters()] + [name for name, _ in cell.named_buffers()]


@contextmanager
def _holding(cell: Any, tensors: list[Tensor]) -> Iterator[None]:
    """Put tensors into a cell as its parameters and buffers, for the block.

    Weights that `parametrize.cached()` keeps belong to the caller's tensors, so the block has a cache of its own.
    """
    if not isinstance(cell, nn.Module) or not tensors:
        yield
        return
    named = dict(zip(names(cell), tensors, strict=True))
    kept, parametrize._cache = parametrize._cache, {}
    try:
        with _reparametrize_module(cell, named, tie_weights=True):
            yield
    finally:
        parametrize._cache = kept

"""Parts of cells that help equilibrium models train: one dropout mask per solve, and a cell that always converges.

Weight and spectral normalisation come from `torch.nn.utils.parametrizations`; `begin_solve` keeps them constant during
a solve. Jacobian regularisation comes from `deqcore.diagnostics`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from deqcore.errors import ConfigError, ProblemError


def begin_solve(module: object) -> None:
    """Notify all parts of a module that a new solve begins. `DEQ` calls it; call it before a bare `fixed_point`.

    Dropout masks are forgotten. Parametrised weights are computed once: `torch.nn.utils.parametrize.cached()` then
    keeps them with their gradient. Spectral normalisation takes its power iteration here (in training) and not in the
    solve, where it would make f another function in every evaluation.

    Args:
        module: the module with these parts; anything else is ignored.

    Example:
        >>> dropout = VariationalDropout(0.5)
        >>> mask = dropout(torch.ones(4, 2)), dropout.mask is None
        >>> begin_solve(dropout)
        >>> mask[1], dropout.mask is None
        (False, True)
    """
    if not isinstance(module, nn.Module):
        return
    for part in module.modules():
        if isinstance(part, VariationalDropout):
            part.mask = None
        elif parametrize.is_parametrized(part):
            _normalise(part)


def _normalise(part: nn.Module) -> None:
    """Compute the weights once, and stop the power iteration of spectral normalisation until the next solve."""
    lists = part.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    spectral = [norm for norm in lists.modules() if isinstance(norm, _SpectralNorm)]
    for norm in spectral:
        norm.train(part.training)
    for name in lists:
        getattr(part, name)
    for norm in spectral:
        norm.eval()


class VariationalDropout(nn.Module):
    """Dropout whose mask stays the same through one solve, so that f is one function and has a fixed point.

    The mask is drawn at the first evaluation after `begin_solve`, on the device and in the dtype of its input, and is
    applied again in the backward pass. Ordinary `nn.Dropout` in a cell makes f another function in every evaluation.

    Args:
        p: probability that a number becomes zero, from 0 to below 1.
        shared: axes (the batch, 0, is not among them) along which one mask serves all, such as `(1,)` for the tokens
            of `(batch, tokens, width)`.

    Raises:
        ConfigError: p is out of range.
        ProblemError: (when called) the shape of the input changed within a solve.

    Source: Gal & Ghahramani (2016), "A theoretically grounded application of dropout in recurrent neural networks";
    for equilibrium models: Bai, Kolter & Koltun (2019), §4.

    Example:
        >>> x = torch.ones(2, 3)
        >>> dropout = VariationalDropout(0.5)
        >>> begin_solve(dropout)
        >>> bool((dropout(x) == dropout(x)).all())  # one mask until the next solve
        True
    """

    def __init__(self, p: float = 0.5, shared: tuple[int, ...] = ()) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ConfigError.bad_value("VariationalDropout", "p", p, "a number from 0 to below 1")
        if 0 in shared:
            raise ConfigError.bad_value(
                "VariationalDropout", "shared", shared, "numbers of axes other than the batch (axis 0)"
            )
        self.p = p
        self.shared = shared
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with the solve's mask applied, scaled by 1 / (1 − p); the input itself outside training."""
        if not self.training or self.p == 0.0:
            return x
        if self.mask is None:
            self.mask = self._draw(x)
        expected = self._shape(x)
        if tuple(self.mask.shape) != expected:
            raise ProblemError(
                f"The dropout mask was drawn for shape {tuple(self.mask.shape)}, but the input now needs {expected}: a "
                f"solve evaluates its cell on one shape. Call deqcore_torch.cells.begin_solve(cell) before each solve "
                f"(DEQ does), and do not combine this layer with forward.compact."
            )
        return x * self.mask.to(x.dtype)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        return tuple(1 if axis in self.shared else size for axis, size in enumerate(x.shape))

    def _draw(self, x: Tensor) -> Tensor:
        keep = torch.full(self._shape(x), 1.0 - self.p, device=x.device)
        return torch.bernoulli(keep) / (1.0 - self.p)

    def extra_repr(self) -> str:
        """Return the options for the printed form."""
        return f"p={self.p}, shared={self.shared}"


class MonotoneCell(nn.Module):
    """z ← relu(z − α (z − (W z + U x + b))) with W = (1 − m) I − AᵀA + B − Bᵀ, which converges for any weights.

    I − W is strongly monotone with constant m, so z = relu(W z + U x + b) has exactly one solution, and this
    forward–backward step contracts towards it for α < 2m/‖I − W‖². The step is α = m/‖I − W‖², with the norm computed
    again whenever the weights have changed. The solution does not depend on α, so neither do its gradients.

    Args:
        inputs: width of x `(batch, inputs)`.
        width: width of z `(batch, width)`.
        margin: m, above 0.

    Raises:
        ConfigError: the margin is not above 0.

    Source: Winston & Kolter (2020), "Monotone operator equilibrium networks", eq. (8) and §3.2.

    Example:
        >>> from deqcore_torch.nn import DEQ
        >>> layer = DEQ(MonotoneCell(inputs=3, width=5), forward__solver="picard", forward__max_steps=5000)
        >>> sol = layer.solve(torch.ones(2, 3))
        >>> sol.value.shape, bool(sol.converged.all())
        (torch.Size([2, 5]), True)
    """

    def __init__(self, inputs: int, width: int, margin: float = 0.1) -> None:
        super().__init__()
        if not margin > 0.0:
            raise ConfigError.bad_value("MonotoneCell", "margin", margin, "a number above 0")
        self.margin = margin
        self.a = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.b = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.inject = nn.Linear(inputs, width)
        self._step: tuple[Any, float] = (None, 0.0)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Take one forward–backward step for z `(batch, width)` and x `(batch, inputs)`."""
        step = self.step_size()
        return torch.relu(z + step * (self.apply_w(z) + self.inject(x) - z))

    def apply_w(self, z: Tensor) -> Tensor:
        """Return W z for z `(batch, width)`."""
        return (1.0 - self.margin) * z - (z @ self.a.T) @ self.a + z @ self.b.T - z @ self.b

    def step_size(self) -> float:
        """Return m/‖I − W‖², computed again if the weights have changed."""
        key = tuple((p.data_ptr(), p._version, p.dtype) for p in (self.a, self.b))
        if self._step[0] != key:
            with torch.no_grad():
                eye = torch.eye(len(self.a), dtype=self.a.dtype, device=self.a.device)
                norm = float(torch.linalg.matrix_norm(eye - self.apply_w(eye).T, ord=2))
            self._step = key, self.margin / norm**2
        return self._step[1]

    def initial_state(self, x: Tensor) -> Tensor:
        """Return zeros `(batch, width)`."""
        return x.new_zeros((x.shape[0], len(self.a)))

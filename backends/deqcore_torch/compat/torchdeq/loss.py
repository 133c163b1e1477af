"""torchdeq's losses: fixed-point correction, Jacobian regularization, the spectral radius."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from deqcore.errors import ConfigError, listing

Weight = Callable[..., Any]

_weights: Final[dict[str, Weight]] = {
    "exp": lambda n, k, gamma=0.8, **_: gamma ** (n - k - 1),
    "linear": lambda n, k, gamma=0.9, bias=0.0, **_: 1 - (n - k - 1) / n * gamma + bias,
    "const": lambda n, k, c=1.0, **_: c,
}


def register_weight_func(name: str, func: Weight) -> None:
    """Register a function of weights for `fp_correction`.

    Args:
        name: its name.
        func: `func(n, k, **kwargs)` returns the weight of state k of n.

    Raises:
        ConfigError: it cannot be called.

    Example:
        >>> register_weight_func("last", lambda n, k: float(k == n - 1))
        >>> fp_correction(lambda z, y: z - y, ([1.0, 5.0], 2.0), weight_func="last")
        3.0
    """
    if not callable(func):
        raise ConfigError.bad_value("register_weight_func", "func", func, "a function of (n, k)")
    _weights[name] = func


def fp_correction(
    crit: Callable[..., Any],
    args: Sequence[Any],
    weight_func: str = "exp",
    return_loss_values: bool = False,
    **kwargs: Any,
) -> Any:
    """Sum a loss over the states on the way to the solution, with weights that grow towards it.

    Args:
        crit: the loss of one state; it takes an item of each of `args`.
        args: what the loss takes: lists with one item a state, and values that all states share.
        weight_func: "exp" (γ^(n−k−1), the default with gamma = 0.8), "linear", "const", or one that
            `register_weight_func` has added.
        return_loss_values: return the losses of the states, too.
        **kwargs: of the function of weights, such as `gamma`.

    Returns:
        The sum, or the sum and the losses as numbers.

    Raises:
        ConfigError: the function of weights is not registered.

    Source: Bai, Geng, Savani & Kolter (2022), "Deep equilibrium optical flow estimation", eq. (6).

    Example:
        >>> fp_correction(lambda z, y: (z - y) ** 2, ([3.0, 2.0], 1.0), gamma=0.5)  # 0.5 · 4 + 1
        3.0
    """
    if weight_func not in _weights:
        raise ConfigError.bad_value("fp_correction", "weight_func", weight_func, listing(_weights))
    lists = [list(item) if isinstance(item, (list, tuple)) else [item] for item in args]
    count = max(map(len, lists))
    losses = [crit(*(item[k % len(item)] for item in lists)) for k in range(count)]
    total = sum(_weights[weight_func](count, k, **kwargs) * loss for k, loss in enumerate(losses))
    return (total, [float(loss) for loss in losses]) if return_loss_values else total


def jac_reg(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
    """Estimate ‖J‖² / numel(z) of the Jacobian J of f at z, by Hutchinson's estimator.

    Args:
        f0: f(z) with its graph.
        z0: z, which requires a gradient.
        vecs: number of random vectors.
        create_graph: let the estimate be differentiated.

    Returns:
        One number. `deqcore.diagnostics.jacobian_penalty` is the same for all backends.

    Source: Bai, Koltun & Kolter (2021), "Stabilizing equilibrium models by Jacobian regularization", eq. (5).

    Example:
        >>> z = torch.ones(4, 3, requires_grad=True)
        >>> torch.manual_seed(0).initial_seed(), 0.1 < float(jac_reg(0.5 * z, z, vecs=50)) < 0.4  # ‖J‖²/12 = 0.25
        (0, True)
    """
    total = torch.zeros((), dtype=z0.dtype, device=z0.device)
    for _ in range(vecs):
        (product,) = torch.autograd.grad(f0, z0, torch.randn_like(z0), retain_graph=True, create_graph=create_graph)
        total = total + product.square().sum()
    return total / (vecs * z0.numel())


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 100) -> tuple[Tensor, Tensor]:
    """Estimate the spectral radius of the Jacobian of f at z by power iteration.

    The radius is the mean growth of the vector over the second half of the iterations, which is right for a complex
    pair of eigenvalues, too. `deqcore.diagnostics.spectral_radius` needs fewer products and says how accurate it is.

    Args:
        f0: f(z) with its graph, which is kept.
        z0: z `(batch, ...)`, which requires a gradient.
        n_iters: number of vector–Jacobian products.

    Returns:
        The last vector, like z, and the radius of each sample `(batch,)`.

    Example:
        >>> z = torch.ones(2, 3, requires_grad=True)
        >>> power_method(0.5 * z, z, n_iters=20)[1].tolist()
        [0.5, 0.5]
    """
    vector, rows = torch.randn_like(z0), len(z0)
    shape, growth = (rows, *(1,) * (z0.ndim - 1)), []
    vector = vector / vector.reshape(rows, -1).norm(dim=1).reshape(shape)
    for _ in range(n_iters):
        (product,) = torch.autograd.grad(f0, z0, vector, retain_graph=True)
        norm = product.reshape(rows, -1).norm(dim=1)
        growth.append(norm)
        vector = product / norm.clamp(min=torch.finfo(norm.dtype).tiny).reshape(shape)
    return vector, torch.stack(growth[n_iters // 2 :]).log().mean(0).exp()

"""Jacobian-norm regularisation: a loss that keeps a fixed-point layer contractive while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from deqcore.diagnostics.linearization import linearize
from deqcore.errors import InitialIterateError
from deqcore.types import Array, Tree


def jacobian_penalty(
    f: Callable[..., Tree], z: Tree, *args: Any, noise: Tree | list[Tree], batch: bool | Literal[2] = True
) -> Array:
    """Estimate ‖∂f/∂z‖_F² at `z` per sample (Hutchinson): differentiable, on the state's device, in its dtype.

    For independent ε of zero mean and unit variance E ‖Jᵀε‖² = ‖J‖_F². Add its mean, divided by the size n of a
    sample as in the paper and times a small weight, to the loss: ‖J‖_F bounds the spectral radius, so solves stay
    short. One probe a training step is enough; several average within one step.

    The noise is an argument so that the caller draws it: with the framework's generator, so that a seed reproduces it,
    and with a key in compiled code, where noise drawn here would be a constant of the program.

    Gradients flow to everything that f depends on: parameters, `args` and `z`. Give a detached z (the published
    form) or the attached `sol.value`, which differentiates through the fixed point as well. On a backend without
    autodiff the value is right and has no gradient.

    Cost: one recorded evaluation of f, and one vector–Jacobian product per probe that is itself recorded.

    Args:
        f: `f(z, *args)` returns a tree like z.
        z: the point, a tree of floating-point arrays, usually the solution.
        *args: further arguments of f.
        noise: ε, a tree like z, as in `torch.randn_like(z)` or `jax.random.normal(key, z.shape)` (normal numbers, or
            ±1 with equal odds, which has the smaller variance); or a list of such trees, one per probe, if z itself
            is not a list.
        batch: whether the first axis of z is the batch, as `forward.batch`; 2 is the same as true here.

    Returns:
        ‖Jᵀε‖², averaged over the probes, `(batch,)`.

    Raises:
        InitialIterateError: z is unfit as a state, or the noise is not like z.
        ProblemError: f returned something that is not like z.

    Source: Bai, Koltun & Kolter (2021), "Stabilizing equilibrium models by Jacobian regularization", section 4.1.

    Example:
        >>> import numpy as np
        >>> a, z = np.array([[0.0, 2.0], [1.0, 0.0]]), np.zeros((1, 2))
        >>> probes = [np.array([[1.0, 1.0]]), np.array([[1.0, -1.0]])]  # all signs: exact
        >>> jacobian_penalty(lambda z: z @ a.T, z, noise=probes).tolist()  # ‖a‖_F² = 5
        [5.0]
    """
    at = linearize(f, z, args, batch)
    probes = noise if isinstance(noise, list) and not isinstance(z, list) else [noise]
    if not probes:
        raise InitialIterateError("noise must have at least one probe, a tree like z (got an empty list).")
    vjp = at.backend.autodiff.differentiable_vjp(at.f, at.z)
    total: Array = 0.0
    for probe in probes:
        product = vjp(at.space.ravel_like("noise", probe))
        total = total + at.backend.xp.sum(product * product, axis=1)
    return total / len(probes)


def residual_penalty(f: Callable[..., Tree], z: Tree, *args: Any, batch: bool | Literal[2] = True) -> Array:
    """Return ‖f(z) − z‖² / ‖f(z)‖² per sample, differentiable: a loss that pulls the last state of a loop to rest.

    Add its mean, times a small weight, to the loss of a model whose steps are truncated: deeper loops then stay where
    the trained depth ended. Gradients flow to z and to everything that f depends on; ‖f(z)‖ is held constant, so that
    the loss cannot fall by growth of the state.

    Cost: one recorded evaluation of f.

    Args:
        f: `f(z, *args)` returns a tree like z.
        z: the last state, a tree of floating-point arrays: `sol.value`, or `sol.z` to train f alone.
        *args: further arguments of f.
        batch: whether the first axis of z is the batch, as `forward.batch`; 2 is the same as true here.

    Returns:
        The squared relative residual `(batch,)`; 0 where f(z) = z = 0.

    Raises:
        InitialIterateError: z is unfit as a state.
        ProblemError: f returned something that is not like z.

    Example:
        >>> import numpy as np
        >>> residual_penalty(lambda z: 0.5 * z + 1.0, np.array([[1.0], [2.0]])).round(4).tolist()  # (1.5 − 1)² / 1.5²
        [0.1111, 0.0]
    """
    at = linearize(f, z, args, batch)
    xp, fz = at.backend.xp, at.f(at.z)
    size = at.backend.norm(at.backend.detach(fz)) ** 2
    scale = xp.where(size > 0, size, xp.ones_like(size))
    return xp.sum((fz - at.z) ** 2, axis=1) / at.backend.cast(scale, fz)

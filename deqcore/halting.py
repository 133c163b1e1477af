"""Halting per sample: a looped reasoner stops when its answer has settled, not only when its state has.

The state keeps moving long after the answer that is read from it has settled. `until` wraps f in a function that
returns a sample's state unchanged once a rule says that the sample is done. That sample is then at a fixed point, so
every solver stops it, freezes it while the rest of the batch continues, and counts its steps. No training is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

from deqcore import plugins
from deqcore.abc.arrays import is_inexact
from deqcore.abc.backend import Backend
from deqcore.api import get_backend
from deqcore.errors import BackendError, ConfigError, ProblemError
from deqcore.solve.dispatch import plain_leaves
from deqcore.types import Array, Tree

Rule: TypeAlias = Callable[[Tree, Tree], Array]
"""`rule(z, fz)` says of each sample whether it is done: `(batch,)` of bool, or `()` with `forward.batch = false`.

With `forward.batch = 2` it says so of each unit, `(batch, units)`.
"""


@dataclass(frozen=True)
class Settled:
    """A rule: a sample is done when one more evaluation of f changes no number of its answer by more than `tolerance`.

    Args:
        read: maps a state to its answer `(batch, ...)`, each row from its own row of the state. Probabilities suit
            well: the tolerance is then the largest change of any of them. `read` is called without gradients.
        tolerance: above 0.
        batch: as `forward.batch`; false: the whole answer belongs to one sample; 2: each unit halts by itself.

    Raises:
        ConfigError: the tolerance is not above 0.

    Source: Geiping et al. (2025), "Scaling up test-time compute with latent reasoning", which stops a token when
    the divergence between successive predictions is small. Graves (2016), "Adaptive computation time", trains the
    decision instead.
    """

    read: Callable[[Tree], Array]
    tolerance: float = 1e-3
    batch: bool | Literal[2] = True

    def __post_init__(self) -> None:
        if not self.tolerance > 0.0:
            raise ConfigError.bad_value("Settled", "tolerance", self.tolerance, "a number above 0")

    def __call__(self, z: Tree, fz: Tree) -> Array:
        """Return whether each sample is done."""
        before, after = self.read(z), self.read(fz)
        xp = _backend_of(after).xp
        axes = tuple(range(int(self.batch), after.ndim))
        change = xp.abs(after - before)
        return (xp.max(change, axis=axes) if axes else change) <= self.tolerance


@dataclass(frozen=True)
class Within:
    """A rule: a sample is done when a norm of f(z) − z of your choice is at most `atol + rtol · norm(f(z))`.

    The residual of a halted sample is reported as 0, see `until`. Set `forward__rtol=0.0`, so that the solver's own
    criterion in the 2-norm does not stop a sample first.

    Args:
        norm: maps a tree like z to one number for each sample `(batch,)`, or `()` for one system.
        rtol: not below 0.
        atol: not below 0; one of the two must be above 0.

    Raises:
        ConfigError: a tolerance is below 0, or both are 0.

    Example:
        >>> import torch, deqcore
        >>> largest = lambda tree: tree.abs().amax(1)
        >>> f = until(lambda z: 0.5 * z + 0.5, Within(largest, atol=1e-2))
        >>> sol = deqcore.fixed_point(f, torch.zeros(1, 3), forward__solver="picard", forward__rtol=0.0)
        >>> int(sol.steps), float((sol.value - 1).abs().max()) <= 2e-2
        (6, True)
    """

    norm: Callable[[Tree], Array]
    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self) -> None:
        if min(self.rtol, self.atol) < 0.0 or max(self.rtol, self.atol) == 0.0:
            given = (self.rtol, self.atol)
            raise ConfigError.bad_value("Within", "(rtol, atol)", given, "numbers from 0, at least one of them above 0")

    def __call__(self, z: Tree, fz: Tree) -> Array:
        """Return whether each sample is done."""
        backend = _backend_of(fz)
        (before, structure), (after, _) = backend.flatten(z), backend.flatten(fz)
        moved = [b - a if _is_float(backend, b) else b for a, b in zip(before, after, strict=True)]
        return self.norm(backend.unflatten(structure, moved)) <= self.atol + self.rtol * self.norm(fz)


def _is_float(backend: Backend, leaf: Any) -> bool:
    return backend.is_array(leaf) and is_inexact(backend.dtype_name(leaf))


def until(f: Callable[..., Tree], rule: Rule) -> Callable[..., Tree]:
    """Wrap f for `fixed_point` so that each sample halts when `rule` says that it is done.

    The value of a halted sample is its state z at that step, its residual is 0 and its status CONVERGED:
    `sol.residual == 0` distinguishes it from a sample that met the tolerance. Its gradient is that of f at z, as for
    any solve that ends early. A sample that neither halts nor converges is reported as usual.

    Args:
        f: `f(z, *args)` returns a tree like z.
        rule: see `Rule`; `Settled`, or your own function. It receives z and f(z) without gradients.

    Raises:
        ProblemError: (when called) the rule did not return one bool per sample.
        BackendError: (when called) the backend differentiates by differences, to which a halted sample is a constant.

    Example:
        >>> import torch, deqcore
        >>> from deqcore.halting import Settled, until
        >>> f = lambda z: 0.5 * z + 0.5  # 1 − z halves at each step
        >>> z0 = torch.tensor([[0.0, 0.0], [0.9, 0.9]])
        >>> picard = {"forward__solver": "picard", "forward__rtol": 1e-6}
        >>> deqcore.fixed_point(f, z0, **picard).steps.tolist()
        [19, 16]
        >>> deqcore.fixed_point(until(f, Settled(lambda z: z, 0.01)), z0, **picard).steps.tolist()
        [6, 3]
        >>> sure = lambda z, fz: fz.amin(1) > 0.99  # a custom rule
        >>> deqcore.fixed_point(until(f, sure), z0, **picard).steps.tolist()
        [6, 3]
    """

    def halting(z: Tree, *args: Any) -> Tree:
        fz = f(z, *args)
        backend = _backend_of(z)
        leaves, structure = backend.flatten(z)
        moved, returned = backend.flatten(fz)
        if returned != structure:
            return fz  # the caller of f raises the error
        with backend.errstate():
            done = rule(*(backend.unflatten(structure, [*map(backend.detach, tree)]) for tree in (leaves, moved)))
        _check(backend, done, next(leaf for leaf in leaves if backend.is_array(leaf)))
        held = [_hold(backend, done, *pair) for pair in zip(leaves, moved, strict=True)]
        return backend.unflatten(structure, held)

    halting.__wrapped__ = f  # type: ignore[attr-defined] # backward passes are counted for f
    return halting


def _hold(backend: Backend, done: Array, z: Array, fz: Array) -> Array:
    """Return rows of z where done, to the last bit, with the derivative of fz; rows of fz elsewhere."""
    if not _is_float(backend, fz):
        return fz  # carried along
    xp = backend.xp
    held = backend.detach(z) + (fz - backend.detach(fz))
    return xp.where(xp.reshape(done, (*done.shape, *(1,) * (fz.ndim - done.ndim))), held, fz)


def _check(backend: Backend, done: Any, leaf: Array) -> None:
    is_mask = backend.is_array(done) and backend.dtype_name(done) == "bool"
    allowed = [tuple(leaf.shape[:axes]) for axes in range(min(3, leaf.ndim))]
    if not is_mask or tuple(done.shape) not in allowed:
        given = f"{backend.dtype_name(done)} {tuple(done.shape)}" if backend.is_array(done) else type(done).__name__
        raise ProblemError(
            f"The halting rule must return one bool per sample, an array of shape {tuple(leaf.shape[:1])}, or () with "
            f"forward.batch = false (got {given}). Reduce over every axis but the first, or the first two with "
            f"forward.batch = 2."
        )


def _backend_of(tree: Tree) -> Backend:
    return _named(next((name for leaf in plain_leaves(tree) if (name := plugins.backend_of(leaf))), "numpy"))


@cache
def _named(name: str) -> Backend:
    backend = get_backend(backend=name)
    if not backend.capabilities.autodiff:
        raise BackendError(
            f"Halting rules work only on backends that differentiate f themselves (got {name!r}): to finite "
            f"differences a halted sample is a constant. Use torch or jax, or let forward.rtol decide when a sample "
            f"is done."
        )
    return backend

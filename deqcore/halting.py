"""Halting per sample: a looped reasoner stops when its answer has settled, not only when its state has.

The state keeps moving long after the answer that is read from it has settled. `until` wraps f in a function that
returns a sample's state unchanged once a rule says that the sample is done. That sample is then at a fixed point, so
every solver stops it, freezes it while the rest of the batch continues, and counts its steps. No training is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
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
    decision instead: see `Learnt`.

    Example:
        >>> import numpy as np
        >>> Settled(lambda z: z, 0.1)(np.zeros((2, 1)), np.array([[0.05], [0.5]])).tolist()
        [True, False]
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
        xp = _backend_for(after).xp  # `until` refuses backends on which no rule works
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


@dataclass(frozen=True)
class Learnt:
    """A rule: a sample is done when a trained head says so.

    Train the head with `ponder_loss`, or with `halting_loss` where it is known whether an answer is right.

    Args:
        head: maps a state to logits `(batch,)` or `(batch, 1)`, each from its own row; `()` with
            `forward.batch = false`. It is called without gradients.
        threshold: probability from which a sample halts, above 0 and below 1.

    Raises:
        ConfigError: the threshold is out of range.

    Source: Graves (2016), "Adaptive computation time for recurrent neural networks"; Banino, Balaguer & Blundell
    (2021), "PonderNet".

    Example:
        >>> import torch
        >>> Learnt(lambda z: z[:, 0])(torch.zeros(2, 1), torch.tensor([[-1.0], [2.0]])).tolist()
        [False, True]
    """

    head: Callable[[Tree], Array]
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ConfigError.bad_value("Learnt", "threshold", self.threshold, "a number above 0 and below 1")

    def __call__(self, z: Tree, fz: Tree) -> Array:
        """Return whether each sample is done."""
        logits = self.head(fz)
        logits = logits[:, 0] if logits.ndim == 2 and logits.shape[1] == 1 else logits
        return logits >= log(self.threshold / (1.0 - self.threshold))


def halting_distribution(logits: Sequence[Array]) -> list[Array]:
    """Return the probability that a sample halts after each step, `(batch,)` each; the last step takes the rest.

    With λₙ = sigmoid(logit) it is pₙ = λₙ Π_{j<n} (1 − λⱼ). The mean number of steps, Σ n pₙ, is the cost that adaptive
    computation time adds to its loss.

    Args:
        logits: those of the halting head after each step, `(batch,)` each, at least one.

    Raises:
        ConfigError: there are none.

    Example:
        >>> import numpy as np
        >>> [p.tolist() for p in halting_distribution([np.zeros(1)] * 3)]
        [[0.5], [0.25], [0.25]]
    """
    return [_backend_for(p).xp.exp(p) for p in _log_halting(logits)]


def ponder_loss(logits: Sequence[Array], losses: Sequence[Array], *, prior: float = 0.2, weight: float = 0.01) -> Array:
    """Return Σ pₙ Lₙ + weight · KL(p ‖ geometric(prior)) per sample `(batch,)`, differentiable.

    p is `halting_distribution(logits)`. The geometric distribution, cut off after the last step, keeps the head from
    halting always first or always last; its mean is 1/prior steps.

    Args:
        logits: those of the halting head after each step, `(batch,)` each.
        losses: the loss of the answer after each step, `(batch,)` each.
        prior: above 0 and below 1.
        weight: at least 0.

    Raises:
        ConfigError: there are no steps, not as many losses as logits, or a number is out of range.

    Source: Banino, Balaguer & Blundell (2021), "PonderNet: learning to ponder", eq. (3)–(5).

    Example:
        >>> import numpy as np
        >>> never = [np.full(1, -50.0), np.full(1, -50.0)]
        >>> ponder_loss(never, [np.array([1.0]), np.array([3.0])], weight=0.0).round(6).tolist()
        [3.0]
    """
    if len(logits) != len(losses):
        given = (len(logits), len(losses))
        raise ConfigError.bad_value("ponder_loss", "(logits, losses)", given, "as many losses as logits")
    if not (0.0 < prior < 1.0 and weight >= 0.0):
        raise ConfigError.bad_value("ponder_loss", "(prior, weight)", (prior, weight), "in (0, 1), and at least 0")
    chosen = _log_halting(logits)
    xp = _backend_for(logits[0]).xp
    total: Array = 0.0
    for n, (log_p, loss) in enumerate(zip(chosen, losses, strict=True)):
        last = n == len(chosen) - 1
        expected = n * log(1.0 - prior) + (0.0 if last else log(prior))
        total = total + xp.exp(log_p) * (loss + weight * (log_p - expected))
    return total


def halting_loss(logits: Array, correct: Array) -> Array:
    """Return the cross-entropy of a halting head against whether the answer is right, per sample `(batch,)`.

    Args:
        logits: those of the halting head `(batch,)`.
        correct: whether the answer is right, `(batch,)` of bool, or its probability.

    Source: Wang et al. (2025), "Hierarchical reasoning model", arXiv:2506.21734, whose halting head predicts it.

    Example:
        >>> import numpy as np
        >>> halting_loss(np.array([0.0, 9.0]), np.array([True, True])).round(4).tolist()
        [0.6931, 0.0001]
    """
    backend = _backend_for(logits)
    return -_log_sigmoid(backend.xp, -logits) - logits * backend.cast(correct, logits)


def _log_halting(logits: Sequence[Array]) -> list[Array]:
    """Return log pₙ of each step."""
    if not logits:
        raise ConfigError.bad_value("The halting head", "logits", [], "those of at least one step")
    xp = _backend_for(logits[0]).xp
    running, result = xp.zeros_like(logits[0]), []
    for logit in logits[:-1]:
        result.append(running + _log_sigmoid(xp, logit))
        running = running + _log_sigmoid(xp, -logit)
    return [*result, running]


def _log_sigmoid(xp: Any, x: Array) -> Array:
    return xp.where(x < 0, x, xp.zeros_like(x)) - xp.log1p(xp.exp(-xp.abs(x)))


def _backend_for(x: Array) -> Backend:
    return get_backend(backend=plugins.backend_of(x) or "numpy")


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

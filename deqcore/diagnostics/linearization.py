"""A function at a state, raveled: what all measurements at a point start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deqcore import config as settings
from deqcore.abc.backend import Backend
from deqcore.solve.dispatch import pick_backend
from deqcore.solve.flatten import RavelSpec
from deqcore.types import Array, Map, Tree


@dataclass(frozen=True)
class Linearization:
    """The map `z ↦ f(z, *args)` on `(batch, n)` and the point at which it is looked at.

    Attributes:
        backend: whose arrays these are.
        space: how trees become matrices.
        f: the map.
        z: the point `(batch, n)`.
    """

    backend: Backend
    space: RavelSpec
    f: Map
    z: Array


def linearize(f: Callable[..., Tree], z: Tree, args: tuple[Any, ...], batch: bool | Literal[2]) -> Linearization:
    """Look at `f(·, *args)` at `z`; with `batch = 2`, too, at samples, because f may couple their units.

    Raises:
        InitialIterateError: z is unfit as a state (no arrays, integers, no batch axis).
        BackendMismatchError: the arrays belong to several frameworks.
    """
    backend = pick_backend(settings.resolve(None, {})[0], z, args)
    space = RavelSpec.of(backend, z, bool(batch))
    raveled = space.wrap(f)
    return Linearization(backend, space, lambda v: raveled(v, *args), space.ravel(z))


def host(backend: Backend, x: Array) -> Any:
    """Return an array on the host in float64; complex numbers as pairs, in a last axis of 2."""
    array = backend.to_numpy(backend.detach(x))
    if np.iscomplexobj(array):
        array = np.stack([array.real, array.imag], axis=-1)
    return array.astype(np.float64)

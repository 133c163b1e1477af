"""Arguments of f for the tests: a dataclass of arrays, objects that hide an array; and the check of golden values."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from deqcore.testing.problem import walk
from deqcore.testing.problems import Golden
from deqcore.testing.suite.fixtures import Kit


@dataclass(frozen=True)
class Held:
    """Arrays in fields, and a text."""

    a: Any
    rest: Any
    name: str


def hiding(how: str, a: Any) -> tuple[Any, Any]:
    """Build an argument that hides the array `a` from trees, and a function that reads it."""

    def function(scale: Any = 1.0) -> Any:
        return a * scale

    made: dict[str, tuple[Any, Any]] = {
        "object": (Opaque(a), lambda m: m.a),
        "slots": (Slots(a), lambda m: m.a),
        "derived": (Derived(a), lambda m: m.twice / 2),
        "partial": (functools.partial(_first, a), lambda m: m(0)),
        "method": (Opaque(a).get, lambda m: m()),
        "closure": (function, lambda m: m()),
        "default": (lambda a=a: a, lambda m: m()),
        "set": (frozenset([Opaque(a)]), lambda m: next(iter(m)).a),
    }
    return made[how]


def _first(a: Any, _: Any) -> Any:
    return a


class Opaque:
    """An array in an attribute that no tree shows."""

    def __init__(self, a: Any) -> None:
        self.a = a

    def get(self) -> Any:
        return self.a


class Slots:
    """An array in a slot."""

    __slots__ = ("a",)

    def __init__(self, a: Any) -> None:
        self.a = a


@dataclass
class Derived:
    """A dataclass with an array that is not a field."""

    a: Any

    def __post_init__(self) -> None:
        self.twice = 2 * self.a


for _cls in (Held, Opaque, Slots, Derived):
    _cls.__module__ = "user"  # a class of a module of deqcore would belong to the strict backend


def check_golden(kit: Kit, known: Golden, z: Any, gradients: Any, dtype: str, rtol: float) -> None:
    """Hold z* and the gradients for params and inputs to the stored truth, within the bound that the dtype explains."""
    eps, n = float(np.finfo(dtype).eps), known.truth.jacobian.shape[1]
    bounds = known.truth.sensitivity.bounds(eps, n, rtol, rtol)
    result = [kit.numpy(leaf) for _, leaf in walk(z, "z")]
    truth = [leaf for _, leaf in walk(known.truth.z, "z")]
    error = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(result, truth, strict=True)))
    assert error <= bounds["value"], f"z* is off by {error:.2e}, and {bounds['value']:.2e} is explained"
    for name, leaf in [*walk(gradients[0], "params"), *walk(gradients[1], "inputs")]:
        error = np.linalg.norm(kit.numpy(leaf) - known.truth.gradients[name])
        assert error <= bounds[name], f"the gradient for {name} is off by {error:.2e}, {bounds[name]:.2e} is explained"

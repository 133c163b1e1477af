"""The defaults of `Backend` are enough: NumPy with what has no default, and nothing overridden for speed."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from deqcore_numpy.backend import NumpyBackend, NumpyLinalg
from deqcore_numpy.derivative import jacobian
from deqcore_numpy.guards import NumpyGuards

from deqcore import plugins
from deqcore.abc.autodiff import Autodiff
from deqcore.abc.backend import Backend
from deqcore.abc.functional_history import FunctionalHistory
from deqcore.abc.guards import CallGuards
from deqcore.abc.linalg import SmallLinalg
from deqcore.testing import BackendTests, SolverTests
from deqcore.types import Capabilities

pytest_plugins = ["deqcore.testing.plugin"]


class PlainLinalg(SmallLinalg):
    solve = NumpyLinalg.solve


class PlainGuards(CallGuards):
    in_extended_precision = NumpyGuards.in_extended_precision


class PlainAutodiff(Autodiff):
    def pullback(self, f: Any, leaves: tuple[Any, ...]) -> Any:
        with self.be.errstate():
            value = f(leaves)
            dense = [
                jacobian(lambda x, i=i: f((*leaves[:i], x, *leaves[i + 1 :])), leaf) for i, leaf in enumerate(leaves)
            ]

        def vjp(u: Any) -> Any:
            parts = zip(dense, leaves, strict=True)
            return tuple((np.ravel(u) @ d).reshape(x.shape).astype(x.dtype) for d, x in parts)

        return value, vjp

    def implicit(self, f: Any, z0: Any, args: Any, solve: Any, adjoint: Any) -> Any:
        forward = self.forward_only(f, z0, args, solve)
        return forward.z, forward, None


class PlainBackend(Backend):
    name: ClassVar[str] = "plain"
    capabilities = Capabilities(autodiff=False)
    xp = np
    linalg_class, autodiff_class, guards_class = PlainLinalg, PlainAutodiff, PlainGuards

    is_array, asarray, to_numpy = NumpyBackend.is_array, NumpyBackend.asarray, NumpyBackend.to_numpy
    detach, errstate = NumpyBackend.detach, NumpyBackend.errstate

    def known_all(self, mask: Any) -> bool:
        return bool(np.all(mask))

    def astype(self, x: Any, dtype: str) -> Any:
        if np.iscomplexobj(x):
            raise TypeError("norms and dot products are real: `jacobian` turns to differences")
        return super().astype(x, dtype)


SPEC = plugins.BackendSpec("plain", f"{__name__}:PlainBackend", array_modules=("numpy",))
plugins.register(SPEC)


@pytest.fixture(autouse=True)
def registered():
    """Other tests of this process may have reset what is registered."""
    if SPEC.name not in plugins.backends():
        plugins.register(SPEC)


class TestPlainBackend(BackendTests):
    backends = ("plain",)


class TestSolversOnIt(SolverTests):
    backends = ("plain",)
    solvers = ("anderson", "broyden")


def test_a_backend_without_derivatives_says_what_it_lacks():
    class Without(PlainAutodiff):
        pullback = Autodiff.pullback

    with pytest.raises(NotImplementedError, match=r"Without must implement `pullback`, or `linearize` and `vjp`"):
        Without(PlainBackend()).linearize(lambda z: z, np.ones((1, 1)))


def test_the_default_history_keeps_narrow_slots_and_answers_in_the_states_dtype():
    backend = PlainBackend()
    v = np.array([[1.0, 1 / 3], [2.0, 0.5]], np.float32)
    history = backend.history(v, 3, "float16")
    assert isinstance(history, FunctionalHistory)
    history = history.append(v)
    assert {slot.dtype.name for slot in history.slots} == {"float16"}
    found = history.combine(np.array([[2.0, 9.0, 9.0]] * 2))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, 2 * v.astype(np.float16).astype(np.float32))
    assert history.vectors().shape == (2, 1, 2)
    assert backend.history(v, 3).vectors().shape == (2, 0, 2)

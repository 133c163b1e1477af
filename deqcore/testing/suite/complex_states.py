"""Complex states, for every solver and strategy: f is not holomorphic, and the truth is its real form.

f(z) = A z + B conj(z) + b is real-linear in (Re z, Im z). NumPy solves these 2n real equations per sample, so that the
truth shares nothing with how a backend stores or differentiates complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import deqcore
from deqcore.errors import InitialIterateError, ProblemError
from deqcore.testing.suite.base import needs, several
from deqcore.testing.suite.fixtures import Kit, close


@dataclass(frozen=True)
class ComplexAffine:
    """f(z) = A z + B conj(z) + b per sample; a and b_conj are `(batch, n, n)`, b is `(batch, n)`."""

    a: Any
    b_conj: Any
    b: Any

    @classmethod
    def make(cls, norm: float, batch: int = 2, n: int = 3) -> ComplexAffine:
        """Make a random problem with ‖A‖₂ + ‖B‖₂ = norm."""
        rng = np.random.default_rng(7)

        def random(*shape: int) -> Any:
            return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)

        def of_norm(a: Any) -> Any:
            return a * (0.5 * norm / np.linalg.norm(a, 2, axis=(1, 2)))[:, None, None]

        return cls(of_norm(random(batch, n, n)), of_norm(random(batch, n, n)), random(batch, n))

    @property
    def jacobian(self) -> Any:
        """∂f/∂z in real and imaginary parts: `(batch, 2n, 2n)`."""
        p, q = self.a + self.b_conj, self.a - self.b_conj
        return np.block([[p.real, -q.imag], [p.imag, q.real]])

    @property
    def root(self) -> Any:
        """z* `(batch, n)`."""
        return self._solved(self.jacobian, self.b)

    def adjoint(self, g: Any) -> Any:
        """u `(batch, n)`: the gradient for b of Σ Re(conj(g) z*), as ∂/∂Re + i ∂/∂Im."""
        return self._solved(self.jacobian.swapaxes(1, 2), g)

    def _solved(self, jacobian: Any, right: Any) -> Any:
        n = right.shape[1]
        joined = np.concatenate([right.real, right.imag], axis=1)
        x = np.linalg.solve(np.eye(2 * n) - jacobian, joined[..., None])[..., 0]
        return x[:, :n] + 1j * x[:, n:]

    def on(self, kit: Kit) -> tuple[Callable[..., Any], Any]:
        """Return f(z, b) and b on the backend under test."""
        xp = kit.backend.xp
        a, b_conj, b = (kit.complex_array(part) for part in (self.a, self.b_conj, self.b))

        def f(z: Any, b: Any) -> Any:
            return xp.sum(a * z[:, None, :], axis=2) + xp.sum(b_conj * xp.conj(z)[:, None, :], axis=2) + b

        return f, b


def parts(z: Any) -> Any:
    """Return a complex NumPy array as a real one."""
    return np.stack([np.real(z), np.imag(z)])


class ComplexSolverTests:
    """What a solver must keep for complex states."""

    @needs("complex")
    def test_complex_states(self, kit: Kit, solver_name: str, settings: Any) -> None:
        problem = ComplexAffine.make(norm=0.4)
        f, b = problem.on(kit)
        sol = kit.solve(f, 0 * b, b, solver=solver_name, rtol=1e-9, options=settings)
        assert kit.numpy(sol.value).dtype.kind == "c", "the value of a complex state must be complex"
        assert kit.numpy(sol.residual).dtype.kind == "f", "residuals are real"
        close(parts(kit.numpy(sol.value)), parts(problem.root), 1e-4 if kit.eps > 1e-10 else 1e-7, "z*")


class ComplexStrategyTests:
    """What a strategy must keep for complex states: gradients by the convention of the framework."""

    @needs("complex")
    @pytest.mark.supports("complex states", backends="numpy torch", strategies="all")
    def test_gradients_of_complex_states(self, kit: Kit, any_strategy: Any, strategy_name: str, settings: Any) -> None:
        problem = ComplexAffine.make(norm=0.05)
        f, b = problem.on(kit)
        g = np.random.default_rng(8).standard_normal((2, 3)) * (1 + 2j)
        turned = np.conj if kit.backend.autodiff.conjugates else np.asarray
        config = kit.config(strategy=strategy_name, strategy_options=settings)
        z, (db,) = deqcore.vjp(f, 0 * b, b, cotangent=kit.complex_array(turned(g)), config=config)
        close(parts(kit.numpy(z)), parts(problem.root), 1e-4, "z*")
        within = 1e-4 if getattr(any_strategy, "exact", False) else 0.06
        close(parts(turned(kit.numpy(db))), parts(problem.adjoint(g)), within, "gradient for b")


class ComplexBackendTests:
    """What a backend must keep for complex states."""

    @needs("complex")
    def test_pairs_of_real_numbers_and_back(self, kit: Kit) -> None:
        z = np.array([[1 + 2j, -3j], [0.5, 4 - 1j]])
        pairs = kit.backend.numbers.to_pairs(kit.complex_array(z))
        assert np.array_equal(kit.numpy(pairs), np.stack([z.real, z.imag], axis=-1)), "real part, then imaginary part"
        assert np.array_equal(kit.numpy(kit.backend.numbers.from_pairs(pairs)), z), "from_pairs must undo to_pairs"

    @needs("complex")
    def test_a_tree_of_complex_and_real_leaves(self, kit: Kit) -> None:
        z0 = {"psi": kit.complex_array(np.zeros((2, 2))), "mu": kit.array(np.zeros((2, 1)))}
        xp = kit.backend.xp

        def f(z: Any) -> Any:  # psi = (0.5 i psi + mu + 1), mu = 0.25 |psi_0|² / 4
            return {
                "psi": 0.5j * z["psi"] + z["mu"] + 1.0,
                "mu": 0.0625 * xp.real(z["psi"] * xp.conj(z["psi"]))[:, :1],
            }

        value = kit.solve(f, z0, solver="broyden", rtol=1e-9).value
        psi, mu = kit.numpy(value["psi"]), kit.numpy(value["mu"])
        assert (psi.dtype.kind, mu.dtype.kind) == ("c", "f"), "leaves keep their dtypes"
        close(parts(psi), parts((mu + 1.0) / (1.0 - 0.5j) * np.ones((1, 2))), 1e-4, "psi")
        close(mu, 0.0625 * np.abs(psi[:, :1]) ** 2, 1e-4, "mu")

    @needs("complex")
    @several("keep", ["real", "abs"])
    def test_a_real_value_for_a_complex_state_is_refused(self, kit: Kit, keep: str) -> None:
        xp = kit.backend.xp
        f = (xp.real) if keep == "real" else (xp.abs)
        with pytest.raises(ProblemError, match="must not drop the imaginary part"):
            kit.solve(f, kit.complex_array(np.ones((1, 2))), solver="picard", rtol=1e-6)

    @needs("complex")
    def test_leaves_of_two_precisions_are_refused(self, kit: Kit) -> None:
        z0 = [kit.array(np.ones((1, 2)), "complex64"), kit.array(np.ones((1, 2)), "float64")]
        if kit.eps > 1e-10:
            pytest.skip("one precision only")
        with pytest.raises(InitialIterateError, match="complex64 goes with float32"):
            kit.solve(lambda z: z, z0, solver="picard", rtol=1e-6)

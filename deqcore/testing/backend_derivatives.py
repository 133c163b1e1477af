"""What a backend must do to differentiate, and to attach the implicit gradient."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import deqcore
from deqcore import errors, failures
from deqcore.testing.bounds import tolerance
from deqcore.testing.conformance import DTYPES, Conformance, needs, several
from deqcore.testing.kit import Kit, affine, close
from deqcore.testing.problem import walk
from deqcore.testing.problems import Golden, golden


class DerivativeTests(Conformance):
    """Products with the Jacobian, gradients of everything f reads, second derivatives, compiled code."""

    def test_linearize_gives_the_value_and_the_transposed_product(self, kit: Kit) -> None:
        problem, z = affine(), np.random.default_rng(3).standard_normal((3, 6))
        value, pull = kit.backend.linearize(kit.map(problem), kit.array(z))
        close(kit.numpy(value), np.einsum("bij,bj->bi", problem.a, z) + problem.b, 1e-6, "f(z)")
        for seed in (0, 1):  # callable many times
            u = np.random.default_rng(seed).standard_normal((3, 6))
            close(kit.numpy(pull(kit.array(u))), np.einsum("bij,bi->bj", problem.a, u), 1e-6, "pull(u) = Jᵀu, not J u")

    def test_pull_of_a_function_that_reads_no_state(self, kit: Kit) -> None:
        one = kit.array(np.ones((2, 3)))
        _, pull = kit.backend.linearize(lambda z: one, kit.array(np.zeros((2, 3))))
        assert not kit.numpy(pull(one)).any()

    def test_products_of_a_function_that_couples_rows(self, kit: Kit) -> None:
        """A backend may differentiate row by row only if no row depends on any other."""
        xp, u = kit.backend.xp, np.random.default_rng(5).standard_normal((4, 3))
        shift = lambda z: xp.concat([z[1:], z[:1]], axis=0)  # noqa: E731
        pair = lambda z: xp.concat([0 * z[1:], z[2:3]], axis=0)  # noqa: E731 (row 3 reads row 2 only)
        expected = np.zeros((4, 3))
        expected[2] = u[3]
        for f, truth in ((shift, np.roll(u, 1, axis=0)), (pair, expected)):
            _, pull = kit.backend.linearize(f, kit.array(np.ones((4, 3))))
            close(kit.numpy(pull(kit.array(u))), truth, 1e-6, "pull(u) where f couples rows")

    def test_a_backward_pass_that_cannot_be_right_reaches_the_user(self, kit: Kit) -> None:
        """Coupled rows and a failed adjoint solve: a warning by default, an error if that is asked for."""
        if not kit.backend.capabilities.eager:
            pytest.skip("compiled code warns and raises by callbacks")
        xp, one = kit.backend.xp, kit.array(np.ones((4, 3)))
        rates = kit.array(np.tile([0.1, 0.5, 0.9], (4, 1)))
        shift = lambda z, b: 0.5 * xp.concat([z[1:], z[:1]], axis=0) + b  # noqa: E731
        slow = lambda z, b: rates * z + b  # noqa: E731
        for f, z0, kind in (
            (shift, 2 * one, errors.CoupledRowsWarning),
            (slow, one / (1 - rates), errors.ConvergenceWarning),
        ):
            config = kit.config(strategy_options={"max_steps": 2})
            cotangent = kit.array(np.arange(12.0).reshape(4, 3))
            failures.forget()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                deqcore.vjp(f, z0, one, cotangent=cotangent, config=config, backward__on_failure="warn")
            assert kind in {each.category for each in told}, f"{kind.__name__} is missing among {told}"
            with pytest.raises(errors.ConvergenceError):
                deqcore.vjp(f, z0, one, cotangent=cotangent, config=config, backward__on_failure="raise")

    def test_forward_products(self, kit: Kit) -> None:
        problem, v = affine(), np.random.default_rng(4).standard_normal((3, 6))
        product = kit.backend.push(kit.map(problem), kit.array(np.zeros((3, 6))))
        if product is None:
            assert not kit.backend.capabilities.jvp, "the backend promises jvp, but push gives None"
            return
        close(kit.numpy(product(kit.array(v))), np.einsum("bij,bj->bi", problem.a, v), 1e-6, "push(v) = J v")

    def test_vjp_of_trees_and_of_what_has_no_derivative(self, kit: Kit) -> None:
        x, k = kit.array([1.0, 2.0]), kit.array([3, 4], "int32")

        def value(p: Any, k: Any, name: str) -> Any:
            return p["a"] * p["b"][0] * p["b"][0], name

        args = ({"a": x, "b": [2 * x]}, k, "text")
        found, aux, (dp, dk, dname) = kit.backend.vjp(value, args, kit.array([1.0, 10.0]))
        assert (aux, dk, dname) == ("text", None, None)
        close(kit.numpy(found), [4.0, 32.0], 1e-6, "value")
        close(kit.numpy(dp["a"]), [4.0, 160.0], 1e-6, "gradient of a")
        close(kit.numpy(dp["b"][0]), [4.0, 160.0], 1e-6, "gradient of b")

    def test_vjp_of_an_argument_that_is_not_used_is_zero(self, kit: Kit) -> None:
        x, y = kit.array([1.0]), kit.array([2.0, 3.0])
        _, _, (_, dy) = kit.backend.vjp(lambda x, y: (2 * x, None), (x, y), kit.array([1.0]))
        assert np.array_equal(kit.numpy(dy), [0.0, 0.0])

    @several(
        ("name", "dtype"), [*((name, "float64") for name in ("affine", "mlp", "conv", "tree")), ("tree", "float32")]
    )
    def test_golden_gradients(self, kit: Kit, name: str, dtype: str) -> None:
        known = golden(name)
        rtol = tolerance(float(np.finfo(dtype).eps), known.truth.jacobian.shape[1])
        config = kit.config(solver="picard", rtol=rtol, strategy_options={"rtol": rtol})
        f, z0, args = kit.data(known, dtype)
        g = kit.tree(known.problem.direction(), dtype)
        z, gradients = deqcore.vjp(f, z0, *args, cotangent=g, config=config)
        check_golden(kit, known, z, gradients, dtype, rtol)

    @needs("autodiff")
    def test_closed_over_values_get_their_gradient(self, kit: Kit) -> None:
        def loss(a: Any) -> Any:
            z0 = kit.array(np.zeros((1, 1)))
            return kit.backend.xp.sum(deqcore.fixed_point(lambda z: a * z + 1.0, z0, config=self._exact(kit)).value)

        close(kit.numpy(kit.backend.grad(loss)(kit.array(0.5))), 4.0, 1e-6, "d/da 1/(1 − a) through a closure")

    @needs("autodiff")
    @several("strategy", ["exact-ift", "broyden-reuse", "jacobian-free", "neumann"])
    def test_every_argument_gets_its_gradient(self, kit: Kit, strategy: str) -> None:
        problem = affine(norm=0.2)

        def total(a: Any, b: Any) -> Any:
            f = lambda z, a, b: kit.backend.xp.sum(a * z[:, None, :], axis=2) + b  # noqa: E731
            solver = "broyden" if strategy == "broyden-reuse" else "picard"
            sol = deqcore.fixed_point(f, 0 * b, a, b, config=kit.config(solver=solver, strategy=strategy))
            return sol.value, None

        _, _, (da, db) = kit.backend.vjp(
            total, (kit.array(problem.a), kit.array(problem.b)), kit.array(np.ones((3, 6)))
        )
        u = problem.adjoint(np.ones((3, 6)))
        close(kit.numpy(db), u, 0.3, f"gradient for b by {strategy}")
        close(kit.numpy(da), u[:, :, None] * problem.root[:, None, :], 0.3, f"gradient for A by {strategy}")

    @needs("autodiff")
    def test_the_backward_pass_may_run_twice_and_late(self, kit: Kit) -> None:
        def loss(a: Any) -> Any:
            one, two = (self._scalar(kit, a, b) for b in (1.0, 2.0))  # two solves before any backward
            return one + two

        gradient = kit.backend.grad(loss)
        first, again = (float(kit.numpy(gradient(kit.array(0.5)))) for _ in range(2))
        assert first == again == pytest.approx(12.0, rel=1e-6)

    @needs("autodiff")
    def test_second_derivatives_are_right_or_refused(self, kit: Kit) -> None:
        """Promised or not: what must never come out is a wrong number without a word."""
        second = kit.backend.grad(kit.backend.grad(lambda a: self._scalar(kit, a, 1.0)))
        try:
            found = kit.numpy(second(kit.array(0.5)))
        except errors.DeqcoreError:
            assert not kit.backend.capabilities.second_derivatives, "second derivatives are promised"
        else:
            close(found, 16.0, 1e-5, "d²/da² 1/(1 − a) = 2/(1 − a)³")

    @needs("second_derivatives")
    def test_second_derivatives_of_an_approximation_are_refused(self, kit: Kit) -> None:
        loss = lambda a: self._scalar(kit, a, 1.0, solver="picard", strategy="jacobian-free")  # noqa: E731
        with pytest.raises(errors.StrategyError, match="exact-ift"):
            kit.backend.grad(kit.backend.grad(loss))(kit.array(0.5))

    @needs("jit")
    def test_compiled_code_gives_the_same(self, kit: Kit) -> None:
        loss = lambda a: self._scalar(kit, a, 1.0)  # noqa: E731
        close(kit.numpy(kit.backend.jit(loss)(kit.array(0.5))), 2.0, 1e-6, "value inside jit")
        close(kit.numpy(kit.backend.jit(kit.backend.grad(loss))(kit.array(0.5))), 4.0, 1e-6, "gradient inside jit")

    def test_unrolled_steps_are_differentiated(self, kit: Kit) -> None:
        config = kit.config(solver="picard", strategy="unrolled", strategy_options={"steps": 3})
        f = lambda z, b: 0.5 * z + b  # noqa: E731
        b = kit.array([[1.0]])
        z, (db,) = deqcore.vjp(f, 0 * b, b, cotangent=b, config=config)
        close(kit.numpy(z), [[1.875]], 1e-6, "f(f(f(f(0))))")
        close(kit.numpy(db), [[1.875]], 1e-6, "1 + 1/2 + 1/4 + 1/8")

    def test_a_batch_whose_samples_see_each_other(self, kit: Kit) -> None:
        """With `batch = false` the whole state is one system, so its rows may depend on each other."""
        xp = kit.backend.xp
        b = kit.array([[1.0], [3.0]])
        f = lambda z, b: 0.25 * xp.sum(z, axis=0, keepdims=True) + b  # noqa: E731
        _, (db,) = deqcore.vjp(f, 0 * b, b, cotangent=kit.array([[1.0], [0.0]]), config=self._exact(kit, batch=False))
        jacobian = np.full((2, 2), 0.25)
        close(kit.numpy(db)[:, 0], np.linalg.solve((np.eye(2) - jacobian).T, [1.0, 0.0]), 1e-6, "gradient for b")

    @needs("bfloat16")
    def test_states_in_bfloat16(self, kit: Kit) -> None:
        b = kit.backend.astype(kit.array(np.ones((2, 8)), "float32"), "bfloat16")
        sol = kit.solve(lambda z: 0.5 * z + b, 0 * b, solver="anderson", rtol=2e-2)
        assert kit.backend.dtype_name(sol.value) == "bfloat16"
        assert kit.backend.dtype_name(sol.residual) in DTYPES, "residuals are float32 or better"
        close(kit.numpy(kit.backend.astype(sol.value, "float32")), np.full((2, 8), 2.0), 5e-2, "value")

    def test_integer_states_are_refused(self, kit: Kit) -> None:
        with pytest.raises(errors.StateError, match="floating-point"):
            kit.solve(lambda z: z, kit.array(np.zeros((1, 1)), "int32"), solver="picard", rtol=0.0)

    def test_complex_states_are_refused_unless_promised(self, kit: Kit) -> None:
        if kit.backend.capabilities.complex:
            pytest.skip(f"{kit.backend.name} promises complex")
        with pytest.raises(errors.StateError, match="real and imaginary"):
            kit.solve(lambda z: z, kit.array(np.zeros((1, 1)), "complex64"), solver="picard", rtol=0.0)

    def _exact(self, kit: Kit, batch: bool = True) -> deqcore.Config:
        rtol = 1e-11 if kit.eps < 1e-10 else 1e-6
        return kit.config(solver="picard", rtol=rtol, strategy_options={"rtol": rtol}, batch=batch)

    def _scalar(self, kit: Kit, a: Any, b: float, **settings: Any) -> Any:
        """b / (1 − a)."""
        z0 = kit.array(np.zeros((1, 1)))
        config = kit.config(**settings) if settings else self._exact(kit)
        sol = deqcore.fixed_point(lambda z, a: a * z + b, z0, a, config=config)
        return kit.backend.xp.sum(sol.value)


def check_golden(kit: Kit, known: Golden, z: Any, gradients: Any, dtype: str, rtol: float) -> None:
    """Hold z* and the gradients for params and inputs to the stored truth, within the bound that the dtype explains."""
    eps, n = float(np.finfo(dtype).eps), known.truth.jacobian.shape[1]
    bounds = known.truth.sensitivity.bounds(eps, n, rtol, rtol)
    found = [kit.numpy(leaf) for _, leaf in walk(z, "z")]
    truth = [leaf for _, leaf in walk(known.truth.z, "z")]
    error = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(found, truth, strict=True)))
    assert error <= bounds["value"], f"z* is off by {error:.2e}, and {bounds['value']:.2e} is explained"
    for name, leaf in [*walk(gradients[0], "params"), *walk(gradients[1], "inputs")]:
        error = np.linalg.norm(kit.numpy(leaf) - known.truth.gradients[name])
        assert error <= bounds[name], f"the gradient for {name} is off by {error:.2e}, {bounds[name]:.2e} is explained"

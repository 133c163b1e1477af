"""What a backend must do to differentiate, and to attach the implicit gradient."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import deqcore
from deqcore import errors
from deqcore.solve import ledger
from deqcore.testing.problems import golden
from deqcore.testing.suite.backend.arguments import Held, check_golden, hiding
from deqcore.testing.suite.base import DTYPES, Conformance, needs, several
from deqcore.testing.suite.fixtures import Kit, affine, close
from deqcore.testing.tolerances import tolerance


class DerivativeTests(Conformance):
    """Products with the Jacobian, gradients of everything f reads, second derivatives, compiled code."""

    def test_linearize_gives_the_value_and_the_transposed_product(self, kit: Kit) -> None:
        problem, z = affine(), np.random.default_rng(3).standard_normal((3, 6))
        value, vjp = kit.backend.autodiff.linearize(kit.map(problem), kit.array(z))
        close(kit.numpy(value), np.einsum("bij,bj->bi", problem.a, z) + problem.b, 1e-6, "f(z)")
        for seed in (0, 1):  # callable many times
            u = np.random.default_rng(seed).standard_normal((3, 6))
            close(kit.numpy(vjp(kit.array(u))), np.einsum("bij,bi->bj", problem.a, u), 1e-6, "vjp(u) = Jᵀu, not J u")

    def test_vjp_of_a_function_that_reads_no_state(self, kit: Kit) -> None:
        one = kit.array(np.ones((2, 3)))
        _, vjp = kit.backend.autodiff.linearize(lambda z: one, kit.array(np.zeros((2, 3))))
        assert not kit.numpy(vjp(one)).any(), (
            "the vjp of a function that does not read z must be 0, not an error and not None."
        )

    def test_products_of_a_function_that_couples_rows(self, kit: Kit) -> None:
        """Differentiate coupled rows: a backend may work row by row only if no row depends on another."""
        xp, u = kit.backend.xp, np.random.default_rng(5).standard_normal((4, 3))
        shift = lambda z: xp.concat([z[1:], z[:1]], axis=0)  # noqa: E731
        pair = lambda z: xp.concat([0 * z[1:], z[2:3]], axis=0)  # noqa: E731 (row 3 reads row 2 only)
        expected = np.zeros((4, 3))
        expected[2] = u[3]
        for f, truth in ((shift, np.roll(u, 1, axis=0)), (pair, expected)):
            _, vjp = kit.backend.autodiff.linearize(f, kit.array(np.ones((4, 3))))
            close(kit.numpy(vjp(kit.array(u))), truth, 1e-6, "vjp(u) where f couples rows")

    def test_a_backward_pass_that_cannot_be_right_reaches_the_user(self, kit: Kit) -> None:
        """Coupled rows and a failed adjoint solve: a warning by default, an error if that is asked for."""
        eager = kit.backend.capabilities.eager
        xp, one = kit.backend.xp, kit.array(np.ones((4, 3)))
        rates = kit.array(np.tile([0.1, 0.5, 0.9], (4, 1)))
        shift = lambda z, b: 0.5 * xp.concat([z[1:], z[:1]], axis=0) + b  # noqa: E731
        slow = lambda z, b: rates * z + b  # noqa: E731
        for f, z0, category in (
            (shift, 2 * one, errors.CoupledRowsWarning),
            (slow, one / (1 - rates), errors.ConvergenceWarning),
        ):
            config = kit.config(strategy_options={"max_steps": 2})
            cotangent = kit.array(np.arange(12.0).reshape(4, 3))
            ledger.forget()
            if eager:  # a traced warning may come after the result
                with warnings.catch_warnings(record=True) as shown:
                    warnings.simplefilter("always")
                    deqcore.vjp(f, z0, one, cotangent=cotangent, config=config, backward__on_failure="warn")
                assert category in {warning.category for warning in shown}, (
                    f"{category.__name__} is missing (got {shown})"
                )
            # What a tracing framework makes of an error in a callback keeps its message only.
            kind, text = errors.ConvergenceError if eager else Exception, "are coupled|did not converge"
            settings: Any = {"config": config, "backward__on_failure": "raise", "backward__verify_every": 1}
            with pytest.raises(kind, match=text):
                kit.numpy(deqcore.vjp(f, z0, one, cotangent=cotangent, **settings)[1][0])

    def test_forward_products(self, kit: Kit) -> None:
        problem, v = affine(), np.random.default_rng(4).standard_normal((3, 6))
        product = kit.backend.autodiff.jvp(kit.map(problem), kit.array(np.zeros((3, 6))))
        if product is None:
            assert not kit.backend.capabilities.jvp, "the backend promises jvp, but jvp gives None"
            return
        close(kit.numpy(product(kit.array(v))), np.einsum("bij,bj->bi", problem.a, v), 1e-6, "jvp(v) = J v")

    def test_derivatives_in_other_units(self, kit: Kit) -> None:
        """Give each sample of f(z) = s·g(z/s) its own unit s; J equals that of g. |z| excludes complex steps."""
        far = 100 if kit.backend.capabilities.float64 else 12
        s = 10.0 ** np.array([[-far], [-6], [0], [6], [far]])
        y = np.random.default_rng(5).standard_normal((5, 3))
        y = np.sign(y) * (0.1 + np.abs(y))
        unit, xp = kit.array(s), kit.backend.xp

        def f(z: Any, x: Any) -> Any:
            return unit * (0.5 * xp.tanh(z / unit) + 0.125 * xp.abs(z / unit)) + x

        z, x, u = kit.array(s * y), kit.array(0 * y), kit.array(np.ones((5, 3)))
        slope = 0.5 / np.cosh(y) ** 2 + 0.125 * np.sign(y)
        _, vjp = kit.backend.autodiff.linearize(lambda z: f(z, x), z)
        close(kit.numpy(vjp(u)), slope, 1e-5, "Jᵀu of s·g(z/s), a unit s for each sample")
        jvp = kit.backend.autodiff.jvp(lambda z: f(z, x), z)
        if jvp is not None:
            close(kit.numpy(jvp(u)), slope, 1e-5, "J v of s·g(z/s), a unit s for each sample")
        _, _, (dz, dx) = kit.backend.autodiff.vjp(lambda z, x: (f(z, x), None), (z, x), u)
        close(kit.numpy(dz), slope, 1e-5, "gradient of z in s·g(z/s), a unit s for each sample")
        close(kit.numpy(dx), np.ones((5, 3)), 1e-5, "gradient of a term that is 0, a unit s for each sample")

    def test_vjp_of_trees_and_of_what_has_no_derivative(self, kit: Kit) -> None:
        x, k = kit.array([1.0, 2.0]), kit.array([3, 4], "int32")

        def value(p: Any, k: Any, name: str) -> Any:
            return p["a"] * p["b"][0] * p["b"][0], name

        args = ({"a": x, "b": [2 * x]}, k, "text")
        result, aux, (dp, dk, dname) = kit.backend.autodiff.vjp(value, args, kit.array([1.0, 10.0]))
        assert (aux, dk, dname) == ("text", None, None), (
            "vjp must return aux unchanged, and None as the gradient of integers and strings."
        )
        close(kit.numpy(result), [4.0, 32.0], 1e-6, "value")
        close(kit.numpy(dp["a"]), [4.0, 160.0], 1e-6, "gradient of a")
        close(kit.numpy(dp["b"][0]), [4.0, 160.0], 1e-6, "gradient of b")

    def test_vjp_of_an_argument_that_is_not_used_is_zero(self, kit: Kit) -> None:
        x, y = kit.array([1.0]), kit.array([2.0, 3.0])
        _, _, (_, dy) = kit.backend.autodiff.vjp(lambda x, y: (2 * x, None), (x, y), kit.array([1.0]))
        assert np.array_equal(kit.numpy(dy), [0.0, 0.0]), "the gradient of an argument that f does not use must be 0."

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

    @several("strategy", ["exact-ift", "jacobian-free", "phantom", "unrolled"])
    def test_the_value_is_the_iterate_that_is_reported(self, kit: Kit, strategy: str) -> None:
        """Use an f that expands, so that f of the returned point is worse than the point and misses the tolerance."""
        xp = kit.backend.xp
        x = kit.array([[0.1, 0.4], [1.0, -2.0]])
        f = lambda z, x: 3.0 * xp.sin(z) + x  # noqa: E731
        config = kit.config(solver="broyden", rtol=1e-4, max_steps=6, strategy=strategy)
        sol = deqcore.fixed_point(f, 0 * x + 1, x, config=config)
        pulled, _ = deqcore.vjp(f, 0 * x + 1, x, cotangent=x, config=config)
        for what, value in (("fixed_point", kit.backend.detach(sol.value)), ("vjp", pulled)):
            z = kit.numpy(value).astype(float)
            true = np.linalg.norm(3.0 * np.sin(z) + kit.numpy(x) - z, axis=1)
            close(kit.numpy(sol.residual), true, 1e3 * kit.eps, f"{what}: the residual of the value")

    @needs("autodiff")
    def test_closed_over_values_get_their_gradient(self, kit: Kit) -> None:
        def loss(a: Any) -> Any:
            z0 = kit.array(np.zeros((1, 1)))
            return kit.backend.xp.sum(deqcore.fixed_point(lambda z: a * z + 1.0, z0, config=self._exact(kit)).value)

        close(kit.numpy(kit.backend.autodiff.grad(loss)(kit.array(0.5))), 4.0, 1e-6, "d/da 1/(1 − a) through a closure")

    @needs("autodiff")
    @several("strategy", ["exact-ift", "broyden-reuse", "jacobian-free", "neumann"])
    def test_every_argument_gets_its_gradient(self, kit: Kit, strategy: str) -> None:
        problem = affine(norm=0.2)

        def total(a: Any, b: Any) -> Any:
            f = lambda z, a, b: kit.backend.xp.sum(a * z[:, None, :], axis=2) + b  # noqa: E731
            solver = "broyden" if strategy == "broyden-reuse" else "picard"
            sol = deqcore.fixed_point(f, 0 * b, a, b, config=kit.config(solver=solver, strategy=strategy))
            return sol.value, None

        _, _, (da, db) = kit.backend.autodiff.vjp(
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

        gradient = kit.backend.autodiff.grad(loss)
        first, again = (float(kit.numpy(gradient(kit.array(0.5)))) for _ in range(2))
        assert first == again == pytest.approx(12.0, rel=1e-6), (
            "the backward pass must give the same gradient when it runs twice, and after other solves."
        )

    @needs("autodiff")
    def test_second_derivatives_are_right_or_refused(self, kit: Kit) -> None:
        """Require the right number or an error; a silently wrong number must never be returned."""
        second = kit.backend.autodiff.grad(kit.backend.autodiff.grad(lambda a: self._scalar(kit, a, 1.0)))
        try:
            result = kit.numpy(second(kit.array(0.5)))
        except errors.DeqcoreError:
            assert not kit.backend.capabilities.second_derivatives, "second derivatives are promised"
        else:
            close(result, 16.0, 1e-5, "d²/da² 1/(1 − a) = 2/(1 − a)³")

    @needs("autodiff")
    def test_hessian_vector_products_by_two_backward_passes(self, kit: Kit) -> None:
        """d/dv of v·L′(a) and of (v·L′)′(a), which are linear in v: right or refused, never without their term."""
        loss = kit.backend.autodiff.grad(lambda a: self._scalar(kit, a, 1.0))
        twice = lambda v: kit.backend.autodiff.grad(lambda a: v * loss(a))(kit.array(0.5)) + v  # noqa: E731
        once = lambda v: kit.backend.autodiff.grad(lambda a: v * self._scalar(kit, a, 1.0))(kit.array(0.5)) + v  # noqa: E731
        for product, truth, what in ((once, 5.0, "v·L′"), (twice, 17.0, "(v·L′)′")):
            try:
                result = kit.numpy(kit.backend.autodiff.grad(product)(kit.array(1.0)))
            except errors.DeqcoreError:
                continue
            close(result, truth, 1e-5, f"d/dv of {what} + v for L = 1/(1 − a)")

    @needs("autodiff")
    def test_what_f_reads_is_what_it_was_at_the_call(self, kit: Kit) -> None:
        """z = 1 / (1 − c a), with another c before the backward pass: right or refused, in every order."""

        def loss(a: Any) -> Any:
            held = [0.8]
            z0 = kit.array(np.zeros((1, 1)))
            sol = deqcore.fixed_point(lambda z, a: held[0] * a * z + 1.0, z0, a, config=self._exact(kit))
            held[0] = -3.0
            return kit.backend.xp.sum(sol.value)

        what = "where a variable that f reads has changed since the call"
        self._first_and_second(kit, loss, 0.8 / 0.6**2, 2 * 0.8**2 / 0.6**3, what)

    @needs("autodiff")
    def test_each_path_counts_once_where_arguments_depend_on_each_other(self, kit: Kit) -> None:
        """z = 1 / (1 − s) with s = ¾ h + ¼ a and h = a², where f is passed h and a, and closes over h."""

        def loss(a: Any) -> Any:
            h, z0 = a * a, kit.array(np.zeros((1, 1)))
            f = lambda z, h_, a_: (0.5 * h + 0.25 * h_ + 0.25 * a_) * z + 1.0  # noqa: E731
            return kit.backend.xp.sum(deqcore.fixed_point(f, z0, h, a, config=self._exact(kit)).value)

        left, slope = 1 - 0.3125, 1.0
        first, second = slope / left**2, 1.5 / left**2 + 2 * slope**2 / left**3
        self._first_and_second(kit, loss, first, second, "where f reads a and h = a²: each path counts once")

    def test_arguments_in_a_dataclass_get_their_gradient(self, kit: Kit) -> None:
        """Registered with the backend's trees or not."""
        rtol = 1e-11 if kit.eps < 1e-10 else 1e-6
        config = kit.config(solver="picard", rtol=rtol, strategy_options={"rtol": rtol})
        f = lambda z, p: p.a * z + p.rest["b"]  # noqa: E731
        b = kit.array(np.ones((1, 1)))
        _, (result,) = deqcore.vjp(f, 0 * b, Held(kit.array(0.5), {"b": b}, "text"), cotangent=b, config=config)
        close(kit.numpy(result.a), 4.0, 1e-5, "gradient of a field, 1/(1 − a)²")
        close(kit.numpy(result.rest["b"]), [[2.0]], 1e-5, "gradient of a tree in a field, 1/(1 − a)")
        assert result.name is None, (
            "a field of a dataclass that is not a floating-point array must have the gradient None."
        )

    @several("hidden", ["object", "slots", "derived", "partial", "method", "closure", "default", "set"])
    def test_arguments_whose_arrays_would_be_lost_are_refused(self, kit: Kit, hidden: str) -> None:
        """Require an error, because neither None nor zero is the gradient."""
        a, b = kit.array(0.5), kit.array(np.ones((1, 1)))
        argument, read = hiding(hidden, a)
        with pytest.raises(errors.ProblemError, match=r"holds arrays.*[Pp]ass the arrays themselves"):
            deqcore.vjp(lambda z, m: read(m) * z + 1.0, b, argument, cotangent=b, config=self._exact(kit))

    def _first_and_second(self, kit: Kit, loss: Any, first: float, second: float, what: str) -> None:
        for order, truth in ((1, first), (2, second)):
            gradient = (
                kit.backend.autodiff.grad(loss)
                if order == 1
                else kit.backend.autodiff.grad(kit.backend.autodiff.grad(loss))
            )
            try:
                result = kit.numpy(gradient(kit.array(0.5)))
            except errors.DeqcoreError:
                continue
            close(result, truth, 1e-5, f"derivative of order {order} {what}")

    @needs("second_derivatives")
    def test_second_derivatives_of_an_approximation_are_refused(self, kit: Kit) -> None:
        loss = lambda a: self._scalar(kit, a, 1.0, solver="picard", strategy="jacobian-free")  # noqa: E731
        with pytest.raises(errors.StrategyError, match="exact-ift"):
            kit.backend.autodiff.grad(kit.backend.autodiff.grad(loss))(kit.array(0.5))

    @needs("jit")
    def test_compiled_code_gives_the_same(self, kit: Kit) -> None:
        loss = lambda a: self._scalar(kit, a, 1.0)  # noqa: E731
        close(kit.numpy(kit.backend.harness.jit(loss)(kit.array(0.5))), 2.0, 1e-6, "value inside jit")
        close(
            kit.numpy(kit.backend.harness.jit(kit.backend.autodiff.grad(loss))(kit.array(0.5))),
            4.0,
            1e-6,
            "gradient inside jit",
        )

    def test_unrolled_steps_are_differentiated(self, kit: Kit) -> None:
        config = kit.config(solver="picard", strategy="unrolled", strategy_options={"steps": 3})
        f = lambda z, b: 0.5 * z + b  # noqa: E731
        b = kit.array([[1.0]])
        z, (db,) = deqcore.vjp(f, 0 * b, b, cotangent=b, config=config)
        close(kit.numpy(z), [[1.75]], 1e-6, "f(f(f(0)))")
        close(kit.numpy(db), [[1.75]], 1e-6, "1 + 1/2 + 1/4")

    def test_a_batch_whose_samples_see_each_other(self, kit: Kit) -> None:
        """Couple rows with `batch = false`, where the whole state is one system."""
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
        assert kit.backend.dtype_name(sol.value) == "bfloat16", (
            "a state in bfloat16 must have a solution in bfloat16. Cast the value back at the end."
        )
        assert kit.backend.dtype_name(sol.residual) in DTYPES, "residuals are float32 or better"
        close(kit.numpy(kit.backend.astype(sol.value, "float32")), np.full((2, 8), 2.0), 5e-2, "value")

    def test_integer_states_are_refused(self, kit: Kit) -> None:
        with pytest.raises(errors.InitialIterateError, match="floating-point"):
            kit.solve(lambda z: z, kit.array(np.zeros((1, 1)), "int32"), solver="picard", rtol=0.0)

    def test_complex_states_are_refused_unless_promised(self, kit: Kit) -> None:
        if kit.backend.capabilities.complex:
            pytest.skip(f"{kit.backend.name} promises complex")
        with pytest.raises(errors.InitialIterateError, match="real and imaginary"):
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

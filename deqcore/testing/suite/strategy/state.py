"""What a strategy with state must keep: over many passes, with gradients that are known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from deqcore.abc.backward import Strategy
from deqcore.abc.stateful import StatefulStrategy
from deqcore.options import option_values
from deqcore.testing.suite.base import Conformance, several
from deqcore.testing.suite.fixtures import Affine, Kit, close
from deqcore.testing.suite.strategy.equations import check_statuses, no_vjp
from deqcore.types import AdjointReport, Array, PassInputs, Status

BATCH, N = 12, 8


@dataclass(frozen=True)
class Batch:
    """One batch of a training: J per sample, cotangents, and the states that make dW = Σ u zᵀ.

    Attributes:
        problem: J.
        g: `(batch, n)`.
        z: `(batch, n)`.
    """

    problem: Affine
    g: Any
    z: Any

    def gradient(self, u: Any) -> Any:
        """Return dW `(n, n)` for u `(batch, n)`."""
        return u.astype(np.float64).T @ self.z

    @property
    def exact(self) -> Any:
        """The gradient of the batch by (I − J)^-T g."""
        return self.gradient(self.problem.adjoint(self.g))

    def error(self, u: Any) -> float:
        """Return the relative error of the batch's gradient that u gives."""
        return float(np.linalg.norm(self.gradient(u) - self.exact) / np.linalg.norm(self.exact))


def batches(radius: float, seed: int, size: int = BATCH) -> Iterator[Batch]:
    """Yield batches of one training, whose samples have Jacobians near a common one with this spectral radius."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((N, N))
    common *= radius / np.abs(np.linalg.eigvals(common)).max()
    shift = rng.standard_normal(N)
    while True:
        slopes = rng.uniform(0.9, 1.0, (size, 1, N))
        yield Batch(
            Affine(common[None] * slopes, np.zeros((size, N))),
            rng.standard_normal((size, N)) + shift,
            rng.standard_normal((size, N)) + shift,
        )


@functools.lru_cache(maxsize=64)
def _program(kit: Kit, strategy: StatefulStrategy) -> Callable[..., Any]:
    """Return one pass as a function of arrays, compiled where the backend can."""

    def routed(g: Array, a: Array, z: Array, converged: Array, residual: Array, values: Array) -> Any:
        xp = kit.backend.xp
        parameter_vjp = lambda u: (xp.matmul(xp.permute_dims(u, (1, 0)), z),)  # noqa: E731
        inputs = PassInputs(values, converged, residual, parameter_vjp)
        with kit.backend.errstate():
            return strategy.solve_with_state(kit.backend, kit.vjp(a), g, None, inputs)

    return kit.backend.harness.jit(routed)


class Training:
    """Calls a strategy as a training loop does."""

    def __init__(self, kit: Kit, strategy: StatefulStrategy, dtype: str = "float64") -> None:
        self.kit, self.strategy, self.dtype = kit, strategy, dtype
        self.values = self.fresh()

    def fresh(self) -> Any:
        """Return the state before the first pass."""
        return self.kit.array(np.asarray(self.strategy.init_state()), "float32")

    def step(self, batch: Batch, converged: bool = True) -> tuple[Any, AdjointReport]:
        """Do one backward pass: u and the report, on the host."""
        kit, size = self.kit, len(batch.g)
        arrays = (kit.array(each, self.dtype) for each in (batch.g, batch.problem.a, batch.z))
        mask, residual = kit.array(np.full(size, converged), "bool"), kit.array(np.full(size, 1e-6), self.dtype)
        u, report, self.values = _program(kit, self.strategy)(*arrays, mask, residual, self.values)
        result = AdjointReport(*map(kit.numpy, report))
        check_statuses(result)
        return kit.numpy(u), result


class StateTests(Conformance):
    """Only for a `StatefulStrategy` that reads no estimate."""

    @pytest.fixture
    def training(self, kit: Kit, strategy: Strategy) -> Training:
        """A training that begins."""
        if not isinstance(strategy, StatefulStrategy) or strategy.wants_estimate():
            pytest.skip("the strategy has no state, or reads an estimate")
        return Training(kit, strategy)

    def target(self, training: Training) -> float:
        """Return the relative error of the batch's gradient that the options promise."""
        result = option_values(training.strategy).get("max_relative_error")
        if not isinstance(result, float):
            pytest.skip("the options promise no accuracy")
        return result

    def test_the_state_is_a_vector_of_fixed_length(self, training: Training) -> None:
        begin = np.asarray(training.strategy.init_state())
        assert begin.ndim == 1, f"init_state must return one vector of numbers (got {begin.ndim} axes)"
        assert np.isfinite(begin).all(), "a state that is not finite counts as a new one"
        for batch, _ in zip(batches(0.7, 0), range(3), strict=False):
            training.step(batch)
            result = training.kit.numpy(training.values)
            assert result.shape == begin.shape, f"a state of the shape {result.shape}, but init_state has {begin.shape}"
            assert result.dtype == np.float32, f"the state must be float32 (got {result.dtype}): cast it"
            assert np.isfinite(result).all(), f"the state is not finite: {result}"

    def test_a_pass_depends_on_nothing_but_its_arguments(self, training: Training) -> None:
        some = batches(0.7, 1)
        for _ in range(3):
            training.step(next(some))
        kept, batch = training.values, next(some)
        once, _ = training.step(batch)
        after, training.values = training.kit.numpy(training.values), kept
        again, _ = training.step(batch)
        assert np.array_equal(once, again), "the strategy keeps something outside of its state"
        assert np.array_equal(after, training.kit.numpy(training.values)), "the next state differs"

    @several("radius", [0.4, 0.9])
    def test_the_gradient_of_the_batch_is_as_good_as_promised(self, training: Training, radius: float) -> None:
        target = self.target(training)
        errors = [batch.error(training.step(batch)[0]) for batch, _ in zip(batches(radius, 2), range(60), strict=False)]
        over = np.mean(np.array(errors) > target)
        assert over <= 0.1, f"{over:.0%} of the steps have an error above {target}: {np.round(errors, 2)}"

    def test_it_notices_that_the_cell_has_changed(self, training: Training) -> None:
        """Let f become stiff at once: after a few passes the promise holds again."""
        target = self.target(training)
        for radius in (0.3, 0.95):
            errors = [
                batch.error(training.step(batch)[0]) for batch, _ in zip(batches(radius, 3), range(40), strict=False)
            ]
            late = np.array(errors[10:])
            assert np.mean(late > target) <= 0.1, f"after a change to radius {radius}: errors {np.round(errors, 2)}"

    def test_it_costs_less_than_an_exact_solve_where_that_is_easy(self, training: Training) -> None:
        """Compare vjps with those of the first pass, where nothing is known yet."""
        target, spent = self.target(training), []
        for batch, _ in zip(batches(0.3, 4), range(40), strict=False):
            spent.append(int(training.step(batch)[1].vjps.max()))
        if target >= 0.1:
            assert np.median(spent[10:]) < spent[0], f"vjps {spent}: it never becomes cheaper"

    def test_an_audit_judges_what_was_in_force_before_it(self, training: Training) -> None:
        """Show each batch twice: an audit in the second pass must find the true error of the first."""
        checked = 0
        for batch, _ in zip(batches(0.8, 5), range(40), strict=False):
            u, report = training.step(batch)
            audited = (report.gradient_products > 0).any()
            true, (_, report) = batch.error(u), training.step(batch)
            result = report.gradient_error
            if audited or not np.isfinite(result).all():
                continue
            checked += 1
            slack = 2e-3 + 0.02 * true
            assert abs(result[0] - true) <= slack, f"the audit reports {result[0]}, but the error was {true}"
            mine, exact = batch.gradient(u).ravel(), batch.exact.ravel()
            cosine = mine @ exact / np.linalg.norm(mine) / np.linalg.norm(exact)
            assert abs(report.gradient_cosine[0] - cosine) <= slack, f"cosine {report.gradient_cosine[0]}, not {cosine}"
            assert (result == result[0]).all(), "the error is that of the batch, the same for all samples"
        if not checked:
            pytest.skip("no audit came right after a pass without one")

    def test_an_audit_uses_the_gradient_that_it_found(self, training: Training) -> None:
        """Let the gradient of an audit be near enough to judge others: within a fifth of the target."""
        most = 0.2 * self.target(training)
        for batch, _ in zip(batches(0.8, 6), range(8), strict=False):
            u, report = training.step(batch)
            if np.isfinite(report.gradient_error).all():
                error = batch.error(u)
                assert error <= most, f"the gradient of an audit has an error of {error}, and the target allows {most}"

    @several("harm", ["nan", "unconverged", "zero"])
    def test_a_bad_pass_does_not_spoil_the_state(self, training: Training, harm: str) -> None:
        target, some, errors = self.target(training), batches(0.8, 7), []
        for step in range(50):
            batch = next(some)
            if step % 5 == 0:
                g = 0 * batch.g if harm == "zero" else batch.g.copy()
                if harm == "nan":
                    g[1] = np.nan
                u, report = training.step(Batch(batch.problem, g, batch.z), converged=harm != "unconverged")
                assert np.isfinite(u[0]).all(), (
                    f"{harm} in one sample must leave the u of the others finite (got {u[0]})"
                )
                assert harm != "nan" or not np.isfinite(u[1]).all(), "a cotangent that is not finite must stay visible"
                if harm == "nan" and np.isfinite(report.residual[0]):
                    assert report.status[1] == int(Status.NONFINITE), "what is measured and not finite is NONFINITE"
            else:
                errors.append(batch.error(training.step(batch)[0]))
            assert np.isfinite(training.kit.numpy(training.values)).all(), f"the state is not finite after {harm}"
        over = np.mean(np.array(errors) > target)
        assert over <= 0.1, f"{over:.0%} of the good steps exceed {target} beside bad ones: {np.round(errors, 2)}"

    def test_ranks_that_share_a_state_take_the_same_vjps(self, training: Training) -> None:
        """Give two ranks one state and other data: they must audit together, and take the same vjps between audits."""
        other, some, others = Training(training.kit, training.strategy), batches(0.8, 11), batches(0.5, 12)
        for step in range(30):
            other.values = training.values
            _, one = training.step(next(some))
            _, two = other.step(next(others), converged=step % 3 > 0)
            audits = [bool((each.gradient_products > 0).any()) for each in (one, two)]
            assert audits[0] == audits[1], f"in pass {step} one rank audits, and the other does not"
            if not audits[0] and not np.isfinite(one.residual).any():
                assert one.vjps.max() == two.vjps.max(), f"in pass {step} ranks take {one.vjps} and {two.vjps} vjps"

    def test_a_pass_that_needs_no_vjp_is_the_same_without(self, training: Training) -> None:
        """Run a pass without `vjp` where `next_uses_vjp` says that it takes none: f is recorded without z then."""
        kit, strategy = training.kit, training.strategy
        if not kit.eager:
            pytest.skip("compiled code records f for every state")
        for batch, _ in zip(batches(0.05, 14), range(12), strict=False):
            values = training.values
            u, report = training.step(batch)
            if strategy.next_uses_vjp(kit.numpy(values)):
                continue
            assert not report.vjps.any(), f"next_uses_vjp says that none is taken, but the pass took {report.vjps}"
            g, size = kit.array(batch.g, training.dtype), len(batch.g)
            known = kit.array(np.full(size, True), "bool"), kit.array(np.full(size, 1e-6), training.dtype)
            inputs = PassInputs(values, *known, None, has_vjp=False)
            alone, _, after = strategy.solve_with_state(kit.backend, no_vjp, g, None, inputs)
            assert np.array_equal(kit.numpy(alone), u), "next_uses_vjp: u without vjps is another one"
            assert np.array_equal(kit.numpy(after), kit.numpy(training.values)), "next_uses_vjp: another state"

    def test_a_state_that_is_not_finite_counts_as_a_new_one(self, training: Training) -> None:
        batch = next(batches(0.8, 8))
        expected, report = training.step(batch)
        training.values = training.fresh() * float("nan")
        result, other = training.step(batch)
        assert np.array_equal(result, expected), "with a state of NaN, u must be that of init_state: begin again"
        assert np.array_equal(report.vjps, other.vjps), f"with a state of NaN: {other.vjps} vjps, not {report.vjps}"

    def test_batches_of_other_sizes_share_the_state(self, training: Training) -> None:
        target, errors = self.target(training), []
        some = {size: batches(0.5, 9, size) for size in (1, 3, BATCH)}
        for step in range(30):
            batch = next(some[(1, 3, BATCH)[step % 3]])
            u, report = training.step(batch)
            assert report.vjps.shape == (len(batch.g),), (
                f"a report must have a number a sample (got {report.vjps.shape})"
            )
            errors.append(batch.error(u))
        assert np.isfinite(errors).all(), f"u must be finite for every batch size (errors {np.round(errors, 2)})"
        assert np.median(errors) <= target, f"errors {np.round(errors, 2)}"

    def test_a_batch_without_samples_makes_it_forget_nothing(self, training: Training) -> None:
        """Show an empty batch after each of a few passes: the vjps and errors stay what they are without them."""
        if not training.kit.eager:
            pytest.skip("a batch of another size is another program")
        other, spent, errors = Training(training.kit, training.strategy), [], []
        for number, batch in zip(range(24), batches(0.4, 13), strict=False):
            u, report = training.step(batch)
            v, there = other.step(batch)
            if number >= 12:
                u0, empty = training.step(
                    Batch(Affine(batch.problem.a[:0], batch.problem.b[:0]), batch.g[:0], batch.z[:0])
                )
                assert u0.shape == (0, N), f"u of no samples must have the shape (0, {N}) (got {u0.shape})"
                assert {each.shape for each in empty} == {(0,)}, "every field of its report must have the shape (0,)"
                spent.append((report.vjps.max(), there.vjps.max()))
                errors.append((batch.error(u), batch.error(v)))
        own, plain = np.median(spent, axis=0)
        assert own <= plain, f"vjps beside empty batches and without them: {spent}"
        own, plain = np.median(errors, axis=0)
        assert own <= 1.5 * plain + 1e-3, f"errors beside empty batches and without them: {errors}"

    @several("factor", [1e-6, 65536.0])
    def test_the_scale_of_the_loss_changes_no_decision(self, training: Training, factor: float) -> None:
        other = Training(training.kit, training.strategy)
        for batch, _ in zip(batches(0.8, 10), range(12), strict=False):
            u, report = training.step(batch)
            scaled, there = other.step(Batch(batch.problem, factor * batch.g, batch.z))
            assert np.array_equal(report.vjps, there.vjps), "the number of vjps depends on the scale of the loss"
            close(scaled / factor, u, 1e-3, "u for a scaled loss")

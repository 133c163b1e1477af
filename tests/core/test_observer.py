"""The hook that a monitor hangs on: it sees every solve, its backward, and solves that are about to raise."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.abc.backend import Backend
from deqcore.config import Config, resolve
from deqcore.errors import ConvergenceError
from deqcore.solve.observer import Observer, Solve, observer, observing


class Watch(Observer):
    """Keeps what it sees, and overrides settings."""

    def __init__(self, **overrides: object) -> None:
        self.seen: list[Solve] = []
        self.overrides = overrides

    def adjust(self, config: Config, backend: Backend) -> Config:
        return resolve(config, self.overrides)[0]

    def solved(self, solve: Solve) -> None:
        self.seen.append(solve)


def linear(z, x):
    return 0.5 * z + x


def test_it_sees_solves_inside_its_block_only(be) -> None:
    x = be.asarray(np.ones((2, 3)))
    watch = Watch()
    with observing(watch):
        assert observer() is watch
        sol = deqcore.fixed_point(linear, 0 * x, x)
    assert observer() is None
    deqcore.fixed_point(linear, 0 * x, x)
    (seen,) = watch.seen
    assert seen.solution is sol
    assert seen.f is linear
    assert seen.args == (x,)
    assert seen.z0.shape == (2, 3)
    assert seen.seconds > 0


def test_it_may_change_the_settings_even_of_an_explicit_config(be) -> None:
    x = be.asarray(np.ones((2, 3)))
    watch = Watch(forward__max_steps=0, forward__on_failure="ignore")
    with observing(watch):
        sol = deqcore.fixed_point(linear, 0 * x, x, config=Config(forward={"max_steps": 30}))
    assert int(sol.steps.max()) == 0
    assert watch.seen[0].config.forward.max_steps == 0


def test_it_sees_a_solve_that_raises(be) -> None:
    x = be.asarray(np.ones((2, 3)))
    watch = Watch()
    with observing(watch), pytest.raises(ConvergenceError):
        deqcore.fixed_point(lambda z: 2.0 * z + 1.0, 0 * x, forward__on_failure="raise", forward__solver="picard")
    assert not bool(watch.seen[0].solution.converged.any())


def test_vjp_is_seen_with_its_backward(be) -> None:
    x = be.asarray(np.ones((2, 3)))
    watch = Watch()
    with observing(watch):
        z, (dx,) = deqcore.vjp(linear, 0 * x, x, cotangent=x)
    np.testing.assert_allclose(be.to_numpy(dx), 2.0)  # 1 / (1 - 0.5)
    (seen,) = watch.seen
    np.testing.assert_array_equal(be.to_numpy(seen.solution.value), be.to_numpy(z))
    assert seen.solution.backward is not None
    assert be.to_numpy(seen.solution.backward.vjps).min() >= 1


def test_the_record_calls_its_listener_when_the_backward_has_run() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 3, requires_grad=True)
    sol = deqcore.fixed_point(linear, torch.zeros(2, 3), x)
    heard = []
    sol.record.listener = lambda record: heard.append((record.runs, record.seconds))
    assert not heard
    sol.value.sum().backward()
    (one,) = heard
    assert one[0] == 1
    assert one[1] > 0

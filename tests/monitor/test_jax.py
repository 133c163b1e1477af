"""The monitor and JAX: eager solves, compiled solves by callbacks, backward passes by the adjoint tap."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.errors import MonitorError, MonitorWarning
from deqcore.monitor import Monitor, Trigger

jax = pytest.importorskip("jax")
jnp = jax.numpy

from deqcore_jax import adjoint_tap, callbacks  # noqa: E402


def solve(rate, **settings):
    return deqcore.fixed_point(lambda z: rate * z + 1.0, jnp.zeros((3, 4)), forward__solver="picard", **settings)


def test_eager_solves_are_seen_as_they_are() -> None:
    with Monitor(sinks=[], every=2) as monitor:
        found = [solve(0.5) for _ in range(3)]
    assert [row.values["deq_forward_steps"] for row in monitor.rows] == [float(sol.steps.mean()) for sol in found]


def test_traced_solves_are_not_seen_and_that_is_said() -> None:
    step = jax.jit(lambda rate: solve(rate).value.sum())
    with Monitor(sinks=[]) as monitor, pytest.warns(MonitorWarning, match=r"deqcore_jax\.callbacks\.observe"):
        step(0.5)
    assert not monitor.rows


def test_the_collector_reports_every_run_of_compiled_code() -> None:
    traced = []
    monitor = Monitor(sinks=[], every=3)

    @jax.jit
    def step(rate):
        traced.append(1)
        sol = solve(rate, forward__max_steps=200)
        callbacks.observe(monitor, sol, name="cell")
        return sol.value.sum(), sol.steps

    with monitor, callbacks.collecting(monitor):
        steps = []
        for rate in (0.2, 0.5, 0.8, 0.9):
            steps.append(float(step(rate)[1].mean()))
            jax.effects_barrier()
            monitor.advance()
    assert len(traced) == 1
    assert [row.values["deq_forward_steps"] for row in monitor.rows] == steps
    assert [(row.step, row.name) for row in monitor.rows] == [(0, "cell"), (1, "cell"), (2, "cell"), (3, "cell")]
    assert all(row.values["deq_unconverged_fraction"] == 0 for row in monitor.rows)


def test_the_collector_under_grad_and_vmap() -> None:
    monitor = Monitor(sinks=[])

    def loss(rate):
        sol = solve(rate, forward__rtol=1e-6, forward__max_steps=200)
        callbacks.observe(monitor, sol)
        return sol.value[0, 0]

    gradients = jax.jit(jax.vmap(jax.grad(loss)))(jnp.array([0.25, 0.5]))
    jax.effects_barrier()
    monitor.close()
    np.testing.assert_allclose(gradients, [1 / 0.75**2, 4.0], rtol=1e-4)
    assert len(monitor.rows) == 2


def test_a_probe_reports_the_backward_pass_inside_and_outside_of_jit() -> None:
    monitor = Monitor(sinks=[])

    def loss(rate, figures):
        with adjoint_tap.reporting(figures):
            return solve(rate).value.sum()

    @jax.jit
    def inside(rate):
        gradient, figures = jax.grad(loss, argnums=(0, 1))(rate, adjoint_tap.new(3))
        callbacks.observe_backward(monitor, figures, name="in")
        return gradient, figures

    _, figures = inside(0.5)
    jax.effects_barrier()
    report = adjoint_tap.read(figures)
    monitor.observe_backward(report, name="out")
    monitor.close()
    first, second = monitor.rows
    assert (first.name, second.name) == ("in", "out")
    assert first.values == second.values
    assert first.values["deq_backward_steps"] == float(report.vjps.mean())


def test_triggers_of_collected_figures_act_in_the_thread_that_trains() -> None:
    monitor = Monitor(sinks=[], every=1, triggers=[Trigger("deq_forward_steps", "> 3", "raise", window=2)])

    @jax.jit
    def step(rate):
        sol = solve(rate)
        callbacks.observe(monitor, sol)
        return sol.value

    for _ in range(2):
        step(0.5)
    jax.effects_barrier()
    with pytest.raises(MonitorError, match="The run is stopped"):
        monitor.advance()
    monitor.close()


def test_actions_reach_jax_inside_using_and_not_silently_elsewhere() -> None:
    config = deqcore.Config(backward={"strategy": "neumann", "options": {"terms": 1}})
    monitor = Monitor(config, sinks=[], every=1, triggers=[Trigger("deq_forward_steps", "> 3", "exact", window=1)])
    gradient = jax.jit(jax.grad(lambda rate: solve(rate, forward__rtol=1e-6).value[0, 0]))

    def value() -> float:
        with deqcore.using(monitor.config):
            return float(gradient(0.5))

    assert value() == pytest.approx((1 + 0.5) / (1 - 0.5), rel=1e-4)  # Neumann's first two terms of 1/(1 − rate)
    with monitor:
        with pytest.warns(MonitorWarning, match="exact-ift from now on"):
            solve(0.5, config=config)
        with pytest.warns(MonitorWarning, match=r"only inside `with deqcore\.using\(monitor\.config\)"):
            solve(0.5, config=config)
        solve(0.5, config=monitor.config)
    assert value() == pytest.approx(4.0, rel=1e-4)

"""What the monitor records, against NumPy on the solution's own arrays; and that it costs no wait and no surprise."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest

import deqcore
from deqcore import Status
from deqcore.errors import ConfigError, ConvergenceError, MonitorWarning
from deqcore.monitor import Measurement, Metric, Metrics, Monitor
from deqcore.types import AdjointReport, BackwardRecord


def affine(rates):
    """f(z) = rates·z + 1, whose steps and residuals differ by sample."""
    return lambda z: rates * z + 1.0


def start(be, size=4):
    return be.asarray(np.zeros((3, size)))


def rates(be):
    return be.asarray(np.array([[0.1], [0.6], [0.9]]))


def test_a_row_says_what_the_solution_says(be) -> None:
    with Monitor(sinks=[]) as monitor:
        sol = deqcore.fixed_point(
            affine(rates(be)), start(be), forward__solver="picard", forward__max_steps=12, forward__on_failure="ignore"
        )
    steps, residual, status, evaluations = (
        be.to_numpy(a) for a in (sol.steps, sol.residual, sol.status, sol.evaluations)
    )
    (row,) = monitor.rows
    seconds = row.values["deq_forward_seconds"]
    assert 0 < seconds < 60
    expected = {
        "deq_forward_steps": steps.mean(),
        "deq_forward_steps_max": steps.max(),
        "deq_forward_evaluations": evaluations.mean(),
        "deq_forward_residual": np.median(residual),
        "deq_forward_residual_max": residual.max(),
        "deq_unconverged_fraction": (status != Status.CONVERGED).mean(),
        "deq_nonfinite_fraction": 0.0,
        "deq_forward_seconds": seconds,
    }
    assert row.values == pytest.approx(expected, rel=1e-6)
    assert row.values["deq_unconverged_fraction"] == pytest.approx(2 / 3)
    assert set(row.values) <= set(Metrics())


def test_nan_in_f_is_counted_and_never_recorded_as_nan(be) -> None:
    bad = be.asarray(np.array([[0.5], [np.nan], [0.5]]))
    with Monitor(sinks=[]) as monitor:
        deqcore.fixed_point(affine(bad), start(be), forward__on_failure="ignore")
    values = monitor.rows[0].values
    assert values["deq_nonfinite_fraction"] == pytest.approx(1 / 3)
    assert values["deq_forward_residual_max"] == math.inf
    assert not any(math.isnan(value) for value in values.values())


def test_fixed_steps_have_a_residual_and_no_failure(be) -> None:
    with Monitor(sinks=[]) as monitor:
        deqcore.fixed_point(
            affine(0.5),
            start(be),
            forward__solver="picard",
            backward__strategy="unrolled",
            backward__options={"steps": 3},
        )
    values = monitor.rows[0].values
    assert values["deq_forward_steps"] == 3
    assert values["deq_forward_residual"] > 0
    assert values["deq_unconverged_fraction"] == 0  # no tolerance decided when to stop


def test_the_backward_is_recorded_with_its_forward(be) -> None:
    x = be.asarray(np.ones((3, 4)))
    with Monitor(sinks=[]) as monitor:
        deqcore.vjp(lambda z, x: rates(be) * z + x, start(be), x, cotangent=x, backward__strategy="broyden-reuse")
    values = monitor.rows[0].values
    assert values["deq_backward_steps_max"] >= values["deq_backward_steps"] >= 1
    assert values["deq_backward_residual_max"] < 0.1
    assert values["deq_backward_error"] < 0.1
    assert values["deq_uncertified_fraction"] == values["deq_fallback_fraction"] == 0
    assert 0 <= values["deq_refined_fraction"] <= 1
    assert values["deq_backward_seconds"] > 0


def test_exact_ift_has_no_refinement(be) -> None:
    x = be.asarray(np.ones((3, 4)))
    with Monitor(sinks=[]) as monitor:
        deqcore.vjp(lambda z, x: 0.5 * z + x, start(be), x, cotangent=x, backward__strategy="exact-ift")
    assert "deq_refined_fraction" not in monitor.rows[0].values
    assert monitor.rows[0].values["deq_backward_residual"] < 1e-6


def test_figures_stay_on_the_device_until_the_flush(be, monkeypatch) -> None:
    moved = []
    real = type(be).to_numpy
    monkeypatch.setattr(type(be), "to_numpy", lambda self, x: moved.append(x.shape) or real(self, x))
    with Monitor(sinks=[], every=5) as monitor:
        for _ in range(12):
            deqcore.fixed_point(affine(0.5), start(be))
        assert len(moved) == 2  # one transfer for five solves
        assert len(monitor.rows) == 10
    assert len(moved) == 3
    assert [row.solve for row in monitor.rows] == list(range(12))


def test_a_flush_without_solves_moves_nothing() -> None:
    with Monitor(sinks=[]) as monitor:
        monitor.flush()
    assert not monitor.rows


def test_torch_backward_comes_later_and_still_in_its_own_row() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.tensor(0.5, requires_grad=True)
    with Monitor(sinks=[], every=2) as monitor:
        for _ in range(6):
            sol = deqcore.fixed_point(lambda z: weight * z + 1.0, torch.zeros(2, 3))
            sol.value.sum().backward()
    assert len(monitor.rows) == 6
    assert all("deq_forward_steps" in row.values and "deq_backward_steps" in row.values for row in monitor.rows)


def test_torch_a_solve_that_is_never_differentiated_is_recorded_all_the_same() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.tensor(0.5, requires_grad=True)
    with Monitor(sinks=[], every=2) as monitor:
        for _ in range(4):
            deqcore.fixed_point(lambda z: weight * z + 1.0, torch.zeros(2, 3))
        assert [row.solve for row in monitor.rows] == [0, 1]  # held back for one flush
    assert [row.solve for row in monitor.rows] == [0, 1, 2, 3]


def test_torch_a_second_backward_is_a_row_of_its_own() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.tensor(0.5, requires_grad=True)
    with Monitor(sinks=[], every=1) as monitor:
        sol = deqcore.fixed_point(lambda z: weight * z + 1.0, torch.zeros(2, 3))
        sol.value.sum().backward(retain_graph=True)
        sol.value.sum().backward()
    assert [row.solve for row in monitor.rows] == [0, 0]
    assert "deq_forward_steps" not in monitor.rows[1].values
    assert "deq_backward_steps" in monitor.rows[1].values


def test_torch_a_monitored_gradient_is_the_same_bit_for_bit() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

    def gradient():
        weight = torch.eye(8).mul(0.3).requires_grad_()
        deqcore.fixed_point(lambda z: torch.tanh(z @ weight + x), 0 * x).value.square().sum().backward()
        return weight.grad

    plain = gradient()
    with Monitor(sinks=[], every=1):
        assert torch.equal(gradient(), plain)


def test_the_monitor_keeps_no_graph_alive() -> None:
    torch = pytest.importorskip("torch")
    import gc
    import weakref

    weight = torch.ones(3, requires_grad=True)
    with Monitor(sinks=[], every=100):
        sol = deqcore.fixed_point(lambda z: 0.1 * weight * z + 1.0, torch.zeros(2, 3))
        alive = weakref.ref(sol.value)
        del sol
        gc.collect()
        assert alive() is None


def test_a_solve_that_raises_is_recorded(be) -> None:
    with Monitor(sinks=[]) as monitor, pytest.raises(ConvergenceError):
        deqcore.fixed_point(affine(2.0), start(be), forward__on_failure="raise", forward__solver="picard")
    assert monitor.rows[0].values["deq_unconverged_fraction"] == 1.0


def test_observe_by_hand_with_a_name(be) -> None:
    monitor = Monitor(sinks=[])
    sol = deqcore.fixed_point(affine(0.5), start(be))
    monitor.advance(41)
    monitor.observe(sol, name="encoder", seconds=0.25)
    monitor.observe_backward(
        AdjointReport(
            status=np.array([1, 2]),
            vjps=np.array([1, 4]),
            residual=np.array([0.1, np.nan]),
            error=np.array([np.nan, np.nan]),
            fallback=np.array([False, True]),
        ),
        name="encoder",
    )
    monitor.close()
    monitor.close()  # harmless
    first, second = monitor.rows
    assert (first.step, first.name, first.values["deq_forward_seconds"]) == (41, "encoder", 0.25)
    assert second.values == {
        "deq_backward_steps": 2.5,
        "deq_backward_steps_max": 4,
        "deq_uncertified_fraction": 0.5,
        "deq_fallback_fraction": 0.5,
        "deq_backward_residual": pytest.approx(0.1),
        "deq_backward_residual_max": pytest.approx(0.1),
    }


def test_steps_are_counted_by_the_user_or_by_solves(be) -> None:
    with Monitor(sinks=[]) as monitor:
        deqcore.fixed_point(affine(0.5), start(be))
        deqcore.fixed_point(affine(0.5), start(be))
        monitor.advance()
        deqcore.fixed_point(affine(0.5), start(be))
        monitor.advance()
        deqcore.fixed_point(affine(0.5), start(be))
    assert [row.step for row in monitor.rows] == [0, 1, 1, 2]


def test_log_takes_numbers_and_scalars_of_a_framework(be) -> None:
    with Monitor(sinks=[], metrics=[Metric("loss", "1", "Loss.")]) as monitor:
        monitor.log(loss=1.5)
        monitor.log(loss=be.asarray(np.float64(2.5)), deq_spectral_radius=0.9)
    assert [dict(row.values) for row in monitor.rows] == [
        {"loss": 1.5},
        {"loss": 2.5, "deq_spectral_radius": pytest.approx(0.9)},
    ]


def test_a_probe_measures_now_and_then_with_f_at_hand(be) -> None:
    def rate(solve):
        """|f(1) − f(0)| of a scalar affine map is its spectral radius."""
        one = 1.0 + 0 * solve.solution.value
        return (solve.f(one) - solve.f(0 * one))[0, 0]

    with Monitor(sinks=[], measurements=[Measurement("deq_spectral_radius", rate, every=3)]) as monitor:
        for _ in range(7):
            deqcore.fixed_point(affine(0.75), start(be))
    found = [row.values["deq_spectral_radius"] for row in monitor.rows if "deq_spectral_radius" in row.values]
    assert found == pytest.approx([0.75] * 3)


def test_the_probes_of_a_config_measure_what_is_known(be) -> None:
    turn = 0.8 * np.array([[0.0, -1.0], [1.0, 0.0]])  # eigenvalues ±0.8 i
    config = deqcore.Config(
        monitor={"sinks": [], "measurements": {"spectral_radius": 2, "gradient_audit": 3}},
        forward={"solver": "anderson"},
        backward={"strategy": "jacobian-free"},
    )
    with Monitor(config) as monitor:
        for _ in range(4):
            z0 = be.asarray(np.zeros((3, 2)))
            deqcore.fixed_point(lambda z: z @ be.asarray(turn.T, like=z) + 1.0, z0, config=config)
    rows = [row.values for row in monitor.rows]
    assert [row["deq_spectral_radius"] for row in rows if "deq_spectral_radius" in row] == pytest.approx([0.8] * 2)
    audits = [row for row in rows if "deq_gradient_cosine" in row]
    assert len(audits) == 2
    inverse = np.linalg.inv(np.eye(2) - turn.T)
    g = np.random.default_rng(0).standard_normal((3, 2))
    exact = g @ inverse.T
    cosine = (g * exact).sum(1) / np.linalg.norm(g, axis=1) / np.linalg.norm(exact, axis=1)
    error = np.linalg.norm(g - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert audits[0]["deq_gradient_cosine"] == pytest.approx(cosine.mean(), rel=1e-4)
    assert audits[0]["deq_gradient_error"] == pytest.approx(error.mean(), rel=1e-4)


def test_the_solves_of_a_probe_are_not_observed() -> None:
    def again(solve):
        return deqcore.fixed_point(solve.f, solve.z0).steps.mean()

    with Monitor(sinks=[], measurements=[Measurement("deq_spectral_radius", again, 1)]) as monitor:
        deqcore.fixed_point(affine(0.5), np.zeros((2, 2)))
    assert [row.solve for row in monitor.rows] == [0, 1]
    assert "deq_forward_steps" not in monitor.rows[1].values


def test_figures_without_solves_do_not_pile_up() -> None:
    with Monitor(sinks=[], every=2) as monitor:
        for step in range(40):
            monitor.log(deq_spectral_radius=0.5)
            monitor.advance(step)
        assert len(monitor.rows) >= 32


def test_a_measurement_that_fails_is_reported_once_and_left_out() -> None:
    def broken(solve):
        raise RuntimeError("no such luck")

    with Monitor(sinks=[], measurements=[Measurement("deq_spectral_radius", broken, 1)]) as monitor:
        with pytest.warns(MonitorWarning, match=r"deq_spectral_radius fails .*RuntimeError: no such luck"):
            deqcore.fixed_point(affine(0.5), np.zeros((2, 2)))
        deqcore.fixed_point(affine(0.5), np.zeros((2, 2)))
    assert len(monitor.rows) == 2


def test_unknown_metrics_are_reported_with_a_suggestion() -> None:
    monitor = Monitor(sinks=[])
    with pytest.raises(
        ConfigError, match=r"unknown metric 'deq_spectral_radios'\. Did you mean 'deq_spectral_radius'\?"
    ):
        monitor.log(deq_spectral_radios=1.0)
    with pytest.raises(ConfigError, match="Did you mean 'deq_forward_steps'"):
        Monitor(sinks=[], measurements=[Measurement("deq_forward_step", lambda solve: 0.0)])
    with pytest.raises(ConfigError, match="exists already"):
        Monitor(sinks=[], metrics=[Metric("deq_retrain", "1", "")])
    with pytest.raises(ConfigError, match="name must be .*got 'my loss'"):
        Metric("my loss", "1", "")


def test_measurements_are_objects_or_a_table_as_in_a_file() -> None:
    with Monitor(sinks=[], measurements={"spectral_radius": 1}) as monitor:
        deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((2, 3)))
    assert monitor.rows[-1].values["deq_spectral_radius"] == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="has no option 'spectral_radios'.*Did you mean 'spectral_radius'"):
        Monitor(sinks=[], measurements={"spectral_radios": 1})
    with pytest.raises(ConfigError, match=r"measurements must be Measurements, or a table.*got 'spectral_radius'"):
        Monitor(sinks=[], measurements=["spectral_radius"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"evry": 3}, "Did you mean 'every'"),
        ({"every": 0}, "every must be an integer >= 1 .got 0"),
        ({"every": "3"}, "every must be .*got '3'"),
        ({"sinks": 3}, "a table, written"),
        ({"triggers": "deq_forward_steps > 3"}, "a table, written"),
        ({"sinks": [{"sink": "jsonl", "pth": "a"}]}, "Did you mean 'path'"),
        ({"sinks": [{"sink": "jsonll"}]}, "Did you mean 'jsonl'"),
        ({"measurements": {"spectral": 3}}, "Did you mean 'spectral_radius'"),
        ({"measurements": {"spectral_radius": 0}}, "spectral_radius must be a number of solves >= 1 .got 0"),
        ({"measurements": 3}, "measurements must be a table.*got 3"),
        ({"reference": "nowhere.json"}, "reference profile 'nowhere.json' does not exist"),
    ],
)
def test_a_bad_section_is_reported(section, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Monitor(deqcore.Config(monitor=section))


def test_the_section_of_a_config_file_is_used(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deq.toml").write_text(
        '[monitor]\nevery = 3\n[[monitor.sinks]]\nsink = "csv"\npath = "a.csv"\n'
        '[[monitor.triggers]]\nmetric = "deq_forward_steps"\ncondition = "> 1"\nwindow = 2\n'
    )
    monitor = Monitor(deqcore.Config.load("deq.toml"))
    assert monitor.every == 3
    with monitor:
        for step in range(3):
            expectation = (
                pytest.warns(MonitorWarning, match="mean of deq_forward_steps over 2") if step == 2 else nullcontext()
            )
            with expectation:
                deqcore.fixed_point(affine(0.5), np.zeros((2, 2)))
    assert (tmp_path / "a.csv").exists()


def test_sinks_may_be_named_alone() -> None:
    monitor = Monitor(deqcore.Config(monitor={"sinks": ["csv", {"sink": "jsonl", "path": "x"}]}))
    assert [sink.name for sink in monitor._sinks.sinks] == ["csv", "jsonl"]


def test_a_monitor_is_entered_once() -> None:
    monitor = Monitor(sinks=[])
    with monitor:
        pass
    with pytest.raises(ConfigError, match="entered only once"), monitor:
        pass
    with pytest.raises(ConfigError, match="every"):
        Monitor(sinks=[], every=0)


def test_a_record_without_a_listener_works_as_before() -> None:
    record = BackwardRecord()
    record.add("report")  # type: ignore[arg-type]
    assert record.runs == 1

"""Triggers: when they fire, when they are cleared, what they do to solves, and what is refused."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest

import deqcore
from deqcore import Config
from deqcore.errors import ConfigError, MonitorError, MonitorWarning
from deqcore.monitor import Monitor, Trigger
from deqcore.monitor.actions import apply_actions
from deqcore.monitor.metrics import mean
from deqcore.monitor.triggers import Condition, TriggerState

METRIC = "deq_forward_steps"


def feed(state: TriggerState, *values: float | None) -> list[bool | None]:
    """What changed at each value; None stands for a row without the metric."""
    found = []
    for value in values:
        change = state.see({} if value is None else {METRIC: value})
        found.append(None if change is None else change.fired)
    return found


@pytest.mark.parametrize(
    ("text", "yes", "no"), [("> 0.1", 0.2, 0.1), (">=1e-3", 1e-3, 0.0), (" < -2 ", -3, -2), ("<= .5", 0.5, 0.6)]
)
def test_conditions(text, yes, no) -> None:
    condition = Condition.parse(text)
    assert condition(yes)
    assert not condition(no)


@pytest.mark.parametrize("text", ["", "0.1", "== 3", "> x", "> 1 2", ">> 1", 3, None, "> nan"])
def test_bad_conditions(text) -> None:
    with pytest.raises(ConfigError, match=r"such as '> 0\.1'"):
        Condition.parse(text)


@pytest.mark.parametrize(
    ("text", "opposite"), [("> 0.1", "< 0.08"), (">= 10", "< 8"), ("< -1", "> -0.8"), ("> 0", "<= 0")]
)
def test_the_opposite_lies_beyond_the_threshold(text, opposite) -> None:
    assert str(Condition.parse(text).opposite()) == opposite


def test_it_fires_once_with_a_full_window_and_again_after_it_was_over() -> None:
    state = TriggerState(Trigger(METRIC, "> 10", window=3, hold=0))
    assert feed(state, 20, 20, None, 20) == [None, None, None, True]
    assert feed(state, 20, 20, 20, 9, 9) == [None] * 5  # 9 is below 10, but not clearly
    assert feed(state, 7, 7, 7) == [None, False, None]  # mean of (9, 7, 7) < 8
    assert feed(state, 30, 30) == [None, True]  # (7, 30, 30): a window of values since the change


@pytest.mark.parametrize(
    ("statistic", "value"), [("mean", 4.0), ("median", 2.0), ("min", 1.0), ("max", 9.0), ("last", 2.0)]
)
def test_statistics(statistic, value) -> None:
    state = TriggerState(Trigger(METRIC, "> 0", window=3, statistic=statistic))
    change = None
    for each in (1.0, 9.0, 2.0):
        change = state.see({METRIC: each})
    assert change is not None
    assert change.value == value


@pytest.mark.parametrize(
    ("values", "value"),
    [
        ((1e308, 1.5e308, 0.5e308), 1e308),
        ((1e308, -1e308, 3.0), 1.0),
        ((1.0, math.inf, 2.0), math.inf),
        ((-math.inf, math.inf, 2.0), math.nan),
    ],
)
def test_a_mean_of_numbers_whose_sum_is_no_float(values, value) -> None:
    assert mean(list(values)) == pytest.approx(value, nan_ok=True)
    state = TriggerState(Trigger(METRIC, "> 1e300", window=3))
    changes = [state.see({METRIC: each}) for each in values]
    assert (changes[-1] is not None) == (value > 1e300)


def test_an_action_lasts_as_long_as_it_must() -> None:
    state = TriggerState(Trigger(METRIC, "> 10", window=2, hold=5))
    assert feed(state, 20, 20) == [None, True]
    assert feed(state, 0, 0, 0, 0, 0) == [None] * 4 + [False]


def test_what_is_not_measured_meanwhile_is_tried_again_ever_less_often() -> None:
    state = TriggerState(Trigger(METRIC, "> 10", window=1, hold=4))
    waits = []
    for _ in range(9):
        assert feed(state, 20) == [True]
        waits.append(feed(state, *[None] * 500).index(False) + 1)
        state = _resume(state)
    assert waits == [4, 8, 16, 32, 64, 128, 256, 256, 256]


def _resume(state: TriggerState) -> TriggerState:
    """As if the trial had just begun: the rows fed after it do not count."""
    state._since = 0
    return state


def test_a_long_quiet_spell_makes_the_next_action_short_again() -> None:
    state = TriggerState(Trigger(METRIC, "> 10", window=1, hold=2))
    assert feed(state, 20, None, None, 20) == [True, None, False, True]  # relapsed at once: twice as long
    assert feed(state, None, None, None, None) == [None, None, None, False]
    assert feed(state, 0, 0, 0, 0, 20) == [None, None, None, None, True]
    assert feed(state, None, None) == [None, False]


def test_effects_on_settings() -> None:
    config = Config(
        forward={"rtol": 1e-3}, backward={"strategy": "broyden-reuse", "options": {"max_relative_error": 0.2}}
    )
    tighten = Trigger(METRIC, "> 1", "tighten")
    assert apply_actions(config, (tighten,)).forward.rtol == pytest.approx(1e-4)
    assert apply_actions(config, (tighten,), least=5e-4).forward.rtol == 5e-4
    assert apply_actions(config, (Trigger(METRIC, "> 1", "tighten", factor=0.5),)).forward.rtol == pytest.approx(5e-4)
    auto = Config()
    assert apply_actions(auto, (tighten,), rtol=1e-4).forward.rtol == pytest.approx(1e-5)
    assert apply_actions(auto, (tighten,)) == auto

    refined = apply_actions(config, (Trigger(METRIC, "> 1", "refine"),)).backward.options
    assert refined["max_relative_error"] == pytest.approx(0.1)
    assert refined["max_refine_vjps"] == 120
    plain = Config(
        backward={
            "strategy": "broyden-reuse",
            "options": {"max_relative_error": None, "certify": False, "fallback": "none"},
        }
    )
    assert apply_actions(plain, (Trigger(METRIC, "> 1", "refine"),)).backward.options["max_relative_error"] == 0.1
    neumann = Config(backward={"strategy": "neumann", "options": {"terms": 3}})
    assert apply_actions(neumann, (Trigger(METRIC, "> 1", "refine", factor=3.0),)).backward.options["terms"] == 9
    free = Config(backward={"strategy": "jacobian-free"})
    assert apply_actions(free, (Trigger(METRIC, "> 1", "refine"),)) == free

    exact = apply_actions(config, (tighten, Trigger(METRIC, "> 1", "exact")))
    assert exact.backward.strategy == "exact-ift"
    assert exact.backward.options == {}
    assert exact.forward.rtol == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        ({"metric": "deq_forward_stpes", "condition": "> 1"}, "Did you mean 'deq_forward_steps'"),
        ({"metric": METRIC, "condition": "1"}, "condition must be .*got '1'"),
        ({"metric": METRIC, "condition": "> 1", "until": "> 3"}, "until must be .*got '> 3'"),
        ({"metric": METRIC, "condition": "> 1", "until": "soon"}, "until must be .*got 'soon'"),
        ({"metric": METRIC, "condition": "> 1", "action": "tigten"}, "action must be .*got 'tigten'"),
        ({"metric": METRIC, "condition": "> 1", "windw": 3}, "Did you mean 'window'"),
        ({"metric": METRIC, "condition": "> 1", "window": 0}, "window must be .*got 0"),
        ({"metric": METRIC, "condition": "> 1", "action": "tighten", "factor": 2.0}, "factor must be .*got 2.0"),
        ({"metric": METRIC, "condition": "> 1", "action": "refine", "factor": 0.5}, "factor must be .*got 0.5"),
        ({"metric": METRIC, "condition": "> 1", "factor": 0.5}, "take a factor"),
        ({"metric": METRIC, "condition": "> 1", "action": "hook", "hook": "pag"}, "Did you mean 'page'"),
        ({"metric": METRIC, "condition": "> 1", "hook": "page"}, "requires action = 'hook'"),
        ({"condition": "> 1"}, "needs the option metric"),
        ({"metric": METRIC}, "needs the option condition"),
    ],
)
def test_bad_triggers_are_reported_before_the_training(trigger, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Monitor(Config(monitor={"triggers": [trigger], "sinks": []}), hooks={"page": print})


def solve(rate: float, **settings: object):
    return deqcore.fixed_point(lambda z: rate * z + 1.0, np.zeros((2, 3)), forward__solver="picard", **settings)


def test_raise_stops_the_run_and_the_log_says_why(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    monitor = Monitor(
        sinks=[{"sink": "jsonl", "path": str(path)}], triggers=[Trigger(METRIC, "> 3", "raise", window=2)], every=2
    )
    with pytest.raises(MonitorError, match="mean of deq_forward_steps over 2 = .* The run is stopped"), monitor:
        for _ in range(100):
            solve(0.5)
    assert len(monitor.rows) == 2
    assert '"event":"fired"' in path.read_text()


def test_what_broke_the_block_is_not_hidden_by_a_trigger() -> None:
    monitor = Monitor(sinks=[], triggers=[Trigger(METRIC, "> 3", "raise", window=1)])
    with pytest.raises(ZeroDivisionError), monitor:
        solve(0.5)
        1 / 0  # noqa: B018


def test_a_warning_points_at_the_line_that_led_to_it() -> None:
    monitor = Monitor(sinks=[], every=1, triggers=[Trigger(METRIC, "> 3", window=1)])
    with pytest.warns(MonitorWarning) as seen, monitor:
        deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((2, 3)), forward__solver="picard")
    assert seen[0].filename == __file__


def test_hooks_get_the_event() -> None:
    events = []
    trigger = Trigger(METRIC, "> 3", "hook", window=1, hook="page")
    with Monitor(sinks=[], triggers=[trigger], hooks={"page": events.append}):
        solve(0.5)
    (event,) = events
    assert (event.kind, event.metric, event.action) == ("fired", METRIC, "hook")
    assert event.value > 3


@pytest.mark.parametrize("action", ["hook", "warn"])
def test_what_a_hook_or_a_warning_raises_costs_no_record(action, tmp_path) -> None:
    def broken(event):
        raise RuntimeError("the pager is broken")

    path = tmp_path / "log.jsonl"
    trigger = Trigger(METRIC, "> 3", action, window=1, hook="page" if action == "hook" else "")
    monitor = Monitor(sinks=[{"sink": "jsonl", "path": str(path)}], every=3, triggers=[trigger], hooks={"page": broken})
    with monitor:
        solve(0.5)
        solve(0.5)
        with pytest.raises((RuntimeError, MonitorWarning), match="pager is broken|deq_forward_steps over 1"):
            solve(0.5)  # here warnings are errors
        solve(0.5)
    assert path.read_text().count('"kind":"row"') == 4


def test_tightening_reaches_solves_whatever_config_they_have(be) -> None:
    config = Config(forward={"rtol": 1e-2, "solver": "picard"})
    trigger = Trigger("deq_forward_residual_max", "> 1e-3", "tighten", window=2, hold=4, factor=0.01)
    residuals = []

    def run() -> None:
        sol = deqcore.fixed_point(lambda z: 0.5 * z + 1.0, be.asarray(np.zeros((2, 3))), config=config)
        residuals.append(float(be.to_numpy(sol.residual).max()))

    with Monitor(sinks=[], every=1, triggers=[trigger]) as monitor:
        for step in range(12):
            with pytest.warns(MonitorWarning, match="tightened") if step in (1, 7) else nullcontext():
                run()
    loose, tight = residuals[0], residuals[2]
    assert loose > 1e-3
    assert tight < 1e-3
    assert residuals[:2] == [loose] * 2
    assert residuals[2:6] == [tight] * 4
    assert residuals[6:8] == [loose] * 2  # undone after `hold`, and it fires again
    assert [event.kind for event in monitor.events] == ["fired", "cleared", "fired"]
    assert config.forward.rtol == 1e-2


def test_an_action_that_changes_nothing_says_so() -> None:
    config = Config(backward={"strategy": "jacobian-free"})
    with Monitor(sinks=[], every=1, triggers=[Trigger(METRIC, "> 3", "refine", window=1)]):
        with pytest.warns(MonitorWarning, match="budget of the backward strategy is raised"):
            solve(0.5, config=config)
        with pytest.warns(MonitorWarning, match="refine has no effect .* 'jacobian-free': its budget cannot be raised"):
            solve(0.5, config=config)
        solve(0.5, config=config)  # said once


def test_an_action_is_applied_once_where_the_config_has_it_already() -> None:
    config = Config(forward={"rtol": 1e-3})
    with Monitor(config, sinks=[], every=1, triggers=[Trigger(METRIC, "> 3", "tighten", window=1)]) as monitor:
        with pytest.warns(MonitorWarning, match="tightened"):
            solve(0.5, config=config)
        backend = deqcore.get_backend(backend="numpy")
        assert monitor.adjust(config, backend).forward.rtol == pytest.approx(1e-4)
        assert monitor.config.origin("forward.rtol") == "the monitor"
        assert monitor.adjust(monitor.config, backend) is monitor.config
        with deqcore.using(monitor.config, forward__max_steps=99) as inside:
            assert monitor.adjust(inside, backend).forward.rtol == pytest.approx(1e-4)


def test_monitor_config_follows_the_actions_and_serves_using() -> None:
    trigger = Trigger(METRIC, "> 3", "exact", window=1, until="< 0.5")
    with Monitor(Config(backward={"strategy": "jacobian-free"}), sinks=[], every=1, triggers=[trigger]) as monitor:
        assert monitor.config.backward.strategy == "jacobian-free"
        with pytest.warns(MonitorWarning, match="exact-ift from now on"):
            solve(0.5)
        assert monitor.config.backward.strategy == "exact-ift"
    with deqcore.using(monitor.config) as inside:
        assert inside.backward.strategy == "exact-ift"


def train_stiff(monitor: Monitor) -> tuple[list[str], list[float]]:
    """f(z) = gain·z + 1, whose gain is trained to 0.97 and back to 0.2; the strategies, and gradients over the truth.

    The gradient of z* = 1/(1 − gain) is 1/(1 − gain)²; the Neumann series of two terms knows 1 + gain + gain² of it.
    """
    import torch

    gain = torch.tensor(0.3, requires_grad=True)
    config = Config(
        forward={"solver": "picard", "max_steps": 2000, "rtol": 1e-5},
        backward={"strategy": "neumann", "options": {"terms": 2}},
    )
    strategies, ratios = [], []
    with monitor:
        for step in range(60):
            strategies.append(monitor.adjust(config, deqcore.get_backend(backend="torch")).backward.strategy)
            sol = deqcore.fixed_point(lambda z, gain: gain * z + 1.0, torch.zeros(2, 3), gain, config=config)
            (found,) = torch.autograd.grad(sol.value[0, 0], gain)
            with torch.no_grad():
                ratios.append(float(found * (1.0 - gain) ** 2))
                gain += 0.3 * ((0.97 if step < 30 else 0.2) - gain)
    return strategies, ratios


def test_a_model_trained_to_go_stiff_is_switched_to_exact_gradients_and_back() -> None:
    pytest.importorskip("torch")
    trigger = Trigger("deq_forward_steps", "> 60", "exact", window=3, until="< 20", hold=10)
    monitor = Monitor(sinks=[], every=1, triggers=[trigger])
    with pytest.warns(MonitorWarning, match="exact-ift from now on"):
        strategies, ratios = train_stiff(monitor)
    assert [event.kind for event in monitor.events] == ["fired", "cleared"]
    on, off = strategies.index("exact-ift"), len(strategies) - strategies[::-1].index("exact-ift")
    assert 5 < on < 30 < off < 60
    assert ratios[on - 1] < 0.4  # what the truncated series made of a stiff model
    assert ratios[on:off] == pytest.approx([1.0] * (off - on), rel=1e-2)
    assert ratios[off:] == pytest.approx([1.0] * (60 - off), rel=0.05)

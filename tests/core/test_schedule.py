"""Settings by training step."""

import numpy as np
import pytest

import deqcore
from deqcore.config.schedule import Ramp, Schedule
from deqcore.errors import ConfigError


def test_a_ramp_is_geometric_and_keeps_its_ends():
    ramp = Ramp(1e-1, 1e-5, until=50, begin=10)
    assert [ramp.at(step) for step in (0, 10, 50, 99)] == [1e-1, 1e-1, 1e-5, 1e-5]
    assert ramp.at(30) == pytest.approx(1e-3)
    assert ramp.at(20) / ramp.at(21) == pytest.approx(ramp.at(40) / ramp.at(41))


def test_stages_follow_each_other_and_keep_nothing():
    schedule = Schedule(
        [(0, {"backward__strategy": "unrolled"}), (5, {"forward__max_steps": Ramp(4, 64, until=9, begin=5)})]
    )
    assert schedule.at(4) == {"backward__strategy": "unrolled"}
    assert [schedule.at(step)["forward__max_steps"] for step in (5, 7, 9, 100)] == [4, 16, 64, 64]
    assert all(type(schedule.at(step)["forward__max_steps"]) is int for step in range(5, 12))


def test_a_schedule_drives_a_solve():
    schedule = Schedule([(0, {"forward__rtol": Ramp(1e-1, 1e-8, until=10), "forward__solver": "picard"})])
    steps = []
    for at in (0, 5, 10):
        with deqcore.using(**schedule.at(at)):
            steps.append(int(deqcore.fixed_point(lambda z: 0.5 * z + 1, np.zeros((1, 1))).steps[0]))
    expected = [np.log2(1 / rtol) for rtol in (1e-1, 10**-4.5, 1e-8)]  # ‖f(z) − z‖ = 2⁻ᵏ, f(z) ≈ 2
    assert steps == pytest.approx(expected, abs=2)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "increase from 0"),
        ([(1, {})], "increase from 0"),
        ([(0, {}), (0, {})], "increase from 0"),
        ([(0, {"forward__rtoll": 1})], "rtol"),
        ([(0, {"forward__rtol": -1.0})], "rtol"),
        ([(0, {"forward__solver": Ramp(1, 2, 3)})], "take a Ramp"),
    ],
)
def test_mistakes_are_told_when_a_schedule_is_made(stages, words):
    with pytest.raises(ConfigError, match=words):
        Schedule(stages)


def test_bad_ramps_and_steps_are_refused():
    with pytest.raises(ConfigError, match="above 0"):
        Ramp(0.0, 1.0, 3)
    with pytest.raises(ConfigError, match="after begin"):
        Ramp(1.0, 2.0, 3, 3)
    with pytest.raises(ConfigError, match="at least 0"):
        Schedule([(0, {})]).at(-1)

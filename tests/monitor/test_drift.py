"""Drift: the measures against formulas and SciPy, profiles on disk, and the retrain mark under synthetic drift."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

import deqcore
from deqcore.errors import ConfigError, MissingExtraError, MonitorWarning
from deqcore.monitor import Monitor, Profile, Trigger
from deqcore.monitor.drift import MIN_SAMPLES, kolmogorov_smirnov, stability_index


def profile(seed: int = 0, size: int = 1000) -> Profile:
    rng = np.random.default_rng(seed)
    return Profile({"residual": rng.lognormal(-12, 1, size), "steps": rng.poisson(6, size).astype(float)})


def test_the_index_agrees_with_its_formula() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(5000), rng.normal(0.5, 1.2, 3000)
    edges = np.quantile(a, np.arange(1, 10) / 10)
    p = np.histogram(b, [-np.inf, *edges, np.inf])[0] / b.size
    q = np.histogram(a, [-np.inf, *edges, np.inf])[0] / a.size
    expected = sum((pi - qi) * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    assert stability_index(a, b) == pytest.approx(expected, rel=0.02)
    # Between two normal laws the index tends to the symmetric Kullback-Leibler divergence as bins get finer.
    assert 0.1 < stability_index(a, b) < 0.5 * (1.2**2 + 0.25 + (1 + 0.25) / 1.2**2 - 2)


def test_the_index_bears_ties_and_empty_bins() -> None:
    steps = np.repeat([3.0, 4.0, 5.0], [10, 80, 10])
    assert stability_index(steps, steps) == 0.0
    assert 1 < stability_index(steps, np.full(100, 9.0)) < 20
    assert stability_index(np.full(300, 2.0), np.full(300, 2.0)) == 0.0
    assert stability_index(np.full(300, 2.0), np.full(300, 3.0)) > 1
    assert math.isfinite(stability_index(steps, np.full(50, np.inf)))


def test_kolmogorov_smirnov() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(800), rng.normal(0.3, 1, 500)
    grid = np.sort(np.concatenate([a, b]))
    gap = np.abs(np.searchsorted(np.sort(a), grid, "right") / 800 - np.searchsorted(np.sort(b), grid, "right") / 500)
    distance, pvalue = kolmogorov_smirnov(a, b)
    assert distance == pytest.approx(gap.max())
    assert pvalue == pytest.approx(stats.kstwo.sf(distance, round(800 * 500 / 1300)), rel=0.3)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_profile_comes_back_from_disk(tmp_path, suffix) -> None:
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"profile.{suffix}"
    made = profile()
    made.samples["residual"][:3] = np.inf
    made.save(path)
    back = Profile.load(path)
    for name, array in made.samples.items():
        np.testing.assert_array_equal(back.samples[name], array)
    if suffix == "json":
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_what_is_not_a_profile_is_reported(tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="The reference profile .* does not exist"):
        Profile.load(tmp_path / "none.json")
    for text in ("{", "[]", "{}", '{"deqcore.profile": 9}', '{"deqcore.profile": 1, "residual": ["x"], "steps": [1]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.json' cannot be read"):
            Profile.load(tmp_path / "bad.json")
    (tmp_path / "short.json").write_text('{"deqcore.profile": 1, "residual": [1.0], "steps": [1.0]}')
    with pytest.raises(ConfigError, match="at least 256 samples"):
        Profile.load(tmp_path / "short.json")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        Profile.load(tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError, match=r"ends in \.json or \.safetensors"):
        profile().save(tmp_path / "a.pkl")
    monkeypatch.setattr("deqcore.monitor.drift.is_installed", lambda name: False)
    with pytest.raises(MissingExtraError, match=r"deqcore\[monitor\]"):
        profile().save(tmp_path / "a.safetensors")


def test_too_few_samples_make_no_profile() -> None:
    with Monitor(sinks=[]) as monitor:
        serve(1, rate=0.5)
        with pytest.raises(ConfigError, match="Monitor more solves"):
            monitor.profile()


def serve(batches: int, rate: float, seed: int = 0) -> None:
    """Requests to a model whose contraction rate depends on its inputs; 64 samples a batch."""
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        gains = rate * rng.uniform(0.5, 1.0, (64, 1))
        x = rng.standard_normal((64, 4))
        deqcore.fixed_point(
            lambda z, gains, x: gains * np.tanh(z) + x,
            np.zeros((64, 4)),
            gains,
            x,
            forward__solver="picard",
            forward__rtol=1e-6,
            forward__max_steps=200,
        )


def test_drift_raises_the_retrain_mark_and_its_absence_does_not(tmp_path) -> None:
    path = tmp_path / "profile.json"
    with Monitor(sinks=[]) as monitor:
        serve(40, rate=0.5)
        monitor.profile().save(path)

    with Monitor(sinks=[], reference=path) as monitor:
        serve(40, rate=0.5, seed=1)
    assert monitor.retrain is None
    measured = [row.values["deq_steps_psi"] for row in monitor.rows if "deq_steps_psi" in row.values]
    assert len(measured) == 40 * 64 // MIN_SAMPLES
    assert max(measured) < 0.1
    assert all(row.values["deq_retrain"] == 0 for row in monitor.rows)

    with Monitor(sinks=[], reference=path) as monitor:
        serve(20, rate=0.5, seed=2)
        with pytest.warns(MonitorWarning, match="marked for retraining"):
            serve(40, rate=0.9, seed=3)  # harder inputs: more steps for the same tolerance
    assert monitor.retrain is not None
    assert "deq_steps" in monitor.retrain or "deq_residual" in monitor.retrain
    first = next(event for event in monitor.events if event.kind == "retrain")
    assert 20 <= first.step < 45
    assert monitor.rows[-1].values["deq_retrain"] == 1


def test_own_drift_triggers_replace_the_default_ones() -> None:
    trigger = Trigger("deq_steps_psi", "> 100", action="retrain", window=1)
    with Monitor(sinks=[], reference=profile(), triggers=[trigger]) as monitor:
        serve(10, rate=0.9)
    assert monitor.retrain is None
    assert any("deq_steps_psi" in row.values for row in monitor.rows)

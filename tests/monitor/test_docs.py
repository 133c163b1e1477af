"""What docs/monitor.md says is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np

import deqcore
from deqcore import plugins
from deqcore.monitor import Monitor, Profile, Trigger
from deqcore.monitor.metrics import STANDARD
from deqcore.plugins.builtin import SINKS

PAGE = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text(encoding="utf-8")


def test_the_settings_on_the_page_are_accepted(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Profile({"residual": rng.random(300), "steps": rng.random(300)}).save("profile.json")
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    monitor = Monitor(deqcore.Config(monitor=tomllib.loads(text)["monitor"]))
    assert monitor.every == 10


def test_every_action_sink_and_named_metric_is_on_the_page_and_exists() -> None:
    actions = get_args(get_type_hints(Trigger)["action"])
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(actions)
    for sink in SINKS:
        assert f"`{sink.name}`" in PAGE
        plugins.load("sink", sink.name)
    names = set(re.findall(r"\bdeq_[a-z]+_?[a-z_]*", PAGE)) - {"deqcore_sinks"}
    assert names <= {metric.name for metric in STANDARD}

"""The section `[monitor]` of a config, checked when the config is made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import deqcore
from deqcore.errors import ConfigError, UnknownNameError

TRIGGER = {"metric": "deq_unconverged_fraction", "condition": "> 0.1"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"evry": 5}, r"no option 'evry'.*Did you mean 'every'"),
        ({"every": 0}, r"every must be an integer >= 1 \(got 0\)"),
        ({"triggers": [{**TRIGGER, "metric": "deq_unconverged_fracton"}]}, "Did you mean 'deq_unconverged_fraction'"),
        ({"triggers": [{**TRIGGER, "condition": "about 0.1"}]}, r"condition must be .*got 'about 0.1'"),
        ({"triggers": [{**TRIGGER, "until": "> 0.5"}]}, r"until must be .*other side.*got '> 0.5'"),
        ({"triggers": [{**TRIGGER, "action": "tighten", "factor": 2.0}]}, r"factor must be .*got 2.0"),
        ({"triggers": [{**TRIGGER, "window": 0}]}, r"window must be an integer >= 1 \(got 0\)"),
        ({"triggers": [{**TRIGGER, "acton": "warn"}]}, r"Did you mean 'action'"),
        ({"triggers": "warn"}, r"a table, written \[\[monitor.triggers\]\]"),
        ({"measurements": {"spectral": 5}}, r"no option 'spectral'"),
        ({"sinks": [{"path": "a.csv"}]}, r"sink must be the name of a registered sink \(got None\)"),
    ],
)
def test_a_mistake_is_reported_when_the_config_is_made(section: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        deqcore.Config(monitor=section)


def test_a_sink_that_is_not_registered_is_reported_when_the_config_is_made():
    with pytest.raises(UnknownNameError, match="Did you mean 'jsonl'"):
        deqcore.Config(monitor={"sinks": ["jsonlines"]})


def test_a_mistake_in_a_file_is_reported_when_the_file_is_loaded(tmp_path: Path):
    (tmp_path / "deq.toml").write_text('[[monitor.triggers]]\nmetric = "deq_forward_step"\ncondition = "> 9"\n')
    with pytest.raises(ConfigError, match="Did you mean 'deq_forward_steps'"):
        deqcore.Config.load(tmp_path / "deq.toml")


def test_what_only_a_monitor_knows_is_left_to_it():
    own = {"metric": "my_loss", "condition": "> 3", "action": "hook", "hook": "page"}
    config = deqcore.Config(monitor={"triggers": [own], "sinks": ["tensorboard"]})
    assert config.section("monitor")["triggers"] == [own]


def test_a_config_without_the_section_imports_nothing_of_the_monitor():
    import subprocess

    code = "import sys, deqcore; deqcore.Config(backend='numpy'); sys.exit('deqcore.monitor.settings' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

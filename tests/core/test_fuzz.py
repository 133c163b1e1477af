"""Whatever a config, a record of a plugin or a log holds: nothing but errors of our own types.

`FUZZ_CASES=10000 pytest tests/core/test_fuzz.py` tries that many of each; a plain run tries some dozen.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deqcore
from deqcore import errors, plugins
from deqcore.config import Config, resolve
from deqcore.config.environment import environment
from deqcore.config.sections import KEYS
from deqcore.monitor import Event, Metrics, Monitor, Row, RunInfo
from deqcore.monitor.live import live_view
from deqcore.monitor.log.format import header, line
from deqcore.monitor.log.reader import read
from deqcore.monitor.report import table, tiles, verdict
from deqcore.monitor.sinks.jsonl import JsonlSink

CASES = int(os.environ.get("FUZZ_CASES", "60"))


def our(error):
    """An error of deqcore that says something."""
    assert str(error)


fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=CASES < 1000,
    suppress_health_check=list(HealthCheck),
)

TEXT = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["", "\ud800", "\x00", "a\nb", "é" * 3, "x" * 5000, "__"]
)
NUMBER = (
    st.integers()
    | st.floats()
    | st.sampled_from([2**31, 2**63, 10**400, -(10**400), 1e18, 1e308, math.nan, math.inf, -0.0, 5e-324, True])
)
PLAIN = st.none() | st.booleans() | NUMBER | TEXT | st.binary(max_size=4)
ANY = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
KEY = st.sampled_from(["__".join(key) for key in KEYS] + ["forward__options__history_size", "forward__rtoll"]) | TEXT
NAMES = ["solver", "rtol", "atol", "max_steps", "batch", "options", "strategy", "patience", "deqfile", "rtoll"]
SECTION = st.dictionaries(st.sampled_from(NAMES) | TEXT, ANY, max_size=4) | ANY
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
SPECS = (plugins.SolverSpec, plugins.StrategySpec, plugins.SinkSpec, plugins.BackendSpec, plugins.CommandSpec)


@fuzzed
@given(
    st.dictionaries(st.sampled_from(["backend", "forward", "backward", "plugins", "study", "monitor"]) | TEXT, SECTION)
)
def test_tables(table):
    try:
        config = Config(**table)
    except errors.DeqcoreError as error:
        our(error)
    else:
        assert config == Config(**table)
        assert repr(config)
        assert config.as_dict()


@fuzzed
@given(st.dictionaries(KEY, ANY, max_size=3))
def test_overrides(overrides):
    try:
        config, _ = resolve(None, overrides)
    except errors.DeqcoreError as error:
        our(error)
    else:
        assert list(config.items())


@fuzzed
@given(
    st.dictionaries(KEY.map(lambda key: f"DEQCORE_{key.upper()}") | TEXT.map("deqcore_".__add__), TEXT | JSON.map(repr))
)
def test_environments(variables):
    try:
        environment(tuple(variables.items()))
    except errors.DeqcoreError as error:
        our(error)


TOML = st.sampled_from(
    [
        b'backend = "numpy"\n',
        b"[forward]\nrtol = 1e-3\n",
        b"[forward.options]\nmemory = 99999999999999999999\n",
        b"[monitor]\nevery = 3\nsinks = ['jsonl', 'csv']\n",
        b"[[monitor.triggers]]\nmetric = 'deq_forward_steps'\ncondition = '> 1'\n",
        b"a = " + b"[" * 3000,
        b"[study]\nx = 1979-05-27\n",
    ]
)


@fuzzed
@given(st.lists(TOML | st.binary(max_size=8), max_size=4), st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]))
def test_files(tmp_path_factory, parts, mark):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(mark + b"".join(parts))
    try:
        assert Config.load(path).as_dict()
    except errors.DeqcoreError as error:
        our(error)


@fuzzed
@given(st.sampled_from(SPECS), ANY, ANY, st.dictionaries(st.sampled_from(["summary", "backend", "version"]), ANY))
def test_records_of_plugins(spec, name, target, more):
    fields = {field.name for field in dataclasses.fields(spec)}
    try:
        plugins.register(spec(name, target, **{option: value for option, value in more.items() if option in fields}))
        assert plugins.plugins_status()
    except errors.DeqcoreError as error:
        our(error)
    finally:
        plugins.reset()


ROWS = st.builds(
    Row, NUMBER, NUMBER, NUMBER, st.dictionaries(TEXT | st.just("deq_forward_steps"), NUMBER | TEXT, max_size=3), PLAIN
)
EVENTS = st.builds(
    Event, NUMBER, NUMBER, st.sampled_from(["fired", "retrain", "note"]) | TEXT, TEXT, TEXT, NUMBER, TEXT
)


def shown(path: Path) -> None:
    """What all readers make of a log."""
    try:
        log = read(path)
    except errors.MonitorError as error:
        str(error).encode()
        return
    from rich.console import Console

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = [json.dumps(log.config), str(verdict(log)), str(tiles(log)), str(table(log))]
        console = Console(width=80, record=True, file=io.TextIOWrapper(io.BytesIO(), "utf-8"))
        console.print(live_view(log, 10, 80, now=0.0))
    "\n".join(text).encode()


@fuzzed
@given(st.lists(ROWS | EVENTS, max_size=5), ANY)
def test_records_of_a_log(tmp_path_factory, records, config):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.unlink(missing_ok=True)
    sink = JsonlSink(str(path))
    sink.open(RunInfo(Metrics(), 0.0, {"any": config}))
    sink.write(records)
    sink.close()
    shown(path)
    assert len(path.read_bytes().splitlines()) == 1 + len(records)


@fuzzed
@given(st.lists(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30), max_size=5))
def test_lines_that_are_none(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    good = [header(RunInfo(Metrics(), 0.0)).encode(), line(Row(1, 1, 1.0, {"deq_forward_steps": 1.0})).encode()]
    path.write_bytes(b"\n".join([*good, *lines]))
    shown(path)


KEYED = st.fixed_dictionaries(
    {"kind": st.sampled_from(["run", "row", "event"])},
    optional=dict.fromkeys(
        ["step", "solve", "time", "name", "run", "event", "message", "value", "units", "version"], JSON
    ),
)


@fuzzed
@given(st.lists(KEYED, max_size=5))
def test_lines_of_the_right_kind(tmp_path_factory, tables):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    good = [header(RunInfo(Metrics(), 0.0)), line(Row(1, 1, 1.0, {"deq_forward_steps": 1.0}))]
    path.write_text("\n".join([*good, *map(json.dumps, tables)]))
    shown(path)


@settings(
    max_examples=max(5, CASES // 20), deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES < 1000
)
@given(PLAIN)
def test_labels_of_a_monitor(tmp_path_factory, label):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.unlink(missing_ok=True)
    with Monitor(sinks=[{"sink": "jsonl", "path": str(path)}], every=1) as monitor:
        sol = deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((1, 2)))
        monitor.observe(sol, name=label)
    assert len(read(path).rows) == 2

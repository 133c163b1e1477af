"""The distribution of depth per unit: from solves to the log, the report and the live view."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

import deqcore
from deqcore.monitor import Monitor, Row
from deqcore.monitor.depths import depths_by_layer, depths_of
from deqcore.monitor.live import live_view
from deqcore.monitor.log.format import line, parse
from deqcore.monitor.log.reader import read
from deqcore.monitor.report import render

SETTINGS = {
    "forward__solver": "picard",
    "forward__rtol": 1e-6,
    "forward__batch": 2,
    "forward__coupled": False,
    "forward__max_steps": 400,
}


def solve(rates, mask=None):
    rates = np.asarray(rates)[..., None]
    return deqcore.fixed_point(lambda z, r: r * z + 1.0, np.zeros_like(rates), rates, mask=mask, **SETTINGS)


def test_every_unit_counts_once_in_the_bin_of_its_depth(tmp_path):
    path = tmp_path / "monitor.jsonl"
    mask = np.array([[True, True, True], [True, True, False]])
    with Monitor(sinks=[{"sink": "jsonl", "path": str(path)}]):
        first = solve([[0.0, 0.1, 0.5], [0.0, 0.9, 0.95]])
        second = solve([[0.1, 0.1, 0.1], [0.1, 0.1, 0.99]], mask)
    log = read(path)
    steps = np.concatenate([first.steps.ravel(), second.steps[mask]])
    found = depths_by_layer(log.rows)[""]
    assert sum(found.values()) == len(steps) == 11
    bounds = list(found)
    for low, high in zip([-1, *bounds], bounds, strict=False):
        assert found[high] == ((steps > low) & (steps <= high)).sum(), high
    assert max(bounds) > 100 > min(bounds)
    page = render(log)
    assert "Depth of each unit" in page
    assert "% of units" in page
    console = Console(width=120)
    with console.capture() as capture:
        console.print(live_view(log, 10))
    assert f"{min(bounds)} " in capture.get()
    assert f"{max(bounds)} steps, 11 units" in capture.get()


def test_depths_come_back_from_a_line_and_wrong_ones_are_refused():
    row = Row(1, 2, 3.0, {"deq_forward_steps": 2.0}, depths=depths_of([1, 1, 2, 5, 10**9]))
    table = json.loads(line(row))
    assert parse(table) == row
    assert row.depths == {1: 2, 2: 1, 6: 1, 3 * 2**19: 1}
    for wrong in ({"1": -1}, {"1": 2**60}, {"5": 1}, {"many": 1}, {"1": "x"}, 7):
        with pytest.raises(ValueError, match="a field is missing or wrong"):
            parse(table | {"depths": wrong})

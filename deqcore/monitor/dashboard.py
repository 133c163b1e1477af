"""The Grafana dashboard that ships with the Prometheus sinks, as `grafana.json` beside this file."""

from __future__ import annotations

import json
from importlib.resources import files


def load() -> dict[str, object]:
    """The dashboard, ready to be imported in Grafana (Dashboards, New, Import)."""
    text = (files("deqcore.monitor") / "grafana.json").read_text(encoding="utf-8")
    found: dict[str, object] = json.loads(text)
    return found

"""Prometheus: the latest values, served over HTTP or written for the node exporter's textfile collector.

`deqcore monitor dashboard` prints the Grafana dashboard that goes with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from deqcore.errors import MonitorError
from deqcore.monitor.metrics import COUNTERS, Metric
from deqcore.monitor.sink import Event, Record, RunInfo, Sink

NEEDS: Mapping[str, str] = {"prometheus_client": "monitor"}


class Latest:
    """The exposed state: the latest value of each metric and layer, and counts.

    A collector in the sense of prometheus_client.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self.values: dict[str, dict[str, float]] = {}
        self.solves: dict[str, int] = {}
        self.events: dict[str, int] = {}

    def after(self, records: Sequence[Record]) -> Latest:
        """Return a new state that includes `records`; the caller drops it if writing fails."""
        new = Latest(self._metrics)
        new.values = {metric: dict(layers) for metric, layers in self.values.items()}
        new.solves, new.events = dict(self.solves), dict(self.events)
        for record in records:
            if isinstance(record, Event):
                new.events[record.kind] = new.events.get(record.kind, 0) + 1
                continue
            if "deq_forward_steps" in record.values:
                new.solves[record.name] = new.solves.get(record.name, 0) + 1
            for metric, value in record.values.items():
                new.values.setdefault(metric, {})[record.name] = value
        return new

    def collect(self) -> Iterator[Any]:
        """Yield the families of metrics, as prometheus_client wants them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for metric, layers in self.values.items():
            gauge = GaugeMetricFamily(metric, self._metrics[metric].help, labels=["layer"])
            for layer, value in layers.items():
                gauge.add_metric([layer], value)
            yield gauge
        for (name, label), counts in zip(COUNTERS, (self.solves, self.events), strict=True):
            counter = CounterMetricFamily(name.name, name.help, labels=[label])
            for layer, count in counts.items():
                counter.add_metric([layer], count)
            yield counter


@dataclass(eq=False)
class PrometheusSink(Sink):
    """Serve the latest values at `http://ADDRESS:PORT/metrics`.

    Args:
        port: 1 to 65535; 0 takes a free one.
        address: to listen on; "0.0.0.0" lets other machines read.
    """

    port: int = field(default=9464, metadata={"least": 0, "expected": "a port from 0 to 65535"})
    address: str = "127.0.0.1"
    _state: Latest | None = field(default=None, init=False, repr=False)
    _server: Any = field(default=None, init=False, repr=False)
    _thread: Any = field(default=None, init=False, repr=False)
    keeps: ClassVar[bool] = False
    needs: ClassVar[Mapping[str, str]] = NEEDS

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise ValueError(f"port must be from 0 to 65535 (got {self.port})")

    @property
    def bound(self) -> int:
        """The port that the server listens on, once it is open."""
        return int(self._server.server_port)

    def open(self, run: RunInfo) -> None:
        """Begin to listen.

        Raises:
            MonitorError: the port is in use, or may not be used.
        """
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        self._state = Latest(run.metrics)
        try:
            self._server, self._thread = start_http_server(self.port, self.address, registry)
        except (OSError, OverflowError) as error:
            raise MonitorError(
                f"The sink cannot listen on port {self.port} of {self.address} ({error}). Free it, or choose "
                f"another one with the option port."
            ) from error

    def write(self, records: Sequence[Record]) -> None:
        """Expose the records."""
        assert self._state is not None
        self._state = self._state.after(records)

    def collect(self) -> Iterator[Any]:
        """Yield what a scrape sees."""
        return iter(()) if self._state is None else self._state.collect()

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


@dataclass(eq=False)
class PrometheusTextfileSink(Sink):
    """Write the latest values to a file for the node exporter's textfile collector, atomically at every flush.

    Args:
        path: the file; it must end in .prom for the collector to read it.
    """

    path: str = "deqcore.prom"
    _state: Latest | None = field(default=None, init=False, repr=False)
    keeps: ClassVar[bool] = False
    needs: ClassVar[Mapping[str, str]] = NEEDS

    def __post_init__(self) -> None:
        if not self.path.endswith(".prom"):
            raise ValueError(f"path must end in .prom (got {self.path!r})")

    def open(self, run: RunInfo) -> None:
        """Make the folder."""
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self._state = Latest(run.metrics)

    def write(self, records: Sequence[Record]) -> None:
        """Write the file."""
        from prometheus_client import CollectorRegistry, write_to_textfile

        assert self._state is not None
        state = self._state.after(records)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(state)
        write_to_textfile(self.path, registry)
        self._state = state

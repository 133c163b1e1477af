"""What the entry point names: hooks and records only."""

from collections.abc import Iterator

from deqcore.plugins import SinkSpec, hookimpl


@hookimpl
def deqcore_sinks() -> Iterator[SinkSpec]:
    yield SinkSpec("sqlite", "deq_sqlite.sink:SqliteSink", summary="a table of SQLite")

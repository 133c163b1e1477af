"""What the entry point names: hooks and records only."""

from collections.abc import Iterator

from deqcore.plugins import StrategySpec, hookimpl


@hookimpl
def deqcore_strategies() -> Iterator[StrategySpec]:
    yield StrategySpec("richardson", "deq_richardson.strategy:Richardson", summary="damped adjoint iteration")

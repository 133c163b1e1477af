"""What the layer does with an `EquilibriumCache`: its start, its part of a checkpoint, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from deqcore.errors import ConfigError

if TYPE_CHECKING:
    from deqcore.equilibrium_cache import EquilibriumCache

KEY: Final = "warm_start."  # of the entries in a state_dict, after the prefix of the layer


def check(cache: object, reuse: str | None) -> None:
    """Refuse a cache that is none, and one beside `reuse`.

    Raises:
        ConfigError: it does not fit.
    """
    if cache is None:
        return
    from deqcore.equilibrium_cache import EquilibriumCache

    if not isinstance(cache, EquilibriumCache):
        raise ConfigError.bad_value("The layer", "warm_start", cache, "None or a deqcore EquilibriumCache")
    if reuse is not None:
        raise ConfigError.bad_value("The layer", "reuse", reuse, "None beside warm_start, which starts by sample id")


def from_cache(
    cache: EquilibriumCache | None, f: Callable[..., Any], cold: Any, inputs: tuple[Any, ...], ids: Any, changed: Any
) -> Any:
    """Return the start of a call with sample ids.

    Args:
        cache: of the layer.
        f: the cell.
        cold: where samples without a stored state start.
        inputs: of the cell.
        ids: as in `DEQ.forward`.
        changed: as in `DEQ.forward`.

    Raises:
        ConfigError: the layer has no cache, or the arguments do not fit.
        StrategyError: the call is inside `torch.func.vmap`.
    """
    if cache is None:
        raise ConfigError.bad_value(
            "The layer", "ids", type(ids).__name__, "None without a cache; make the layer with "
            "warm_start=EquilibriumCache(capacity)",
        )  # fmt: skip
    from deqcore_torch import functorch

    functorch.refuse_vmap("A layer with sample ids", "Call it outside, where each id names one state.")
    start = cache.start(ids, cold, changed)
    if not cache.compare or start is cold:
        return start
    from deqcore.warm_start import closer_start

    with torch.no_grad():
        return closer_start(f, cold, start, *inputs)


def from_previous(previous: Any, cold: Any, changed: Any, reuse: str | None) -> Any:
    """Return the previous equilibrium, with changed parts at the cold start.

    Raises:
        ConfigError: the layer keeps no equilibrium by sample, or `changed` does not fit.
    """
    if reuse not in ("sequence", "carry"):
        expected = "None without ids, except with reuse = 'sequence' or 'carry'"
        raise ConfigError.bad_value("The layer", "changed", type(changed).__name__, expected)
    from deqcore.warm_start import restart_changed

    return restart_changed(previous, cold, changed)


def save(cache: EquilibriumCache | None, destination: Any, prefix: str) -> None:
    """Add the states of a persistent cache to a `state_dict`."""
    if cache is not None and cache.persistent:
        destination.update({f"{prefix}{KEY}{name}": value for name, value in cache.state_dict().items()})


def load(cache: EquilibriumCache | None, state_dict: Any, prefix: str) -> None:
    """Take the states out of a checkpoint. Other weights make those in the cache stale, so they are dropped."""
    names = [name for name in state_dict if name.startswith(f"{prefix}{KEY}")]
    kept: dict[str, Tensor] = {name.removeprefix(f"{prefix}{KEY}"): state_dict.pop(name) for name in names}
    if cache is not None:
        cache.load_state_dict(kept)

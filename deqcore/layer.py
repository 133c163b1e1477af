"""The common part of the layers of all frameworks: settings that are checked when the layer is made.

A layer resolves its settings at each call, so that `deqcore.using` and the environment apply to it. A typo in its own
settings is an error at construction, not in the first training step.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from deqcore import config as settings
from deqcore import plugins
from deqcore.errors import ConfigError, LayerWarning, ProblemError
from deqcore.options import freeze, plain
from deqcore.solve.user_line import warn
from deqcore.types import Tree

REUSE: Final = ("batch", "sequence", "carry")

Items = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class LayerSettings:
    """Settings of one layer. Frozen and hashable, so that JAX can treat them as static.

    Attributes:
        config: complete settings, or None for environment and `deqcore.using`.
        overrides: single settings, such as `("forward__rtol", 1e-5)`.
        evaluation: further settings that apply outside training.
    """

    config: settings.Config | None = None
    overrides: Items = ()
    evaluation: Items = ()

    @classmethod
    def of(
        cls, config: settings.Config | None, overrides: Mapping[str, object], evaluation: Mapping[str, object] | None
    ) -> LayerSettings:
        """Check and freeze.

        Raises:
            ConfigError: a setting is unknown or out of range.
            UnknownNameError: the solver or strategy is not registered.
        """
        if config is not None and not isinstance(config, settings.Config):
            raise ConfigError.bad_value("The layer", "config", config, "a deqcore.Config")
        made = cls(config, _frozen(overrides), _frozen(evaluation or {}))
        for training in (True, False):
            resolved, _ = settings.resolve(*made.call(training))
            plugins.make_solver(resolved.forward.solver, resolved.forward.options)
            plugins.make_strategy(resolved.backward.strategy, resolved.backward.options)
        return made

    def call(self, training: bool) -> tuple[settings.Config | None, dict[str, object]]:
        """Return config and overrides of one solve, as `fixed_point` takes them."""
        return self.config, dict(self.overrides) if training else dict(self.overrides) | dict(self.evaluation)

    def shown(self) -> list[str]:
        """Return the settings in effect now, for the printed form: the most important ones, and all overrides."""
        resolved, _ = settings.resolve(*self.call(training=True))
        main = {
            "forward__solver": resolved.forward.solver,
            "forward__rtol": resolved.forward.rtol,
            "forward__max_steps": resolved.forward.max_steps,
            "backward__strategy": resolved.backward.strategy,
        }
        lines = [f"{name}={value!r}" for name, value in (main | dict(self.overrides)).items()]
        return [*lines, f"evaluation={dict(self.evaluation)!r}"] if self.evaluation else lines

    def strategy_state(self) -> Sequence[float] | None:
        """Return the state with which the strategy of training begins, None if it has none."""
        from deqcore.abc.stateful import StatefulStrategy

        backward = settings.resolve(*self.call(True))[0].backward
        strategy = plugins.make_strategy(backward.strategy, backward.options)
        return strategy.init_state() if isinstance(strategy, StatefulStrategy) else None

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, to store beside the weights."""
        return {
            "config": None if self.config is None else self.config.as_dict(),
            "overrides": {name: plain(value) for name, value in self.overrides},
            "evaluation": {name: plain(value) for name, value in self.evaluation},
        }


def _frozen(items: Mapping[str, object]) -> Items:
    from deqcore.config.sources import scalar

    return tuple((name, freeze("The layer", name, scalar(value))) for name, value in sorted(items.items()))


def check_reuse(reuse: object) -> None:
    """Refuse a `reuse` that is not one of `REUSE`.

    Raises:
        ConfigError: it is not None, "batch", "sequence" or "carry".
    """
    if reuse is not None and reuse not in REUSE:
        raise ConfigError.bad_value("The layer", "reuse", reuse, "None, 'batch', 'sequence' or 'carry'")


def check_cell(cell: object) -> None:
    """Refuse a cell that cannot be called.

    Raises:
        ConfigError: it is not callable.
    """
    if not callable(cell):
        raise ConfigError.bad_value("The layer", "cell", cell, "a module or a function cell(z, *inputs)")


def initial_state(cell: Any, inputs: tuple[Tree, ...], zeros_like: Callable[[Tree], Tree]) -> Tree:
    """Return the initial iterate that the cell's method `initial_state` makes, or else zeros like the first input.

    Args:
        cell: the cell.
        inputs: the inputs of the layer's call.
        zeros_like: a function `tree -> tree` of zeros.

    Raises:
        ConfigError: the cell lacks this method, and the layer got no input.
    """
    if hasattr(cell, "initial_state"):
        return cell.initial_state(*inputs)
    if not inputs:
        raise ConfigError(
            "The layer was called without inputs and without z0, and its cell has no method initial_state, so the "
            "shape of the state is unknown. Pass z0, or give the cell a method initial_state(*inputs)."
        )
    return zeros_like(inputs[0])


def stages(steps: Sequence[int]) -> list[dict[str, object]]:
    """Return the settings of the solves of a trajectory, each of which continues the one before.

    Args:
        steps: the step counts after which a state is wanted.

    Raises:
        ConfigError: the step counts are not positive, or they do not increase.
    """
    counts = [0, *steps]
    if not steps or any(after <= before for before, after in pairwise(counts)):
        raise ConfigError.bad_value("trajectory", "steps", list(steps), "increasing positive step counts")
    ends = [after - before for before, after in pairwise(counts)]
    return [*({"forward__max_steps": count, "forward__on_failure": "ignore"} for count in ends), {}]


@contextmanager
def explain_arguments(cell: Callable[..., Any], inputs: tuple[Any, ...], name: str) -> Iterator[None]:
    """Translate a `TypeError` inside the block if the cell takes another number of arguments than the layer passes.

    Args:
        cell: the cell, whose signature is compared.
        inputs: the inputs of the layer's call.
        name: the cell's name, for the message.

    Raises:
        ProblemError: the cell cannot be called as `cell(z, *inputs)`.
    """
    try:
        yield
    except TypeError as error:
        try:
            signature = inspect.signature(cell)
        except (TypeError, ValueError):  # some callables in C have no signature
            raise error from None
        try:
            taken = list(signature.bind(None, *inputs).arguments)
        except TypeError as reason:
            raise ProblemError(
                f"The layer was called with {len(inputs)} input(s) and calls its cell as cell(z, *inputs) with "
                f"{len(inputs) + 1} argument(s), but {name} takes {signature} ({reason}). Call the layer with the "
                f"inputs that the cell takes after z, or wrap the module in a cell that takes them, as in "
                f"f(z, x) = tanh(linear(z) + x)."
            ) from error
        optional = [argument for argument in taken if signature.parameters[argument].default is not signature.empty]
        if optional:  # as in flax's Linear, whose second argument is a sharding
            error.add_note(
                f"The layer called {name}, which takes {signature}, as cell(z, *inputs), so an input was passed as "
                f"{', '.join(optional)}."
            )
        raise


def compare_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Warn if the settings of a checkpoint differ from the layer's own, which stay unchanged.

    Args:
        saved: the settings of the checkpoint, plain values from JSON.
        own: the settings of the layer, plain values.
    """
    lines = differences(saved, json.loads(json.dumps(own)))
    if lines:
        warn(
            f"The checkpoint was saved by a layer with other settings ({'; '.join(lines)}). The weights are loaded, "
            f"and the layer keeps its own settings. Make the layer with the settings of the checkpoint to get the "
            f"same equilibrium.",
            LayerWarning,
        )


def batch_norm_text(names: Iterable[str]) -> str:
    """Return the warning about batch normalisation in training mode; the caller appends where to put the layer."""
    return (
        f"The cell has batch normalisation in training mode ({', '.join(names)}): it makes each sample's "
        f"equilibrium depend on its batch mates, and its running statistics change with every evaluation of "
        f"the solver. Use GroupNorm or LayerNorm inside the cell, or put it into "
    )


def differences(saved: Mapping[str, Any], own: Mapping[str, Any], at: str = "") -> list[str]:
    """Return one line for each difference between two nested dictionaries of settings."""
    lines: list[str] = []
    for name in sorted({*saved, *own}):
        a, b, path = saved.get(name), own.get(name), f"{at}{name}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{path}.")
        elif a != b:
            lines.append(f"{path}: {a!r} in the checkpoint, {b!r} in the layer")
    return lines

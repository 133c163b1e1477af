"""The settings themselves: the sections of a config, with their defaults and limits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final, Literal, TypeAlias, TypeVar

from deqcore.options import Options

Key: TypeAlias = tuple[str, ...]
T = TypeVar("T")
TABLE: Final = {"expected": "a table of settings"}
LARGEST: Final = 2**31 - 1  # steps are counted in int32, on every backend


def setting(default: T, expected: str, least: float | None = None, most: int | None = None) -> T:
    """Return a field of a section.

    Args:
        default: the default.
        expected: a noun phrase that continues "must be" in an error.
        least: the smallest number allowed.
        most: the largest number allowed.
    """
    made: T = field(default=default, metadata={"expected": expected, "least": least, "most": most})
    return made


@dataclass(frozen=True)
class Forward:
    """The settings of the solve.

    Attributes:
        solver: name of a registered solver (`deqcore solvers`).
        rtol: a sample has converged when ‖f(z) − z‖ ≤ atol + rtol·‖f(z)‖, 2-norm over its own state; "auto": what
            the dtype can reach, at most 1e-4. Growth of the iterate alone does not meet the tolerance.
        atol: see rtol; in units of the state.
        max_steps: solver steps at most. The first evaluation of f comes on top.
        check_every: steps between checks whether all samples have stopped; "auto": 1 where a check costs no wait.
        batch: the first axis of every leaf is the batch; false: the whole state is one system; 2: the first two axes
            are units, such as the tokens of each sequence, each with its own convergence.
        coupled: whether f may couple the units of a sample, as attention does; only `batch = 2` reads it. False: units
            are as independent as samples, and the backward pass solves for each alone.
        patience: steps without progress of the residual after which a sample ends as STALLED.
        on_failure: what happens if a sample does not converge; with a strategy of fixed steps, if it is not finite.
            Code compiled by JAX raises with "raise", and warns only if "warn" is set explicitly: the default compiles
            no callback in.
        compact: evaluate f only for the samples that still run (eager backends; needs `batched_args`).
        options: fields of the solver's own dataclass.

    Raises:
        ConfigError: (when a Config is made) a setting is unknown or out of range.

    Example:
        >>> from deqcore import Config
        >>> forward = Config(forward={"solver": "anderson", "max_steps": 60}).forward
        >>> forward.solver, forward.max_steps, forward.rtol
        ('anderson', 60, 'auto')
    """

    solver: str = setting("auto", "the name of a registered solver")
    rtol: float | Literal["auto"] = setting("auto", "'auto' or a finite number >= 0", least=0)
    atol: float = setting(0.0, "a finite number >= 0", least=0)
    max_steps: int = setting(40, "an integer >= 0", least=0, most=LARGEST)
    check_every: int | Literal["auto"] = setting("auto", "'auto' or an integer >= 1", 1, LARGEST)
    batch: bool | Literal[2] = setting(True, "true, false or 2")
    coupled: bool = setting(True, "true or false")
    patience: int = setting(50, "an integer >= 1", least=1, most=LARGEST)
    on_failure: Literal["raise", "warn", "ignore"] = setting("warn", "'raise', 'warn' or 'ignore'")
    compact: bool = setting(False, "true or false")
    options: Options = field(default=Options(), metadata=TABLE)


@dataclass(frozen=True)
class Backward:
    """The settings of the gradient.

    Attributes:
        strategy: name of a registered strategy (`deqcore strategies`).
        on_failure: what happens if the adjoint solve of a sample does not converge: a warning, an error, nothing, or
            zero or NaN instead of its adjoint solution.
        verify_every: measure the true adjoint residual and look for coupled samples in the first backward pass of a
            layer or function and in every n-th after it; 0: never. Code compiled by JAX measures only if this was
            set, in one pass of n on average.
        step: the training step, from which strategies that draw random numbers (`looped`) draw with their seed. In JAX
            an array of int32, so that another step compiles nothing.
        options: fields of the strategy's own dataclass.

    Raises:
        ConfigError: (when a Config is made) a setting is unknown.

    Example:
        >>> from deqcore import Config
        >>> backward = Config(backward={"strategy": "broyden-reuse", "options": {"max_relative_error": 0.1}}).backward
        >>> backward.strategy, backward.options["max_relative_error"]
        ('broyden-reuse', 0.1)
    """

    strategy: str = setting("exact-ift", "the name of a registered strategy")
    on_failure: Literal["warn", "raise", "ignore", "zero", "nan"] = setting(
        "warn", "'warn', 'raise', 'ignore', 'zero' or 'nan'"
    )
    verify_every: int = setting(100, "an integer >= 0", least=0, most=LARGEST)
    step: int = setting(0, "an integer >= 0", least=0, most=LARGEST)
    options: Options = field(default=Options(), metadata=TABLE)


@dataclass(frozen=True)
class Plugins:
    """Whether a config file may bring code along.

    Attributes:
        deqfile: execute the `deqfile.py` beside the config file, which registers solvers and other plugins.

    Raises:
        ConfigError: (when a Config is made) a setting is unknown, or is not true or false.

    Example:
        >>> from deqcore import Config
        >>> Config().plugins.deqfile  # a config file executes nothing by default
        False
    """

    deqfile: bool = setting(False, "true or false")


@dataclass(frozen=True)
class Settings:
    """All settings, with their defaults."""

    backend: str = setting("auto", "'auto' or the name of a registered backend")
    forward: Forward = field(default=Forward(), metadata=TABLE)
    backward: Backward = field(default=Backward(), metadata=TABLE)
    plugins: Plugins = field(default=Plugins(), metadata=TABLE)


Section: TypeAlias = Forward | Backward | Plugins


def names_of(cls: type) -> tuple[str, ...]:
    """Return the names of a dataclass's fields."""
    return tuple(field.name for field in fields(cls))


SECTIONS: Final[dict[str, type[Section]]] = {"forward": Forward, "backward": Backward, "plugins": Plugins}
KEYS: Final[tuple[Key, ...]] = (
    ("backend",),
    *((section, field) for section, cls in SECTIONS.items() for field in names_of(cls)),
)
TABLES: Final[tuple[Key, ...]] = tuple((section,) for section in SECTIONS)
# A level that sets the first of a pair discards the second of lower levels.
CHOICES: Final[dict[Key, Key]] = {
    ("forward", "solver"): ("forward", "options"),
    ("backward", "strategy"): ("backward", "options"),
}

"""The records that plugins offer: a name, an import string, and a summary for listings.

A record names its target as `"module:attribute"` and imports nothing, so that every plugin can be listed without
importing a framework. The target is imported when its name is first used.

Requirements of a plugin module: it imports no framework, and its hooks yield the records below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, TypeAlias

from deqcore.errors import PluginError

Kind: TypeAlias = Literal["backend", "solver", "strategy", "sink", "trainer", "data", "model", "command"]
Condition: TypeAlias = Literal["ok", "heavy", "conflict", "broken", "disabled"]
INPUTS: Final = ("vector", "image", "tokens")  # kinds of data of a study, see deqcore.study.models.base.Shape

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TARGET: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class PluginStatus:
    """The line of one plugin in `deqcore plugins`.

    Attributes:
        name: name of the entry point, the module or the file.
        version: version of its distribution, "" if it has none.
        source: where the plugin was found.
        hooks: the hooks that it implements.
        status: "heavy" means that it works, but imports a framework when it is merely listed.
        reason: what is wrong, or "".
    """

    name: str
    version: str = ""
    source: str = ""
    hooks: tuple[str, ...] = ()
    status: Condition = "ok"
    reason: str = ""


@dataclass(frozen=True)
class Spec:
    """The common part of all records.

    Attributes:
        name: its name in a config or on a command line: letters, digits, `.`, `_` and `-`.
        target: import string, `"package.module:attribute"`.
        summary: one line for listings.
        kind: the kind of thing that is registered.
        version: layout of the record; deqcore refuses a record of a later layout than its own.
    """

    name: str
    target: str
    summary: str = ""

    kind: ClassVar[Kind]
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check(self, "name", self.name, NAME, "letters, digits, '.', '_' and '-', such as 'my-solver'")
        _check(self, "target", self.target, TARGET, "an import string, such as 'my_package.solver:MySolver'")
        if not isinstance(self.summary, str):
            raise PluginError(f"{type(self).__name__}: summary must be a string (got {self.summary!r}).")


class SolverSpec(Spec):
    """A solver: the target is a frozen dataclass, subclass of `deqcore.Solver`.

    Attributes:
        name: its name in a config or on a command line: letters, digits, `.`, `_` and `-`.
        target: import string, `"package.module:attribute"`, imported when its name is first used.
        summary: one line for listings.

    Example:
        >>> SolverSpec("mine", "my_package.solver:Mine", "steps of half the length").target
        'my_package.solver:Mine'
    """

    kind: ClassVar[Kind] = "solver"


class StrategySpec(Spec):
    """A backward strategy: a frozen dataclass, subclass of `deqcore.Strategy` or `deqcore.StepStrategy`.

    Attributes:
        name: its name in a config or on a command line: letters, digits, `.`, `_` and `-`.
        target: import string, `"package.module:attribute"`, imported when its name is first used.
        summary: one line for listings.

    Example:
        >>> StrategySpec("mine", "my_package.strategy:Mine", "two terms of the series").kind
        'strategy'
    """

    kind: ClassVar[Kind] = "strategy"


@dataclass(frozen=True)
class BackendSpec(Spec):
    """A backend: the target is a subclass of `deqcore.Backend`.

    Attributes:
        name: its name in a config.
        target: import string, `"package.module:Class"`.
        summary: one line for listings.
        package: the framework's import name, looked up before the target is imported; None if it needs none.
        extra: the extra of deqcore that installs the framework.
        array_modules: roots of the modules that define the framework's array types: `("jax", "jaxlib")`. A type that
            a built-in backend owns may also be listed (`"numpy"`): the config then picks between the two.
        context: import string of a function `config -> context manager`, which `deqcore.using` enters if the framework
            is imported, so that code compiled under some settings is not used under others.
        compiler: two modules: one that is imported once the framework's compiler is, and one that then calls
            `deqcore.solve.capture.add_compiler`. Compiled code may call `fixed_point` before the backend is loaded.

    Example:
        >>> spec = BackendSpec("cupy", "deq_cupy:CupyBackend", package="cupy", array_modules=("cupy",))
        >>> spec.kind, spec.array_modules
        ('backend', ('cupy',))
    """

    package: str | None = None
    extra: str | None = None
    array_modules: tuple[str, ...] = ()
    context: str | None = None
    compiler: tuple[str, str] | None = None

    kind: ClassVar[Kind] = "backend"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.array_modules, tuple) or not all(
            isinstance(root, str) and root.isidentifier() for root in self.array_modules
        ):
            raise PluginError(
                f"BackendSpec({self.name!r}): array_modules must be a tuple of top-level module names, such as "
                f"('torch',) (got {self.array_modules!r})."
            )
        if self.context is not None:
            _check(self, "context", self.context, TARGET, "an import string, such as 'my_package.jit:context'")
        modules = self.compiler
        if modules is not None and not (
            isinstance(modules, tuple) and len(modules) == 2 and all(isinstance(name, str) and name for name in modules)
        ):
            raise PluginError(
                f"BackendSpec({self.name!r}): compiler must be two names of modules, such as "
                f"('torch._dynamo', 'deqcore_torch.captured') (got {modules!r})."
            )


class SinkSpec(Spec):
    """A sink of the monitor: the target is a dataclass of its options, subclass of `deqcore.monitor.Sink`.

    Attributes:
        name: its name in a config or on a command line: letters, digits, `.`, `_` and `-`.
        target: import string, `"package.module:attribute"`, imported when its name is first used.
        summary: one line for listings.

    Example:
        >>> SinkSpec("sqlite", "deq_sqlite.sink:SqliteSink").name
        'sqlite'
    """

    kind: ClassVar[Kind] = "sink"


@dataclass(frozen=True)
class TrainerSpec(Spec):
    """The training loop that a study uses on one backend.

    Attributes:
        name: its name in listings.
        target: import string, `"package.module:Class"`.
        summary: one line for listings.
        backend: name of the backend that it trains on.

    Example:
        >>> TrainerSpec("mine", "my_package.trainer:Trainer", backend="torch").backend
        'torch'
    """

    backend: str = field(kw_only=True)

    kind: ClassVar[Kind] = "trainer"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "backend", self.backend, NAME, "the name of a backend, such as 'torch'")


@dataclass(frozen=True)
class DataSpec(Spec):
    """Data for studies: the target is a function `DataChoice -> Dataset`, see `deqcore.study.data`.

    Attributes:
        name: its name in a study.
        target: import string, `"package.module:attribute"`.
        summary: one line for listings.
        gives: the kind of its inputs, "vector", "image" or "tokens", if it is always the same. Models that do not
            take it are then left out of the grid, and a study without a fitting model is an error at its start.

    Example:
        >>> DataSpec("ours", "our_package.data:load", gives="image").gives
        'image'
    """

    gives: str | None = None

    kind: ClassVar[Kind] = "data"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gives is not None and self.gives not in INPUTS:
            raise PluginError(f"DataSpec({self.name!r}): gives must be one of {INPUTS} (got {self.gives!r}).")


class ModelSpec(Spec):
    """A model for studies: the target is a subclass of `deqcore.study.models.Model`.

    Attributes:
        name: its name in a study.
        target: import string, `"package.module:Class"`.
        summary: one line for listings.

    Example:
        >>> ModelSpec("ours", "our_package.model:Ours").kind
        'model'
    """

    kind: ClassVar[Kind] = "model"


class CommandSpec(Spec):
    """A subcommand of `deqcore`: the target is a typer app or a function with typer annotations.

    Attributes:
        name: its name in a config or on a command line: letters, digits, `.`, `_` and `-`.
        target: import string, `"package.module:attribute"`, imported when its name is first used.
        summary: one line for listings.

    Example:
        >>> CommandSpec("serve", "my_package.cli:app", "serve a model").summary
        'serve a model'
    """

    kind: ClassVar[Kind] = "command"


def _check(record: Spec, name: str, given: object, pattern: re.Pattern[str], expected: str) -> None:
    if not (isinstance(given, str) and pattern.fullmatch(given)):
        raise PluginError(f"{type(record).__name__}: {name} must be {expected} (got {given!r}).")

"""A fixed-point problem that every framework can solve, and how one is read from a user's file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.errors import ProblemError, did_you_mean, listing
from deqcore.types import Array, Tree

SUBJECTS: Final = {"LAYER": "a LayerUnderTest or a module", "--inputs": "an array or a tuple"}
"""What the name in `file.py:name` stands for, by the option of the command."""


@dataclass(frozen=True)
class Problem:
    """z* = f(z*, params, inputs), with NumPy data that each framework gets a copy of.

    Attributes:
        name: for reports.
        params: tree (usually a dict) of NumPy arrays.
        inputs: tree of NumPy arrays.
        z0: initial iterate, a tree of NumPy arrays; its first axis is the batch, unless `batch` is False.
        f: written once, `f(xp, params, z, inputs)` with the array namespace `xp`; or one function per framework,
            `{"torch": f, "jax": g}`, each `f(params, z, inputs)` on that framework's arrays.
        cotangent: dL/dz*, a tree like z0; default: standard normal numbers from a fixed seed.
        batch: as the setting `forward.batch`.

    Example:
        >>> import numpy as np
        >>> def f(xp, params, z, x):
        ...     return xp.tanh(z @ params["W"]) + x
        >>> problem = Problem("cell", {"W": 0.1 * np.ones((2, 2))}, np.ones((1, 2)), np.zeros((1, 2)), f)
        >>> [name for name, _ in problem.leaves()]
        ["params['W']", 'inputs']
    """

    name: str
    params: Tree
    inputs: Tree
    z0: Tree
    f: Callable[..., Tree] | Mapping[str, Callable[..., Tree]]
    cotangent: Tree | None = None
    batch: bool = True

    def __post_init__(self) -> None:
        for field in ("params", "inputs", "z0", "cotangent"):
            for name, leaf in walk(getattr(self, field), field):
                if not isinstance(leaf, np.ndarray | np.generic | int | float | None):
                    raise ProblemError(
                        f"Problem {self.name!r}: {name} must be a NumPy array (got a {type(leaf).__name__}): "
                        f"the data are shared by all frameworks."
                    )
        functions = self.f.values() if isinstance(self.f, Mapping) else [self.f]
        if not functions or not all(callable(f) for f in functions):
            raise ProblemError(
                f"Problem {self.name!r}: f must be a function f(xp, params, z, inputs), or a dict such as "
                f"{{'torch': f, 'jax': g}} of functions f(params, z, inputs) (got {self.f!r})."
            )

    @property
    def backends(self) -> tuple[str, ...] | None:
        """The backends that f is written for; None for all."""
        return tuple(self.f) if isinstance(self.f, Mapping) else None

    def bound(self, backend: Backend) -> Callable[..., Tree]:
        """F for one backend, as `f(z, params, inputs)`."""
        if isinstance(self.f, Mapping):
            own = self.f[backend.name]
            return lambda z, params, inputs: own(params, z, inputs)
        f, xp = self.f, backend.xp
        return lambda z, params, inputs: f(xp, params, z, inputs)

    def leaves(self) -> list[tuple[str, Any]]:
        """Return the names and values of everything that gets a gradient."""
        return [*walk(self.params, "params"), *walk(self.inputs, "inputs")]

    def direction(self) -> Tree:
        """Return the cotangent, or the default one."""
        if self.cotangent is not None:
            return self.cotangent
        rng = np.random.default_rng(20)
        return rebuild(self.z0, lambda leaf: rng.standard_normal(np.shape(leaf)).astype(np.float32))


def walk(tree: Tree, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts (keys sorted), lists and tuples, with names such as `params['layers'][0]`."""
    if isinstance(tree, Mapping):
        for key in sorted(tree):
            yield from walk(tree[key], f"{name}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for i, item in enumerate(tree):
            yield from walk(item, f"{name}[{i}]")
    else:
        yield name, tree


def rebuild(tree: Tree, change: Callable[[Any], Array]) -> Tree:
    """Return the same tree with `change` applied to each leaf, in the order of `walk`."""
    if isinstance(tree, Mapping):
        return {key: rebuild(tree[key], change) for key in sorted(tree)}
    if isinstance(tree, list | tuple):
        return type(tree)([rebuild(item, change) for item in tree])
    return change(tree)


def load_problem(where: str) -> Problem:
    """Read `path/to/file.py:name`; the name is a Problem or a function without arguments that returns one.

    Raises:
        ProblemError: no such file or name, the file raises, or the name is something else.
    """
    result = load_named(where)
    if not isinstance(result, Problem):
        raise ProblemError(
            f"{where} must be a deqcore.testing.Problem, or a function without arguments that returns one "
            f"(got a {type(result).__name__})."
        )
    return result


def load_own(where: str) -> Problem | tuple[Any, ...]:
    """Read `path/to/file.py:name` as `load_problem` does; it may also be a layer, a module or a function with its data.

    Returns:
        A Problem, or a tuple `(layer, *inputs)`.

    Raises:
        ProblemError: as `load_problem`, or a layer comes without data.
    """
    result = load_named(where)
    if isinstance(result, Problem) or (isinstance(result, tuple) and len(result) > 1 and callable(result[0])):
        return result
    raise ProblemError(
        f"{where} must be a deqcore.testing.Problem, a tuple (layer, *inputs) of a layer, module or function "
        f"cell(z, *inputs) and its arrays, or a function without arguments that returns one of these (got a "
        f"{type(result).__name__})."
    )


def load_named(where: str, option: str = "--problem") -> Any:
    """Return what `path/to/file.py:name` names, or what the function of that name returns.

    Args:
        where: the file and the name.
        option: of the command that the user called, for messages.

    Raises:
        ProblemError: no such file or name, or the file or the function raises.
    """
    file, name = UserFile.named(where, option)
    return file.made(name, option)


@dataclass(frozen=True)
class UserFile:
    """A Python file of a user, executed once, whatever number of its names is asked for.

    Attributes:
        path: of the file.
        module: what its execution made.
    """

    path: Path
    module: Any

    @classmethod
    def named(cls, where: str, option: str) -> tuple[UserFile, str]:
        """Execute the file of `path/to/file.py:name`; return it and the name.

        Raises:
            ProblemError: no such file, or it raises.
        """
        path_text, separator, name = where.rpartition(":")
        if not separator or not name.isidentifier():
            raise ProblemError(f"{option} must be path/to/file.py:name (got {where!r}).")
        path = Path(path_text)
        if not path.is_file():
            raise ProblemError(f"{option} {where!r}: the file {path_text!r} does not exist in {Path.cwd()}.")
        return cls(path, _execute(path, option)), name

    def get(self, name: str, option: str) -> Any:
        """Return what has this name in the file.

        Raises:
            ProblemError: nothing has it.
        """
        if hasattr(self.module, name):
            return getattr(self.module, name)
        public = [key for key in vars(self.module) if not key.startswith("_")]
        fitting = [key for key in public if isinstance(getattr(self.module, key), Problem)]
        rest = f" Problems in it: {listing(fitting)}." if option == "--problem" else ""
        raise ProblemError(f"{self.path} defines no {name!r}.{did_you_mean(name, public)}{rest}")

    def made(self, name: str, option: str) -> Any:
        """Return what has this name in the file, or what the function of that name returns.

        Raises:
            ProblemError: nothing has it, or the function raises.
        """
        result = self.get(name, option)
        if not inspect.isroutine(result):
            return result
        try:
            return result()
        except Exception as error:
            raise ProblemError(
                f"{self.path}:{name}() raised {type(error).__name__}: {error}. It must be "
                f"{SUBJECTS.get(option, 'a Problem')}, or a function without arguments that returns one."
            ) from error


def _execute(path: Path, option: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"deqcore_problem_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ProblemError(f"{path} is not a Python file. {option} must be path/to/file.py:name.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ProblemError(f"{path} cannot be executed: {place(error, path)}") from error
    return module


def place(error: BaseException, path: Path | None = None) -> str:
    """Return an error with the line that it came from: the last one in `path`, or the last outside of deqcore."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} (line {error.lineno})"
    line, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if path is None or file == str(path):
            line = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{line}"

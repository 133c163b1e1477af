"""What a call of a layer does beside returning its state: output, global settings, its own arrays, its inputs."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.diagnostics.check.report import FAILED, NOTE, OK, Finding
from deqcore.types import Tree

SHOWN: Final = 3  # names in a line of text


class EffectWatch:
    """Keeps global state as it was, and notes what calls print and change.

    Random generators run on between the calls, so that a layer that draws from them shows itself; `close` restores
    them.
    """

    def __init__(self, backend: Backend) -> None:
        """Note the state before the first call."""
        self.backend = backend
        self.text = io.StringIO()
        self.changed: dict[str, None] = {}
        self.before = self._state()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Enter one call: its output is kept from the terminal, and settings that it changes are restored."""
        try:
            with contextlib.redirect_stdout(self.text), contextlib.redirect_stderr(self.text):
                yield
        finally:
            self._restore(lambda name: "random state" not in name)

    def close(self) -> None:
        """Restore everything."""
        self._restore(lambda name: True)

    def _state(self) -> dict[str, Any]:
        return {name: read() for name, (read, _) in PROCESS.items()} | self.backend.harness.global_state()

    def _restore(self, chosen: Callable[[str], bool]) -> None:
        now = self._state()
        changed = {
            name: value for name, value in self.before.items() if name in now and not same(value, now[name])
        }  # a setting that an import registers does not count
        self.changed |= dict.fromkeys(changed)
        restore(self.backend, {name: value for name, value in changed.items() if chosen(name)})


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in RUNNER}


def _set_environment(before: dict[str, str]) -> None:
    for name in _environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


RUNNER: Final = ("PYTEST_CURRENT_TEST",)
"""Variables of the environment that a test runner changes between the parts of a test."""
PROCESS: Final[Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]]] = {
    "numpy random state": (np.random.get_state, np.random.set_state),
    "python random state": (random.getstate, random.setstate),
    "numpy error settings": (np.geterr, lambda state: np.seterr(**state)),
    "environment variables": (_environment, _set_environment),
    "working directory": (os.getcwd, os.chdir),
    "recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
}
"""How each setting of Python and NumPy is read and set."""


def restore(backend: Backend, changed: Mapping[str, Any]) -> None:
    """Set settings of the process and of a framework to these values."""
    for name in changed.keys() & PROCESS.keys():
        PROCESS[name][1](changed[name])
    backend.harness.restore_global_state({name: value for name, value in changed.items() if name not in PROCESS})


def same(a: Any, b: Any) -> bool:
    """Return whether two values of a setting are equal; arrays and nested tuples are compared by content."""
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    if hasattr(a, "shape"):
        return bool(np.array_equal(np.asarray(a), np.asarray(b)))
    return bool(a == b)


def copied(backend: Backend, tree: Tree) -> list[Any]:
    """Return copies of a tree's arrays on the host."""
    return [np.array(backend.to_numpy(backend.detach(x))) for x in backend.flatten(tree)[0] if backend.is_array(x)]


def side_effects(
    backend: Backend, watch: EffectWatch, layer: Any, inputs: tuple[Tree, ...], run: Callable[[], Any]
) -> Finding:
    """Run the layer once and compare its arrays and its inputs before and after; with what `watch` has noted so far."""
    names = list(backend.harness.module_arrays(layer))
    arrays = copied(backend, list(backend.harness.module_arrays(layer).values()))
    given = copied(backend, inputs)
    run()
    after = copied(backend, list(backend.harness.module_arrays(layer).values()))
    moved = [name for name, a, b in zip(names, arrays, after, strict=False) if not _equal(a, b)]
    overwritten = any(not _equal(a, b) for a, b in zip(given, copied(backend, inputs), strict=True))
    lines, remedies = [], []
    if overwritten:
        lines.append("its inputs are overwritten")
        remedies.append("copy an input before writing to it")
    if moved:
        lines.append(f"a call changes {_listed(moved)}")
        remedies.append("call the layer in evaluation mode (running statistics change in training mode)")
    if watch.changed:
        lines.append(f"a call changes global state: {_listed(list(watch.changed))}; it was restored")
        remedies.append("set global state outside of the layer, and pass a generator or a key")
    text = watch.text.getvalue().strip()
    if text:
        lines.append(f"it prints {len(text.splitlines())} lines, the first is {text.splitlines()[0][:60]!r}")
        remedies.append("remove the output, or use `logging`")
    status = FAILED if overwritten else NOTE if lines else OK
    remedy = f"{'; '.join(remedies)}.".capitalize() if remedies else ""
    return Finding("side effects", status, "a call changes nothing", "; ".join(lines) or "none", remedy)


def _equal(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")

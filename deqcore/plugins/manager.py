"""Discovery and loading of plugins; a fault in one plugin does not affect the others.

Nothing is loaded until a name is missing among the built-ins or a listing is requested. A plugin that fails becomes a
`PluginStatus` with the reason, and the error about an unknown name repeats it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Final

import pluggy

from deqcore.errors import PluginError, did_you_mean
from deqcore.plugins import hookspecs
from deqcore.plugins.builtin import BUILTIN
from deqcore.plugins.specs import Condition, Kind, PluginStatus, Spec

GROUP: Final = "deqcore"
DISABLE: Final = "DEQCORE_DISABLE_PLUGINS"
AUTOLOAD: Final = "DEQCORE_PLUGIN_AUTOLOAD"
HEAVY: Final = frozenset({"torch", "jax", "jaxlib", "flax", "equinox", "tensorflow", "mlx"})


@dataclass
class _Plugin:
    status: PluginStatus
    specs: list[Spec] = field(default_factory=list)

    def add(self, spec: Spec) -> None:
        if any((spec.kind, spec.name) == (other.kind, other.name) for other in self.specs):
            raise PluginError(f"it offers the {spec.kind} {spec.name!r} twice. Remove one of the two records.")
        self.specs.append(spec)

    def add_reason(self, status: Condition, reason: str) -> None:
        reason = f"{self.status.reason} {reason}".strip()
        self.status = replace(self.status, status=status, reason=reason)


class Manager:
    """All plugins of this process: registered plugins and, once they are needed, those of entry points."""

    def __init__(self) -> None:
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self._plugins: dict[str, _Plugin] = {}
        self._points: list[EntryPoint] | None = None  # still to be loaded; None: not discovered yet
        self._loading = False

    def register(self, plugin: object, name: str, source: str, version: str = "") -> PluginStatus:
        """Register a plugin and return its status; it replaces an earlier one of that name. Its failure is its status.

        An interrupt leaves nothing behind, so that the plugin can be registered again.
        """
        self.unregister(name)
        try:
            return self._take_in(plugin, name, source, version)
        except BaseException:
            self.unregister(name)
            raise

    def _take_in(self, plugin: object, name: str, source: str, version: str) -> PluginStatus:
        entry = self._plugins[name] = _Plugin(PluginStatus(name, version, source))
        with _contained(entry):
            self._pluggy.register(plugin, name=name)
            self._refuse_unknown_hooks(plugin)
            for kind, hook in hookspecs.HOOKS.items():
                for impl in getattr(self._pluggy.hook, hook).get_hookimpls():
                    if impl.plugin_name == name:
                        entry.status = replace(entry.status, hooks=(*entry.status.hooks, hook))
                        with _contained(entry, hook):
                            for spec in _records(kind, impl.function):
                                entry.add(spec)
            if not entry.status.hooks:
                raise PluginError(
                    f"it implements no hook. Use deqcore.plugins.hookimpl to mark one of {_hook_names()}."
                )
        return entry.status

    def offer(self, spec: Spec, name: str, source: str) -> None:
        """Register one record without a plugin (notebooks)."""
        _accept(spec.kind, spec)
        self._plugins[name] = _Plugin(PluginStatus(name, "", source, (hookspecs.HOOKS[spec.kind],)), [spec])

    def unregister(self, name: str) -> None:
        """Forget the plugin of that name, if it is registered."""
        self._plugins.pop(name, None)
        if self._pluggy.has_plugin(name):
            self._pluggy.unregister(name=name)

    def offers(self, kind: Kind) -> dict[str, list[tuple[Spec, str]]]:
        """Return all records of a kind with the plugins that offer them, by name, without the built-ins."""
        self._discover()
        offers: dict[str, list[tuple[Spec, str]]] = {}
        for plugin in self._plugins.values():
            for spec in plugin.specs:
                if spec.kind == kind:
                    offers.setdefault(spec.name, []).append((spec, _title(plugin.status)))
        return offers

    def statuses(self) -> list[PluginStatus]:
        """Return the status of every plugin; a name that two of them offer is a conflict in both."""
        self._discover()
        taken = {kind: self.offers(kind) for kind in hookspecs.HOOKS}
        return [self._with_conflicts(plugin, taken) for plugin in self._plugins.values()]

    def broken(self) -> list[PluginStatus]:
        """Return the plugins that could not be loaded completely."""
        self._discover()
        return [plugin.status for plugin in self._plugins.values() if plugin.status.status == "broken"]

    def _with_conflicts(self, plugin: _Plugin, taken: dict[Kind, dict[str, list[tuple[Spec, str]]]]) -> PluginStatus:
        shown = _Plugin(plugin.status)
        for spec in plugin.specs:
            others = [title for _, title in taken[spec.kind][spec.name] if title != _title(plugin.status)]
            if others:
                shown.add_reason("conflict", f"{others[0]} also offers the {spec.kind} {spec.name!r}.")
        return shown.status

    def _refuse_unknown_hooks(self, plugin: object) -> None:
        for attribute in dir(plugin):
            options = self._pluggy.parse_hookimpl_opts(plugin, attribute)
            if options is not None and attribute not in hookspecs.HOOKS.values():
                near = did_you_mean(attribute, hookspecs.HOOKS.values())
                raise PluginError(f"it marks {attribute!r}, which is not a hook.{near} Available: {_hook_names()}.")

    def _discover(self) -> None:
        """Load the entry points, once. After an interrupt the next lookup continues with the interrupted one."""
        if self._loading or self._points == []:  # a plugin may look something up while it is loaded
            return
        self._loading = True
        try:
            points = self._entry_points() if self._points is None else self._points
            self._points = points
            disabled = {name.strip() for name in os.environ.get(DISABLE, "").split(",")}
            while points:
                self._load(points[0], disabled)
                del points[0]
        finally:
            self._loading = False

    def _entry_points(self) -> list[EntryPoint]:
        if os.environ.get(AUTOLOAD, "1").strip().lower() in {"0", "false", "no", "off"}:
            return []
        return sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))

    def _load(self, point: EntryPoint, disabled: set[str]) -> None:
        dist = point.dist.name if point.dist else ""
        name = point.name if point.name not in self._plugins else f"{point.name} ({dist or point.value})"
        try:
            self._load_as(name, point, dist, disabled)
        except BaseException:
            self.unregister(name)
            raise

    def _load_as(self, name: str, point: EntryPoint, dist: str, disabled: set[str]) -> None:
        version = point.dist.version if point.dist else ""
        source = f"entry point {point.value!r}" + (f" of {dist}" if dist else "")
        entry = self._plugins[name] = _Plugin(PluginStatus(name, version, source))
        if disabled & {point.name, dist} - {""}:
            entry.add_reason("disabled", f"named in {DISABLE}.")
            return
        before = _frameworks()
        loaded: list[object] = []
        with _contained(entry):
            loaded.append(_load_entry_point(point))
        if loaded:
            self.register(loaded[0], name, source, version)
        heavy = _frameworks() - before
        if heavy and self._plugins[name].status.status == "ok":
            names = ", ".join(sorted(heavy))
            self._plugins[name].add_reason(
                "heavy", f"It imports {names} when it is loaded. Import frameworks inside the target instead."
            )


def _accept(kind: Kind, record: object) -> Spec:
    """Check a record: its type, its layout, and that its name is free."""
    layout = {cls.kind: cls for cls in Spec.__subclasses__()}[kind]
    if not isinstance(record, layout):
        raise PluginError(f"it must yield a {layout.__name__} (got {record!r}).")
    if record.version > layout.version:
        raise PluginError(
            f"{layout.__name__}({record.name!r}) has layout version {record.version}, but this deqcore supports "
            f"only {layout.version}. Upgrade deqcore, or install an older version of the plugin."
        )
    if record.name in BUILTIN[kind]:
        raise PluginError(f"the {kind} name {record.name!r} is reserved for the built-in one. Choose another name.")
    return record


def _records(kind: Kind, function: Callable[[], object]) -> Iterator[Spec]:
    offered = function()
    if not isinstance(offered, Iterable) or isinstance(offered, (str, bytes)):
        raise PluginError(f"it must return records (got {offered!r}). Use yield, or return a list.")
    for record in offered:
        yield _accept(kind, record)


def _load_entry_point(point: EntryPoint) -> object:
    try:
        return point.load()
    except ModuleNotFoundError as error:
        root = point.module.partition(".")[0]
        if error.name and error.name != root and not error.name.startswith(f"{root}."):
            raise PluginError(f"it needs the package {error.name!r}, which is not installed. Install it.") from error
        raise PluginError(f"its entry point {point.value!r} does not exist: {error}.") from error
    except AttributeError as error:
        raise PluginError(f"its entry point {point.value!r} does not exist: {error}.") from error


@contextmanager
def _contained(entry: _Plugin, hook: str = "") -> Iterator[None]:
    """Turn any error of a plugin into its status."""
    where = f"{hook}: " if hook else ""
    try:
        yield
    except PluginError as error:
        entry.add_reason("broken", f"{where}{error}")
    except (Exception, SystemExit) as error:
        entry.add_reason("broken", f"{where}{type(error).__name__}: {error} ({place(error)}).")


def place(error: BaseException) -> str:
    """Return file and line of the innermost frame of an exception, or of the syntax error itself."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}" if trace else "unknown place"


def _frameworks() -> set[str]:
    return {root for root in HEAVY if root in sys.modules}


def _hook_names() -> str:
    return ", ".join(hookspecs.HOOKS.values())


def _title(status: PluginStatus) -> str:
    return f"{status.name!r} ({status.source})" if status.source else repr(status.name)

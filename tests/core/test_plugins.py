"""Plugins: found by name, contained when they are broken, and without a cost when no caller asks."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from deqcore import errors, plugins
from deqcore.plugins import BackendSpec, SolverSpec, StrategySpec, TrainerSpec, hookimpl, lookup
from deqcore.plugins.builtin import BUILTIN
from deqcore.solvers.picard import Picard

Install = Callable[..., None]

HEADER = "from deqcore.plugins import *\nfrom deqcore.plugins import hookimpl\n"
OFFERS_MINE = HEADER + '@hookimpl\ndef deqcore_solvers():\n    yield SolverSpec("mine", "{module}_impl:Mine")\n'
SOLVER = """
from dataclasses import dataclass
from deqcore import Solver

@dataclass(frozen=True)
class Mine(Solver):
    weight: float = 0.5
    count: int = 1
    label: str = "a"

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count must be at least 1 (got {self.count})")

    def init(self, backend, z, fz):
        return ()

    def step(self, backend, f, z, fz, state):
        return fz, f(fz), state

class Plain(Solver):
    init, step = Mine.init, Mine.step
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, no_plugins: None) -> Iterator[None]:
    for name in ("DEQCORE_DISABLE_PLUGINS", "DEQCORE_PLUGIN_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("deq_", "deqfile_")):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution as pip would: a module and its dist-info with an entry point."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def add(name: str, source: str | None, *, entry: str | None = None, version: str = "1.2") -> None:
        module = f"deq_{name}"
        if source is not None:
            (site / f"{module}.py").write_text(textwrap.dedent(source).replace("{module}", module))
        (site / f"{module}_impl.py").write_text(SOLVER)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[deqcore]\n{name} = {entry or module}\n")

    return add


def status(name: str) -> plugins.PluginStatus:
    return next(each for each in plugins.plugins_status() if each.name == name)


# -- built-ins ---------------------------------------------------------------------------------------------


def test_a_built_in_name_loads_no_plugin(install: Install) -> None:
    install("bomb", "raise SystemExit('this must not run')")
    assert plugins.spec("solver", "picard").target == "deqcore.solvers.picard:Picard"
    assert plugins.make_solver("picard") is plugins.make_solver("picard", {})
    assert "deq_bomb" not in sys.modules


def test_a_plugin_cannot_take_a_built_in_name(install: Install) -> None:
    install("thief", OFFERS_MINE.replace('"mine"', '"broyden"'))
    assert plugins.solvers()["broyden"] is BUILTIN["solver"]["broyden"]
    assert status("thief").status == "broken"
    assert "'broyden' is reserved" in status("thief").reason


def test_unknown_names_get_a_suggestion_and_the_list() -> None:
    with pytest.raises(errors.UnknownNameError, match=r"'brodyen'.*mean 'broyden'.*anderson, auto, broyden"):
        plugins.make_solver("brodyen")
    with pytest.raises(errors.UnknownNameError, match=r"No strategy .*'exact_ift'.*'exact-ift'"):
        plugins.make_strategy("exact_ift")
    with pytest.raises(errors.UnknownNameError, match=r"No backend .*'pytorch'.*'torch'"):
        plugins.load("backend", "pytorch")


def test_a_missing_framework_names_the_extra() -> None:
    plugins.register(
        BackendSpec("absent", "deq_absent:Backend", package="no_such_framework", extra="absent", array_modules=())
    )
    plugins.register(TrainerSpec("absent", "deq_absent:Trainer", backend="absent"))
    for kind in ("backend", "trainer"):
        with pytest.raises(errors.MissingFrameworkError, match=r'pip install "deqcore\[absent\]"'):
            plugins.load(kind, "absent")  # type: ignore[arg-type]
    assert "absent" in plugins.backends()


@pytest.mark.parametrize("kind", ["backend", "solver", "strategy", "trainer", "command"])
def test_built_in_names_and_targets_are_unique(kind: plugins.Kind) -> None:
    targets = [record.target for record in BUILTIN[kind].values()]
    assert len(set(targets)) == len(targets) > 0
    assert all(record.summary for record in BUILTIN[kind].values())


# -- entry points ------------------------------------------------------------------------------------------


def test_an_entry_point_is_found_by_name_and_listed(install: Install) -> None:
    install("good", OFFERS_MINE)
    made = plugins.make_solver("mine", {"weight": 1})
    assert made == type(made)(weight=1.0)
    assert isinstance(made.weight, float)
    assert plugins.solvers()["mine"].target == "deq_good_impl:Mine"
    assert status("good") == plugins.PluginStatus(
        "good", "1.2", "entry point 'deq_good' of deq_good", ("deqcore_solvers",), "ok", ""
    )


def test_one_plugin_may_offer_several_kinds(install: Install) -> None:
    source = HEADER + textwrap.dedent(
        """
        @hookimpl
        def deqcore_strategies():
            return [StrategySpec("half", "deq_x:Half", summary="half of it")]
        @hookimpl
        def deqcore_sinks():
            yield SinkSpec("null", "deq_x:Null")
        @hookimpl
        def deqcore_trainers():
            yield TrainerSpec("mlx", "deq_x:Trainer", backend="mlx")
        @hookimpl
        def deqcore_commands():
            yield CommandSpec("export", "deq_x:export")
        @hookimpl
        def deqcore_backends():
            yield BackendSpec("mlx", "deq_x:Backend", package="mlx", array_modules=("mlx",))
        """
    )
    install("many", source)
    assert plugins.strategies()["half"].summary == "half of it"
    assert plugins.sinks()["null"].kind == "sink"
    assert plugins.trainers()["mlx"].backend == "mlx"
    assert plugins.commands()["export"].target == "deq_x:export"
    assert plugins.backends()["mlx"].array_modules == ("mlx",)
    assert len(status("many").hooks) == 5


def test_two_plugins_with_one_name_are_an_error_naming_both(install: Install) -> None:
    install("first", OFFERS_MINE)
    install("second", OFFERS_MINE)
    assert plugins.make_solver("picard")  # no other user is affected
    assert "jacobian-free" in plugins.strategies()
    for ask in (lambda: plugins.make_solver("mine"), plugins.solvers):
        with pytest.raises(errors.PluginError, match=r"'mine'.*'first'.*deq_first.*'second'.*deq_second"):
            ask()
    assert {each.status for each in plugins.plugins_status()} == {"conflict"}
    assert "'second'" in status("first").reason


def test_disabling_one_plugin_settles_a_conflict(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("first", OFFERS_MINE)
    install("second", OFFERS_MINE)
    install("third", OFFERS_MINE)
    monkeypatch.setenv("DEQCORE_DISABLE_PLUGINS", "first, deq_third")
    assert plugins.solvers()["mine"].target == "deq_second_impl:Mine"
    assert status("first").status == status("third").status == "disabled"
    assert "deq_first" not in sys.modules


def test_autoload_off_loads_no_entry_point(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("good", OFFERS_MINE)
    monkeypatch.setenv("DEQCORE_PLUGIN_AUTOLOAD", "0")
    assert "mine" not in plugins.solvers()
    assert plugins.plugins_status() == []
    assert "deq_good" not in sys.modules


BROKEN = {
    "raises on import": (
        "raise RuntimeError('no licence')",
        None,
        r"RuntimeError: no licence .*deq_bad.py, line 1",
    ),
    "exits on import": ("import sys; sys.exit(3)", None, "SystemExit: 3"),
    "syntax error": ("x = (", None, r"SyntaxError.*deq_bad.py, line 1"),
    "module missing": (None, "deq_nowhere", "entry point 'deq_nowhere' does not exist"),
    "attribute missing": ("x = 1", "deq_bad:plugin", "does not exist.*plugin"),
    "dependency missing": ("import no_such_dependency", None, "needs the package 'no_such_dependency'"),
    "no hooks": ("x = 1", None, "implements no hook"),
    "hook raises": (
        HEADER + "@hookimpl\ndef deqcore_solvers():\n    1 / 0\n    yield",
        None,
        "deqcore_solvers: ZeroDivisionError",
    ),
    "wrong type": (
        HEADER + "@hookimpl\ndef deqcore_solvers():\n    yield 'mine'",
        None,
        r"must yield a SolverSpec \(got 'mine'\)",
    ),
    "wrong kind": (
        HEADER + "@hookimpl\ndef deqcore_solvers():\n    yield StrategySpec('a', 'b:c')",
        None,
        r"must yield a SolverSpec \(got StrategySpec",
    ),
    "no list": (
        HEADER + "@hookimpl\ndef deqcore_solvers():\n    return SolverSpec('a', 'b:c')",
        None,
        "Use yield, or return a list",
    ),
    "nothing": (HEADER + "@hookimpl\ndef deqcore_solvers():\n    pass", None, r"must return records \(got None\)"),
    "misspelt hook": (
        HEADER + "@hookimpl\ndef deqcore_solver():\n    yield",
        None,
        "'deqcore_solver', which is not a hook. Did you mean 'deqcore_solvers'",
    ),
    "wrong arguments": (HEADER + "@hookimpl\ndef deqcore_solvers(config):\n    yield", None, "config"),
    "offers twice": (
        HEADER + "@hookimpl\ndef deqcore_solvers():\n    yield from [SolverSpec('a', 'b:c')] * 2",
        None,
        "offers the solver 'a' twice",
    ),
    "newer record": (
        HEADER
        + "class Newer(SolverSpec):\n    version = 2\n"
        + "@hookimpl\ndef deqcore_solvers():\n    yield Newer('a', 'b:c')",
        None,
        "layout version 2, but this deqcore supports only 1. Upgrade deqcore",
    ),
    "bad target": (
        HEADER + "@hookimpl\ndef deqcore_solvers():\n    yield SolverSpec('a', 'not an import string')",
        None,
        r"must be an import string, .*\(got 'not an import string'\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_hurts_nobody_until_its_name_is_asked_for(case: str, install: Install) -> None:
    source, entry, reason = BROKEN[case]
    install("bad", source, entry=entry)
    install("good", OFFERS_MINE)
    assert plugins.make_solver("mine")
    assert "mine" in plugins.solvers()
    assert status("bad").status == "broken"
    with pytest.raises(errors.UnknownNameError, match=rf"(?s)'theirs'.*plugin 'bad' is broken: .*{reason}"):
        plugins.make_solver("theirs")


def test_the_working_half_of_a_plugin_works(install: Install) -> None:
    install("half", OFFERS_MINE + "@hookimpl\ndef deqcore_sinks():\n    raise KeyError('x')\n")
    assert plugins.make_solver("mine")
    assert status("half").status == "broken"
    assert status("half").hooks == ("deqcore_solvers", "deqcore_sinks")


def test_a_plugin_that_imports_a_framework_is_flagged(install: Install, tmp_path: Path) -> None:
    (tmp_path / "site" / "tensorflow.py").write_text("")  # stands for any framework
    install("heavy", "import tensorflow\n" + OFFERS_MINE)
    try:
        assert status("heavy").status == "heavy"
        assert "imports tensorflow" in status("heavy").reason
        assert plugins.make_solver("mine")
    finally:
        sys.modules.pop("tensorflow", None)


TARGETS = {
    "deq_good_impl:Absent": "AttributeError",
    "deq_absent:Mine": "ModuleNotFoundError",
    "deq_good_impl:SOLVERS": "AttributeError",
    "json:dumps": "must be a subclass of deqcore.abc.solver.Solver",
    "deqcore.abc.solver:Solver": "which must implement init, step",
    "deq_good_impl:Plain": "must be a dataclass of its options",
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_that_is_no_solver_is_an_error_when_used(target: str, install: Install) -> None:
    install("good", OFFERS_MINE)
    plugins.register(SolverSpec("wrong", target))
    assert "wrong" in plugins.solvers()
    with pytest.raises(errors.PluginError, match=TARGETS[target]):
        plugins.make_solver("wrong")


SHAPELESS = """
from dataclasses import dataclass
from deqcore import Backend, Solver, Strategy
from deqcore.abc.linalg import SmallLinalg
from deqcore_numpy.backend import NumpyBackend

@dataclass(frozen=True)
class Mute(Solver):
    def init(self, backend, z, fz):
        return ()

@dataclass(frozen=True)
class Short(Mute):
    def step(self, f, z):
        return f(z)

@dataclass(frozen=True)
class Odd(Strategy):
    needs = "vjp"
    def solve_adjoint(self, vjp, g):
        return g

class Half(Backend):
    name = "half"

class Unsolved(NumpyBackend):
    linalg_class = type("Mine", (SmallLinalg,), {})

class Unguarded(NumpyBackend):
    guards_class = dict

class Partless(NumpyBackend):
    def __init__(self):
        self.device = "cpu"
"""


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (
            plugins.make_solver,
            "Mute",
            r"solver 'wrong' is Mute, which must implement step. See deqcore.abc.solver.Solver",
        ),
        (
            plugins.make_solver,
            "Short",
            r"solver 'wrong' has step\(self, f, z\), but deqcore calls step\(self, backend, f, z, fz, state\)",
        ),
        (
            plugins.make_strategy,
            "Odd",
            r"has solve_adjoint\(self, vjp, g\), but deqcore calls solve_adjoint\(self, backend, vjp, ",
        ),
        (
            plugins.make_backend,
            "Half",
            r"'wrong' is Half, which must implement asarray, .*\. See deqcore.abc.backend.Backend",
        ),
        (
            plugins.make_backend,
            "Unsolved",
            r"The linalg_class of the backend 'wrong' is Mine, which must implement solve. See deqcore.abc.linalg",
        ),
        (
            plugins.make_backend,
            "Unguarded",
            r"The guards_class of the backend 'wrong' must be a subclass of deqcore.abc.guards.CallGuards .got",
        ),
        (
            plugins.make_backend,
            "Partless",
            r"The backend 'wrong' must have its parts. Call super\(\).__init__\(\) in Partless.__init__",
        ),
        (
            plugins.make_backend,
            "Mute",
            r"'wrong' must be a subclass of deqcore.abc.backend.Backend .got <class .*Mute'>",
        ),
    ],
)
def test_a_class_that_misses_the_contract_is_told_so_before_it_is_used(make, target, message, install: Install) -> None:
    install("good", OFFERS_MINE)
    (Path(sys.path[0]) / "deq_shapeless.py").write_text(SHAPELESS)
    spec = {plugins.make_solver: SolverSpec, plugins.make_strategy: StrategySpec, plugins.make_backend: BackendSpec}
    plugins.register(spec[make]("wrong", f"deq_shapeless:{target}"))
    with pytest.raises(errors.PluginError, match=message):
        make("wrong")


def test_a_framework_that_no_extra_installs_is_named_itself() -> None:
    plugins.register(BackendSpec("theirs", "deq_theirs:Theirs", package="no_such_framework"))
    with pytest.raises(errors.MissingFrameworkError, match="Install it with: pip install no_such_framework$"):
        plugins.make_backend("theirs")


# -- options -----------------------------------------------------------------------------------------------


def test_options_are_checked_against_the_dataclass(install: Install) -> None:
    install("good", OFFERS_MINE)
    with pytest.raises(errors.ConfigError, match=r"solver 'mine' has no option 'wieght'.*'weight'"):
        plugins.make_solver("mine", {"wieght": 1})
    for name, value in (("count", 1.5), ("count", "3"), ("count", True), ("weight", "1"), ("label", 3)):
        with pytest.raises(errors.ConfigError, match=rf"solver 'mine': {name} must be of type \w+ \(got {value!r}\)\."):
            plugins.make_solver("mine", {name: value})
    refused = r"solver 'mine' refuses its options: count must be at least 1 \(got 0\)\."
    with pytest.raises(errors.ConfigError, match=refused):
        plugins.make_solver("mine", {"count": 0})
    with pytest.raises(errors.ConfigError, match=r"solver 'mine': weight must be a number, .*\(got \{1\}\)"):
        plugins.make_solver("mine", {"weight": {1}})


def test_equal_values_of_other_types_do_not_share_a_cached_instance(install: Install) -> None:
    install("good", OFFERS_MINE)
    assert plugins.make_solver("mine", {"count": 1})
    with pytest.raises(errors.ConfigError, match="count must be of type int .got True"):
        plugins.make_solver("mine", {"count": True})


def test_a_required_option_is_named(install: Install) -> None:
    install("good", OFFERS_MINE)
    (Path(sys.path[0]) / "deq_strict.py").write_text(
        SOLVER.replace("weight: float = 0.5", "weight: float").replace("Mine", "Strict")
    )
    plugins.register(SolverSpec("strict", "deq_strict:Strict"))
    with pytest.raises(errors.ConfigError, match="needs the option weight"):
        plugins.make_solver("strict")


def test_a_second_lookup_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options = plugins.Options({"damping": 0.5})
    first = plugins.make_solver("picard", options)
    monkeypatch.setattr(Picard, "__post_init__", lambda self: pytest.fail("a solver is made again"))
    assert plugins.make_solver("picard", options) is first


# -- notebooks ---------------------------------------------------------------------------------------------


def notebook(name: str, target: str) -> SimpleNamespace:
    class Plugin:
        @hookimpl
        def deqcore_solvers(self) -> list[SolverSpec]:
            return [SolverSpec(name, target)]

    return Plugin()  # type: ignore[return-value]


def test_register_takes_records_objects_and_modules() -> None:
    plugins.register(SolverSpec("one", "deqcore.solvers.picard:Picard"))
    plugins.register(notebook("two", "deqcore.solvers.picard:Picard"))
    module = ModuleType("my_cell")
    exec(HEADER + "@hookimpl\ndef deqcore_solvers():\n    yield SolverSpec('three', 'm:T')", module.__dict__)
    plugins.register(module)
    assert {"one", "two", "three"} <= set(plugins.solvers())
    assert type(plugins.make_solver("two")) is type(plugins.make_solver("picard"))
    assert status("my_cell").hooks == ("deqcore_solvers",)


def test_a_cell_may_run_again() -> None:
    for target in ("deqcore.solvers.picard:Picard", "deqcore.solvers.anderson:Anderson"):
        plugins.register(SolverSpec("mine", target))
        plugins.register(notebook("yours", target))
        for name in ("mine", "yours"):
            assert type(plugins.make_solver(name)).__name__ == target.partition(":")[2]


def test_register_refuses_what_is_no_plugin() -> None:
    with pytest.raises(errors.PluginError, match="implements no hook"):
        plugins.register(SimpleNamespace())
    with pytest.raises(errors.PluginError, match="'picard' is reserved"):
        plugins.register(SolverSpec("picard", "a:b"))
    with pytest.raises(errors.PluginError, match="'anderson' is reserved"):
        plugins.register(notebook("anderson", "a:b"))
    assert plugins.plugins_status() == []


@pytest.mark.parametrize(
    ("name", "target"),
    [("", "a:b"), ("my solver", "a:b"), ("a", "b"), ("a", "b:"), ("a", "1b:c"), (3, "b:c")],
)
def test_records_validate_name_and_target(name: str, target: str) -> None:
    with pytest.raises(errors.PluginError, match="must be (letters|an import string)"):
        SolverSpec(name, target)


def test_records_validate_their_other_fields() -> None:
    with pytest.raises(errors.PluginError, match="summary must be a string .got 3"):
        StrategySpec("a", "b:c", summary=3)  # type: ignore[arg-type]
    with pytest.raises(errors.PluginError, match="array_modules"):
        BackendSpec("a", "b:c", array_modules="torch")  # type: ignore[arg-type]
    with pytest.raises(errors.PluginError, match="compiler must be two names of modules"):
        BackendSpec("a", "b:c", compiler=("torch._dynamo",))  # type: ignore[arg-type]
    with pytest.raises(errors.PluginError, match="the name of a backend"):
        TrainerSpec("a", "b:c", backend="")


# -- whose array is this? ----------------------------------------------------------------------------------


def test_backend_of_numpy_and_of_nothing() -> None:
    import numpy as np

    class Sub(np.ndarray): ...

    assert plugins.backend_of(np.ones(2)) == "numpy"
    assert plugins.backend_of(np.float32(1)) == "numpy"
    assert plugins.backend_of(np.ones(2).view(Sub)) == "numpy"
    for value in (1.0, 1, "a", None, [1], {"a": 1}, SimpleNamespace()):
        assert plugins.backend_of(value) is None


def test_backend_of_a_plugins_array(install: Install) -> None:
    record = "BackendSpec('mlx', 'a:b', array_modules=('mlxlib',))"
    install("mlx", HEADER + f"@hookimpl\ndef deqcore_backends():\n    yield {record}")
    array = type("array", (), {"__module__": "mlxlib.core"})
    assert plugins.backend_of(array()) == "mlx"


def test_backend_of_torch() -> None:
    torch = pytest.importorskip("torch")
    assert plugins.backend_of(torch.ones(1)) == "torch"
    assert plugins.backend_of(torch.nn.Parameter(torch.ones(1))) == "torch"


def test_backend_of_jax_and_its_tracers() -> None:
    jax = pytest.importorskip("jax")
    seen = []
    jax.jit(lambda x: seen.append(plugins.backend_of(x)))(1.0)
    jax.grad(lambda x: seen.append(plugins.backend_of(x)) or x)(1.0)
    assert [plugins.backend_of(jax.numpy.ones(1)), *seen] == ["jax"] * 3


# -- deqfile.py --------------------------------------------------------------------------------------------

DEQFILE = HEADER + SOLVER + '@hookimpl\ndef deqcore_solvers():\n    yield SolverSpec("mine", f"{__name__}:Mine")\n'


def test_a_deqfile_registers_its_own_classes(tmp_path: Path) -> None:
    path = tmp_path / "deqfile.py"
    path.write_text(DEQFILE)
    plugins.load_deqfile(path)
    first = plugins.make_solver("mine")
    plugins.load_deqfile(path)
    assert plugins.make_solver("mine") is first
    path.write_text(DEQFILE.replace("weight: float = 0.5", "weight: float = 0.7"))
    plugins.load_deqfile(path)
    assert repr(plugins.make_solver("mine")) == "Mine(weight=0.7, count=1, label='a')"
    assert status(str(path)).source == "deqfile"


def test_a_deqfile_may_name_modules_beside_it_but_shadows_none(tmp_path: Path) -> None:
    (tmp_path / "deq_beside.py").write_text(SOLVER)
    (tmp_path / "json.py").write_text("raise RuntimeError")
    (tmp_path / "deqfile.py").write_text(
        HEADER + '@hookimpl\ndef deqcore_solvers():\n    yield SolverSpec("mine", "deq_beside:Mine")\n'
    )
    plugins.load_deqfile(tmp_path / "deqfile.py")
    assert type(plugins.make_solver("mine")).__module__ == "deq_beside"
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ny = 1 / 0\n", "deqfile.py, line 2: ZeroDivisionError"),
        ("x = 1\n\ny = (\n", "deqfile.py, line 3: SyntaxError"),
        ("x = 1\nimport no_such_thing\n", "deqfile.py, line 2: ModuleNotFoundError"),
        ("x = 1\n", "implements no hook"),
        (
            HEADER + "@hookimpl\ndef deqcore_solvers():\n    raise OSError(3)\n",
            r"deqcore_solvers: OSError.*line 5",
        ),
    ],
)
def test_errors_in_a_deqfile_name_file_and_line(source: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "deqfile.py"
    path.write_text(source)
    for _ in range(2):
        with pytest.raises(errors.PluginError, match=message) as caught:
            plugins.load_deqfile(path)
        assert str(path) in str(caught.value)
    assert plugins.plugins_status() == []


def test_a_missing_deqfile_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(errors.PluginError, match=r"plugins.deqfile = true, but .*No such file"):
        plugins.load_deqfile(tmp_path / "deqfile.py")


# -- what listing costs ------------------------------------------------------------------------------------


def test_listing_everything_imports_no_framework() -> None:
    code = """
        import json, sys
        from deqcore import plugins
        for kind in "backends solvers strategies sinks trainers data models commands plugins_status".split():
            getattr(plugins, kind)()
        heavy = "torch jax jaxlib flax equinox numpy scipy pydantic sklearn matplotlib".split()
        print(json.dumps(sorted(set(heavy) & set(sys.modules))))
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=True)
    assert json.loads(out.stdout) == []


def test_the_examples_of_the_hooks_run() -> None:
    import doctest

    from deqcore.plugins import hookspecs

    results = doctest.testmod(hookspecs)
    assert results.attempted >= 12
    assert results.failed == 0


def test_the_caches_forget_what_was_registered() -> None:
    plugins.register(SolverSpec("mine", "deqcore.solvers.picard:Picard"))
    assert plugins.make_solver("mine")
    plugins.reset()
    with pytest.raises(errors.UnknownNameError):
        plugins.make_solver("mine")
    assert lookup.spec.cache_info().currsize == 0


# -- annotations that need more than a look -----------------------------------------------------------------

RICH = """
from __future__ import annotations
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from deqcore_numpy.backend import NumpyBackend

class Mode(enum.Enum):
    FAST = "fast"

@dataclass(frozen=True)
class Rich:
    mode: Mode = Mode.FAST
    sizes: tuple[int, ...] = ()
    table: Mapping[str, float] = field(default_factory=dict)
    choice: Literal["a", "b"] | None = None
    odd: NumpyBackend | None = None
    owner: NumpyBackend = None
    hidden: int = field(default=0, metadata={"internal": True})
"""


def test_rich_annotations_are_checked_by_jsons_strict_rules(tmp_path: Path) -> None:
    from deqcore.options import instantiate

    module = ModuleType("deq_rich")
    sys.modules["deq_rich"] = module
    exec(RICH, module.__dict__)
    options = plugins.Options({"mode": "fast", "sizes": [1, 2], "table": {"x": 1}, "choice": "b"})
    made = instantiate("solver 'rich'", module.Rich, options)
    assert made.mode is module.Mode.FAST
    assert made.sizes == (1, 2)
    assert made.table == {"x": 1}
    assert made.choice == "b"
    for name, value in {
        "mode": "slow",
        "sizes": ["1"],
        "table": {"x": "1"},
        "choice": "c",
        "owner": 3,
    }.items():
        with pytest.raises(errors.ConfigError, match=f"{name} must be of type"):
            instantiate("solver 'rich'", module.Rich, plugins.Options({name: value}))
    with pytest.raises(errors.ConfigError, match="no option 'hidden'"):
        instantiate("solver 'rich'", module.Rich, {"hidden": 1})


def test_an_annotation_that_cannot_be_evaluated_is_left_to_the_class() -> None:
    from deqcore.options import instantiate

    module = ModuleType("deq_lazy")
    sys.modules["deq_lazy"] = module
    source = "class Lazy:\n    value: Unknown = None\n"
    header = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass(frozen=True)\n"
    exec(header + source, module.__dict__)
    assert instantiate("solver 'lazy'", module.Lazy, {"value": "anything"}).value == "anything"


def test_options_travel() -> None:
    import pickle

    options = plugins.Options({"history_size": 3, "nested": {"a": [1]}})
    assert pickle.loads(pickle.dumps(options)) == options


# -- interrupts --------------------------------------------------------------------------------------------

INTERRUPTED = """
import sys
if not hasattr(sys, "_{module}_tried"):
    setattr(sys, "_{module}_tried", True)
    raise {error}
"""


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "GeneratorExit"])
@pytest.mark.parametrize("where", ["module", "hook"])
def test_an_interrupt_of_the_discovery_loses_no_plugin(where: str, error: str, install: Install) -> None:
    first, late = OFFERS_MINE.replace('"mine"', '"first"'), OFFERS_MINE.replace('"mine"', '"late"')
    install("a", first)
    body = INTERRUPTED.replace("{error}", error)
    if where == "module":
        install("b", body + OFFERS_MINE)
    else:
        hook = OFFERS_MINE.replace("    yield", textwrap.indent(body, "    ") + "    yield", 1)
        install("b", hook)
    install("c", late)
    try:
        with pytest.raises((KeyboardInterrupt, GeneratorExit)) as caught:
            plugins.solvers()
        assert type(caught.value).__name__ == error
        assert {"first", "mine", "late"} <= set(plugins.solvers())
        assert all(each.status == "ok" for each in plugins.plugins_status()), plugins.plugins_status()
        assert len(plugins.plugins_status()) == len({each.name for each in plugins.plugins_status()})
    finally:
        del sys._deq_b_tried  # type: ignore[attr-defined]


def test_an_interrupt_of_register_leaves_nothing_behind() -> None:
    tried = []

    class Plugin:
        @hookimpl
        def deqcore_solvers(self):
            if not tried:
                tried.append(True)
                raise KeyboardInterrupt
            yield SolverSpec("mine", "somewhere:Mine")

    plugin = Plugin()
    with pytest.raises(KeyboardInterrupt):
        plugins.register(plugin)
    assert "mine" not in plugins.solvers()
    assert not plugins.plugins_status()
    plugins.register(plugin)
    assert "mine" in plugins.solvers()


def test_an_interrupted_deqfile_is_executed_again(tmp_path: Path) -> None:
    path = tmp_path / "deqfile.py"
    path.write_text(
        (INTERRUPTED + textwrap.dedent(OFFERS_MINE)).replace("{error}", "KeyboardInterrupt").replace("{module}", "deq")
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            plugins.load_deqfile(path)
        plugins.load_deqfile(path)
        assert "mine" in plugins.solvers()
    finally:
        del sys._deq_tried  # type: ignore[attr-defined]


def test_a_plugin_that_looks_something_up_while_it_is_loaded(install: Install) -> None:
    install("a", "import deqcore.plugins as p\nassert 'picard' in p.solvers()\n" + textwrap.dedent(OFFERS_MINE))
    assert "mine" in plugins.solvers()
    assert status("a").status == "ok"

"""What an import brings into a program. Numbers and names of modules stand for the time, which is not measured here."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import deqcore
import deqcore.abc
import deqcore.config
import deqcore.diagnostics
import deqcore.monitor
import deqcore.plugins
import deqcore.testing
import deqcore.types

HEAVY = {
    "torch",
    "jax",
    "scipy",
    "sklearn",
    "matplotlib",
    "pydantic",
    "pydantic_settings",
    "numpy",
    "typer",
    "rich",
}
RARE = {"difflib", "json", "optree", "pathlib", "pluggy", "tomllib"}  # for errors, files, plugins and nested states

LAZY = [
    deqcore,
    deqcore.abc,
    deqcore.config,
    deqcore.diagnostics,
    deqcore.monitor,
    deqcore.plugins,
    deqcore.testing,
    deqcore.types,
]


def imported(code: str) -> set[str]:
    """Return the modules that code brings into a fresh interpreter."""
    script = f"import sys; before = set(sys.modules); {code}; print(*set(sys.modules) - before, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    return set(done.stdout.split())


def test_importing_deqcore_is_light() -> None:
    modules = imported("import deqcore")
    assert {name for name in modules if name.startswith("deqcore")} == {"deqcore"}
    assert not modules & HEAVY
    assert len(modules) <= 10  # 4 today: typing alone brings 20


def test_importing_the_config_is_light() -> None:
    modules = imported("import deqcore.config; deqcore.Config(forward={'rtol': 1e-3}); deqcore.config.current()")
    own = {name.split(".")[1] for name in modules if name.startswith("deqcore.")}
    assert own == {"abc", "config", "errors", "lazy", "options", "plugins"}
    assert not modules & (HEAVY | RARE)
    assert len(modules) <= 70  # 62 today


def test_importing_the_plugins_imports_neither_lookups_nor_records() -> None:
    names = {name for name in imported("import deqcore.plugins") if name.startswith("deqcore.")}
    assert names == {"deqcore.plugins", "deqcore.lazy"}


def test_importing_the_solve_brings_nothing_for_rare_cases() -> None:
    assert not imported("import numpy; import deqcore; deqcore.fixed_point") & RARE


@pytest.mark.parametrize("package", LAZY)
def test_names_that_are_imported_by_their_first_use_are_all_there(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'fixedpoint'"):
        _ = package.fixedpoint


def test_deqcore_knows_its_version() -> None:
    assert deqcore.__version__.count(".") >= 1
    assert deqcore.Config is deqcore.config.Config


# -- modules of layers ---------------------------------------------------------------------------------------------


def runs_on_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements that run when a module is imported: those outside of functions and type checks."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif isinstance(statement, ast.ClassDef | ast.Try | ast.With):
            yield from runs_on_import(statement.body)
        elif isinstance(statement, ast.If):
            checked = isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
            yield from runs_on_import(statement.orelse if checked else statement.body + statement.orelse)


def source(module: str) -> Path | None:
    """Return the file of one of our modules, found without running it or its framework."""
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package) if package.startswith("deqcore") else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*rest.split(".")) if rest else Path(spec.origin).parent
    files = [path / "__init__.py", path.with_suffix(".py")]
    return next((file for file in files if file.exists()), None)


def reached(module: str, known: set[str]) -> set[str]:
    """Add to `known` what importing a module imports: our modules with all that they import, and names of others."""
    if module in known:
        return known
    file = source(module)
    if file is None:
        return known if module.startswith("deqcore") else known | {module.partition(".")[0]}  # a name in a module
    known = reached(module.rpartition(".")[0], known | {module}) if "." in module else known | {module}
    for statement in runs_on_import(ast.parse(file.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            names = [statement.module or "", *(f"{statement.module}.{alias.name}" for alias in statement.names)]
        for name in names:
            known = reached(name, known)
    return known


@pytest.mark.parametrize("module", ["deqcore_torch.nn", "deqcore_jax.nnx", "deqcore_jax.equinox"])
def test_a_module_of_layers_imports_neither_a_solve_nor_its_records(module: str) -> None:
    names = reached(module, set())
    assert {module, "deqcore.layer", "deqcore.errors"} <= names
    parts = {name.removeprefix("deqcore.") for name in names if name.startswith("deqcore.")}
    light = {"abc", "abc.strategy_state", "config", "errors", "layer", "lazy", "options", "plugins"}
    light |= {"solve", "solve.user_line", "types", "types.arrays"}
    assert parts <= light
    assert "optree" not in names

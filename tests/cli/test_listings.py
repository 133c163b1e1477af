"""The listings of the command line: a table for people, JSON for programs, one readable line for an error."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import typer

import deqcore
from deqcore import plugins
from deqcore.cli.app import main
from deqcore.cli.listing import rows as listing_rows
from deqcore.cli.output import readable_warnings
from deqcore.errors import PluginError
from deqcore.plugins import BackendSpec, CommandSpec, SolverSpec
from deqcore.plugins.builtin import BUILTIN, COMMANDS

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("project")


def run(capture: Capture, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deqcore ARGS`."""
    with pytest.raises(SystemExit) as exit:
        main(list(args))
    out, err = capture.readouterr()
    return int(exit.value.code or 0), out, err


def test_warnings_of_a_command_name_the_users_line_or_none(tmp_path: Path) -> None:
    usual = warnings.formatwarning
    with readable_warnings():
        for inner in (typer.main.__file__, deqcore.__file__):
            assert warnings.formatwarning("no font", UserWarning, inner, 9) == "Warning: no font\n"
        assert "cell.py:9: UserWarning: mine" in warnings.formatwarning(
            "mine", UserWarning, str(tmp_path / "cell.py"), 9
        )
    assert warnings.formatwarning is usual


def listing(capture: Capture, *args: str) -> dict[str, dict[str, object]]:
    code, out, _ = run(capture, *args, "--json")
    assert code == 0
    rows = json.loads(out)
    return {row.get("name", row.get("setting")): row for row in rows}


def test_help_lists_all_commands_and_imports_none(capsys: Capture) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for record in COMMANDS:
        assert record.name in out
    script = (
        "import sys; from deqcore.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout.split()
    assert not {"torch", "jax", "numpy", "scipy", "pydantic", "deqcore.cli.solvers", "deqcore.config.config"} & set(
        found
    )


def test_every_command_can_be_imported() -> None:
    for record in COMMANDS:
        target = plugins.load("command", record.name)
        assert isinstance(target, typer.Typer) or callable(target)


def test_the_entry_point_is_installed() -> None:
    script = Path(sys.executable).with_name("deqcore")
    out = subprocess.run([str(script), "--version"], capture_output=True, check=True, text=True).stdout
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["version"]
    assert out.strip() == declared


def test_backends(capsys: Capture) -> None:
    plugins.register(BackendSpec("absent", "a:b", package="no_such_framework", array_modules=("nope",)))
    rows = listing(capsys, "backends")
    assert list(rows) == ["numpy", "torch", "jax", "absent"]
    import numpy as np

    assert rows["numpy"]["installed"] is True
    assert rows["numpy"]["version"] == np.__version__
    assert rows["absent"]["installed"] is False
    assert rows["absent"]["remedy"] == "pip install no_such_framework"
    assert all("device" not in row for row in rows.values())
    assert "pip install" in run(capsys, "backends")[1]


def test_backends_shows_devices_when_asked(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deqcore.cli.backends.plugins.backends", lambda: {"numpy": BUILTIN["backend"]["numpy"]})
    assert listing(capsys, "backends", "--devices")["numpy"]["device"] == "cpu"


def test_solvers(capsys: Capture) -> None:
    rows = listing(capsys, "solvers")
    assert rows["picard"]["options"] == {"damping": 1.0}
    assert rows["picard"]["estimate"] is False
    assert rows["broyden"]["estimate"] is True
    out = run(capsys, "solvers")[1]
    assert "damping=1.0" in out
    assert "broyden" in out


def test_strategies(capsys: Capture) -> None:
    rows = listing(capsys, "strategies")
    assert rows["exact-ift"]["exact"] is True
    assert rows["exact-ift"]["options"]["solver"] == "gmres"  # type: ignore[index]
    assert "bound" not in rows["exact-ift"]["options"]  # type: ignore[operator]
    assert rows["broyden-reuse"]["needs"] == "estimate"
    assert "jacobian-free" in run(capsys, "strategies")[1]


@pytest.mark.parametrize("kind", ["solver", "strategy"])
def test_every_built_in_is_there_and_has_checked_defaults(kind: plugins.Kind) -> None:
    make = {"solver": plugins.make_solver, "strategy": plugins.make_strategy}[kind]
    for row in listing_rows(kind, BUILTIN[kind].values(), {}):
        assert row["status"] == "ok", row
        assert make(str(row["name"]), row["options"]) == make(str(row["name"]))  # type: ignore[arg-type]


def test_a_broken_solver_is_a_row_like_others(capsys: Capture) -> None:
    plugins.register(SolverSpec("mine", "no_such_module:Mine"))
    rows = listing(capsys, "solvers")
    assert rows["mine"]["status"] == "broken"
    assert "no_such_module" in str(rows["mine"]["reason"])
    assert rows["picard"]["status"] == "ok"


def test_plugins(capsys: Capture) -> None:
    assert run(capsys, "plugins")[1].strip() == "No plugins are installed."
    plugins.register(SolverSpec("mine", "a:b"))
    rows = listing(capsys, "plugins")
    assert rows["solver mine"]["hooks"] == ["deqcore_solvers"]
    assert rows["solver mine"]["status"] == "ok"
    assert "deqcore_solvers" in run(capsys, "plugins")[1]


def test_config_show(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deq.toml").write_text('[forward]\nsolver = "anderson"\noptions = { history_size = 3}\n')
    monkeypatch.setenv("DEQCORE_FORWARD__RTOL", "1e-6")
    rows = listing(capsys, "config", "show")
    assert rows["forward.rtol"] == {
        "setting": "forward.rtol",
        "value": 1e-6,
        "origin": "environment variable DEQCORE_FORWARD__RTOL",
    }
    assert rows["forward.options.history_size"]["origin"] == "file deq.toml"
    assert rows["backward.strategy"]["origin"] == "default"
    assert '"anderson"' in run(capsys, "config", "show")[1]
    (tmp_path / "other.toml").write_text('backend = "numpy"\n')
    assert listing(capsys, "config", "show", "--config", "other.toml")["backend"]["value"] == "numpy"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('forward.solver = "andersen"', "No solver is registered as 'andersen'. Did you mean 'anderson'?"),
        ('backward.strategy = "exact"', "No strategy is registered as 'exact'. Did you mean 'exact-ift'?"),
        ('backend = "jacks"', "No backend is registered as 'jacks'."),
        ("forward.options = {history_sise = 3}", "has no option 'history_sise'. Did you mean 'history_size'?"),
    ],
)
def test_config_show_finds_names_that_are_not_registered(capsys: Capture, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "deq.toml").write_text(text)
    code, out, err = run(capsys, "config", "show")
    assert code == 2
    assert text.partition(" = ")[0] in out  # what is set is shown all the same
    assert said in err


def test_the_study_says_which_extra_it_needs(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from deqcore.cli import study

    monkeypatch.setattr(study, "NEEDED", ("no_such_package",))
    code, _, err = run(capsys, "study")
    assert code == 2
    assert "`deqcore study` needs the package 'no_such_package'" in err
    assert 'pip install "deqcore[study]"' in err


def test_an_error_is_one_message_without_a_traceback(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "deq.toml").write_text("[forward]\nrtoll = 1\n")
    code, out, err = run(capsys, "config", "show")
    assert code == 2
    assert out == ""
    assert err.startswith("Error: [forward] (set by file deq.toml) has no option 'rtoll'. Did you mean 'rtol'?")
    assert err.count("\n") == 1


@pytest.mark.parametrize("args", [["solvers", "--bad"], ["solver"], ["config", "shwo"], ["--bad"]])
def test_wrong_usage_exits_with_2(args: list[str], capsys: Capture) -> None:
    code, _, err = run(capsys, *args)
    assert code == 2
    assert err


def test_a_misspelt_command_gets_a_suggestion(capsys: Capture) -> None:
    assert "Did you mean 'solvers'?" in run(capsys, "solver")[2]


def test_a_plugins_command_runs(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deq_cli.py").write_text(
        "import typer\napp = typer.Typer()\n@app.command()\ndef a(n: int):\n    print('got', n)\n"
        "@app.command()\ndef b():\n    raise typer.Exit(1)\n"
        "def single(n: int = 3):\n    '''One command.'''\n    print('single', n)\nwrong = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, target in (("many", "app"), ("one", "single"), ("wrong", "wrong"), ("absent", "absent")):
        plugins.register(CommandSpec(name, f"deq_cli:{target}", summary=f"summary of {name}"))
    (tmp_path / "deq_script.py").write_text("import sys\nsys.exit(0)\n")
    plugins.register(CommandSpec("script", "deq_script:main", summary="ends the process"))
    assert run(capsys, "many", "a", "5")[:2] == (0, "got 5\n")
    assert run(capsys, "many", "b")[0] == 1
    assert run(capsys, "one", "--n", "4")[:2] == (0, "single 4\n")
    assert "summary of one" in run(capsys, "--help")[1]
    for name, reason in (
        ("wrong", "must be a typer app or a function"),
        ("absent", "cannot be imported"),
        ("script", "cannot be imported: SystemExit: 0"),
    ):
        code, _, err = run(capsys, name)
        assert code == 2
        assert reason in err


def test_a_conflict_between_plugins_does_not_cost_the_help_page(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def conflict() -> None:
        raise PluginError("two plugins offer 'export'")

    monkeypatch.setattr("deqcore.cli.app.plugins.commands", conflict)
    code, out, err = run(capsys, "--help")
    assert code == 0
    assert "solvers" in out
    assert "two plugins offer 'export'" in err


def test_listings_see_the_deqfile_of_the_working_directory(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "deqfile.py").write_text(
        "from deqcore.plugins import SolverSpec, hookimpl\n@hookimpl\ndef deqcore_solvers():\n"
        "    yield SolverSpec('mine', 'deqcore.solvers.picard:Picard')\n"
    )
    assert "mine" not in listing(capsys, "solvers")
    (tmp_path / "deq.toml").write_text("plugins.deqfile = true\n")
    assert listing(capsys, "solvers")["mine"]["options"] == {"damping": 1.0}
    assert listing(capsys, "plugins")[str(tmp_path / "deqfile.py")]["source"] == "deqfile"


def test_a_broken_deqfile_does_not_stop_the_listing(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "deqfile.py").write_text("x = 1\n1 / 0\n")
    (tmp_path / "deq.toml").write_text("plugins.deqfile = true\n")
    for command in ("solvers", "strategies", "backends", "plugins"):
        code, out, err = run(capsys, command)
        assert code == 0
        assert out
        assert "deqfile.py, line 2: ZeroDivisionError" in err


def test_help_keeps_words_in_brackets_and_shows_no_type_for_flags(capsys: Capture) -> None:
    code, out, _ = run(capsys, "study", "--help")
    assert code == 0
    assert "[study]" in out
    assert "<bool>" not in out


def test_tables_are_as_wide_as_asked_and_cut_nothing(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run(capsys, "solvers")
    assert max(map(len, out.splitlines())) <= 60
    letters = "".join(out.split())
    assert "…" not in out
    assert "damping=1.0" in letters


def test_the_package_itself_is_the_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "deqcore", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == deqcore.__version__

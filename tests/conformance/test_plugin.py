"""The suite as authors meet it: in their own test files, by `--pyargs`, and as commands."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from deqcore import errors, plugins
from deqcore.cli import app
from deqcore.testing.runner import card, conformance, render
from deqcore.testing.runner.conformance import CaseOutcome, SuiteRequest

QUICK = ("--backend", "numpy", "-k", "returns_f_of_z")
CONFTEST = 'pytest_plugins = ["deqcore.testing.plugin"]\n'
MINE = """
    from dataclasses import dataclass
    from deqcore import Solver, plugins
    from deqcore.testing import SolverTests

    @dataclass(frozen=True)
    class Lazy(Solver):
        def init(self, backend, z, fz):
            return ()
        def step(self, backend, f, z, fz, state):
            return {step}

    class TestLazy(SolverTests):
        solvers = ("lazy",)
        backends = ("numpy",)
        expected_failures = {expected}

    plugins.register(plugins.SolverSpec("lazy", f"{{__name__}}:Lazy"))
"""


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run pytest without the plugins that happen to be installed, whose import takes most of the time."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


def write(folder: Path, step: str, expected: str, conftest: str = CONFTEST) -> None:
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_mine.py").write_text(textwrap.dedent(MINE).format(step=step, expected=expected))


def test_a_users_own_class_runs_and_fails_where_it_should(tmp_path):
    write(tmp_path, "fz, fz, state", "{}")  # f(z) is not that of the new z
    done = run(tmp_path, "-k", "returns_f_of_z or converges or budget")
    assert done.returncode == 1
    assert "the f(z) that a step returns: off by" in done.stdout


def test_expected_failures_are_strict(tmp_path):
    write(tmp_path, "fz, fz, state", '{"test_a_step_returns_f_of_z": "it is lazy"}')
    done = run(tmp_path, "-k", "returns_f_of_z")
    assert done.returncode == 0, done.stdout
    assert "1 xfailed" in done.stdout
    write(tmp_path, "fz, f(fz), state", '{"test_a_step_returns_f_of_z": "it is lazy"}')
    done = run(tmp_path, "-k", "returns_f_of_z")
    assert done.returncode == 1
    assert "XPASS(strict)" in done.stdout


def test_an_expected_failure_that_names_no_test_gets_a_suggestion(tmp_path):
    write(tmp_path, "fz, f(fz), state", '{"test_a_step_returns_f_of_x": "typo"}')
    done = run(tmp_path)
    assert done.returncode == 4
    assert "Did you mean 'test_a_step_returns_f_of_z'" in done.stdout + done.stderr


def test_without_the_plugin_the_message_says_what_to_write(tmp_path):
    write(tmp_path, "fz, f(fz), state", "{}", conftest="")
    done = run(tmp_path, "-k", "returns_f_of_z")
    assert done.returncode == 1
    assert "pytest_plugins = ['deqcore.testing.plugin']" in done.stdout


def test_by_pyargs_without_any_file(tmp_path):
    args = ("-p", "deqcore.testing.plugin", "--pyargs", "deqcore.testing.suite")
    chosen = ("--deqcore-backend", "numpy", "--deqcore-solver", "picard", "--deqcore-strategy", "neumann")
    done = run(tmp_path, *args, *chosen, "-k", "budget or neighbours or loop")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_by_pyargs_the_device_is_that_of_the_arrays(tmp_path):
    args = ("-p", "deqcore.testing.plugin", "--pyargs", "deqcore.testing.suite.test_solver", "-k", "budget")
    chosen = ("--deqcore-backend", "numpy", "--deqcore-solver", "picard", "--deqcore-device")
    assert run(tmp_path, *args, *chosen, "cpu").returncode == 0
    refused = run(tmp_path, *args, *chosen, "cuda")
    assert refused.returncode == 1
    assert "device must be 'cpu' for the backend 'numpy' (got 'cuda')" in refused.stdout


def test_nothing_runs_in_sessions_that_did_not_ask(tmp_path):
    from importlib.metadata import entry_points

    assert not [point for point in entry_points(group="pytest11") if "deqcore" in point.value]


def test_without_pytest_the_message_names_the_extra(tmp_path):
    program = """
        import sys
        sys.modules["pytest"] = None
        import deqcore.testing
        deqcore.testing.golden("mlp")
        try:
            deqcore.testing.SolverTests
        except deqcore.errors.MissingExtraError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "pip install pytest" in done.stdout, done.stderr


# -- commands ---------------------------------------------------------------------------------------------------


def command(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        app.main(list(args))
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_a_good_solver_and_its_three_outputs(capsys, tmp_path):
    args = ("check", "solver", "picard", "--backend", "numpy", "-k", "budget or differentiated")
    junit = tmp_path / "junit.xml"
    code, out, _ = command(capsys, *args, "--json", "--junit", str(junit))
    assert code == 0
    found = json.loads(out)
    assert found["ok"]
    assert {each["outcome"] for each in found["tests"]} == {"passed", "skipped"}
    (suite,) = ET.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "0", "1")


def test_a_deqfile_of_the_working_directory_is_seen(capsys, tmp_path, monkeypatch):
    (tmp_path / "deq.toml").write_text("plugins.deqfile = true\n")
    (tmp_path / "deqfile.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from deqcore import Solver
            from deqcore.plugins import SolverSpec, hookimpl

            @dataclass(frozen=True)
            class Stays(Solver):
                def init(self, backend, z, fz):
                    return ()
                def step(self, backend, f, z, fz, state):
                    return z, fz, state

            @hookimpl
            def deqcore_solvers():
                yield SolverSpec("stays", f"{__name__}:Stays")
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(capsys, "check", "solver", "stays", "--backend", "numpy", "-k", "golden or honest")
    plugins.reset()
    assert code == 1
    assert "healthy samples ended as ['STALLED'" in out  # honest about it, but plain iteration would converge


def test_a_deqfile_that_nobody_opted_into_is_never_executed(capsys, tmp_path, monkeypatch):
    """Neither by a command nor by the processes that it starts, whatever lies beside it."""
    (tmp_path / "deqfile.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    (tmp_path / "conftest.py").write_text("import deqfile\n")
    monkeypatch.chdir(tmp_path)
    for content in (None, "plugins.deqfile = false\n", "[forward]\nrtol = 1e-3\n"):
        if content is not None:
            (tmp_path / "deq.toml").write_text(content)
        for args in (("plugins",), ("solvers",), ("config", "show"), ("check", "solver", "picard", *QUICK)):
            code, _, err = command(capsys, *args)
            assert code == 0, err
        assert not (tmp_path / "executed").exists()
    plugins.reset()


def test_a_config_path_that_is_a_directory(capsys, tmp_path, monkeypatch):
    (tmp_path / "deq.toml").mkdir()
    monkeypatch.chdir(tmp_path)
    code, _, err = command(capsys, "check", "solver", "picard", *QUICK)
    assert code == 2
    assert "'deq.toml' must be a TOML file (got a directory)" in " ".join(err.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("solver", "andersen"), "Did you mean 'anderson'?"),
        (("backend", "numpyy"), "Did you mean 'numpy'?"),
        (("strategy", "neuman"), "Did you mean 'neumann'?"),
        (("solver", "picard", "--backend", "torhc"), "Did you mean 'torch'?"),
        (("solver", "picard", "--options", "[1]"), "JSON object"),
        (("solver", "picard", "--options", "{"), "JSON object"),
        (
            ("strategy", "neumann", "--cost-bounds", "[6]"),
            "--cost-bounds must be a JSON object, such as '{\"slow-modes\": 60}' (got '[6]')",
        ),
        (("solver", "picard", "--junit", "/nowhere/x.xml"), "must be in an existing folder"),
        (
            ("solver", "picard", "--junit", "/tmp"),
            "--junit must be the name of a file to write (got the directory '/tmp')",
        ),
        (("solver", "picard", "--expect", "/nowhere/x.toml"), "must be an existing file"),
        (("solver", "picard", "--expect", "/tmp"), "--expect must be a TOML file (got the directory '/tmp')"),
        (("backend", "numpy", "--device", "cuda"), "device must be 'cpu' for the backend 'numpy' (got 'cuda')"),
        (("solver", "picard", "--backend", "numpy", "-k", "zzz"), "No test matches 'zzz'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_reported_before_any_test_runs(capsys, args, message):
    code, _, err = command(capsys, "check", *args)
    plugins.reset()
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("test_x = ", "cannot be read"),
        ("test_x = 3", "must be a text that gives the reason"),
        ("test_x = 'why'", "no such test"),
    ],
)
def test_a_wrong_list_of_expected_failures(tmp_path, content, message):
    path = tmp_path / "expect.toml"
    path.write_text(content)
    with pytest.raises(errors.BackendError, match=message):
        conformance.check(SuiteRequest("solver", "picard", ("numpy",), expect=path, select="budget"))
    plugins.reset()


def test_expected_failures_by_file_are_strict_too(tmp_path):
    path = tmp_path / "expect.toml"
    path.write_text("'test_a_budget_is_kept' = 'wrongly listed'")
    outcomes = conformance.check(SuiteRequest("solver", "picard", ("numpy",), expect=path, select="budget"))
    plugins.reset()
    assert [each.outcome for each in outcomes] == ["failed", "failed"]
    assert "XPASS(strict)" in outcomes[0].message


OUTCOMES = [
    CaseOutcome("test_one[numpy]", "numpy", "passed", "", "", 0.5),
    CaseOutcome("test_one[torch]", "torch", "failed", "AssertionError: off by 3", "trace", 0.25),
    CaseOutcome("test_two[numpy]", "numpy", "expected", "known", "", 0.125),
    CaseOutcome("test_two[torch]", "torch", "skipped", "cannot", "", 0.0),
]


def test_the_table_says_what_failed():
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render.table(SuiteRequest("solver", "mine"), OUTCOMES, 1.0))
    text = console.export_text()
    assert "✗ 1 of 1" in text
    assert "✗ test_one[torch]: off by 3" in text
    assert "1 known to fail" in text
    assert "1 test failed, 1 passed, 1 failed as expected, 1 do not apply" in text


def test_tests_that_were_not_run_are_not_counted_as_failures_of_their_property():
    from rich.console import Console

    hung = [CaseOutcome(f"test_one[{i}]", "numpy", "failed", "no end within 1 s", "", 1.0) for i in range(4)]
    after = [CaseOutcome(f"test_two[{i}]", "numpy", "failed", "not run: 4 tests before it hung", "", 0.0) for i in "ab"]
    request = SuiteRequest("solver", "picard")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render.table(request, hung + after, 1.0))
    text = console.export_text()
    assert "✗ 4 of 4" in text
    assert "2 of 2" not in text
    assert "✗ test_one[0] and 3 tests more: no end within 1 s" in text  # one line per message
    assert "4 tests failed, 2 were not run, 0 passed" in text
    made = card.card(request, hung + after, 1.0)
    assert made.verdict == "1 of 2 properties fail: 4 checks. 2 tests after them were not run."
    assert [row.cells[0].text for row in made.rows] == ["✗ 4 of 4", "not run"]
    assert {failure.sentence for failure in made.failures} == {"One"}
    assert not made.ok


def test_a_run_in_which_nothing_ran_is_not_ok():
    assert not conformance.ok([OUTCOMES[3]])
    assert conformance.ok(OUTCOMES[2:])
    assert not conformance.ok(OUTCOMES)


@pytest.mark.parametrize(
    ("kind", "name", "cost_bounds", "words"),
    [
        ("solver", "broyden", {"tree": 30}, ""),
        ("solver", "broyden", {"tree": 20}, "at most 20 are claimed"),
        ("strategy", "exact-ift", {"tree": 12}, ""),
        ("strategy", "exact-ift", {"tree": 11}, "at most 11 are claimed"),
        ("strategy", "exact-ift", {"treee": 12}, "Did you mean 'tree'?"),
    ],
)
def test_claims_on_the_command_line_are_held(kind, name, cost_bounds, words):
    """With options the class's own cost_bounds count for nothing; these do."""
    options = {"solver": '{"history_size": 20}', "strategy": '{"max_steps": 30}'}[kind]
    select = "golden and tree and float64 and not units" if kind == "solver" else "claim_is_kept and tree"
    request = SuiteRequest(kind, name, ("numpy",), options=options, cost_bounds=json.dumps(cost_bounds), select=select)
    (outcome,) = [each for each in conformance.check(request) if "golden_gradients" not in each.test]
    assert outcome.outcome == ("failed" if words else "passed")
    assert words in outcome.message

"""Adapters of whole solves, as a user meets them: right, lying, hanging, dying, printing, meddling."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import deqcore
from deqcore import errors
from deqcore.cli import app
from deqcore.testing.runner import card, conformance, isolation
from deqcore.testing.runner.conformance import CaseOutcome, SuiteRequest
from deqcore.testing.runner.isolation import Journal
from deqcore.testing.suite.process import Settings

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def adapters(project):
    shutil.copy(Path(__file__).with_name("external_adapters.py"), project / "external_adapters.py")
    (project / "deqfile.py").write_text("from external_adapters import deqcore_solvers\n")
    (project / "deq.toml").write_text("plugins.deqfile = true\n")
    deqcore.Config.discover()
    return project


def check(name: str, select: str | None = None, limit: float = 300.0) -> dict[str, CaseOutcome]:
    outcomes = conformance.check(SuiteRequest("solver", name, select=select, limit=limit))
    return {outcome.test.replace(f"numpy-{name}-", "").replace(f"[numpy-{name}]", ""): outcome for outcome in outcomes}


def failures(outcomes: dict[str, CaseOutcome]) -> dict[str, str]:
    return {name: each.message for name, each in outcomes.items() if each.outcome == "failed"}


def test_a_right_one_passes_everything():
    outcomes = check("right")
    assert not failures(outcomes)
    assert len(outcomes) > 30
    assert all(each.outcome == "passed" for each in outcomes.values())


def test_what_is_not_claimed_is_not_checked():
    outcomes = check("modest", "success or batch or solves_what")
    assert {each.outcome for name, each in outcomes.items() if "solves_what" in name} == {"passed"}
    rest = [each for name, each in outcomes.items() if "solves_what" not in name]
    assert {(each.outcome, each.message.partition(":")[0]) for each in rest} == {("skipped", "not claimed")}


def test_lies_about_counts_and_success_are_found():
    (message,) = failures(check("liar", "evaluations_are_those")).values()
    assert "1 evaluations are reported, 16 took place" in message
    found = failures(check("optimist", "success"))
    assert "‖f(z) − z‖/‖f(z)‖ = 1.7e-01" in found["test_success_is_not_claimed_without_a_solution[budget]"]
    assert len(found) == 5  # the four without a solution as well


def test_one_that_hangs_is_a_row_and_not_the_end():
    outcomes = check("hangs", "small_residual", limit=15.0)
    assert failures(outcomes) == {
        "test_success_means_a_small_residual[0.01]": "no end within 15 s: the process was killed"
    }
    assert len(outcomes) == 3


def test_a_process_whose_tests_have_ended_is_not_waited_for():
    begun, ended = Journal(["a", "b"], entries={"a": {}}), Journal(["a", "b"], entries={"a": {}, "b": {}})
    assert isolation._allowed(ended, 60.0) == isolation.END
    assert isolation._allowed(begun, 60.0) == isolation._allowed(Journal(), 60.0) == isolation.START
    assert isolation._allowed(Journal(["a"], running="a"), 60.0) == 60.0


def test_one_that_kills_the_process_is_a_row_and_not_the_end():
    outcomes = check("dies", "small_residual")
    assert failures(outcomes) == {
        "test_success_means_a_small_residual[0.01]": "it ended the process: exit status 3",
        "test_success_means_a_small_residual[1e-08]": "it ended the process: SIGKILL",
    }
    assert len(outcomes) == 3


def test_after_some_deaths_the_rest_is_not_run():
    messages = list(failures(check("alwaysdies", "budget or solves_what or start or constant")).values())
    assert messages[:4] == ["it ended the process: exit status 1"] * 4
    assert set(messages[4:]) == {"not run: 4 tests before it hung or ended the process"}


def test_what_it_prints_or_plots_is_reported():
    assert "it prints 'iteration 1'" in str(failures(check("prints", "prints")))
    assert "it opens 1 figure" in str(failures(check("plots", "prints")))


def test_settings_that_it_changes_are_reported_and_restored():
    outcomes = check("meddles", "settings or start or constant or agree")
    assert failures(outcomes).keys() == {"test_settings_of_the_process_are_left_alone"}
    assert "python random state, numpy error settings, environment variables" in str(failures(outcomes))


def test_results_of_another_form_are_named():
    assert "z must have the shape of z0, (1, 2) (got (1,))" in str(failures(check("misshapes", "constant_f")))
    found = failures(check("words", "evaluations_are"))
    assert "evaluations must be an integer, or an array of integers (1,) (got 'many')" in str(found)


def test_a_stream_that_it_replaces_is_reported():
    assert "replaced sys.stdout" in str(failures(check("mutes", "settings")))


def test_settings_of_the_process_are_restored(monkeypatch):
    folder, limit = Path.cwd(), sys.getrecursionlimit()
    monkeypatch.setenv("DEQCORE_TEST_KEPT", "1")
    before = Settings.read(deqcore.get_backend(backend="numpy"))
    os.chdir("/")
    del os.environ["DEQCORE_TEST_KEPT"]
    os.environ["DEQCORE_TEST_NEW"] = "1"
    sys.setrecursionlimit(limit + 1)
    assert before.restore() == ["environment variables", "working directory", "recursion limit"]
    assert (Path.cwd(), sys.getrecursionlimit()) == (folder, limit)
    assert os.environ["DEQCORE_TEST_KEPT"] == "1"
    assert "DEQCORE_TEST_NEW" not in os.environ
    assert before.restore() == []


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_settings_of_a_framework_are_reported_and_restored(framework):
    pytest.importorskip(framework)
    harness = deqcore.get_backend(backend=framework).harness
    settings = Settings.read(deqcore.get_backend(backend=framework))
    name = {"torch": "torch default dtype", "jax": "jax.config.jax_debug_nans"}[framework]
    other = {"torch": lambda: __import__("torch").float64, "jax": lambda: True}[framework]()
    harness.restore_global_state({name: other})
    assert harness.global_state()[name] == other
    assert settings.restore() == [name]
    assert harness.global_state()[name] == settings.values[name] != other
    assert settings.restore() == []


def test_it_also_is_a_solver_of_one_step():
    sol = deqcore.fixed_point(np.cos, np.ones((2, 1)), forward__solver="right", forward__rtol=1e-5, backend="numpy")
    assert np.allclose(sol.value, 0.7390851332, atol=1e-5)
    assert sol.converged.all()
    assert sol.steps.tolist() == [1, 1]


def test_a_report_card_says_what_fails_and_how_to_see_it(adapters: Path, capsys: Capture):
    args = ["check", "solver", "optimist", "--report", "card.html", "-k", "small_residual or without_a or batch"]
    with pytest.raises(SystemExit) as end:
        app.main(args)
    assert end.value.code == 1
    html = (adapters / "card.html").read_text()
    for text in (
        "Report card of solver optimist",
        "z + z * z + b",  # the code of a case
        "test_success_is_not_claimed_without_a_solution[numpy-optimist-budget]",
        "deqcore check solver optimist -k test_success_is_not_claimed_without_a_solution",
        f"numpy {np.__version__}",
        "✗ 5 of 5",
        "✓ 3",
        "default-src 'none'",
    ):
        assert text in html, text
    assert "http" not in html.replace("http-equiv", "")


def test_best_settings_have_a_column_of_their_own(adapters: Path):
    with (adapters / "external_adapters.py").open("a") as out:
        out.write("\nRight.best = {'max_steps': 7}\n")
    request = SuiteRequest("solver", "right", select="constant_f")
    conformance.plugins.load("solver", "right").best = {"max_steps": 7}
    outcomes = conformance.check(request)
    assert [each.backend for each in outcomes] == ["numpy", "numpy, best settings"]
    made = card.card(request, outcomes, 1.0)
    assert list(made.columns) == ["numpy", "numpy, best settings"]
    assert made.verdict == "All 1 properties hold or are not claimed."


def test_a_card_names_the_framework_and_a_command_that_finds_the_code():
    failed = CaseOutcome("test_a_constant_f_is_solved[torch-right]", "torch", "failed", "0, not b", "", 1.0)
    request = SuiteRequest("solver", "right", paths=(Path("/some code"),))
    made = card.card(request, [failed], 1.0)
    assert f"torch {metadata.version('torch')}" in made.about
    assert made.verdict == "1 of 1 properties fail: 1 check."
    (failure,) = made.failures
    assert failure.command == (
        "deqcore check solver right --path '/some code' -k test_a_constant_f_is_solved"
    )  # fmt: skip


def test_bad_arguments_are_told(capsys: Capture):
    for args, text in (
        (("--path", "nowhere"), "--path must be an existing folder (got 'nowhere')."),
        (("--limit", "0"), "--limit must be a number of seconds > 0 (got 0)."),
        (("--report", "nowhere/card.html"), "--report must be in an existing folder (got 'nowhere/card.html')."),
        (("--backend", "torch"), "--backend must be 'numpy': right takes its arrays (got ['torch'])."),
    ):
        with pytest.raises(SystemExit) as end:
            app.main(["check", "solver", "right", *args])
        assert end.value.code == 2
        assert text in " ".join(capsys.readouterr().err.split())


def test_code_on_no_index_is_found_by_its_path(
    adapters: Path, tmp_path_factory: pytest.TempPathFactory, capsys: Capture
):
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "published_code.py").write_text(
        "def solve(f, z, steps):\n    for _ in range(steps): z = f(z)\n    return z\n"
    )
    (adapters / "adapter.py").write_text(
        "from external_adapters import Modest\nfrom deqcore.abc.external import ExternalResult\n"
        "class Published(Modest):\n"
        "    def solve(self, f, z0, args, *, rtol, max_steps):\n"
        "        from published_code import solve\n"
        "        return ExternalResult(solve(lambda z: f(z, *args), z0, max_steps))\n"
    )
    deqfile = adapters / "deqfile.py"
    deqfile.write_text(
        "from deqcore.plugins import SolverSpec, hookimpl\n@hookimpl\ndef deqcore_solvers():\n"
        "    yield SolverSpec('published', 'adapter:Published')\n"
    )
    command = ["check", "solver", "published", "-k", "solves_what", "--json"]
    with pytest.raises(SystemExit) as end:
        app.main([*command, "--path", str(checkout)])
    assert end.value.code in (None, 0), capsys.readouterr()


def test_an_adapter_must_return_a_result():
    with pytest.raises(errors.UnknownNameError):
        conformance.check(SuiteRequest("solver", "rigth"))

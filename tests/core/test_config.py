"""Settings: which value wins, where it came from, and what the error of a mistake says."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import deqcore
from deqcore import errors, plugins
from deqcore.config import Config, current, resolve, using
from deqcore.plugins import Options

pytestmark = pytest.mark.usefixtures("no_settings", "no_plugins")


def resolved(**overrides: object) -> Config:
    return resolve(None, overrides)[0]


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


# -- values ------------------------------------------------------------------------------------------------


def test_the_defaults() -> None:
    config = Config()
    assert config.backend == "auto"
    assert config.as_dict() == {
        "backend": "auto",
        "forward": {
            "solver": "auto",
            "rtol": "auto",
            "atol": 0.0,
            "max_steps": 40,
            "check_every": "auto",
            "batch": True,
            "coupled": True,
            "patience": 50,
            "on_failure": "warn",
            "compact": False,
            "options": {},
        },
        "backward": {"strategy": "exact-ift", "on_failure": "warn", "verify_every": 100, "step": 0, "options": {}},
        "plugins": {"deqfile": False},
    }
    assert {origin for _, _, origin in config.items()} == {"default"}


def test_a_config_is_a_frozen_value() -> None:
    one = Config(backend="numpy", forward={"rtol": 1, "options": {"a": [1, 2], "b": {"c": 3}}})
    two = Config(forward={"rtol": 1.0, "options": {"b": {"c": 3}, "a": (1, 2)}}, backend="numpy")
    assert one == two
    assert hash(one) == hash(two)
    assert one != Config()
    assert one != "config"
    assert len({one, two, Config()}) == 2
    for name in ("backend", "forward", "invented"):
        with pytest.raises(AttributeError):
            setattr(one, name, "torch")
    with pytest.raises(AttributeError):
        one.forward.rtol = 2.0  # type: ignore[misc]


def test_a_config_survives_copying_and_travelling() -> None:
    config = Config(forward={"solver": "anderson", "options": {"history_size": 3}}, study={"seed": [1]})
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert twin.origin("forward.options.history_size") == "Config(...)"
        assert twin.section("study") == {"seed": [1]}


def test_a_config_hashes_alike_after_travelling_to_another_process() -> None:
    config = Config(forward={"options": {"history_size": 3}})
    code = (
        "import pickle, sys; from deqcore import Config; c = pickle.load(sys.stdin.buffer);"
        "print(hash(c) == hash(Config(forward={'options': {'history_size': 3}})))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(config),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert out.stdout.strip() == b"True"


def test_options_read_like_a_mapping() -> None:
    options = Config(forward={"options": {"history_size": 20, "nested": {"a": [1, {"b": 2}]}}}).forward.options
    assert isinstance(options, Mapping)
    assert options["history_size"] == 20
    assert dict(options) == options == {"history_size": 20, "nested": {"a": (1, {"b": 2})}}
    assert sorted(options) == ["history_size", "nested"]
    assert len({options, Options(options)}) == 1
    assert Options({"a": 1}) != Options({"a": True}) != Options({"a": 1.0})
    assert repr(options) == "Options(history_size=20, nested=Options(a=(1, Options(b=2))))"


def test_sections_of_other_modules_are_kept_as_they_are() -> None:
    config = Config(study={"seeds": [1, 2], "deep": {"x": None}})
    config.section("study")["seeds"].append(3)  # type: ignore[attr-defined]
    assert config.section("study") == {"seeds": [1, 2], "deep": {"x": None}}
    assert config.section("monitor") == {}
    assert config.as_dict()["study"] == {"seeds": [1, 2], "deep": {"x": None}}
    with pytest.raises(errors.ConfigError, match=r"'studdy'.*mean 'study'"):
        config.section("studdy")
    with pytest.raises(errors.ConfigError, match="study must be a table of settings .got 3"):
        Config(study=3).section("study")  # type: ignore[arg-type]


# -- mistakes ----------------------------------------------------------------------------------------------

BAD_VALUES = [
    ("forward", "rtol", -1.0, "'auto' or a finite number >= 0"),
    ("forward", "rtol", "1e-3", "'auto' or a finite number >= 0"),
    ("forward", "rtol", True, "'auto' or a finite number >= 0"),
    ("forward", "rtol", None, "'auto' or a finite number >= 0"),
    ("forward", "rtol", float("nan"), "'auto' or a finite number >= 0"),
    ("forward", "rtol", float("inf"), "'auto' or a finite number >= 0"),
    ("forward", "rtol", 1j, "'auto' or a finite number >= 0"),
    ("forward", "atol", "auto", "a finite number >= 0"),
    ("forward", "max_steps", -1, "an integer >= 0"),
    ("forward", "max_steps", 3.0, "an integer >= 0"),
    ("forward", "max_steps", True, "an integer >= 0"),
    ("forward", "check_every", 0, "'auto' or an integer >= 1"),
    ("forward", "batch", 1, "true, false or 2"),
    ("forward", "batch", "true", "true, false or 2"),
    ("forward", "on_failure", "explode", "'raise', 'warn' or 'ignore'"),
    ("forward", "solver", 3, "the name of a registered solver"),
    ("forward", "options", 3, "a table of settings"),
    ("backward", "strategy", ["a"], "the name of a registered strategy"),
    ("plugins", "deqfile", "yes", "true or false"),
]


@pytest.mark.parametrize("value", [2**31, 2**40, 10**400], ids=["2**31", "2**40", "10**400"])
@pytest.mark.parametrize("setting", ["forward.max_steps", "forward.patience", "forward.check_every"])
def test_steps_that_no_counter_holds_are_refused_with_the_range(setting: str, value: int) -> None:
    """Steps are counted in int32 on every backend."""
    section, name = setting.split(".")
    with pytest.raises(errors.ConfigError, match="a number of at most 2147483647"):
        Config(**{section: {name: value}})  # type: ignore[arg-type]
    assert getattr(getattr(Config(**{section: {name: 2**31 - 1}}), section), name) == 2**31 - 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("section", "name", "value", "expected"), BAD_VALUES)
def test_bad_values_are_refused_at_every_level(
    section: str, name: str, value: object, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Config(**{section: {name: value}})  # type: ignore[arg-type]
    assert f"[{section}] (set by Config(...)): {name} must be {expected} (got " in str(caught.value)
    with pytest.raises(errors.ConfigError, match="set by the call"):
        resolve(None, {f"{section}__{name}": value})
    with (
        pytest.raises(errors.ConfigError, match=r"set by deqcore\.using"),
        using(**{f"{section}__{name}": value}),
    ):
        pass  # pragma: no cover


@pytest.mark.parametrize("value", [0, 1, 0.0, 1e-300, "auto", np.float32(0.5), np.int64(1), np.array(0.25)])
def test_good_tolerances(value: object) -> None:
    found = resolved(forward__rtol=value).forward.rtol
    assert type(found) is (str if value == "auto" else float)
    assert found == value


def test_unknown_settings_get_a_suggestion() -> None:
    with pytest.raises(errors.ConfigError, match=r"\[forward\] .*no option 'rtoll'. Did you mean 'rtol'\?"):
        Config(forward={"rtoll": 1})
    with pytest.raises(errors.ConfigError, match=r"no option 'foward'\. Did you mean 'forward'"):
        Config(foward={})  # type: ignore[call-arg]
    with pytest.raises(errors.ConfigError, match=r"forward must be a table of settings \(got 3\)"):
        Config(forward=3)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match=r"\[plugins\] .*no option 'options'"):
        Config(plugins={"options": {"x": 1}})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("forward__rtoll", "'forward__rtol'"),
        ("rtol", "'forward__rtol'"),
        ("solver", "'forward__solver'"),
        ("strategy", "'backward__strategy'"),
        ("options", "'forward__options' or 'backward__options'"),
        ("backwards__strategy", "'backward__strategy'"),
        ("backnd", "'backend'"),
        ("forward__rtol__x", "'forward__rtol'"),
    ],
)
def test_misspelt_overrides_get_a_suggestion(given: str, meant: str) -> None:
    for config in (None, Config()):
        with pytest.raises(errors.ConfigError, match=f"The call has no option '{given}'. Did you mean {meant}"):
            resolve(config, {given: 1})


def test_options_must_be_hashable() -> None:
    with pytest.raises(errors.ConfigError, match=r"The call, forward__options: a must be a number, .*\(got \{1\}\)"):
        resolved(forward__options={"a": {1}})
    with pytest.raises(errors.ConfigError, match=r"The call: forward__options__a must be a number, .*got array"):
        resolved(forward__options__a=np.ones(2))
    with pytest.raises(
        errors.ConfigError, match=r"forward.options \(set by Config\(...\)\): a must be a number, .*\(got \{1\}\)"
    ):
        Config(forward={"options": {"a": {1}}})


# -- precedence --------------------------------------------------------------------------------------------


def test_each_level_wins_over_the_one_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(
        tmp_path / "deq.toml",
        """
        backend = "numpy"
        [forward]
        rtol = 1e-1
        atol = 1e-1
        max_steps = 1
        """,
    )
    monkeypatch.setenv("DEQCORE_FORWARD__ATOL", "1e-2")
    monkeypatch.setenv("DEQCORE_FORWARD__MAX_STEPS", "2")
    monkeypatch.setenv("DEQCORE_FORWARD__BATCH", "false")
    loaded = Config.load(file)
    assert (loaded.forward.rtol, loaded.forward.atol, loaded.forward.max_steps) == (0.1, 0.01, 2)
    assert loaded.origin("forward.rtol") == f"file {file}"
    assert loaded.origin("forward.atol") == "environment variable DEQCORE_FORWARD__ATOL"
    with using(forward__max_steps=3, forward__compact=True):
        call, _ = resolve(None, {"forward__compact": False})
        assert (call.forward.atol, call.forward.max_steps, call.forward.compact) == (0.01, 3, False)
        assert call.forward.batch is False
        assert call.origin("forward.max_steps") == "deqcore.using"
        assert call.origin("forward.compact") == "the call"
        assert call.origin("forward.batch") == "environment variable DEQCORE_FORWARD__BATCH"
        assert call.origin("forward.rtol") == "default"
    with using(loaded):
        assert current().forward.rtol == 0.1
        assert current().origin("forward.rtol") == f"deqcore.using, file {file}"


def test_an_explicit_config_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQCORE_FORWARD__MAX_STEPS", "2")
    monkeypatch.setenv("DEQCORE_FORWARD__RTOL", "not even a number")
    config = Config(forward={"atol": 1.0})
    with pytest.raises(errors.ConfigError), using(forward__max_steps=3):
        pass
    found, _ = resolve(config, {"forward__compact": True})
    assert found == Config(forward={"atol": 1.0, "compact": True})
    assert resolve(config, {})[0] is config


def test_naming_a_solver_discards_lower_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQCORE_FORWARD__OPTIONS__HISTORY_SIZE", "20")
    monkeypatch.setenv("DEQCORE_BACKWARD__OPTIONS__TERMS", "7")
    assert resolved().forward.options == {"history_size": 20}
    assert resolved(forward__options={"ridge": 0.1}).forward.options == {"history_size": 20, "ridge": 0.1}
    assert resolved(forward__options__history_size=5).forward.options == {"history_size": 5}
    named = resolved(forward__solver="picard")
    assert named.forward.options == {}
    assert named.backward.options == {"terms": 7}
    assert named.origin("forward.options") == "default"
    both = resolved(forward__solver="picard", forward__options={"damping": 0.5})
    assert both.forward.options == {"damping": 0.5}
    assert resolved(backward__strategy="neumann").backward.options == {}
    config = Config(forward={"solver": "anderson", "options": {"history_size": 3}})
    assert resolve(config, {"forward__solver": "broyden"})[0].forward.options == {}
    assert resolve(config, {"forward__options__history_size": 4})[0].forward.options == {"history_size": 4}


def test_sections_can_be_handed_on() -> None:
    config = Config(forward={"rtol": 0.1, "options": {"history_size": 3}})
    assert Config(forward=config.forward) == config


def test_using_nests_and_ends() -> None:
    with using(Config(forward={"rtol": 0.1, "max_steps": 5}), forward__atol=0.5) as outer:
        assert (outer.forward.rtol, outer.forward.atol) == (0.1, 0.5)
        with contextlib.suppress(KeyError), using(forward__rtol=0.2) as inner:
            assert (inner.forward.rtol, inner.forward.max_steps) == (0.2, 5)
            raise KeyError
        assert current() == outer
    assert current() == Config()


def test_threads_and_tasks_do_not_disturb_each_other() -> None:
    seen: dict[int, int] = {}
    together = threading.Barrier(4)

    def in_thread(steps: int) -> None:
        with using(forward__max_steps=steps):
            together.wait()
            seen[steps] = current().forward.max_steps
            together.wait()

    threads = [threading.Thread(target=in_thread, args=(steps,)) for steps in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {steps: steps for steps in range(4)}

    async def in_task(steps: int) -> bool:
        with using(forward__max_steps=steps):
            await asyncio.sleep(0)
            return current().forward.max_steps == steps

    async def all_tasks() -> list[bool]:
        return await asyncio.gather(*(in_task(steps) for steps in range(4)))

    assert asyncio.run(all_tasks()) == [True] * 4


# -- environment -------------------------------------------------------------------------------------------


def test_values_from_the_environment_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BACKEND": "jax",
        "FORWARD__RTOL": "1e-6",
        "FORWARD__CHECK_EVERY": "auto",
        "FORWARD__MAX_STEPS": "7",
        "FORWARD__COMPACT": "true",
        "FORWARD__OPTIONS": '{"history_size": 5, "mode": "fast", "sizes": [1, 2]}',
        "FORWARD__OPTIONS__HISTORY_SIZE": "6",
        "BACKWARD__STRATEGY": "neumann",
        "BACKWARD__OPTIONS__NAME": "text",
        "BACKWARD__OPTIONS__OPTIONS__HISTORY_SIZE": "3",
        "PLUGINS__DEQFILE": "false",
        "FORWARD__ATOL": "",
        "DISABLE_PLUGINS": "a,b",
        "SOMEBODY_ELSES": "x",
    }.items():
        monkeypatch.setenv(f"DEQCORE_{name}", value)
    config = current()
    assert config.backend == "jax"
    assert config.forward.rtol == 1e-6
    assert config.forward.max_steps == 7
    assert config.forward.compact is True
    assert config.forward.atol == 0.0
    assert config.forward.options == {"history_size": 6, "mode": "fast", "sizes": (1, 2)}
    assert config.backward.options == {"name": "text", "options": {"history_size": 3}}
    assert (
        config.origin("forward.options.history_size") == "environment variable DEQCORE_FORWARD__OPTIONS__HISTORY_SIZE"
    )
    assert config.origin("forward.options.mode") == "environment variable DEQCORE_FORWARD__OPTIONS"
    assert config.origin("forward.atol") == "default"


@pytest.mark.parametrize("name", ["deqcore_forward__rtol", "Deqcore_Forward__Rtol", "DEQCORE_forward__RTOL"])
def test_the_case_of_a_variable_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1e-3")
    config = current()
    assert config.forward.rtol == 1e-3
    assert config.origin("forward.rtol") == f"environment variable {name}"


def test_two_variables_that_differ_in_case_only_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQCORE_FORWARD__RTOL", "1e-3")
    monkeypatch.setenv("deqcore_forward__rtol", "1e-3")
    with pytest.raises(errors.ConfigError, match="DEQCORE_FORWARD__RTOL and deqcore_forward__rtol are one setting"):
        current()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deqcore_forward__rtoll", r"has no option 'rtoll'. Did you mean 'rtol'"),
        ("deqcore_forwards__rtol", "does not name a setting. Did you mean 'DEQCORE_FORWARD__RTOL'"),
        ("deqcore_native", "must be written DEQCORE_NATIVE"),
    ],
)
def test_mistakes_in_lower_case_are_found_too(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(errors.ConfigError, match=message):
        current()


@pytest.mark.parametrize("name", ["deq.toml", "pyproject.toml"])
def test_a_file_may_begin_with_a_byte_order_mark(name: str, tmp_path: Path) -> None:
    head = "[tool.deqcore.forward]" if name == "pyproject.toml" else "[forward]"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + f"{head}\r\nrtol = 1e-3\r\n".encode())
    assert Config.load(tmp_path / name).forward.rtol == 1e-3


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 10_000, "[forward]\nmax_steps = " + "9" * 100])
def test_a_file_beyond_all_bounds_is_an_error_of_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / "deq.toml").write_text(text)
    with contextlib.suppress(errors.ConfigError):
        Config.load(tmp_path / "deq.toml")
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        Config.load("a\0b.toml")


def test_changes_of_the_environment_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current().backend == "auto"
    monkeypatch.setenv("DEQCORE_BACKEND", "torch")
    assert current().backend == "torch"
    monkeypatch.setenv("DEQCORE_BACKEND", "numpy")
    assert current().backend == "numpy"
    monkeypatch.delenv("DEQCORE_BACKEND")
    assert current().backend == "auto"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "FORWARD__RTOL",
            "abc",
            r"DEQCORE_FORWARD__RTOL\): rtol must be 'auto' or a finite number >= 0 \(got 'abc'\)",
        ),
        ("FORWARD__RTOL", "-1", r"DEQCORE_FORWARD__RTOL\): rtol must be .* \(got '-1'\)"),
        ("FORWARD__MAX_STEPS", "2.5", r"DEQCORE_FORWARD__MAX_STEPS\): max_steps"),
        ("FORWARD__RTOLL", "1", r"DEQCORE_FORWARD__RTOLL\) has no option 'rtoll'. Did you mean 'rtol'"),
        ("FORWARD_RTOL", "1", "DEQCORE_FORWARD_RTOL does not name a setting. Did you mean 'DEQCORE_FORWARD__RTOL'"),
        ("BACKENDS", "torch", "DEQCORE_BACKENDS does not name a setting. Did you mean 'DEQCORE_BACKEND'"),
        ("FORWARD__OPTIONS", "{bad", "DEQCORE_FORWARD__OPTIONS holds a whole table, so it must be valid JSON"),
        ("FORWARD", "{bad", "DEQCORE_FORWARD holds a whole table, so it must be valid JSON"),
    ],
)
def test_bad_variables_are_named(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"DEQCORE_{name}", value)
    with pytest.raises(errors.ConfigError, match=message):
        current()


# -- files -------------------------------------------------------------------------------------------------


def test_a_file_and_a_pyproject_say_the_same(tmp_path: Path) -> None:
    plain = write(
        tmp_path / "a.toml", '[forward]\nsolver = "anderson"\noptions = { history_size = 5}\n[study]\nseed = 1\n'
    )
    project = write(
        tmp_path / "pyproject.toml",
        '[project]\nname = "x"\n[tool.deqcore.forward]\nsolver = "anderson"\n'
        "options.history_size = 5\n[tool.deqcore.study]\nseed = 1\n",
    )
    one, two = Config.load(plain), Config.load(str(project))
    assert one == two == Config(forward={"solver": "anderson", "options": {"history_size": 5}})
    assert one.section("study") == two.section("study") == {"seed": 1}
    assert resolve(one, {"forward__atol": 1.0})[0].section("study") == {"seed": 1}


def test_equal_configs_of_two_files_keep_their_origins(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, 'backend = "numpy"\n') for name in ("a.toml", "b.toml")]
    for path in paths:
        assert resolve(Config.load(path), {"forward__atol": 1.0})[0].origin("backend") == f"file {path}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[forward\nrtol = 1\n", r"not valid TOML: .*line 1"),
        ("[forward]\nrtol = \n", r"not valid TOML: .*line 2"),
        ("[foward]\nrtol = 1\n", r"deq.toml\) has no option 'foward'. Did you mean 'forward'"),
        ("[forward]\nrtoll = 1\n", r"\[forward\] \(set by file .*deq.toml\) has no option 'rtoll'.* 'rtol'"),
        ('[forward]\nrtol = "1"\n', r"deq.toml\): rtol must be .* \(got '1'\)"),
        ("forward = 1\n", r"deq.toml\): forward must be a table of settings \(got 1\)"),
        ('solver = "picard"\n', r"has no option 'solver'. Did you mean 'forward.solver'\?"),
        ('[forward]\nsolver = "picard"\n[forward]\n', r"not valid TOML: .*line 3"),
    ],
)
def test_mistakes_in_a_file_name_it(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        Config.load(write(tmp_path / "deq.toml", content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"config file '.*absent.toml' does not exist"):
        Config.load(tmp_path / "absent.toml")
    with pytest.raises(errors.ConfigError, match="must be a TOML file .got a directory"):
        Config.load(tmp_path)
    with pytest.raises(errors.ConfigError, match=r"no table \[tool.deqcore\]"):
        Config.load(write(tmp_path / "pyproject.toml", "[tool]\nother = 1\n"))
    (tmp_path / "latin.toml").write_bytes('name = "\xe9"'.encode("latin-1"))
    with pytest.raises(errors.ConfigError, match="must be UTF-8 text"):
        Config.load(tmp_path / "latin.toml")
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        Config.load(tmp_path / "latin.toml" / "below")


def test_discover_reads_the_working_directory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pyproject.toml", "[tool.deqcore.forward]\nmax_steps = 3\n")
    assert Config.discover().forward.max_steps == 40
    write(tmp_path / "deq.toml", "[forward]\nmax_steps = 4\n")
    assert Config.discover().forward.max_steps == 4
    assert Config.discover("pyproject.toml").forward.max_steps == 3
    assert current().forward.max_steps == 40  # no library call reads a file on its own


DEQFILE = """
from deqcore.plugins import SolverSpec, hookimpl

@hookimpl
def deqcore_solvers():
    yield SolverSpec("mine", "deqcore.solvers.picard:Picard")
"""


def test_a_deqfile_is_executed_only_when_the_config_says_so(tmp_path: Path) -> None:
    write(tmp_path / "deqfile.py", DEQFILE)
    write(tmp_path / "off.toml", '[forward]\nsolver = "mine"\n')
    config = Config.load(tmp_path / "off.toml")
    with pytest.raises(errors.UnknownNameError):
        plugins.make_solver(config.forward.solver)
    Config.load(write(tmp_path / "false.toml", "plugins.deqfile = false"))
    assert "mine" not in plugins.solvers()
    Config.load(write(tmp_path / "on.toml", "plugins.deqfile = true"))
    assert plugins.make_solver(config.forward.solver)


def test_a_deqfile_needs_a_file_to_stand_beside(tmp_path: Path) -> None:
    for attempt in (
        lambda: Config(plugins={"deqfile": True}),
        lambda: resolve(None, {"plugins__deqfile": True}),
        lambda: contextlib.ExitStack().enter_context(using(plugins__deqfile=True)),
    ):
        with pytest.raises(errors.ConfigError, match="beside a config file, so it must be set in a file"):
            attempt()
    with pytest.raises(errors.PluginError, match=r"deqfile.py cannot be read"):
        Config.load(write(tmp_path / "deq.toml", "plugins.deqfile = true"))


def test_a_config_with_a_deqfile_takes_overrides(tmp_path: Path) -> None:
    write(tmp_path / "deqfile.py", DEQFILE)
    config = Config.load(write(tmp_path / "deq.toml", "plugins.deqfile = true"))
    assert resolve(config, {"forward__solver": "mine"})[0].plugins.deqfile is True
    with using(config, forward__solver="mine") as inside:
        assert inside.forward.solver == "mine"


# -- resolving a call --------------------------------------------------------------------------------------


def test_scalars_of_a_framework_are_handed_back() -> None:
    torch = pytest.importorskip("torch")
    rtol, steps = torch.tensor(1e-3), torch.tensor(5)
    config, scalars = resolve(None, {"forward__rtol": rtol, "forward__max_steps": steps, "forward__atol": 1})
    assert scalars == {"forward__rtol": rtol, "forward__max_steps": steps}
    assert config == Config(forward={"atol": 1.0})
    explicit = Config(forward={"rtol": 0.5})
    assert resolve(explicit, {"forward__rtol": rtol}) == (explicit, {"forward__rtol": rtol})
    with pytest.raises(errors.ConfigError, match="batch must be true, false or 2 .got tensor"):
        resolve(None, {"forward__batch": torch.tensor(True)})


def test_tracers_are_handed_back() -> None:
    jax = pytest.importorskip("jax")
    seen: list[object] = []

    def program(rtol: object) -> object:
        config, scalars = resolve(None, {"forward__rtol": rtol})
        seen.append((config, scalars["forward__rtol"] is rtol))
        return rtol

    jax.jit(program)(1e-3)
    assert seen == [(Config(), True)]


@pytest.mark.parametrize(
    "overrides",
    [{}, {"forward__rtol": 1e-6, "forward__solver": "picard"}, {"forward__options": {"history_size": 3}}],
)
def test_resolving_again_finds_the_same_settings(overrides: dict[str, object]) -> None:
    for config in (None, Config()):
        first = resolve(config, overrides)[0]
        assert resolve(config, dict(overrides))[0] is first


def test_equal_overrides_of_other_types_are_told_apart() -> None:
    assert resolved(forward__batch=True).forward.batch is True
    with pytest.raises(errors.ConfigError, match="batch must be true, false or 2 .got 1"):
        resolved(forward__batch=1)
    assert resolved(forward__options={"a": 1}) != resolved(forward__options={"a": 1.0})


def test_origin_of_what_does_not_exist() -> None:
    with pytest.raises(errors.ConfigError, match=r"'forward.rtoll'. Did you mean 'forward.rtol'"):
        Config().origin("forward.rtoll")


def test_variables_of_the_plugin_manager_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from deqcore.config.environment import variables

    monkeypatch.setenv("DEQCORE_DISABLE_PLUGINS", "a")
    monkeypatch.setenv("DEQCORE_PLUGIN_AUTOLOAD", "0")
    monkeypatch.setenv("DEQCORE_BACKEND", "numpy")
    assert variables() == (("DEQCORE_BACKEND", "numpy"),)


@pytest.mark.parametrize("given", ["deq.toml", {"backend": "numpy"}, Path("deq.toml")])
def test_what_is_no_config_is_told_how_to_become_one(given: object) -> None:
    x = np.ones((1, 1))
    calls = [
        lambda: deqcore.fixed_point(np.cos, x, config=given),
        lambda: deqcore.fixed_point(np.cos, x, config=given, forward__rtol=1e-3),
        lambda: deqcore.get_backend(given),
        lambda: using(given).__enter__(),
    ]
    for call in calls:
        with pytest.raises(
            errors.ConfigError, match=r"config must be a deqcore\.Config \(got .*Use deqcore\.Config\.load\(path\)"
        ):
            call()

"""What a study may ask for, and what it becomes."""

from __future__ import annotations

import pytest

from deqcore.errors import ConfigError, StrategyError, UnknownNameError
from deqcore.study.grid import Cell, UserCode, cells
from deqcore.study.report import gates
from deqcore.study.settings import read


def grid(table: dict[str, object]) -> list[Cell]:
    return cells(read(table, "study.toml"), UserCode(), ("torch",))


def test_the_default_compares_strategies_at_equal_error_from_one_start():
    found = grid({})
    labels = ["exact-ift", "exact-ift 0.01", "exact-ift 0.1", "broyden-reuse", "jacobian-free"]
    assert [cell.strategy.label for cell in found] == labels
    assert [cell.strategy.options.get("rtol") for cell in found] == [None, 0.01, 0.1, None, None]
    assert len({(cell.seed, cell.rtol, cell.model, cell.data, cell.training) for cell in found}) == 1
    assert len({cell.key for cell in found}) == 5


def test_every_axis_multiplies_and_explicit_models_appear_once():
    table = {"models": ["dense", "dense-explicit"], "rtol": [1e-3, 1e-5], "seeds": [0, 1], "solvers": ["broyden"]}
    found = grid(table)
    assert len([cell for cell in found if not cell.explicit]) == 2 * 2 * 5
    assert len([cell for cell in found if cell.explicit]) == 2  # one per seed: no solver, no strategy, no tolerance
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)


def test_models_meet_only_the_data_that_they_take():
    found = grid({"data": ["digits", "text"], "models": ["conv", "attention"], "strategies": ["exact-ift"]})
    assert [(cell.data.name, cell.model.name) for cell in found] == [("digits", "conv"), ("text", "attention")]


def test_a_cell_comes_back_from_its_json_form():
    entry = {"name": "broyden-reuse", "label": "plain", "options": {"max_relative_error": "none", "certify": False}}
    (cell,) = grid({"strategies": [{**entry, "options": {**entry["options"], "fallback": "none"}}]})
    assert Cell.of(cell.as_dict()) == cell
    assert Cell.of(cell.as_dict()).key == cell.key
    assert cell.config().backward.options["max_relative_error"] is None


def test_what_changes_a_number_changes_the_key():
    one, two = grid({})[0], grid({"training": {"rate": 1e-3}})[0]
    assert one.key != two.key


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"strategy": ["exact-ift"]}, "no option 'strategy'. Did you mean 'strategies'?"),
        ({"training": {"epoch": 3}}, "Did you mean 'epochs'?"),
        ({"training": {"epochs": 0}}, "epochs = 0"),
        ({"training": {"epochs": "3"}}, "epochs = '3'"),
        ({"seeds": []}, "seeds = []"),
        ({"rtol": [2.0]}, "rtol[0] = 2.0"),
        ({"models": [{"name": "dense", "widht": 3}]}, "Did you mean 'width'?"),
        ({"language": "de"}, "language = 'de'"),
        ({"gates": [{"stage": "pilot", "strategy": "exact-ift", "metric": "cosine"}]}, "at_least or at_most"),
    ],
)
def test_mistakes_in_the_file_are_reported_with_their_place(table: dict[str, object], words: str):
    with pytest.raises(ConfigError) as caught:
        read(table, "study.toml")
    assert words in str(caught.value)
    assert "study.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        ({"models": ["dens"]}, UnknownNameError, "Did you mean 'dense'?"),
        ({"solvers": ["broyde"]}, UnknownNameError, "Did you mean 'broyden'?"),
        (
            {"strategies": [{"name": "broyden-reuse", "options": {"max_relative_eror": 0.1}}]},
            ConfigError,
            "Did you mean 'max_relative_error'",
        ),
        ({"solvers": ["picard"]}, StrategyError, "keeps none"),
        ({"strategies": ["exact-ift", "exact-ift"]}, ConfigError, "two entries of strategies"),
        ({"models": ["attention"]}, ConfigError, "'attention' takes tokens. Add an entry to data that gives it"),
        ({"data": ["digits", "text"]}, ConfigError, "'text' is tokens. Add an entry to models that takes it"),
        ({"seeds": [1, 1]}, ConfigError, "same cell twice"),
    ],
)
def test_mistakes_in_names_are_found_before_training(table: dict[str, object], error: type[Exception], words: str):
    with pytest.raises(error) as caught:
        grid(table)
    assert words in str(caught.value)


def test_a_backend_without_trainer_is_refused():
    with pytest.raises(UnknownNameError, match="trainer"):
        cells(read({}, "x"), UserCode(), ("numpy",))


def test_gates_name_what_exists():
    table = {"gates": [{"stage": "pilot", "strategy": "exact-ift", "metric": "cosin", "at_least": 0.5}]}
    with pytest.raises(ConfigError, match=r"no metric 'cosin'\. Did you mean 'cosine'"):
        gates.check(read(table, "x").gates, ["exact-ift"])
    table["gates"][0]["metric"], table["gates"][0]["strategy"] = "cosine", "exact"
    with pytest.raises(ConfigError, match="Available: exact-ift"):
        gates.check(read(table, "x").gates, ["exact-ift"])


@pytest.mark.parametrize(
    ("own", "said"),
    [(UserCode(data="mine:load"), "leave data out"), (UserCode(model="mine:Model"), "leave models out")],
)
def test_own_code_that_no_entry_asks_for_is_an_error(own: UserCode, said: str):
    with pytest.raises(ConfigError, match=said):
        cells(read({"data": ["digits"], "models": ["dense"]}, "x"), own, ("torch",))


def test_the_text_none_stands_for_no_promise_in_a_checked_grid():
    entry = {"name": "broyden-reuse", "options": {"max_relative_error": "none", "fallback": "none"}}
    assert grid({"strategies": [entry], "solvers": ["broyden"]})

"""Summaries, answers, gates and the report, from synthetic results."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deqcore.study.grid import Cell, UserCode, cells
from deqcore.study.report import page, plots, table
from deqcore.study.report.gates import judge
from deqcore.study.report.recommendation import bill, devices, recommendations
from deqcore.study.report.retraining import accumulations
from deqcore.study.report.summary import Interval, reference, rows
from deqcore.study.settings import CostSettings, Study, read
from deqcore.study.translations import EN, HEADS_JA, JA, head

SPEED = {"exact-ift": 4.0, "broyden-reuse": 3.0, "jacobian-free": 2.0, "explicit": 1.0}
LOSS = {"exact-ift": 0.0, "broyden-reuse": 0.002, "jacobian-free": 0.05, "explicit": 0.0}


def result(cell: Cell) -> dict[str, Any]:
    """A training as it might have been: two epochs of three steps."""
    rng = np.random.default_rng([cell.seed, len(cell.strategy.label)])
    name = cell.strategy.name
    steps = {
        part: (SPEED[name] * 1e-3 * rng.uniform(0.9, 1.1, 6)).tolist() for part in ("forward", "backward", "update")
    }
    vjps = None if cell.explicit else [3] * 6
    steps |= {"loss": [1.0] * 6, "evaluations_most": [9] * 6, "vjps_most": vjps or [None] * 6}
    steps |= {"adjoint_residual": [0.05] * 6 if name == "broyden-reuse" else [None] * 6}
    audits = [
        {"epoch": e, "cosine": 0.98 - 0.2 * (name == "jacobian-free"), "radius": 0.5, "radius_most": 0.6}
        for e in (0, 1)
    ]
    whole = np.sum([steps[part] for part in ("forward", "backward", "update")], axis=0)
    times = {part: float(np.median(steps[part])) for part in ("forward", "backward", "update")}
    return {
        "status": "ok",
        "cell": cell.as_dict(),
        "test_accuracy": 0.95 + 0.01 * np.random.default_rng(cell.seed).uniform() - LOSS[name] - 1e-4 * rng.uniform(),
        "test_loss": 0.1,
        "warm_up": 1.0,
        "times": times | {"step": float(np.median(whole)), "training": float(whole.sum())},
        "peak_memory": 100_000_000,
        "training_memory": 10_000_000,
        "figures": {
            "evaluations_most": 9.0,
            "vjps_most": None if cell.explicit else 3.0,
            "unconverged": 0.0,
            "adjoint_residual": None,
            "fallback": 0.0,
        },
        "cosine": None if cell.explicit else audits[0]["cosine"],
        "history": {
            "steps": steps,
            "epochs": [
                {"validation_accuracy": 0.9, "validation_loss": 0.3},
                {"validation_accuracy": 0.95, "validation_loss": 0.2},
            ],
            "audits": [] if cell.explicit else audits,
        },
    }


def made(**table: Any) -> tuple[Study, list[dict[str, Any]]]:
    study = read({"seeds": [0, 1, 2], "models": ["dense", "dense-explicit"], **table}, "x")
    return study, [result(cell) for cell in cells(study, UserCode(), ("torch",))]


ABOUT = {"machine": {"cpu": "a <fast> one"}, "command": "deqcore study a.toml"}


def test_intervals_are_students():
    values = [0.91, 0.93, 0.95, 0.90]
    found, truth = Interval.of(values), stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high))
    assert Interval.of([0.9]) == Interval(0.9, None, None, 1)


def test_differences_are_paired_by_seed():
    _, results = made()
    found = {row.name: row for row in rows(results)}
    gap = found["broyden-reuse"].against(found["exact-ift"], "test_accuracy")
    assert gap is not None
    by_name = {
        name: [each["test_accuracy"] for each in results if each["cell"]["strategy"]["name"] == name]
        for name in ("broyden-reuse", "exact-ift")
    }
    truth = stats.ttest_rel(by_name["broyden-reuse"], by_name["exact-ift"]).confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx((truth.low, truth.high))
    assert reference(found["jacobian-free"], found.values()) is found["exact-ift"]


def test_quotients_are_paired_in_logarithms():
    _, results = made()
    found = {row.name: row for row in rows(results)}
    ratio = found["broyden-reuse"].ratio(found["exact-ift"], "training")
    assert ratio is not None
    seconds = {
        name: np.log([each["times"]["training"] for each in results if each["cell"]["strategy"]["name"] == name])
        for name in ("broyden-reuse", "exact-ift")
    }
    truth = stats.ttest_rel(seconds["broyden-reuse"], seconds["exact-ift"]).confidence_interval(0.95)
    assert (ratio.low, ratio.high) == pytest.approx((np.exp(truth.low), np.exp(truth.high)))


def test_the_answer_is_the_fastest_that_is_accurate_enough():
    _, results = made()
    (answer,) = recommendations(rows(results), CostSettings())
    assert answer.best is not None
    assert answer.best.name == "broyden-reuse"  # jacobian-free is faster, but costs five points
    assert answer.explicit is not None
    words = [word for word, _ in answer.warnings]
    assert "low_cosine" in words
    assert "harmful" in words


def test_the_bill():
    _, results = made()
    found = {row.name: row for row in rows(results)}
    cost = CostSettings(price_per_hour=3.6, trainings_per_month=10, scale=1000, switch_cost=5)
    costs = bill(found["jacobian-free"], found["exact-ift"], cost)
    seconds = {
        name: np.mean([each["times"]["training"] for each in results if each["cell"]["strategy"]["name"] == name])
        for name in ("jacobian-free", "exact-ift")
    }
    assert costs.training == pytest.approx(seconds["jacobian-free"])  # 1000 trainings at 0.001 a second
    assert costs.saved == pytest.approx(10 * (seconds["exact-ift"] - seconds["jacobian-free"]))
    assert costs.payback == pytest.approx(5 / costs.saved)


@pytest.mark.parametrize(("share", "count", "wanted"), [(0.5, 8, 4), (0.51, 8, 5), (0.95, 8, None), (0.1, 1, None)])
def test_memory_saved_is_fewer_devices(tmp_path: Path, share: float, count: int, wanted: int | None):
    study, results = made(cost={"devices": count})
    for each in results:
        if each["cell"]["strategy"]["name"] != "exact-ift":
            each["training_memory"] *= share
    (answer,) = recommendations(rows(results), study.cost)
    assert answer.against_exact is not None
    assert devices(answer.against_exact.memory, study.cost) == wanted
    page.write(tmp_path, study, results, ABOUT)
    sentence = f"{wanted} devices suffice instead of the {count} that exact gradients need"
    assert (sentence in (tmp_path / "report.html").read_text()) == (wanted is not None)


def test_gates_stop_at_the_first_that_is_not_met():
    gates = [
        {"stage": "pilot", "strategy": "broyden-reuse", "metric": "accuracy", "at_least": 90.0},
        {"stage": "shadow", "strategy": "broyden-reuse", "metric": "time_ratio", "at_most": 0.5},
        {"stage": "rollout", "strategy": "broyden-reuse", "metric": "accuracy_difference", "at_least": -1.0},
    ]
    study, results = made(gates=gates)
    verdict = judge(rows(results), study.gates)
    assert [gate.passed for gate in verdict.gates] == [True, False, True]
    assert not verdict.go
    assert verdict.sentence("en").startswith("Go for pilot; no-go from shadow on: broyden-reuse: time_ratio ≤ 0.5")
    study, _ = made(gates=gates[:1])
    assert judge(rows(results), study.gates).go


def test_a_failed_cell_is_reported_and_nothing_else_suffers(tmp_path: Path):
    study, results = made()
    bad = next(
        each for each in results if each["cell"]["strategy"]["name"] == "jacobian-free" and each["cell"]["seed"] == 1
    )
    results[results.index(bad)] = {
        "status": "failed",
        "reason": "diverged",
        "detail": "<loss> nan",
        "cell": bad["cell"],
    }
    found = page.write(tmp_path, study, results, ABOUT)
    (row,) = (row for row in found if row.name == "jacobian-free")
    assert set(row.results) == {0, 2}
    assert row.failures == {1: "diverged: <loss> nan"}
    html = (tmp_path / "report.html").read_text()
    assert "diverged: &lt;loss&gt; nan" in html
    assert "<loss>" not in html


@pytest.mark.parametrize(
    ("seeds", "head"),
    [
        ([0], "was the fastest setting that lost at most one point of accuracy, but there are too few"),
        ([0, 1, 2], " use "),
    ],
)
def test_too_few_seeds_recommend_nothing(tmp_path: Path, seeds: list[int], head: str):
    study, results = made(models=["dense"], seeds=seeds)
    page.write(tmp_path, study, results, ABOUT)
    (said,) = re.findall(r"For dense on digits[^<]*", (tmp_path / "report.html").read_text())
    assert head in said


def test_nothing_trained(tmp_path: Path):
    study, results = made(models=["dense"])
    failed = [{"status": "failed", "reason": "error", "detail": "x", "cell": each["cell"]} for each in results]
    found = page.write(tmp_path, study, failed, ABOUT)
    assert "no training finished" in (tmp_path / "report.html").read_text()
    assert "–" in table.markdown(found)


def test_the_files_hold_what_the_results_say(tmp_path: Path):
    study, results = made()
    page.write(tmp_path, study, results, ABOUT)
    stored = json.loads((tmp_path / "results.json").read_text())
    for row in stored["summary"]:
        name = row["strategy"] if row["strategy"] != "–" else "explicit"
        values = [each["test_accuracy"] for each in results if each["cell"]["strategy"]["label"] == name]
        assert row["metrics"]["test_accuracy"]["mean"] == pytest.approx(np.mean(values))
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(lines) == len(results) == 12
    assert float(lines[0]["test_accuracy"]) == results[0]["test_accuracy"]
    exact = [each["test_accuracy"] for each in results if each["cell"]["strategy"]["name"] == "exact-ift"]
    half = stats.t.ppf(0.975, 2) * np.std(exact, ddof=1) / 3**0.5
    expected = f"{100 * np.mean(exact):.2f} ± {100 * half:.2f}"
    assert expected in (tmp_path / "results.md").read_text()
    assert expected in (tmp_path / "report.html").read_text()


def grown(slope: float, **table: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Results whose certified rows lose `slope` more in each of four rounds."""
    study, results = made(drift={"rounds": 4}, models=["dense"], **table)
    for result in results:
        loss = slope if result["cell"]["strategy"]["name"] == "broyden-reuse" else 0.0
        noise = np.random.default_rng(result["cell"]["seed"]).uniform(0, 1e-3, 4)
        result["rounds"] = [
            {"test_accuracy": 0.9 - loss * i + noise[i] * (loss > 0), "test_loss": 1.0} for i in range(4)
        ]
    return study, results


def test_accuracy_is_drawn_over_the_time_that_was_taken_alone():
    _, (first, *others) = made()
    seconds = np.sum([first["history"]["steps"][part] for part in ("forward", "backward", "update")], axis=0)
    ends = np.array([seconds[:3].sum(), seconds.sum()])
    assert plots.clock(first) == pytest.approx(ends)
    alone = first | {"times": first["times"] | {"training": 0.1 * ends[1]}, "serial": True}
    assert plots.clock(alone) == pytest.approx(0.1 * ends)
    untimed = [each | {"times": dict.fromkeys(each["times"])} for each in (first, *others)]
    assert "plot_accuracy" in plots.plots(rows([alone, *others]))
    assert "plot_accuracy" not in plots.plots(rows(untimed))


def test_the_growth_of_the_gap_is_paired_by_seed():
    _, results = grown(0.02)
    found = {each.row.name: each for each in accumulations(rows(results))}
    assert found["exact-ift"].gap is None
    mine = [each for each in results if each["cell"]["strategy"]["name"] == "broyden-reuse"]
    accuracy = np.array([[each["test_accuracy"] for each in result["rounds"]] for result in mine])
    truth = stats.ttest_1samp(accuracy[:, 3] - accuracy[:, 0], 0.0).confidence_interval(0.95)
    growth = found["broyden-reuse"].growth
    assert growth is not None
    assert (growth.low, growth.high) == pytest.approx((truth.low, truth.high))
    assert found["broyden-reuse"].builds_up
    assert not found["jacobian-free"].builds_up


@pytest.mark.parametrize(("language", "words"), [("en", "builds up from round to round"), ("ja", "蓄積しています")])
def test_the_report_shows_the_rounds(tmp_path: Path, language: str, words: str):
    study, results = grown(0.02, language=language)
    page.write(tmp_path, study, results, ABOUT)
    html = (tmp_path / "report.html").read_text()
    assert words in html
    mine = [each for each in results if each["cell"]["strategy"]["name"] == "broyden-reuse"]
    gap = np.mean([result["rounds"][3]["test_accuracy"] for result in mine]) - 0.9
    assert f"({100 * gap:+.2f})".replace("-", "−") in html
    stored = json.loads((tmp_path / "results.json").read_text())["summary"]
    (row,) = (each for each in stored if each["strategy"] == "broyden-reuse")
    assert row["rounds"]["gap"][3]["mean"] == pytest.approx(gap)


def test_a_single_training_has_no_rounds_to_show(tmp_path: Path):
    study, results = made(models=["dense"])
    page.write(tmp_path, study, results, ABOUT)
    assert "Retraining under drift" not in (tmp_path / "report.html").read_text()


class Links(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_page_needs_nothing_from_outside_and_escapes_names(tmp_path: Path, language: str):
    evil = "<script>alert(1)</script> & $x$"
    study, results = made(
        name=evil, language=language, strategies=["exact-ift", {"name": "broyden-reuse", "label": f"plain {evil}"}]
    )
    page.write(tmp_path, study, results, ABOUT)
    html = (tmp_path / "report.html").read_text()
    assert ("テスト精度 %" in html) == (language == "ja")
    links = Links()
    links.feed(html)
    assert all(link.startswith(("#", "data:")) for link in links.found)
    assert "script" not in links.tags
    assert "svg" in links.tags
    assert "url(http" not in html
    assert "default-src 'none'" in html
    assert "mathdefault" not in html  # a label that no parser reads
    assert not re.search(r"@import|<link(?! rel=\"icon\")", html)


def test_languages_say_the_same_things():
    assert EN.keys() == JA.keys()
    titles = [*table.IDENTITY, *(title for title, _, _ in table.COLUMNS)]
    assert list(HEADS_JA) == titles
    assert [head("en", title) for title in titles] == titles
    for word, sentence in EN.items():
        assert sorted(re.findall(r"{(\w+)}", sentence)) == sorted(re.findall(r"{(\w+)}", JA[word])), word


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1234.6, "1235"), (0.0123456, "0.0123"), (9.996, "10.00"), (2.5e-9, "2.50e-09")]
)
def test_three_significant_digits(value: float, text: str):
    assert table.significant(value) == text

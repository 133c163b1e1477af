"""Summaries, answers, gates and the report, from synthetic results."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from deqcore.bench.pareto import front
from deqcore.errors import ConfigError
from deqcore.pages import charts
from deqcore.study import main
from deqcore.study.grid import Cell, UserCode, cells
from deqcore.study.labels import HEADS_JA, head
from deqcore.study.report import page, plots, table
from deqcore.study.report.gates import judge
from deqcore.study.report.recommendation import bill, devices, recommendations
from deqcore.study.report.retraining import accumulations
from deqcore.study.report.summary import Interval, audit_error, reference, rows
from deqcore.study.report.terminal import fitted
from deqcore.study.settings import CostSettings, Study, read
from deqcore.study.store import Store, StudyError
from deqcore.study.translations import EN, JA

THREE = ["exact-ift", "broyden-reuse", "jacobian-free"]
SPEED = {"exact-ift": 4.0, "neumann": 3.0, "broyden-reuse": 3.0, "jacobian-free": 2.0, "explicit": 1.0}
LOSS = {"exact-ift": 0.0, "neumann": 0.0, "broyden-reuse": 0.002, "jacobian-free": 0.05, "explicit": 0.0}

ERROR = {"exact-ift": 1e-4, "neumann": 0.4, "broyden-reuse": 0.08, "jacobian-free": 0.6, "explicit": 0.0}


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the charts of a page of which only the text is read: they take nearly all of its time."""
    monkeypatch.setattr(page, "plots", lambda rows, language: {})


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
        {
            "epoch": e,
            "cosine": 0.98 - 0.2 * (name == "jacobian-free"),
            "ratio": 1.0,
            "error": ERROR[name] * (1 + 0.5 * e),
            "radius": 0.5,
            "radius_most": 0.6,
        }
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
        "step_memory": 2_000_000,
        "seconds": 26.0,
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
    default = {"seeds": [0, 1, 2], "models": ["dense", "dense-explicit"], "strategies": THREE}
    study = read({**default, **table}, "x")
    return study, [result(cell) for cell in cells(study, UserCode(), ("torch",))]


ABOUT: dict[str, Any] = {"machine": {"cpu": "a <fast> one"}, "command": "deqcore study a.toml"}


@pytest.mark.parametrize("width", [40, 60, 73, 100, 200])
def test_no_text_of_a_table_in_the_terminal_is_cut(width):
    heads = ["strategy", "gradient error", "test accuracy %", "training s", "assessment"]
    lines = [
        ["exact-ift 0.1", "7.4e-05", "95.21 ± 0.96", "12.5", "reference: exact gradients; recommended"],
        ["broyden-reuse", "0.083", "97.05 ± 0.39", "6.3", "not shown to be faster than exact gradients"],
    ]
    console = Console(width=width, file=io.StringIO())
    console.print(fitted(heads, lines, 1, width, title="data digits"))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for line in lines:
        assert all(cell in text for cell in line[:-1])
        assert set(line[-1].split()) <= set(text.split())
    assert text.count("exact-ift 0.1") == text.count("strategy") == {40: 4, 60: 2, 73: 2, 100: 1, 200: 1}[width]


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
    assert "harmful" in words
    by_name = {line.row.name: [word for word, _ in line.reasons] for line in answer.lines}
    assert by_name == {
        "exact-ift": [],
        "broyden-reuse": [],
        "jacobian-free": ["block_error", "block_cosine", "block_accuracy"],
    }


def test_the_bill():
    _, results = made()
    found = {row.name: row for row in rows(results)}
    cost = CostSettings(price_per_hour=3.6, currency="USD", trainings_per_month=10, scale=1000, switch_cost=5)
    costs = bill(found["jacobian-free"], found["exact-ift"], cost)
    assert costs is not None
    seconds = {
        name: np.mean([each["times"]["training"] for each in results if each["cell"]["strategy"]["name"] == name])
        for name in ("jacobian-free", "exact-ift")
    }
    assert costs.training == pytest.approx(seconds["jacobian-free"])  # 1000 trainings at 0.001 a second
    assert costs.saved == pytest.approx(10 * (seconds["exact-ift"] - seconds["jacobian-free"]))
    assert costs.payback == pytest.approx(5 / costs.saved)


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize(("share", "count", "wanted"), [(0.5, 8, 4), (0.51, 8, 5), (0.95, 8, None), (0.1, 1, None)])
def test_memory_saved_is_fewer_devices(tmp_path: Path, share: float, count: int, wanted: int | None):
    study, results = made(cost={"devices": count})
    for each in results:
        if each["cell"]["strategy"]["name"] != "exact-ift":
            each["step_memory"] *= share
            each["training_memory"] *= 0.01  # resident memory does not repeat, so it decides nothing
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
    [([0], "no recommendation. It takes at least 3 seeds, and this study has 1"), ([0, 1, 2], " use ")],
)
def test_below_three_seeds_nothing_wins(tmp_path: Path, seeds: list[int], head: str):
    cost = {"price_per_hour": 3.0, "currency": "USD", "devices": 8}
    study, results = made(models=["dense"], seeds=seeds, cost=cost)
    for each in results:
        each["step_memory"] *= 0.5 if each["cell"]["strategy"]["name"] == "broyden-reuse" else 1.0
    page.write(tmp_path, study, results, ABOUT)
    html = (tmp_path / "report.html").read_text()
    (said,) = re.findall(r"<p class=\"head[^>]*>([^<]*dense on digits[^<]*)", html)
    assert head in said
    few = len(seeds) < 3
    for claim in ("costs", "devices suffice", "recommended</td>", "times as large"):
        assert (claim in html) == (not few and claim != "times as large"), claim
    for line in ("exact-ift", "broyden-reuse", "jacobian-free"):  # each strategy has its line on the first screen
        assert f">{line}</td>" in html[: html.index("<h2>")]


@pytest.mark.usefixtures("no_charts")
def test_no_price_no_money(tmp_path: Path):
    study, results = made(cost={"trainings_per_month": 40.0})
    page.write(tmp_path, study, results, ABOUT)
    assert "costs" not in (tmp_path / "report.html").read_text()
    with pytest.raises(ConfigError, match="price_per_hour needs a currency"):
        made(cost={"price_per_hour": 3.0})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"error": 0.35, "cosine": 0.9901}, "block_error"),  # a cosine near 1 does not hide an error of 35 %
        ({"error": 0.2, "cosine": 0.85}, "block_cosine"),
        ({"error": float("nan"), "cosine": 0.99}, "block_error"),
        (None, "block_unknown"),
    ],
)
def test_a_poor_gradient_blocks_a_recommendation(change: dict[str, float] | None, reason: str):
    _, results = made()
    for each in results:
        if each["cell"]["strategy"]["name"] == "broyden-reuse":
            audits = each["history"]["audits"]
            each["history"]["audits"] = [] if change is None else [audit | change for audit in audits]
            each["cosine"] = None if change is None else change["cosine"]
    (answer,) = recommendations(rows(results), CostSettings())
    assert answer.best is answer.exact
    (line,) = (line for line in answer.lines if line.row.name == "broyden-reuse")
    assert [word for word, _ in line.reasons] == [reason]


def test_what_loses_at_equal_error_is_not_recommended():
    loose = {"name": "exact-ift", "label": "loose", "options": {"rtol": 0.05}}
    _, results = made(strategies=[loose, *THREE])
    for each in results:
        if each["cell"]["strategy"]["label"] == "loose":
            each["times"]["training"] *= 0.5
            each["history"]["audits"] = [audit | {"error": 0.05} for audit in each["history"]["audits"]]
    found = {row.label: row for row in rows(results)}
    assert reference(found["broyden-reuse"], found.values()) is found["exact-ift"]  # not the one that comes first
    (answer,) = recommendations(rows(results), CostSettings())
    assert answer.best is not None
    assert answer.best.label == "loose"
    (line,) = (line for line in answer.lines if line.row.label == "broyden-reuse")
    assert ("block_beaten", {"strategy": "loose"}) in line.reasons
    assert line.peer is not None
    assert line.peer.label == "loose"
    seconds = {
        label: np.array([each["times"]["training"] for each in results if each["cell"]["strategy"]["label"] == label])
        for label in ("broyden-reuse", "loose")
    }
    assert line.equal is not None
    assert line.equal.mean == pytest.approx(stats.gmean(seconds["broyden-reuse"] / seconds["loose"]))
    assert "no_equal" not in [word for word, _ in answer.warnings]
    (alone,) = recommendations([row for row in rows(results) if row.label != "loose"], CostSettings())
    assert "no_equal" in [word for word, _ in alone.warnings]
    assert all(line.equal is None for line in alone.lines)


def test_the_error_of_older_audits_follows_from_cosine_and_norms():
    rng = np.random.default_rng(0)
    exact, own = rng.standard_normal((2, 30))
    cosine = float(exact @ own / np.linalg.norm(exact) / np.linalg.norm(own))
    audit = {"cosine": cosine, "ratio": float(np.linalg.norm(own) / np.linalg.norm(exact))}
    assert audit_error(audit) == pytest.approx(np.linalg.norm(own - exact) / np.linalg.norm(exact))


def test_resident_memory_is_never_reported():
    _, results = made(models=["dense"])
    older = [{k: v for k, v in each.items() if k != "step_memory"} for each in results]
    assert all(row.metric("step_memory") is None for row in rows(older))
    assert "plot_memory" not in plots.plots(rows(older))
    on_gpu = [each | {"device": "NVIDIA H200"} for each in older]
    assert all(row.metric("step_memory").mean == 1e7 for row in rows(on_gpu))  # type: ignore[union-attr]


def test_nothing_trained(tmp_path: Path):
    study, results = made(models=["dense"])
    failed = [{"status": "failed", "reason": "error", "detail": "x", "cell": each["cell"]} for each in results]
    found = page.write(tmp_path, study, failed, ABOUT)
    assert "no training finished" in (tmp_path / "report.html").read_text()
    assert "–" in table.markdown(found)


@pytest.mark.usefixtures("no_charts")
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


def test_charts_use_an_installed_font_for_japanese_and_warn_once_without_one(monkeypatch) -> None:
    from matplotlib.font_manager import fontManager

    def title(canvas: charts.Canvas) -> bool:
        canvas.axes.set_title("学習時間")
        return True

    installed = fontManager.ttflist[0].name
    monkeypatch.setattr(charts, "JAPANESE", ("A family that is missing", installed))
    charts.fonts.cache_clear()
    assert charts.fonts() == ("sans-serif", installed)
    monkeypatch.setattr(charts, "JAPANESE", ("A family that is missing",))
    monkeypatch.setattr(charts, "_warned", [])
    charts.fonts.cache_clear()
    with pytest.warns(UserWarning, match="No installed font has all characters") as caught:
        drawn = [charts.draw(salt, title) for salt in "ab"]
    assert all("学習時間" in svg for svg in drawn)
    assert len(caught) == 1
    charts.fonts.cache_clear()


def test_results_without_their_history_of_epochs_have_the_other_plots() -> None:
    _, results = made()
    whole = plots.plots(rows(results))
    for each in results:
        each["history"] = {"audits": each["history"]["audits"]}
    trimmed = plots.plots(rows(results))
    assert set(whole) - set(trimmed) == {"plot_accuracy", "plot_evaluations", "plot_certificate"}
    assert trimmed["plot_error"]


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
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == html.count("<script") == 1
    assert f"script-src 'sha256-{digest}'\"" in html.replace("&#39;", "'")  # no other script may run
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


def test_every_row_is_drawn_with_its_error():
    labels = [{"name": "exact-ift", "label": f"row {i}", "options": {"rtol": 10.0**-i}} for i in range(1, 13)]
    _, results = made(models=["dense"], strategies=labels)
    for word, svg in plots.plots(rows(results)).items():
        for i in range(1, 13):
            assert f"row {i} (error 1.3e-04)" in svg, (word, i)
    numbers = [(charts.colour(i), charts.mark(i), charts.DASHES[i // 8 % 4]) for i in range(32)]
    assert len(set(numbers)) == 32


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = [tuple(map(float, point)) for point in rng.integers(0, 12, (60, 2))]
    found = {points[i] for i in front(points)}
    wanted = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert found == wanted
    assert front([(1.0, float("nan")), (2.0, 1.0)]) == [1]
    _, results = made(models=["dense"])
    assert plots.measured(rows(results))[1] == (
        1,
        pytest.approx(np.mean([r["times"]["training"] for r in results[1::3]])),
        pytest.approx(0.08 * 1.25),
    )


@pytest.mark.parametrize("language", ["en", "ja"])
def test_a_japanese_page_has_no_english_label(tmp_path: Path, language: str):
    gates = [{"stage": "pilot", "strategy": "exact-ift", "metric": "time_ratio", "at_most": 0.5}]
    cost = {"price_per_hour": 450.0, "currency": "JPY", "scale": 1e9}
    study, results = made(language=language, gates=gates, cost=cost)
    page.write(tmp_path, study, results, ABOUT | {"machine": {"cpu": "x", "usable_cores": 2}})
    text = re.sub(r"<(style|script|pre).*?</\1>", "", (tmp_path / "report.html").read_text(), flags=re.DOTALL)
    english = (
        "epoch",
        "seconds",
        "per step",
        "forward",
        "backward",
        "cosine",
        "time_ratio",
        "pilot:",
        "usable",
        "gradient",
    )
    for word in english:
        assert (word in re.sub(r"<[^>]*>", "\n", text)) == (language == "en" and word != "pilot:"), word
    assert ("円 です" in text) == (language == "ja")
    assert ("JPY" in text) == (language == "en")


@pytest.mark.usefixtures("no_charts")
def test_the_pages_figures_are_those_of_the_raw_results(tmp_path: Path):
    """Each cell of the table and of the first screen, computed again from the cells of results.json."""
    study, results = made(models=["dense"])
    page.write(tmp_path, study, results, ABOUT)
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    html = (tmp_path / "report.html").read_text()
    lines, *_ = (
        re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL) for part in re.findall(r"<tbody>(.*?)</tbody>", html, re.S)
    )
    by_label = {label: [c for c in cells if c["cell"]["strategy"]["label"] == label] for label in THREE}
    whole = {label: np.array([c["times"]["training"] for c in mine]) for label, mine in by_label.items()}
    for line in lines:
        texts = re.findall(r"<td[^>]*>([^<]*)", line.replace("\N{NO-BREAK SPACE}", " "))
        label, _, error, cosine, accuracy, time, *_ = texts
        mine = by_label[label]
        errors = [np.mean([audit["error"] for audit in c["history"]["audits"]]) for c in mine]
        assert float(error) == pytest.approx(np.mean(errors), rel=0.05)
        assert float(cosine) == pytest.approx(np.mean([c["cosine"] for c in mine]), abs=1e-4)
        if label == "exact-ift":
            assert (accuracy, time) == ("–", "–")
            continue
        gap = [c["test_accuracy"] - e["test_accuracy"] for c, e in zip(mine, by_label["exact-ift"], strict=True)]
        low, high = stats.ttest_1samp(gap, 0.0).confidence_interval(0.95)
        wanted = f"{100 * np.mean(gap):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        assert accuracy == wanted.replace("-", "−")
        ratio = np.log(whole[label] / whole["exact-ift"])
        ends = np.exp(stats.ttest_1samp(ratio, 0.0).confidence_interval(0.95))
        assert time == f"{np.exp(ratio.mean()):.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


@pytest.mark.usefixtures("no_charts")
def test_a_page_written_again_keeps_the_machine_of_its_figures(tmp_path: Path):
    study, results = made(models=["dense"])
    first = {"cpu": "first", "date": "2026-01-01", "load_before": [0.1, 0.2, 0.3]}
    later = first | {"date": "2026-01-03", "load_before": [4.0, 0.1, 0.3]}
    for each, machine in zip(results, [first, later] * 9, strict=False):
        each["measured"] = machine
    del results[0]["measured"]  # as older versions left it
    page.write(tmp_path, study, results, ABOUT)
    html = (tmp_path / "report.html").read_text()
    for text in ("a &lt;fast&gt; one", "2026-01-01 – 2026-01-03", "0.1–4.0", "2 different machines"):
        assert text in html, text


@pytest.mark.usefixtures("no_charts")
def test_writing_a_report_again_keeps_machine_and_command(tmp_path: Path):
    place = Store(tmp_path / "out")
    first = {"machine": {"cpu": "first", "load_before": [0.1]}, "command": "deqcore study a.toml"}
    place.open({"settings": {}, **first})
    assert main._about(place, "deqcore study a.toml --language ja", new=False) == first
    more = main._about(place, "deqcore study b.toml", new=True)  # trained more: the new command reproduces all of it
    assert more == first | {"command": "deqcore study b.toml"}
    assert set(main._about(Store(tmp_path / "other"), "x", new=True)) == {"machine", "command"}


def test_two_studies_side_by_side(tmp_path: Path):
    study, old = made(models=["dense"])
    _, new = made(models=["dense"], strategies=["exact-ift", "broyden-reuse", "neumann"])
    for each in new:
        each["times"] = {part: 0.5 * value for part, value in each["times"].items()}
        each["test_accuracy"] += 0.01
    for name, results in (("old", old), ("new", new)):
        page.write(tmp_path / name, study, results, ABOUT)
    console = Console(width=250, record=True, file=io.StringIO())
    main.compare(tmp_path / "old", tmp_path / "new", None, "en", console)
    text, html = console.export_text(), (tmp_path / "new" / "compare.html").read_text()
    for shown in (text, html):
        for part in (
            "new compared with old",
            "+1.00 [+1.00, +1.00]",
            "0.50 [0.50, 0.50]",
            "Only in old:",
            "Only in new:",
        ):
            assert part in shown, part
        assert "jacobian-free" in shown
    with pytest.raises(StudyError, match=r"has no results\.json"):
        main.compare(tmp_path, tmp_path / "new", None, "en", console)

"""The verdicts of the evidence, from synthetic results, and the data that its studies are run in."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import evidence
from deqcore.errors import DeqcoreError
from deqcore.study.report.summary import rows

LABELS = ("exact-ift", "broyden-reuse", "plain reuse", "jacobian-free")
ADAPTIVE = ("exact-ift", "jacobian-free", "adaptive")


def results(accuracy: dict[str, list[float]]) -> list[dict[str, Any]]:
    found = []
    for label, values in accuracy.items():
        for seed, value in enumerate(values):
            cell = {
                "data": {"label": "d"},
                "backend": "torch",
                "model": {"name": "m", "width": 8},
                "solver": {"name": "broyden", "options": {}},
                "strategy": {"label": label, "name": label},
                "rtol": 1e-3,
                "seed": seed,
            }
            figures = dict.fromkeys(("evaluations_most", "unconverged", "adjoint_residual", "fallback"))
            seconds = 1.0 + [*LABELS, "adaptive"].index(label) + 0.1 * seed
            found.append(
                {
                    "status": "ok",
                    "cell": cell,
                    "test_accuracy": value,
                    "times": {"training": seconds},
                    "figures": {**figures, "vjps_most": 3.0},
                    "cosine": 0.5,
                }
            )
    return found


ACCURACY = {
    "exact-ift": [0.90, 0.92, 0.91, 0.93],
    "broyden-reuse": [0.90, 0.915, 0.912, 0.93],
    "plain reuse": [0.5, 0.4, 0.6, 0.45],
    "jacobian-free": [0.89, 0.90, 0.90, 0.905],
}


def test_verdicts_are_paired_over_seeds():
    lines = evidence.verdicts("digits-torch", rows(results(ACCURACY)))
    exact, certified, free = (np.array(ACCURACY[LABELS[i]]) for i in (0, 1, 3))
    errors = (exact - free).mean() / stats.sem(exact - free)
    assert errors > 2
    assert f"{errors:.1f} standard errors: the task counts" in lines[0]
    low, high = stats.ttest_rel(certified, exact).confidence_interval(0.95)
    assert f"[{100 * low:+.2f}, {100 * high:+.2f}]" in lines[2]
    assert lines[2].endswith(f"lower end at least -1.0: {'met' if low >= -0.01 else 'MISSED'}.")
    assert "cosine of its gradient 0.500" in lines[1]
    assert "of Jacobian-free (at most 1.15: met)" in lines[4]
    assert "of exact (below 1: MISSED)" in lines[4]


def test_adaptive_is_judged_by_its_interval_and_its_time():
    chosen = {name: ACCURACY[name] for name in ("exact-ift", "jacobian-free")}
    near = [value + offset for value, offset in zip(ACCURACY["exact-ift"], (0.001, -0.002, 0.002, 0.0), strict=True)]
    for shift, verdict in ((0.0, "met"), (0.01, "MISSED"), (-0.01, "MISSED")):
        gaps = np.array(near) + shift
        found = rows(results(chosen | {"adaptive": list(gaps)}))
        lines = evidence.verdicts("digits-torch", found)
        low, high = stats.ttest_rel(gaps, ACCURACY["exact-ift"]).confidence_interval(0.95)
        words = f"[{100 * low:+.2f}, {100 * high:+.2f}] points (within ±1: {verdict})."
        assert lines[1].startswith("- adaptive against exact")
        assert lines[1].endswith(words)
        assert "of Jacobian-free (at most 1.25: met)" in lines[2]
    untimed = rows([evidence._untimed(each) for each in results(chosen | {"adaptive": near})])
    assert evidence.verdicts("digits-torch", untimed)[2].endswith("against Jacobian-free not timed (at most 1.25).")


def test_a_task_where_nothing_differs_does_not_count():
    same = ACCURACY | {"jacobian-free": [0.905, 0.91, 0.92, 0.925]}
    assert "does not count as evidence" in evidence.verdicts("text-torch", rows(results(same)))[0]
    assert "lower end" not in evidence.verdicts("text-torch", rows(results(same)))[2]


def test_one_seed_says_nothing():
    alone = evidence.verdicts("digits-torch", rows(results({name: values[:1] for name, values in ACCURACY.items()})))
    assert alone[0] == "- Exact gradients against Jacobian-free: +1.00 points."
    assert alone[2].endswith("lower end at least -1.0: one seed cannot decide.")
    assert "2.00 of exact (below 1: one seed cannot decide)" in alone[4]


def test_what_was_not_timed_has_no_verdict():
    found = results(ACCURACY)
    for each in found:
        if each["cell"]["strategy"]["label"] == "jacobian-free":
            each["times"] = {"training": None}
    (line,) = (line for line in evidence.verdicts("digits-torch", rows(found)) if "Whole training" in line)
    assert "against Jacobian-free not timed (at most 1.15), 1.88 [1." in line
    assert line.endswith("of exact (below 1: MISSED).")
    for each in found:
        each["times"] = {"training": None}
    assert not any("Whole training" in line for line in evidence.verdicts("digits-torch", rows(found)))


def test_a_section_says_how_many_seeds_were_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evidence, "HOME", tmp_path)
    (tmp_path / "digits.toml").write_text("[study]\nseeds = [0, 1, 2, 3, 4]\n")
    found = [each | {"warm_up": None, "peak_memory": None} for each in results(ACCURACY)]
    for each in found:
        each["times"] = dict.fromkeys(("forward", "backward", "update", "step")) | each["times"]
    machine = {"cpu": "a CPU", "usable_cores": 2, "load_before": [0.0, 0.0, 0.0], "date": "2026-01-01"}

    def section() -> str:
        (tmp_path / "digits-torch.json").write_text(json.dumps({"machine": machine, "cells": found}))
        return evidence._section("digits-torch")

    assert "seeds finished: 4 to 4 of 5.\n" in section()
    for each in found[1:4]:
        each["times"] = each["times"] | {"training": None}
    assert "seeds finished: 4 to 4 of 5, timed alone: 1 to 4.\n" in section()


def test_a_gap_that_grows_is_reported():
    found = results(ACCURACY)
    for each in found:
        label, noise = each["cell"]["strategy"]["label"], 1e-3 * each["cell"]["seed"]
        loss = 0.1 + noise if label == "plain reuse" else 0.0
        each["rounds"] = [{"test_accuracy": 0.9 - loss * number} for number in range(3)]
    lines = evidence.verdicts("rounds-torch", rows(found))
    (plain,) = (line for line in lines if line.startswith("- plain reuse, gap"))
    assert "round 1: +0.00" in plain
    assert "in round 3: -20.30" in plain
    assert plain.endswith("it builds up.")
    assert sum("no build-up is shown" in line for line in lines) == 2


def test_images_are_unpacked_and_texts_are_linked(tmp_path: Path):
    source, place = tmp_path / "source", tmp_path / "data"
    (source / "train" / "cat").mkdir(parents=True)
    (source / "train" / "cat" / "1.jpg").write_bytes(b"x")
    (source / "wikitext-2").mkdir()
    with tarfile.open(source / "cifar10-jpeg.tar.gz", "w:gz") as archive:
        archive.add(source / "train", "train")
    evidence.prepare(["images-torch", "text-torch", "digits-torch"], source, place)
    assert (place / "cifar10" / "train" / "cat" / "1.jpg").read_bytes() == b"x"
    assert (place / "wikitext-2").is_dir()
    with pytest.raises(DeqcoreError, match="--data must be a folder with 'cifar10'"):
        evidence.prepare(["images-torch"], None, tmp_path / "other")


def test_a_study_that_there_is_not(capsys: pytest.CaptureFixture[str]):
    assert evidence.main(["digit-torch"]) == 2
    assert "Did you mean 'digits-torch'" in capsys.readouterr().err


def test_times_that_were_not_taken_alone_are_left_out_where_others_were():
    first, second = results({"exact-ift": [0.9, 0.8]})
    times = {"training": None}
    assert evidence._alone([first, second]) == [first, second]  # one training at a time needs no second pass
    assert evidence._alone([first | {"serial": True}, second]) == [
        first | {"serial": True},
        second | {"times": times, "warm_up": None},
    ]


@pytest.mark.parametrize("name", evidence.STUDIES + evidence.ON_GPU)
def test_the_settings_are_a_study_with_what_the_verdicts_ask_for(name: str):
    from deqcore.study.settings import read

    study = read(evidence.settings(name), name)
    assert set(ADAPTIVE if name.startswith("adaptive") else LABELS) <= {each.label for each in study.strategies}
    assert len(study.seeds) == (10 if name.startswith("adaptive_digits") else 5)

"""The evidence on certified reuse: results survive their way to a file, sections are kept, wrong usage is reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from benchmarks.certificates.measure import measure
from benchmarks.certificates.problems import linear_problems
from benchmarks.certificates.report import page, verdicts
from benchmarks.certificates.sections import pack, unpack
from benchmarks.certificates.trained import Training

ROOT = Path(__file__).resolve().parents[2]


def test_results_survive_json_and_agree_with_dense_linear_algebra():
    case = next(linear_problems(2, seed=50))
    result = measure(case)
    training = Training("cell", 3, 0.01, 1.0)
    (again,), (learnt,) = unpack(json.loads(json.dumps(pack([result], [training], 1.0), default=float)))
    assert learnt == training
    assert again.curve == result.curve
    for mine, other in zip(again.outcomes, result.outcomes, strict=True):
        for name, value in vars(other).items():
            np.testing.assert_array_equal(getattr(mine, name), value)
    assert [v.found for v in verdicts([again])] == [v.found for v in verdicts([result])]
    assert (again.outcomes[0].residual <= 0.1).all()
    assert "**images-conv was not measured in full**: no time" in page(
        [again], [], 1.0, "x", {"images-conv": "no time"}
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--samples", "0"], "must be above 0"),
        (["--images", "/no/such/folder"], "the folder does not exist"),
        (["--section", "images-conv"], "Give their folder as --images"),
        (["--section", "digit"], "invalid choice"),
    ],
)
def test_bad_usage(monkeypatch, capsys, given, message):
    from benchmarks.certificates import __main__ as command

    monkeypatch.setattr(sys, "argv", ["certificates", *given])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_section_that_runs_out_of_time_is_named_and_the_others_stay(tmp_path, monkeypatch, capsys):
    from benchmarks.certificates import __main__ as command

    def run(*more: str) -> str:
        given = ["certificates", "--quick", "--samples", "1", "--out", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", given)
        command.main()  # each section runs in a process of its own
        return capsys.readouterr().out

    run("--section", "random-cells")
    said = run("--section", "linear", "--minutes", "0.001")
    assert "not measured in full  linear: ended after 1 s" in said
    text = (tmp_path / "certificates.md").read_text()
    assert "attention cell, random weights" in text
    assert "**linear was not measured in full**" in text

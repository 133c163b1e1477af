"""The figures in the READMEs are those of the committed measurements, in both languages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.ja.md"]
SECTIONS = json.loads((ROOT / "docs" / "benchmarks" / "results.json").read_text(encoding="utf-8"))["sections"]
# Columns of the table of peers, and what the contenders of a row are called in the measurements.
PEERS = ["torchdeq", "jaxopt", "optimistix", "xitorch"]
ROWS = [
    ("torch", "conv", "Broyden", "deqcore broyden", ["torchdeq broyden", "", "", "xitorch broyden1"]),
    ("torch", "conv", "Anderson", "deqcore anderson", ["torchdeq anderson", "", "", "xitorch anderson_acc"]),
    ("jax", "dense", "Broyden", "deqcore broyden", ["", "jaxopt broyden", "", ""]),
    ("jax", "dense", "Anderson", "deqcore anderson", ["", "jaxopt anderson", "", ""]),
    (
        "jax",
        "dense",
        "plain iteration|単純反復",
        "deqcore picard",
        ["", "jaxopt fixed-point", "optimistix fixed-point", ""],
    ),
]
MISSED = "not reached|未到達"


def seconds(framework: str, case: str, contender: str) -> float | None:
    """The median of a contender's times; None if it has not reached the residual."""
    rows = SECTIONS[f"cases-{framework}"]["rows"]
    (row,) = [row for row in rows if (row["case"], row["contender"]) == (case, contender)]
    return median(row["seconds"]) if row["reached"] else None


def cells(page: str, framework: str, solver: str) -> list[str]:
    """One row of the table of peers."""
    name = {"torch": "PyTorch", "jax": "JAX"}[framework]
    (line,) = re.findall(rf"^\| (?:{solver})[^|]*{name}[^|]*\|(.*)\|$", page, re.M)
    return [cell.strip() for cell in line.split("|")]


def on_the_convolution() -> dict[str, dict]:
    """Training steps by layer."""
    return {step["layer"]: step for step in SECTIONS["training-torch"]["steps"] if step["case"] == "conv"}


@pytest.mark.parametrize("readme", READMES)
@pytest.mark.parametrize(("framework", "case", "solver", "ours", "theirs"), ROWS)
def test_times_beside_peers(readme, framework, case, solver, ours, theirs):
    own, *shown = cells((ROOT / readme).read_text(encoding="utf-8"), framework, solver)
    assert own == "1"
    for cell, peer in zip(shown, theirs, strict=True):
        if not peer:
            assert cell == "–"
        elif (time := seconds(framework, case, peer)) is None:
            assert re.fullmatch(MISSED, cell)
        else:
            quotient = time / seconds(framework, case, ours)
            assert re.match(r"[\d.]+", cell)[0] == f"{quotient:.1f}", f"{peer}: {quotient}"
    if ours == "deqcore anderson" and framework == "jax":
        vmap = seconds(framework, case, "jaxopt anderson (vmap)")
        assert shown[1].endswith(f"`vmap` {vmap / seconds(framework, case, ours):.1f}")


@pytest.mark.parametrize("readme", READMES)
def test_limits(readme):
    page = (ROOT / readme).read_text(encoding="utf-8")
    steps = on_the_convolution()
    default, ours = steps["torchdeq defaults"], steps["deqcore, defaults"]
    slower = median(a / b for a, b in zip(ours["step"], default["step"], strict=True))
    broyden = seconds("jax", "dense", "deqcore broyden") / seconds("jax", "dense", "jaxopt anderson (vmap)")
    figures = json.loads((ROOT / "docs" / "pictures" / "figures.json").read_text(encoding="utf-8"))
    kept = f"{100 * figures['certificate: share of targets kept']:.1f} %"
    certified = str(figures["certificate: samples"])
    for figure in (f"{slower:.1f}", f"{default['cosine']:.2f}", f"{broyden:.1f}", kept, certified):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", page), figure


def contenders(framework: str) -> dict[tuple[str, str], dict]:
    return {(row["case"], row["contender"]): row for row in SECTIONS[f"cases-{framework}"]["rows"]}


def quotient(a: list[float], b: list[float]) -> float:
    """The median over rounds, in which both took turns."""
    return median(x / y for x, y in zip(a, b, strict=True))


def test_choosing():
    page = " ".join((ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").split())
    steps = on_the_convolution()
    share = {layer: quotient(step["step"], steps["deqcore, defaults"]["step"]) for layer, step in steps.items()}
    cosine = {layer: step["cosine"] for layer, step in steps.items()}
    certified, loose, cheap = (
        "deqcore broyden, certified reuse",
        "deqcore, gradient error 0.1",
        "deqcore, jacobian-free",
    )
    theirs = quotient(steps[certified]["step"], steps["torchdeq broyden, IFT broyden"]["step"])
    rows = contenders("torch")
    overhead = {
        case: [
            quotient(row["seconds"], [row["evaluations"] * one for one in row["reference"]])
            for row in (
                rows[case, f"deqcore {solver}"] for solver in ("picard", "anderson", "broyden", "newton-krylov")
            )
        ]
        for case in ("conv", "dense")
    }
    count = {key: row["evaluations"] for key, row in rows.items()}
    conv, dense = overhead["conv"], overhead["dense"]
    for text in (
        f"cosine {cosine['deqcore, defaults']:.4f}; the default",
        f"cosine {cosine[loose]:.4f} on the convolution at {share[loose]:.0%} of",
        f"cosine {cosine[certified]:.3f}, {share[certified]:.0%} of the step time of the defaults; {theirs:.0%} of",
        f"| {share[cheap]:.0%} of the step time; cosine {cosine[cheap]:.2f}",
        f"its cosine was {cosine['deqcore broyden, plain reuse']:.2f} on the convolution",
        f"needs {count['conv', 'deqcore picard']} evaluations to 1e-5 where Anderson needs "
        f"{count['conv', 'deqcore anderson']}",
        f"{count['dense', 'deqcore anderson']} evaluations on the dense cell (plain iteration "
        f"{count['dense', 'deqcore picard']}, torchdeq's Anderson {count['dense', 'torchdeq anderson']})",
        f"{count['slow-modes', 'deqcore anderson']} evaluations on 20 slow modes",
        f"`broyden` takes {count['slow-modes', 'deqcore broyden']}",
        f"{count['slow-modes', 'deqcore newton-krylov']} evaluations and products on 20 slow modes",
        f"For the convolution it is {conv[0]:.2f} (`picard`), {conv[1]:.2f} (`anderson`), {conv[2]:.2f} (`broyden`) "
        f"and {conv[3]:.1f} (",
        f"is cheaper, it is {dense[0]:.2f}, {dense[1]:.2f}, {dense[2]:.2f} and {dense[3]:.1f}",
    ):
        assert text.replace("%", " %") in page, text


def test_tuning():
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    rows = contenders("torch")
    for solver in ("picard", "anderson", "broyden"):
        plain, compact = (rows["mixed-conv", f"deqcore {solver}{suffix}"]["seconds"] for suffix in ("", " (compact)"))
        assert f"{quotient(compact, plain):.2f} (`{solver}`)" in page


def test_concepts():
    page = " ".join((ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").split())
    found = json.loads((ROOT / "docs" / "pictures" / "figures.json").read_text(encoding="utf-8"))
    plain, free = found["worst cosine, plain reuse"], found["worst cosine, jacobian-free"]
    certified, vjps = found["worst cosine, certified reuse, target 0.1"], found["mean vjps, certified"]
    assert found["steps to 1e-4, picard"] == -1
    for text in (
        f"`anderson` takes {found['steps to 1e-4, anderson']}, `broyden` {found['steps to 1e-4, broyden']}, and "
        f"`newton-krylov` {found['steps to 1e-4, newton-krylov']} steps",
        f"plain reuse has a cosine of {plain['0']:.2f} with the exact gradient; "
        f"with two, the cosine is −{-plain['2']:.2f} "
        f"and the norm is up to {int(found['largest norm ratio, plain reuse']['2'])} times",
        f"falls as well (to {free['2']:.2f})",
        f"stays at {min(certified.values()):.2f} or better, for {min(vjps.values()):.0f} to "
        f"{max(vjps.values()):.0f} vjps",
        f"{found['certificate: samples']} samples",
        f"{found['certificate: share at least half the error']:.1%} of the estimates",
        f"{found['certificate: share at most three times the error']:.1%} at most three times",
        f"{found['certificate: share of targets kept']:.1%} of the samples keep their target",
    ):
        assert text.replace("%", " %") in page, text


@pytest.mark.parametrize("name", ["proof-of-concept.md", "proof-of-concept.ja.md"])
def test_proof_of_concept(name):
    page = " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split()).replace(" %", "")
    stored = json.loads((ROOT / "docs" / "evidence" / "digits-torch.json").read_text(encoding="utf-8"))
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(stored["cells"], key=lambda each: each["cell"]["seed"]):
        strategy = result["cell"]["strategy"]
        rows.setdefault((strategy["label"] or strategy["name"]) if strategy else "explicit", []).append(result)

    def interval(values: np.ndarray) -> tuple[float, float]:
        return values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5

    accuracy = {each: 100 * np.array([row["test_accuracy"] for row in found]) for each, found in rows.items()}
    seconds = {each: np.log([row["times"]["training"] for row in found]) for each, found in rows.items()}
    lost, chance = interval(accuracy["jacobian-free"] - accuracy["exact-ift"])
    gained, unsure = interval(accuracy["broyden-reuse"] - accuracy["exact-ift"])
    middle, half = interval(seconds["broyden-reuse"] - seconds["exact-ift"])
    assert {len(found) for found in rows.values()} == {5}
    shown = ("exact-ift", "broyden-reuse", "explicit")
    figures = ["{:.2f} ± {:.2f}".format(*interval(accuracy[each])) for each in shown]
    figures += [f"{-lost:.2f}", f"−{chance - lost:.2f}", f"−{-chance - lost:.2f}", f"−{unsure - gained:.2f}"]
    figures += [f"{np.exp(middle):.2f}", f"{np.exp(middle + half):.2f}"]
    figures += [f"{np.exp((seconds['jacobian-free'] - seconds['exact-ift']).mean()):.2f}"]
    figures += [f"{np.exp((seconds['exact-ift'] - seconds['explicit']).mean()):.0f}"]
    figures += [f"{stored['machine']['load_before'][0]:.1f}"]
    figures += [f"{np.mean([row['cosine'] for row in rows['jacobian-free']]):.2f}"]
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", page), figure


def test_the_page_of_warm_starts_has_the_committed_figures():
    pytest.importorskip("torch")
    from benchmarks import warm_starts
    from deqcore.bench.report import markdown

    results = json.loads((ROOT / "docs" / "benchmarks" / "warm_starts.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "warm-starts.md").read_text(encoding="utf-8")
    for table in (list(warm_starts.rows(results)), list(warm_starts.adjoint_rows(results))):
        assert markdown(table, tuple(table[0])) in page

"""The figures in the READMEs are those of the committed measurements, in both languages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import pytest

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
    steps = {step["layer"]: step for step in SECTIONS["training-torch"]["steps"]}
    default, ours = steps["torchdeq defaults"], steps["deqcore, defaults"]
    slower = median(a / b for a, b in zip(ours["step"], default["step"], strict=True))
    broyden = seconds("jax", "dense", "deqcore broyden") / seconds("jax", "dense", "jaxopt anderson (vmap)")
    figures = json.loads((ROOT / "docs" / "pictures" / "figures.json").read_text(encoding="utf-8"))
    kept = f"{100 * figures['certificate: share of targets kept']:.1f} %"
    certified = str(figures["certificate: samples"])
    for figure in (f"{slower:.1f}", f"{default['cosine']:.2f}", f"{broyden:.1f}", kept, certified):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", page), figure

"""The page of tables and plots that `python -m benchmarks` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.results import Results
from benchmarks.steps import Step
from benchmarks.targets import COLUMNS, DEFAULT, Target, targets
from deqcore.bench import plots
from deqcore.bench.report import cells, disturbed, machine_text, markdown, spread
from deqcore.bench.rows import BenchRow
from deqcore.bench.sweeps import STEPS, Point
from deqcore.bench.timing import SHARE, Spread

NOTES: Final = f"""\
- *residual*: ‖f(z) − z‖ / ‖f(z)‖ of the state that each library returns, per sample, in float64: one norm for all. A
  library with a stopping rule of its own gets the loosest tolerance with which every sample reaches it.
- *evaluations*: of f for the slowest sample, counted from outside on torch (products J v, which Newton–Krylov takes,
  are added as the library counts them), as each library counts its steps on JAX.
- *overhead*: seconds / (evaluations × seconds of one stand-alone evaluation measured just before and after).
- *floor*: of a training step, its evaluations of f, vjps and the gradient of the parameters alone, measured in the same
  rounds without a solver.
- *memory*: by how much the process grew during a solve, in states.
- Contenders take turns within each round; rounds in which other processes used more than {100 * SHARE:.0f} % of the
  machine are left out while time allows. Figures are medians, quartiles in parentheses. Compilation and the first
  call stand apart.
- Peers run with their own defaults except for tolerance and step budget. On JAX, jaxopt without *(vmap)*, and
  optimistix, take the whole batch for one system; a compiled f may cost less inside a loop than alone, so an overhead
  below 1 is possible."""
TARGETS: Final = """\
What the project set out to reach, missed targets first. *Memory bound*: the overhead of a solve whose steps move the
vectors that they need once, at the measured speed of `c = a + b` on arrays that no cache holds."""
STEP_COLUMNS: Final = (
    "cell",
    "layer",
    "forward ms",
    "backward ms",
    "step ms (quartiles)",
    "floor ms",
    "f: forward + backward",
    "vjps",
    "residual",
    "cosine",
    "gradient error",
    "note",
)


def write(results: Mapping[str, Any], out: Path) -> None:
    """Write index.md, and the plots where matplotlib is installed."""
    result = Results(results)
    parts = ["# Benchmarks", *_gains(result), _opening(results)]
    pictures = _plots(result, out) if plots.available() else {}
    for framework, title in (("torch", "PyTorch (eager)"), ("jax", "JAX (compiled)")):
        parts += _framework(result, framework, title, pictures)
    if result.steps:
        parts += [
            "## A training step (PyTorch)",
            markdown(step_cells(result.steps.values()), STEP_COLUMNS),
        ]
    parts += ["## Targets", TARGETS, markdown(_missed_first(targets(results)), COLUMNS)]
    parts += ["## How it was measured", NOTES]
    (out / "index.md").write_text("\n\n".join(parts) + "\n")


def _gains(found: Results) -> list[str]:
    """Return the default solver beside the fastest solver of each other library, per problem."""
    rows, ahead = [], 0
    for framework, case in found.problems():
        default = found.row(framework, case, DEFAULT)
        if default is None:
            continue
        libraries = {row.library for row in found.rows if row.framework == framework} - {"deqcore"}
        best = {name: found.fastest(framework, case, lambda row, name=name: row.library == name) for name in libraries}
        timed = {name: row for name, row in best.items() if row is not None}
        mine = Spread.of(default.seconds).median
        ahead += all(mine <= Spread.of(row.seconds).median for row in timed.values())
        others = [
            f"{name} {row.contender.partition(' ')[2]}: {row.against(default).median:.2f} ×"
            for name, row in sorted(timed.items())
        ]
        missed = sorted(libraries - set(timed))
        others += [f"{name}: no solver reached the residual" for name in missed]
        rows.append(
            {"framework": framework, "problem": case, "default": f"{1e3 * mine:.3g} ms", "others": "; ".join(others)}
        )
    if not rows:
        return []
    text = (
        f"deqcore's default solver, `auto`, is the fastest on {ahead} of {len(rows)} problems, at equal residual and "
        "without a choice by the user. The other libraries are shown with their fastest solver on that problem, as a "
        "multiple of the default's time; a figure below 1 is faster. Where deqcore misses a target of its own, the "
        "[list of targets](#targets) says by how much."
    )
    return ["## The default beside other libraries", text, markdown(rows, tuple(rows[0]))]


def _missed_first(listed: Sequence[Target]) -> list[dict[str, str]]:
    order = sorted(listed, key=lambda target: (target.verdict == "met", target.verdict == "not measured"))
    return [target.cells() for target in order]


def _opening(results: Mapping[str, Any]) -> str:
    sections: Mapping[str, Any] = results["sections"]
    measured = {name: section for name, section in sections.items() if "machine" in section}
    lines = ["Written by `python -m benchmarks`; the numbers behind it are in `results.json`."]
    if results["quick"]:
        lines.append("**Measured with `--quick`: small problems and few rounds, a first look and no result.**")
    for text in dict.fromkeys(machine_text(section["machine"]) for section in measured.values()):
        lines.append(text)
    runs = [
        f"{name} ({section['threads']} threads, commit {section['commit']}, {section['seconds']:.0f} s, load before "
        f"{section['machine']['load_before'][0] if section['machine']['load_before'] else 'unknown'})"
        for name, section in measured.items()
    ]
    lines.append(f"Sections: {'; '.join(runs)}.")
    rows = Results(results).rows
    if busy := disturbed(rows):
        lines.append(f"**The machine was not quiet: {busy} of the kept rounds were disturbed by other processes.**")
    for name, section in sections.items():
        if "error" in section:
            lines.append(f"**Not measured: {name} ({section['error']}).**")
    return "\n\n".join(lines)


def _framework(found: Results, framework: str, title: str, pictures: Mapping[str, str]) -> list[str]:
    rows = [row for row in found.rows if row.framework == framework]
    if not rows:
        return []
    notes = found.section(f"cases-{framework}")["notes"]
    listed = "\n".join(f"- *{name}*: {note}." for name, note in notes.items())
    shown = [f"![{caption}]({file})" for file, caption in pictures.items() if file.startswith(framework)]
    return [f"## {title}", listed, markdown(cells(row) for row in rows), *shown]


def step_cells(steps: Iterable[Step]) -> list[dict[str, str]]:
    """Return the table's rows, by `STEP_COLUMNS`."""

    def ms(seconds: Sequence[float]) -> Spread | None:
        return Spread.of([1e3 * second for second in seconds]) if seconds else None

    rows = []
    for step in steps:
        forward, backward, whole, floor = ms(step.forward), ms(step.backward), ms(step.step), ms(step.floor)
        rows.append(
            {
                "cell": step.case,
                "layer": step.layer,
                "forward ms": f"{forward.median:.3g}" if forward else "",
                "backward ms": f"{backward.median:.3g}" if backward else "",
                "step ms (quartiles)": spread(whole) if whole else "",
                "floor ms": f"{floor.median:.3g}" if floor else "",
                "f: forward + backward": f"{step.forward_evaluations} + {step.backward_evaluations}",
                "vjps": "" if step.vjps is None else str(step.vjps),
                "residual": f"{step.residual:.1e}",
                "cosine": f"{step.cosine:.4f}",
                "gradient error": "" if step.error is None else f"{step.error:.2g}",
                "note": step.note,
            }
        )
    return rows


def _plots(found: Results, out: Path) -> dict[str, str]:
    """Draw all; returns captions by file name."""
    made: dict[str, str] = {}
    for framework in ("torch", "jax"):
        rows: list[BenchRow] = [row for row in found.rows if row.framework == framework]
        if rows:
            file = f"{framework}-overhead.png"
            made[file] = f"Overhead of each solver, {framework}"
            plots.overheads(rows, out / file, made[file])
        curves = found.section(f"curves-{framework}")
        residual = [Point(**point) for point in curves.get("residual", ())]
        for case in dict.fromkeys(point.case for point in residual):
            own = [point for point in residual if point.case == case]
            for x, y in (("evaluations", "residual"), ("seconds", "residual"), ("evaluations", "seconds")):
                file = f"{framework}-{case}-{y}-{x}.png"
                made[file] = f"{case}, {framework}: {y} against {x}"
                plots.curves(own, out / file, made[file], x, y)
        for x in ("batch", "size"):
            swept = [Point(**point) for point in curves.get(x, ())]
            if swept:
                file = f"{framework}-seconds-{x}.png"
                made[file] = f"dense cell, {framework}: seconds of {STEPS} steps against {x}"
                plots.curves(swept, out / file, made[file], x, "seconds")
    return made

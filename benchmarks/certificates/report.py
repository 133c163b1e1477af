"""The verdicts on certified reuse, as a page, as data and as plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.certificates.measure import LEVELS, MAX_REFINE_VJPS, TARGETS, Outcome, Result
from benchmarks.certificates.problems import OWN
from benchmarks.certificates.trained import Training


@dataclass(frozen=True)
class Verdict:
    """One figure against its target."""

    figure: str
    target: str
    found: str
    holds: bool
    remark: str = ""


def pooled(results: Sequence[Result], name: str, targets: Sequence[float] = TARGETS) -> Any:
    """Return an attribute of all outcomes with these targets, as one array."""
    return np.concatenate(
        [np.asarray(getattr(o, name), float) for r in results for o in r.outcomes if o.target in targets]
    )


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Return every target, held or missed."""
    first, second = TARGETS
    undetected = int(pooled(results, "undetected").sum())
    failed = pooled(results, "failed", [first])
    settled = pooled(results, "settled", [first]) > 0
    cosine = pooled(results, "cosine", [second])
    sound = cosine[pooled(results, "failed", [second]) == 0]
    excess = pooled(results, "excess")
    committed = _members(results, SETS["committed problems"]) or results  # elsewhere spaces close, and nothing is left
    ratio = pooled(committed, "ratio")
    there = pooled(results, "settled") > 0
    value = [
        Verdict(
            f"adjoint residual above the target and not reported as failed, samples (targets {first} and {second})",
            "0",
            f"{undetected} of {len(excess)}",
            undetected == 0,
        ),
        Verdict(
            f"reported as failed at max_refine_vjps = {MAX_REFINE_VJPS}, target {first}",
            "≤ 1 %",
            _share(failed),
            failed.mean() <= 0.01,
            _where(results, lambda o: o.target == first and o.failed.any(), lambda o: f"{int(o.failed.sum())}"),
        ),
        Verdict(
            f"cosine with the exact gradient at target {second}, worst sample",
            "≥ 0.98",
            f"{cosine.min():.4f}",
            cosine.min() >= 0.98,
            f"{sound.min():.4f} among the samples not reported as failed" if len(sound) else "all reported as failed",
        ),
        *_apart(failed, cosine, settled),
        Verdict(
            "vjps beyond GMRES from 0 at the same adjoint residual, worst sample",
            "≤ 1",
            f"{int(excess.max())} ({int((excess > 1).sum())} of {len(excess)} samples above 1)",
            excess.max() <= 1,
            _where(results, lambda o: (o.excess > 1).any(), lambda o: f"{int(o.excess.max())} at target {o.target}"),
        ),
        *_apart_vjps(excess, there),
        Verdict(
            "committed problems: estimated over true error at least 0.5",
            "99 %",
            f"{100 * np.mean(ratio >= 0.5):.2f} %",
            np.mean(ratio >= 0.5) >= 0.99,
            _where(committed, lambda o: (o.ratio < 0.5).any(), lambda o: f"{int((o.ratio < 0.5).sum())}"),
        ),
        Verdict("… at most 3", "80 %", f"{100 * np.mean(ratio <= 3):.1f} %", np.mean(ratio <= 3) >= 0.80),
        Verdict("… at most 30", "99 %", f"{100 * np.mean(ratio <= 30):.2f} %", np.mean(ratio <= 30) >= 0.99),
    ]
    value += [item for name, members in SETS.items() for item in _promise(_members(results, members), name)]
    for result in results:
        if result.kind == OWN:
            own, theirs = result.curve[0.01]
            value.append(
                Verdict(
                    f"preconditioned, vjps to residual 0.01 over those of GMRES from 0: {result.case}",
                    "≤ 0.8",
                    f"{own / theirs:.2f} ({own / result.samples:.1f} against {theirs / result.samples:.1f})",
                    own <= 0.8 * theirs,
                    f"{100 * result.seen:.0f} % of the exact u lies in the span of the forward's pairs",
                )
            )
    return value


HIDDEN: Final = "hidden "
SETS: Final[Mapping[str, Callable[[str], bool]]] = {
    "committed problems": lambda case: not case.startswith((HIDDEN, "slow ")) and ", n " not in case,
    "small tanh cells": lambda case: case.startswith("tanh cell") and ", n " in case,
    "dense slow modes": lambda case: case.startswith("slow "),
    "hidden mode, 5 % and more of the cotangent": lambda case: case.startswith(HIDDEN) and not _faint(case),
    "hidden mode, 1 % and 2 %": lambda case: case.startswith(HIDDEN) and _faint(case),
    "all but hidden modes of 1 % and 2 %": lambda case: not _faint(case),
}
"""Sets of problems, by their names."""


def _faint(case: str) -> bool:
    return case.startswith(HIDDEN) and ("share 1 %" in case or "share 2 %" in case)


def _members(results: Sequence[Result], belongs: Callable[[str], bool]) -> list[Result]:
    return [result for result in results if belongs(result.case)]


def _promise(results: Sequence[Result], name: str) -> list[Verdict]:
    """Return whether what is reported as within the target is, and at what cost."""
    if not results:
        return []
    kept = Kept.of([o for r in results for o in r.outcomes])
    return [
        Verdict(
            f"{name}: true error above the target among samples reported as within it",
            "≤ 0.5 %",
            f"{100 * kept.wrong:.2f} % of {kept.certified}",
            kept.wrong <= 0.005,
            f"worst {kept.worst:.3f} (estimate {kept.stated:.3f}, target {kept.target})" if kept.wrong else "",
        ),
        Verdict(f"{name}: reported as failed", "≤ 1 %", f"{100 * kept.failed:.2f} %", kept.failed <= 0.01),
        Verdict(f"{name}: vjps over the fewest that suffice", "≤ 1.1", f"{kept.cost:.3f}", kept.cost <= 1.1),
    ]


@dataclass(frozen=True)
class Kept:
    """How a promise was kept, over samples whose forward solve converged.

    Attributes:
        certified: samples reported as within the target.
        wrong: share of these with a true error above it.
        worst: their largest true error over the target, as an error.
        stated: its estimate.
        target: its target.
        failed: share of all samples reported as failed.
        cost: vjps over the fewest after which the same space's solution is within the target.
    """

    certified: int
    wrong: float
    worst: float
    stated: float
    target: float
    failed: float
    cost: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Kept:
        """Return all outcomes together."""

        def joined(name: str) -> Any:
            return np.concatenate([np.asarray(getattr(o, name), float) for o in outcomes])

        sound, wrong, error = joined("certified") > 0, joined("wrong") > 0, joined("error")
        target = np.concatenate([np.full(len(o.error), o.target) for o in outcomes])
        sufficient, settled = joined("sufficient"), joined("settled") > 0
        worst = int(np.argmax(np.where(wrong, error / target, 0.0)))
        counted = sound & np.isfinite(sufficient)
        return cls(
            int(sound.sum()),
            float(wrong.sum() / max(1, sound.sum())),
            float(error[worst]),
            float(joined("reported_error")[worst]),
            float(target[worst]),
            float((~sound & settled).sum() / max(1, settled.sum())),
            float(joined("vjps")[counted].sum() / max(1.0, sufficient[counted].sum())),
        )


def _promises(results: Sequence[Result]) -> list[str]:
    """Return the promise by set, target and reuse, as rows of a table."""
    lines = [
        "| set | target | reuse | certified | above the target | worst error (its estimate) | failed | "
        "vjps over the fewest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, belongs in SETS.items():
        members = _members(results, belongs)
        for target in TARGETS if members else ():
            for reuse, field in (("witness", "outcomes"), ("none", "alone"), ("precondition", "preconditioned")):
                kept = Kept.of([o for r in members for o in getattr(r, field) if o.target == target])
                worst = f"{kept.worst:.3f} ({kept.stated:.3f})" if kept.wrong else "–"
                lines.append(
                    f"| {name} | {target} | {reuse} | {kept.certified} | {100 * kept.wrong:.2f} % | {worst} | "
                    f"{100 * kept.failed:.2f} % | {kept.cost:.3f} |"
                )
    return lines


def _share(found: Any) -> str:
    return f"{100 * found.mean():.2f} % ({int(found.sum())} of {len(found)})"


def _apart(failed: Any, cosine: Any, settled: Any) -> list[Verdict]:
    """Judge failures and cosines where z is a fixed point; elsewhere the solution of f has no gradient."""
    if settled.all() or not settled.any():
        return []
    fails, worst = failed[settled], cosine[settled].min()
    name = "… only samples whose forward solve converged"
    return [
        Verdict(
            f"{name}: reported as failed",
            "≤ 1 %",
            _share(fails),
            fails.mean() <= 0.01,
            f"of those whose solve did not: {_share(failed[~settled])}",
        ),
        Verdict(
            f"{name}: worst cosine",
            "≥ 0.98",
            f"{worst:.4f}",
            worst >= 0.98,
            f"of those whose solve did not: {cosine[~settled].min():.4f}",
        ),
    ]


def _apart_vjps(excess: Any, settled: Any) -> list[Verdict]:
    """Judge the vjps of samples whose forward solve converged."""
    if settled.all() or not settled.any():
        return []
    most = int(excess[settled].max())
    name = "… only samples whose forward solve converged: vjps beyond"
    return [Verdict(name, "≤ 1", str(most), most <= 1, f"of those whose solve did not: {int(excess[~settled].max())}")]


def _where(results: Sequence[Result], is_bad: Any, describe: Any) -> str:
    result = [f"{r.case}: {describe(o)}" for r in results for o in r.outcomes if is_bad(o)]
    return "; ".join(result)


def page(
    results: Sequence[Result],
    trainings: Sequence[Training],
    seconds: float,
    machine: str,
    missing: Mapping[str, str],
) -> str:
    """Return the page in Markdown; `missing`: sections that were not measured in full, and why."""
    lines = [
        "# Certified reuse: what it costs, what it reports, what is true",
        "",
        f"`python -m benchmarks.certificates`, {machine}, {seconds:.0f} s. Forward: Broyden with all pairs kept, "
        f"float32, rtol 1e-4, 100 steps at most; max_refine_vjps = {MAX_REFINE_VJPS}. Truth: a dense float64 Jacobian "
        "by automatic differentiation of the float64 function, LAPACK, and a textbook GMRES, none of them deqcore's.",
        "",
        "| figure | target | found | | remark |",
        "|---|---|---|---|---|",
    ]
    for v in verdicts(results):
        lines.append(f"| {v.figure} | {v.target} | {v.found} | {'holds' if v.holds else '**misses**'} | {v.remark} |")
    lines += [f"\n**{name} was not measured in full**: {why}." for name, why in missing.items()]
    lines += ["", "![Estimated against true error](certificates-scatter.png)", ""]
    lines += ["![vjps to a residual](certificates-vjps.png)", "", "## Is what is certified within the target?", ""]
    lines += [
        "Only samples whose forward solve converged. *reuse*: the option of the strategy. With `precondition` the "
        "Krylov space is that of A M, M being the estimate that the forward solve left; otherwise it is that of A. The "
        "tables above and below have the default, `witness`. *The fewest*: the smallest dimension of the same space "
        "whose solution is within the target, by a textbook GMRES on dense matrices that knows the true error.",
        "",
        *_promises(results),
        "",
        "## By problem",
        "",
    ]
    lines += [
        "| problem | samples | cond(I − J) | forward steps, converged | seen | target | failed | worst cosine | vjps, "
        "GMRES(0) | worst excess | estimate / error: 1, 50, 99 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        for o in r.outcomes:
            lines.append(f"| {_row(r, o)} |")
    if trainings:
        lines += [
            "",
            "## Trained cells",
            "",
            "| cell | epochs | training loss | training accuracy |",
            "|---|---|---|---|",
        ]
        lines += [f"| {t.name} | {t.epochs} | {t.loss:.3f} | {100 * t.accuracy:.1f} % |" for t in trainings]
    lines += ["", "## vjps of preconditioned GMRES to an adjoint residual, over those of GMRES from 0", ""]
    lines += ["| problem | " + " | ".join(map(str, LEVELS)) + " |", "|---|" + "---|" * len(LEVELS)]
    for r in results:
        cells = (f"{r.curve[level][0] / max(1, r.curve[level][1]):.2f}" for level in LEVELS)
        lines.append(f"| {r.case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _row(r: Result, o: Outcome) -> str:
    quantiles = "/".join(f"{q:.2g}" for q in np.quantile(o.ratio, [0.01, 0.5, 0.99]))
    return " | ".join(
        [
            r.case,
            str(r.samples),
            f"{r.condition:.0f}",
            f"{r.steps:.0f}, {100 * r.converged:.0f} %",
            f"{100 * r.seen:.0f} %",
            str(o.target),
            str(int(o.failed.sum())),
            f"{o.cosine.min():.4f}",
            f"{o.vjps.mean():.1f}, {o.baseline.mean():.1f}",
            f"{int(o.excess.max()):+d}",
            quantiles,
        ]
    )


def plots(results: Sequence[Result], out: Path) -> None:
    """Plot estimated against true errors, and the vjps to each residual."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = plt.get_cmap("turbo")(np.linspace(0, 1, len(results)))
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    for r, colour in zip(results, colours, strict=False):
        for o, marker in zip(r.outcomes, "o^", strict=True):
            label = r.case if o.target == TARGETS[0] else None
            axes.scatter(o.error, o.reported_error, s=14, marker=marker, color=colour, label=label, alpha=0.8)
    span = np.geomspace(max(1e-6, float(np.min(pooled(results, "error"))) / 2), 2.0, 2)
    for factor, style in ((1, "-"), (0.5, "--"), (3, ":"), (30, "-.")):
        axes.plot(span, factor * span, style, color="0.4", lw=0.9, label=f"estimate = {factor} × error")
    axes.set(xscale="log", yscale="log", xlabel="true relative error of u", ylabel="error that deqcore reports")
    axes.set_title("Certified reuse: reported against true error (○ target 0.1, △ target 0.01)", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(out / "certificates-scatter.png", dpi=130)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for r, colour in zip(results, colours, strict=False):
        ratios = [r.curve[level][0] / max(1, r.curve[level][1]) for level in LEVELS]
        axes.plot(LEVELS, ratios, "-o" if r.kind == OWN else ":", ms=4, color=colour, label=r.case)
    axes.axhline(1.0, color="0.4", lw=0.9)
    axes.axhline(0.8, color="0.4", lw=0.9, ls="--")
    axes.set(xscale="log", xlabel="relative adjoint residual", ylabel="vjps over those of GMRES from 0")
    axes.invert_xaxis()
    axes.set_title("vjps to a residual (full lines: trained cells, their own cotangents)", fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(out / "certificates-vjps.png", dpi=130)

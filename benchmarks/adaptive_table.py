"""The table of `python -m benchmarks.adaptive`: one row for each strategy, from its trainings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy import stats


@dataclass
class Run:
    """One training.

    Attributes:
        name: of the strategy.
        seed: of weights and order.
        accuracy: on the test part, in per cent.
        loss: of the last epoch, mean.
        test_loss: mean cross-entropy on the test part.
        steps: training steps.
        evaluations: of f in forward solves, mean of the slowest samples.
        vjps: per step, of the slowest sample, audits included.
        products: with the parameters, per step, beyond the one that every gradient takes.
        seconds: of the thread, all training steps.
        backward: of them, the backward passes and updates.
        vjp: seconds of one vjp of f, mean of the timed steps, each the median of `REPEATS`.
        product: seconds of one product with the parameters, and with what f is given, as `vjp`.
        errors: true relative errors on judged steps.
        taken: vjps in force there.
        enough: fewest vjps that would have been enough there, known only afterwards.
        each: true errors there with 0, 1, … vjps.
        chosen: vjps in force at each step.
        audits: audits that counted.
        excluded: audits that did not.
        over: audits that found more than the target.
    """

    name: str
    seed: int
    accuracy: float = 0.0
    loss: float = 0.0
    test_loss: float = 0.0
    steps: int = 0
    evaluations: float = 0.0
    vjps: float = 0.0
    products: float = 0.0
    seconds: float = 0.0
    backward: float = 0.0
    vjp: float = 0.0
    product: float = 0.0
    errors: list[float] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    enough: list[int] = field(default_factory=list)
    each: list[list[float]] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    audits: int = 0
    excluded: int = 0
    over: int = 0

    @property
    def cost(self) -> float:
        """Evaluations, vjps and products per step, with the recorded evaluation and the product of every gradient."""
        return self.evaluations + 2 + self.vjps + self.products


def summary(runs: list[Run]) -> list[dict[str, str]]:
    """Return a row for each strategy; differences of accuracy and costs are paired over the seeds that both have."""
    by = {(run.name, run.seed): run for run in runs}
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        exact = [(run, by["exact-ift", run.seed]) for run in mine if ("exact-ift", run.seed) in by]
        gaps = [run.accuracy - other.accuracy for run, other in exact]
        worse = [100 * math.expm1(run.test_loss - other.test_loss) for run, other in exact]
        free = [(run, by["jacobian-free", run.seed]) for run in mine if ("jacobian-free", run.seed) in by]
        errors = [e for run in mine for e in run.errors]
        timed = [pair for pair in free if pair[0].vjp > 0]
        target = float(name.partition("adaptive, ")[2] or "nan")
        taken = [k for run in mine for k in run.taken]
        enough = [k for run in mine for k in run.enough]
        rows.append(
            {
                "strategy": name,
                "accuracy": f"{np.mean([run.accuracy for run in mine]):.2f}",
                "minus exact (95 %)": interval(gaps),
                "perplexity beyond exact's, % (95 %)": interval(worse),
                "vjps a step": f"{np.mean([run.vjps for run in mine]):.2f}",
                "products a step": f"{np.mean([run.products for run in mine]):.2f}",
                "cost over jacobian-free": mean([run.cost / other.cost for run, other in free]),
                "time over it": mean([run.seconds / other.seconds for run, other in free]),
                "seeds": f"{len(mine)}, {len(exact)} beside exact, {len(free)} beside jacobian-free",
                "time beyond it over that of the vjps": beyond(timed, whole=True),
                "backward alone": beyond(timed),
                "and products": beyond(timed, products=True),
                "judged": str(len(errors)) if errors else "",
                "error: median, 95 %": f"{np.median(errors):.2f}, {np.quantile(errors, 0.95):.2f}" if errors else "",
                "beyond target": f"{100 * np.mean(np.array(errors) > target):.1f} %" if taken else "",
                "vjps in force": f"{np.mean(taken):.2f}" if taken else "",
                "fewest fixed": str(fixed(mine, target)) if taken else "",
                "fewest a step": f"{np.mean(enough):.2f}" if taken else "",
            }
        )
    return rows


def beyond(pairs: list[tuple[Run, Run]], *, whole: bool = False, products: bool = False) -> str:
    """Return the time beyond jacobian-free over that of the reported vjps, mean over seeds and the range.

    The time of one vjp and of one product is that of the same run. `whole` compares whole steps, whose forward solves
    differ in length because the weights do, and not backward passes with updates alone; `products` adds the time of the
    products with the parameters that audits report to that of the vjps.
    """
    ratios = []
    for run, free in pairs:
        spent = run.steps * (run.vjps * run.vjp + (run.products * run.product if products else 0.0))
        more = run.seconds - free.seconds if whole else run.backward - free.backward
        ratios.extend([more / spent] if spent > 0 else [])
    return f"{np.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def mean(values: list[float]) -> str:
    """Return the mean, empty for no values."""
    return f"{np.mean(values):.2f}" if values else ""


def interval(values: list[float]) -> str:
    """Return the mean and half of its 95 % interval, empty for no values."""
    count = len(values)
    if not count:
        return ""
    half = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5 if count > 1 else float("nan")
    return f"{np.mean(values):+.2f} ± {half:.2f}"


def fixed(runs: list[Run], target: float) -> int:
    """Return the least fixed number of vjps that keeps 95 % of the judged steps within the target."""
    each = np.array([errors for run in runs for errors in run.each])
    enough = np.flatnonzero(np.mean(each > target, axis=0) <= 0.05)
    return int(enough[0]) if len(enough) else each.shape[1]

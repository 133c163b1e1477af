"""One section of the measurements in its own process: `python -m benchmarks.worker SECTION FRAMEWORK OUT`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deqcore.bench.machine import limit_threads

SOLVERS: Final = ("auto", "picard", "anderson", "broyden", "newton-krylov")
FRAMEWORKS: Final = ("torch", "jax")
ROUNDS, BUDGET = 7, 8.0  # per case: rounds that are kept, and seconds after which three are enough
LONG: Final = {"dense": 25.0, "conv": 40.0, "mixed-conv": 25.0}  # the cases that targets speak of
QUICK_ROUNDS, QUICK_BUDGET = 3, 0.7
BUDGETS: Final = (1, 2, 4, 7, 10, 14, 20, 28)  # steps of the residual curves
SWEEP_BATCH: Final = (1, 8, 64, 256, 1024)
SWEEP_SIZE: Final = (32, 128, 512, 1024)
# Where each number of steps, tolerance and shape is compiled, most of the time is compilation.
COMPILED_BUDGETS: Final = (2, 5, 10, 20)
COMPILED_BATCH: Final = (8, 64, 512)
COMPILED_SIZE: Final = (32, 128, 512)


@dataclass(frozen=True)
class Setting:
    """What a section measures with.

    Attributes:
        framework: torch or jax.
        threads: that may be used.
        quick: small and short.
        say: takes messages on progress.
    """

    framework: str
    threads: int
    quick: bool
    say: Callable[[str], object]

    @property
    def compiled(self) -> bool:
        """Whether the framework compiles."""
        return self.framework == "jax"

    @property
    def rounds(self) -> int:
        """Of timing."""
        return QUICK_ROUNDS if self.quick else ROUNDS

    def seconds(self, case: str) -> float:
        """Return budget of a case."""
        return QUICK_BUDGET if self.quick else LONG.get(case, BUDGET) / (3 if self.compiled else 1)


def cases(setting: Setting) -> dict[str, Any]:
    """Return the solvers of deqcore and of its peers on all cases."""
    from benchmarks.cells import COMPILED, EVERY, case
    from benchmarks.harnesses import harness
    from benchmarks.peers import peers
    from deqcore.bench.compare import compare
    from deqcore.bench.harness import ours

    measured = harness(setting.framework, setting.threads)
    others = peers(setting.framework)
    rows, notes = [], {}
    for name in COMPILED if setting.compiled else EVERY:
        made = case(name, setting.quick, setting.compiled)
        backends = made.problem.backends
        if backends is not None and setting.framework not in backends:
            continue
        notes[name] = f"{made.note}; relative residual {made.rtol:g}, at most {made.max_steps} steps"
        contenders = [*ours(SOLVERS, made, measured.traced), *others]
        result = compare(
            measured, made, contenders, rounds=setting.rounds, budget=setting.seconds(name), say=setting.say
        )
        rows += [row.as_dict() for row in result]
    return {"rows": rows, "notes": notes}


def curves(setting: Setting) -> dict[str, Any]:
    """Return the residual against work on the dense and the convolutional cell; seconds of a fixed number of steps."""
    from benchmarks.cells import case
    from benchmarks.harnesses import harness
    from benchmarks.peers import peers
    from deqcore.bench.cases import dense
    from deqcore.bench.harness import Deqcore
    from deqcore.bench.sweeps import STEPS, points

    measured = harness(setting.framework, setting.threads)
    own = [Deqcore(name) for name in SOLVERS if name != "newton-krylov"]
    rivals = [peer for peer in peers(setting.framework) if peer.library in ("torchdeq", "jaxopt")]
    limits: dict[str, Any] = {
        "rounds": 1 if setting.quick else 3,
        "seconds": 0.3 if setting.quick else 2.0,
        "say": setting.say,
    }
    budgets, batches, sizes = (
        (COMPILED_BUDGETS, COMPILED_BATCH, COMPILED_SIZE) if setting.compiled else (BUDGETS, SWEEP_BATCH, SWEEP_SIZE)
    )
    if setting.quick:
        budgets, batches, sizes = budgets[:2], batches[:2], sizes[:2]
    residual = []
    for name in ("dense",) if setting.compiled else ("dense", "conv"):
        residual += points(measured, case(name, setting.quick), [*own, *rivals], budgets, **limits)
    batch, size = [], []
    for item in batches:
        batch += points(measured, dense(item, 64 if setting.quick else 256), [*own, *rivals], [STEPS], **limits)
    for item in sizes:
        size += points(measured, dense(16 if setting.quick else 64, item), [*own, *rivals], [STEPS], **limits)
    return {key: [p.as_dict() for p in result] for key, result in zip(CURVES, (residual, batch, size), strict=True)}


CURVES: Final = ("residual", "batch", "size")


def facts(setting: Setting) -> dict[str, Any]:
    """Return single figures, torch only."""
    from benchmarks.facts import facts
    from benchmarks.harnesses import harness

    harness(setting.framework, setting.threads)
    return facts(quick=setting.quick, say=setting.say)


def training(setting: Setting) -> dict[str, Any]:
    """Return whole training steps, torch only."""
    from benchmarks.cells import case
    from benchmarks.harnesses import harness
    from benchmarks.training import training

    measured = harness(setting.framework, setting.threads)
    steps = [
        step
        for name in ("conv", "dense")
        for step in training(
            measured,
            case(name, setting.quick),
            rounds=setting.rounds,
            budget=setting.seconds(name),
            say=setting.say,
        )
    ]
    return {"steps": [step.as_dict() for step in steps]}


SECTIONS: Final[dict[str, Callable[[Setting], dict[str, Any]]]] = {
    "cases": cases,
    "curves": curves,
    "facts": facts,
    "training": training,
}
ALL: Final = (
    ("cases", "torch"),
    ("cases", "jax"),
    ("facts", "torch"),
    ("training", "torch"),
    ("curves", "torch"),
    ("curves", "jax"),
)


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker")
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    limit_threads(given.threads)
    setting = Setting(
        given.framework, given.threads, given.quick, lambda text: print(text, file=sys.stderr, flush=True)
    )
    given.out.write_text(json.dumps(SECTIONS[given.section](setting)))


if __name__ == "__main__":
    main()

"""9×9 Sudoku by a small recursive model: a latent and an answer that update each other, with a carry and halting.

One network of a few thousand weights is all that is learnt. A cycle updates the latent twice and the answer once; a
segment is one to four cycles, drawn at random, of which the last carries the gradient. Each segment has its own loss
and starts, without a gradient, where the one before ended (deep supervision with a carry). No depth is special in the
training, and the loop comes to rest when it is run deeper. A head learns to say when a puzzle is solved. Half of the
puzzles of a batch start at zero and half at random, so that the model can be run from several starts.

Each puzzle has exactly one solution. Most puzzles of the training have more clues than those that are scored: what
follows from what is learnt where few steps suffice, and hard puzzles take more of them. Scored on unseen puzzles at
several depths, up to four times the largest of the training, and at several breadths: of several random starts the one
that comes to rest best is kept.
Source: Jolicoeur-Martineau (2025), "Less is more: recursive reasoning with tiny networks", arXiv:2510.04871. The
network follows Palm, Paquet & Winther (2018), "Recurrent relational networks": sums over rows, columns, boxes, digits.

    python examples/models/looped_sudoku.py                   # PyTorch
    python examples/models/looped_sudoku.py --backend jax
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import common
import numpy as np

WIDTH, HIDDEN = 16, 64
SEGMENTS = 3
MOST, SEED = 4, 0  # the most cycles of a segment, and what draws them
CLUES, FEW = (28, 46), (26, 28)  # of the puzzles to train with, and of those to score
TRAIN, TEST, BATCH = 2000, 80, 8
STEPS, RATE = 1000, 4e-3
DEPTHS, BREADTHS = (3, 6, 12, 24, 48), (1, 4, 16)
SETTINGS = {
    "backward__strategy": "looped",
    "backward__options": {"depth": (1 + MOST) / 2, "recorded": 1, "distribution": "uniform", "seed": SEED},
}
HALTING = {
    "forward__solver": "picard",
    "forward__rtol": 0.0,
    "forward__on_failure": "ignore",
    "backward__strategy": "jacobian-free",
    "backward__options": {},
}
"""Settings of an evaluation in which the head alone stops a puzzle."""

CELLS = np.arange(81)
GROUPS = np.stack([CELLS // 9, 9 + CELLS % 9, 18 + CELLS // 27 * 3 + CELLS % 9 // 3])
"""The row, the column and the box of each cell, of 27 groups."""


def at_depth(cycles: int) -> dict[str, Any]:
    """Return settings for `cycles` cycles, whose residual is measured."""
    return {"backward__strategy": "looped", "backward__options": {"depth": cycles, "recorded": 1, "measure": True}}


def solved(digits: list[int], used: list[int], rng: np.random.Generator | None = None) -> bool:
    """Fill the empty cells of a grid in place, if it has a solution: the cell with the fewest candidates first.

    Args:
        digits: 81 of them, one bit each, 0 where empty.
        used: the digits that each of 27 groups has, as bits.
        rng: draws the order of candidates.
    """
    best, least, cell = 0, 10, -1
    for k in range(81):
        if not digits[k]:
            row, column, box = NEIGHBOURS[k]
            free = 511 & ~(used[row] | used[column] | used[box])
            if (count := free.bit_count()) < least:
                best, least, cell = free, count, k
                if count <= 1:
                    break
    if cell < 0:
        return True
    bits = [1 << d for d in range(9) if best >> d & 1]
    for bit in bits if rng is None else rng.permutation(bits).tolist():
        place(digits, used, cell, bit)
        if solved(digits, used, rng):
            return True
        place(digits, used, cell, 0)
    return False


NEIGHBOURS: list[list[int]] = GROUPS.T.tolist()


def place(digits: list[int], used: list[int], cell: int, bit: int) -> None:
    """Put a digit into a cell, or empty it with 0."""
    for group in NEIGHBOURS[cell]:
        used[group] ^= digits[cell] ^ bit
    digits[cell] = bit


def is_unique(digits: list[int], used: list[int], cell: int) -> bool:
    """Return whether a grid with one solution keeps only that one when `cell` is emptied."""
    own, (row, column, box) = digits[cell], NEIGHBOURS[cell]
    others = 511 & ~(used[row] | used[column] | used[box])
    for bit in (1 << d for d in range(9) if others >> d & 1):
        tried, taken = digits.copy(), used.copy()
        place(tried, taken, cell, bit)
        if solved(tried, taken):
            return False
    return bool(own)


def puzzle(rng: np.random.Generator, least: int, most: int) -> tuple[Any, Any]:
    """Draw a puzzle `(81,)` of the digits 1 to 9, 0 where empty, and its one solution.

    Cells are emptied in random order, as long as one solution is left, down to `least` to `most` clues.
    """
    digits, used = [0] * 81, [0] * 27
    solved(digits, used, rng)
    grid = digits.copy()
    left, wanted = 81, rng.integers(least, most + 1)
    for cell in rng.permutation(81).tolist():
        if left > wanted and is_unique(digits, used, cell):
            place(digits, used, cell, 0)
            left -= 1
    clues, answer = (np.array([bit.bit_length() for bit in bits]) for bits in (digits, grid))
    return clues, answer


def puzzles(rng: np.random.Generator, count: int, span: tuple[int, int] = CLUES) -> tuple[Any, Any]:
    """Draw clues `(count, 9, 9, 9, 2)` (for each digit: given here; another given), and solutions `(count, 81)`.

    The number of clues of a puzzle is drawn from `span`, both ends included.
    """
    drawn = [puzzle(rng, *span) for _ in range(count)]
    given = np.eye(10, dtype=np.float32)[np.stack([clues for clues, _ in drawn])][:, :, 1:]
    clues = np.stack([given, given.sum(2, keepdims=True) - given], -1)
    return clues.reshape(count, 9, 9, 9, 2), np.stack([grid for _, grid in drawn]) - 1


def weights(rng: np.random.Generator) -> common.Weights:
    """Draw the weights of the one network, and of what reads its states."""
    made = {
        "inject.weight": common.matrix(rng, WIDTH, 2, gain=1.5),
        "inject.bias": np.zeros(WIDTH, np.float32),
        "deq.cell.own.weight": common.matrix(rng, HIDDEN, WIDTH, gain=0.5),
        "deq.cell.own.bias": np.zeros(HIDDEN, np.float32),
        "deq.cell.update.weight": common.matrix(rng, WIDTH, HIDDEN, gain=0.5),
        "read.weight": common.matrix(rng, 1, WIDTH),
        "halt.weight": common.matrix(rng, 1, 2 * WIDTH, gain=0.1),
        "halt.bias": np.full(1, -2.0, np.float32),
    }
    others = ("row", "column", "box", "digit")
    return made | {f"deq.cell.{name}.weight": common.matrix(rng, HIDDEN, WIDTH, gain=0.5) for name in others}


def starts(rng: np.random.Generator, count: int) -> Any:
    """Draw random starts `(count, 9, 9, 9, WIDTH)`."""
    return rng.standard_normal((count, 9, 9, 9, WIDTH), dtype=np.float32)


def batches(rng: np.random.Generator, clues: Any, answers: Any) -> Iterable[tuple[Any, ...]]:
    """Yield clues, solutions, starts and the training step without end; about half of the starts are zero."""
    for step, (given, right) in enumerate(common.batches(rng, BATCH, clues, answers)):
        is_random = rng.random((BATCH, 1, 1, 1, 1)) < 0.5
        yield given, right, starts(rng, BATCH) * is_random.astype(np.float32), np.int32(step)


def main(given: list[str] | None = None) -> dict[str, float]:
    """Train, and score unseen puzzles at several depths and breadths, and where the head halts."""
    options = common.arguments(__doc__ or "", STEPS, given)
    rng = np.random.default_rng(options.seed)
    clues, answers = puzzles(rng, TEST, FEW)
    from_each = [starts(rng, TEST) for _ in range(max(BREADTHS))]
    begin = common.start(options, weights(rng))
    side = common.side(options.backend, "looped_sudoku", begin, SETTINGS, options.device)
    if options.steps:
        side.fit(batches(rng, *puzzles(rng, TRAIN)), options.steps, RATE, decay=0.01, memory=0.99)
    common.finish(options, "looped_sudoku", side.weights())
    found: dict[str, float] = {}

    def score(name: str, guess: Any, more: str = "") -> None:
        right = guess == answers
        found[name] = float(right.all(1).mean())
        print(f"{name}: solved {100 * found[name]:.1f} %, cells right {100 * right.mean():.1f} %{more}", flush=True)

    module = importlib.import_module(f"looped_sudoku_{options.backend}")
    for depth, (guesses, residuals) in zip(DEPTHS, runs(module, side, clues, from_each), strict=True):
        for breadth in BREADTHS:
            best = residuals[:breadth].argmin(0)
            score(label(depth, breadth), guesses[best, np.arange(TEST)])
    guess, taken = module.halted(side, clues, max(DEPTHS))
    score(f"at most {max(DEPTHS)} cycles, halted by the head", guess, f", {taken.mean():.1f} cycles on average")
    common.figure(options, "looped-sudoku", lambda figure: draw(figure, found))
    return found


def runs(module: Any, side: Any, clues: Any, from_each: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield digits `(starts, puzzles, 81)` and residuals `(starts, puzzles)` at each depth.

    It runs a few puzzles at a time, whose states fit into the processor's cache.
    """
    parts = [
        [list(module.deepened(side, clues[rows], start[rows], DEPTHS)) for start in from_each]
        for rows in np.split(np.arange(len(clues)), range(BATCH, len(clues), BATCH))
    ]
    for k in range(len(DEPTHS)):
        digits, residuals = ([[run[k][which] for run in part] for part in parts] for which in (0, 1))
        yield np.concatenate(digits, axis=1), np.concatenate(residuals, axis=1)


def label(depth: int, breadth: int) -> str:
    """Name a depth and a breadth."""
    return f"{depth} cycles" + f", best of {breadth}" * (breadth > 1)


def draw(figure: Any, found: dict[str, float]) -> None:
    """Draw the share of solved puzzles against depth."""
    axes = figure.subplots()
    for breadth in BREADTHS:
        name = "one random start" if breadth == 1 else f"best of {breadth} random starts"
        axes.plot(DEPTHS, [100 * found[label(depth, breadth)] for depth in DEPTHS], "o-", label=name)
    axes.axvspan(SEGMENTS, SEGMENTS * MOST, color="0.9", label="depths of the training")
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axes.set(xlabel="cycles", ylabel="puzzles solved, %", ylim=(0, 100))
    axes.legend()


if __name__ == "__main__":
    main()

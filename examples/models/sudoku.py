"""Sudoku by a looped reasoner that stops for each puzzle when it is done.

Each cell of a 4×4 Sudoku holds a few numbers per digit, and reads those of its row, column, box and other digits, with
the same weights again and again until nothing changes: z* = f(z*, clues). Each puzzle halts by itself, easy ones after
few steps: when each of its digits is sure (`deqcore.halting`), or nothing changes any more. No halting network is
trained.

Puzzles are generated, with exactly one solution each; the solutions of test puzzles do not occur in training.
Source: Palm, Paquet & Winther (2018), "Recurrent relational networks"; Bai, Kolter & Koltun (2019).

    python examples/models/sudoku.py                   # PyTorch
    python examples/models/sudoku.py --backend jax
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import common
import numpy as np

WIDTH, HIDDEN = 12, 48
SURE = 0.99  # a puzzle halts when each of its digits has at least this probability
SETTINGS = {
    "forward__solver": "picard",
    "forward__rtol": 3e-3,
    "forward__max_steps": 30,
    "forward__on_failure": "ignore",
    "backward__strategy": "phantom",  # through the last steps only: what comes earlier has to lead there anyway
    "backward__options": {"steps": 6, "damping": 1.0},
}


def peers() -> Any:
    """Return which cells share a row, a column, a box: `(3, 16, 16)`; each row averages the three other cells."""
    row, column = np.divmod(np.arange(16), 4)
    groups = (row, column, row // 2 * 2 + column // 2)
    found = [(group[:, None] == group) & ~np.eye(16, dtype=bool) for group in groups]
    return np.stack(found).astype(np.float32) / 3


def solutions() -> Any:
    """Return all 288 filled grids `(288, 16)` of the digits 0 to 3."""
    rows = list(permutations(range(4)))
    found = []
    for grid in product(rows, repeat=4):
        g = np.asarray(grid)
        boxes = g.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
        if all(len(set(line)) == 4 for line in (*g.T, *boxes)):
            found.append(g.ravel())
    return np.asarray(found)


def puzzles(rng: np.random.Generator, grids: Any, every: Any, count: int) -> tuple[Any, Any]:
    """Draw clues `(count, 16, 4, 2)` (for each digit: given here; another given here) and solutions `(count, 16)`.

    Cells are emptied in random order while exactly one grid fits.
    """
    clues, answers = [], []
    for grid in grids[rng.integers(0, len(grids), count)]:
        known = np.ones(16, dtype=bool)
        for cell in rng.permutation(16)[: rng.integers(8, 17)]:
            known[cell] = False
            if (every[:, known] == grid[known]).all(1).sum() > 1:
                known[cell] = True
        clues.append(np.where(known, grid + 1, 0))
        answers.append(grid)
    given = np.eye(5, dtype=np.float32)[np.stack(clues)][:, :, 1:]
    return np.stack([given, given.sum(2, keepdims=True) - given], -1), np.stack(answers)


def weights(rng: np.random.Generator) -> common.Weights:
    """Draw a layer of messages and a layer of updates, which contract at the start."""
    return {
        "inject.weight": common.matrix(rng, WIDTH, 2, gain=1.5),
        "inject.bias": np.zeros(WIDTH, np.float32),
        "deq.cell.message.weight": common.matrix(rng, HIDDEN, 5 * WIDTH),
        "deq.cell.message.bias": np.zeros(HIDDEN, np.float32),
        "deq.cell.update.weight": common.matrix(rng, WIDTH, HIDDEN, gain=0.5),
        "deq.cell.update.bias": np.zeros(WIDTH, np.float32),
        "read.weight": common.matrix(rng, 1, WIDTH),
    }


def main(given: list[str] | None = None) -> dict[str, float]:
    """Train, solve puzzles whose grids were never seen, and show how long each took."""
    options = common.arguments(__doc__ or "", 300, given)
    rng = np.random.default_rng(options.seed)
    every = solutions()
    grids = rng.permutation(every)
    train, test = puzzles(rng, grids[:240], every, 3000), puzzles(rng, grids[240:], every, 1000)
    model = common.side(options.backend, "sudoku", common.start(options, weights(rng)), SETTINGS, options.device)
    model.fit(common.batches(rng, 64, *train), options.steps, 2e-3, decay=0.01)

    guess, steps, converged = model.predict(test[0])
    right = (guess == test[1]).all(1)
    blanks = 16 - test[0].any((2, 3)).sum(1)
    print(f"solved {100 * right.mean():.1f} %, halted {100 * converged.mean():.1f} %")
    for low, high in ((6, 8), (9, 10), (11, 12)):
        part = (blanks >= low) & (blanks <= high)
        if part.any():
            print(f"{low:2d}-{high:2d} empty: solved {100 * right[part].mean():5.1f} %, {steps[part].mean():.1f} steps")
    common.finish(options, "sudoku", model.weights())
    common.figure(options, "sudoku", lambda figure: histogram(figure, blanks, steps), (6, 3))
    return {"solved": float(right.mean()), "halted": float(converged.mean())}


def histogram(figure: Any, blanks: Any, steps: Any) -> None:
    """Plot the steps until a puzzle halts against its number of empty cells."""
    axis = figure.subplots()
    counts = sorted(set(blanks.tolist()))
    axis.boxplot([steps[blanks == count] for count in counts], tick_labels=counts, showfliers=False)
    axis.set(xlabel="empty cells", ylabel="steps until it halts")


if __name__ == "__main__":
    main()

"""The memory that a harness reports, of functions whose arrays are known."""

from __future__ import annotations

import numpy as np

SIZE = 100_000


def states(backend, fn):
    x = backend.asarray(np.linspace(0.0, 1.0, SIZE))
    return backend.harness.peak_memory(fn, x) / (8 * SIZE)


def test_arrays_that_are_held_together_add_up(every):
    assert 2.9 <= states(every, lambda x: [x + 1.0, x * 2.0, x - 3.0]) <= 3.2


def test_arrays_that_are_dropped_do_not(every):
    def chain(x):
        for _ in range(20):
            x = every.xp.tanh(x)
        return x

    assert 0.9 <= states(every, chain) <= 2.2


def test_a_history_shows(every):
    def kept(x):
        history = [x]
        for _ in range(9):
            history.append(every.xp.tanh(history[-1]))
        return every.xp.stack(history)

    assert 9.9 <= states(every, kept) <= 20.2

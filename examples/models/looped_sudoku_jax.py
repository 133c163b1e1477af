"""The recursive puzzle solver in JAX, and the same loops by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import linear, part
from jax import Array, lax, nn
from looped_sudoku import HALTING, SEGMENTS, at_depth
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import deqcore
from deqcore.breadth import best_of
from deqcore.halting import Learnt, halting_loss, until

State = tuple[Array, Array]


def network(p: Any, h: Array) -> Array:
    """Return each position's next state from sums over its row, its column, its box and the digits of its cell."""
    boxes = linear(p, "box", h.reshape(-1, 3, 3, 3, 3, *h.shape[3:]).sum((2, 4)) / 3)
    seen = linear(p, "own", h) + jnp.repeat(jnp.repeat(boxes, 3, 1), 3, 2)
    for name, axis in (("row", 2), ("column", 1), ("digit", 3)):
        seen = seen + linear(p, name, h.sum(axis, keepdims=True) / 3)
    h = h + linear(p, "update", nn.relu(seen))
    return h * lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6)


def cell(state: State, p: Any, x: Array) -> State:
    """Take a cycle: two updates of the latent, then one of the answer, both `(batch, row, column, digit, width)`."""
    latent, answer = state
    for _ in range(2):
        latent = network(p, latent + answer + x)
    return latent, network(p, latent + answer)


def segment(p: Any, settings: Any, x: Array, carry: State, step: Array) -> tuple[State, State]:
    """Return the states after one more segment, and the carry into the next: the same without a gradient.

    `step` counts the segments of the training.
    """
    solution = deqcore.fixed_point(cell, carry, part(p, "deq.cell."), x, backward__step=step, **settings)
    return solution.value, solution.z


def segment_by_hand(p: Any, x: Array, carry: State, depth: Array) -> tuple[State, State]:
    """Run a segment by hand, which takes the depth: NumPy draws it outside the compiled step."""
    p = part(p, "deq.cell.")
    still = lax.stop_gradient((p, x))
    state = cell(lax.stop_gradient(lax.fori_loop(0, depth - 1, lambda _, z: cell(z, *still), carry)), p, x)
    return state, lax.stop_gradient(state)


def loss(
    p: Any, settings: Any, clues: Array, answers: Array, start: Array, step: Array, segment: Any = segment
) -> Array:
    """Return the sum of the losses of all segments, each of which continues where the last one ended."""
    x = linear(p, "inject", clues)
    carry, total = (start, start), jnp.zeros(())
    for k in range(SEGMENTS):
        (_, answer), carry = segment(p, settings, x, carry, step * SEGMENTS + k)
        scores = logits(p, answer)
        right = (scores.argmax(-1) == answers).all(1)
        total += cross_entropy(scores, answers).mean() + 0.1 * halting_loss(stop(p, answer), right).mean()
    return total


def predict(p: Any, settings: Any, clues: Array, *starts: Array) -> Array:
    """Return the digits `(batch, 81)` after a segment from z0 = 0, or the best of several starts."""
    x = linear(p, "inject", clues)

    def solve(z0: State) -> Any:
        return deqcore.fixed_point(cell, z0, part(p, "deq.cell."), x, **settings)

    _, answer = best_of(solve, [(z, z) for z in starts] or [begin(x)]).value
    return logits(p, answer).argmax(-1)


def until_solved(p: Any, clues: Array, cycles: int) -> tuple[Array, Array]:
    """Return the digits, and the cycles that each puzzle took until the head said that it was solved."""
    x = linear(p, "inject", clues)
    f = until(cell, Learnt(lambda state: stop(p, state[1])))
    solution = deqcore.fixed_point(f, begin(x), part(p, "deq.cell."), x, **HALTING, forward__max_steps=cycles)
    return logits(p, solution.value[1]).argmax(-1), solution.steps


def deepened(side: Any, clues: Any, start: Any, depths: Iterable[int]) -> Iterator[tuple[Any, Any]]:
    """Yield digits and residuals at growing depths of one loop, as NumPy arrays."""
    state, done = (jnp.asarray(start), jnp.asarray(start)), 0
    for depth in depths:
        state, digits, residual = _further(side.params, clues, state, depth - done)
        done = depth
        yield np.asarray(digits), np.asarray(residual)


@partial(jax.jit, static_argnums=3)
def _further(p: Any, clues: Array, state: State, cycles: int) -> tuple[State, Array, Array]:
    x = linear(p, "inject", clues)
    solution = deqcore.fixed_point(cell, state, part(p, "deq.cell."), x, **at_depth(cycles))
    return solution.value, logits(p, solution.value[1]).argmax(-1), solution.residual


def halted(side: Any, clues: Any, cycles: int) -> tuple[Any, Any]:
    """Return the digits, and the cycles after which the head has halted each puzzle, as NumPy arrays."""
    guess, steps = until_solved(side.params, clues, cycles)
    return np.asarray(guess), np.asarray(steps)


def begin(x: Array) -> State:
    return jnp.zeros_like(x), jnp.zeros_like(x)


def logits(p: Any, answer: Array) -> Array:
    """Return `(batch, cell, digit)`."""
    return linear(p, "read", answer)[..., 0].reshape(len(answer), 81, 9)


def stop(p: Any, answer: Array) -> Array:
    """Return the logit `(batch,)` that a puzzle is solved, from the mean and the largest of all positions."""
    sure = nn.relu(answer).reshape(len(answer), -1, answer.shape[-1])
    return linear(p, "halt", jnp.concatenate([sure.mean(1), sure.max(1)], 1))[:, 0]

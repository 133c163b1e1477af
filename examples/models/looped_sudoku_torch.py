"""The recursive puzzle solver in PyTorch, and the same loops by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from deqcore_torch.nn import DEQ
from looped_sudoku import HALTING, HIDDEN, MOST, SEED, SEGMENTS, WIDTH, at_depth
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu, rms_norm

from deqcore.breadth import best_of
from deqcore.halting import Learnt, halting_loss

State = tuple[Tensor, Tensor]


class Cell(nn.Module):
    """A cycle: two updates of the latent, then one of the answer, both `(batch, row, column, digit, width)`."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(WIDTH, HIDDEN)
        self.row, self.column, self.box, self.digit = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(4))
        self.update = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, state: State, x: Tensor) -> State:
        latent, answer = state
        for _ in range(2):
            latent = self.network(latent + answer + x)
        return latent, self.network(latent + answer)

    def network(self, h: Tensor) -> Tensor:
        """Return each position's next state from sums over its row, its column, its box and the digits of its cell."""
        boxes = self.box(h.unflatten(2, (3, 3)).unflatten(1, (3, 3)).sum((2, 4)) / 3)
        seen = self.own(h) + boxes.repeat_interleave(3, 1).repeat_interleave(3, 2)
        for part, axis in ((self.row, 2), (self.column, 1), (self.digit, 3)):
            seen = seen + part(h.sum(axis, keepdim=True) / 3)
        return rms_norm(h + self.update(relu(seen)), (WIDTH,), eps=1e-6)


class Model(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.inject = nn.Linear(2, WIDTH)
        self.deq = DEQ(Cell(), **settings)
        self.read = nn.Linear(WIDTH, 1, bias=False)
        self.halt = nn.Linear(2 * WIDTH, 1)

    def loss(self, clues: Tensor, answers: Tensor, start: Tensor, step: Tensor) -> Tensor:
        """Return the sum of the losses of all segments, each of which continues where the last one ended."""
        x = self.inject(clues)
        carry, total = (start, start), x.new_zeros(())
        for k in range(SEGMENTS):
            (_, answer), carry = self.segment(x, carry, int(step) * SEGMENTS + k)
            logits = self.logits(answer)
            right = (logits.argmax(1) == answers).all(1)
            total = total + cross_entropy(logits, answers) + 0.1 * halting_loss(self.stop(answer), right).mean()
        return total

    def segment(self, x: Tensor, carry: State, step: int) -> tuple[State, State]:
        """Return the states after one more segment, and the carry into the next: the same without a gradient.

        `step` counts the segments of the training.
        """
        solution = self.deq.solve(x, z0=carry, backward__step=step)
        return solution.value, solution.z

    def predict(self, clues: Tensor, *starts: Tensor) -> Tensor:
        """Return the digits `(batch, 81)` after a segment from z0 = 0, or the best of several starts."""
        with torch.no_grad():
            x = self.inject(clues)
            return self.logits(self.best(x, [(z, z) for z in starts] or [self.begin(x)])[1]).argmax(1)

    def best(self, x: Tensor, starts: list[State]) -> State:
        """Return for each puzzle the states that came to rest best."""
        state: State = best_of(lambda z0: self.deq.solve(x, z0=z0), starts).value
        return state

    def until_solved(self, clues: Tensor, cycles: int) -> tuple[Tensor, Tensor]:
        """Return the digits, and the cycles that each puzzle took until the head said that it was solved."""
        with torch.no_grad():
            x = self.inject(clues)
            (_, answer), steps = self.halting(x, cycles)
            return self.logits(answer).argmax(1), steps

    def halting(self, x: Tensor, cycles: int) -> tuple[State, Tensor]:
        rule = Learnt(lambda state: self.stop(state[1]))
        solution = self.deq.solve(x, z0=self.begin(x), until=rule, **HALTING, forward__max_steps=cycles)
        return solution.value, solution.steps

    def begin(self, x: Tensor) -> State:
        return torch.zeros_like(x), torch.zeros_like(x)

    def logits(self, answer: Tensor) -> Tensor:
        """Return `(batch, digit, cell)`."""
        return self.read(answer).squeeze(-1).flatten(1, 2).transpose(1, 2)

    def stop(self, answer: Tensor) -> Tensor:
        """Return the logit `(batch,)` that a puzzle is solved, from the mean and the largest of all positions."""
        sure = relu(answer).flatten(1, 3)
        return self.halt(torch.cat([sure.mean(1), sure.amax(1)], 1)).squeeze(1)


def deepened(side: Any, clues: Any, start: Any, depths: Iterable[int]) -> Iterator[tuple[Any, Any]]:
    """Yield digits and residuals at growing depths of one loop, as NumPy arrays."""
    model, done = side.model.eval(), 0
    clues, z = side.tensors([clues, start])
    with torch.no_grad():
        x, state = model.inject(clues), (z, z)
        for depth in depths:
            solution = model.deq.solve(x, z0=state, **at_depth(depth - done))
            state, done = solution.value, depth
            yield model.logits(state[1]).argmax(1).numpy(force=True), solution.residual.numpy(force=True)


def halted(side: Any, clues: Any, cycles: int) -> tuple[Any, Any]:
    """Return the digits, and the cycles after which the head has halted each puzzle, as NumPy arrays."""
    guess, steps = side.model.until_solved(*side.tensors([clues]), cycles)
    return guess.numpy(force=True), steps.numpy(force=True)


class ByHand(Model):
    """The same model without deqcore's loops."""

    def depth(self, step: int) -> int:
        """Draw the cycles of a segment, the same on all ranks and after a restart."""
        return int(np.random.default_rng((SEED, step)).integers(1, MOST, endpoint=True))

    def segment(self, x: Tensor, carry: State, step: int) -> tuple[State, State]:
        with torch.no_grad():
            for _ in range(self.depth(step) - 1):
                carry = self.deq.cell(carry, x)
        latent, answer = self.deq.cell(carry, x)
        return (latent, answer), (latent.detach(), answer.detach())

    def best(self, x: Tensor, starts: list[State], cycles: int = 48) -> State:
        best: Any = None
        for start in starts:
            state = start
            for _ in range(cycles):
                state = self.deq.cell(state, x)
            moved = zip(self.deq.cell(state, x), state, strict=True)
            residual = torch.stack([(new - old).flatten(1).norm(dim=1) for new, old in moved]).norm(dim=0)
            if best is None:
                best, least = state, residual
                continue
            better = (residual < least)[:, None, None, None, None]
            best = tuple(torch.where(better, new, old) for new, old in zip(state, best, strict=True))
            least = torch.minimum(least, residual)
        return best

    def halting(self, x: Tensor, cycles: int) -> tuple[State, Tensor]:
        state, steps = self.begin(x), torch.zeros(len(x), dtype=torch.int32, device=x.device)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(cycles):
            moved = self.deq.cell(state, x)
            done = done | (self.stop(moved[1]) >= 0)
            if done.all():
                break
            held = done[:, None, None, None, None]
            state = tuple(torch.where(held, old, new) for old, new in zip(state, moved, strict=True))
            steps += ~done
        return state, steps

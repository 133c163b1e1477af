"""Compiled loops copy no history: XLA writes one slot in place, except where a branch or a later use prevents it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

import deqcore

jax = pytest.importorskip("jax")
jnp = jax.numpy

BATCH, N = 3, 80  # n unlike any other size in the program, so that the shape of a history is its own


def computations(text: str) -> dict[str, list[str]]:
    """Return the lines of each computation of an HLO module by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if (head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)) is not None:
            lines = found.setdefault(head[1], [])
        else:
            lines.append(line)
    return found


def reached(parts: dict[str, list[str]], first: set[str], conditional: bool) -> set[str]:
    """Return all computations that those in `first` run, with or without those that run where a condition holds."""
    todo, done = set(first), set()
    while todo:
        name = todo.pop()
        done.add(name)
        for line in parts.get(name, ()):
            named = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                branches = [each.strip().lstrip("%") for each in group.split(",")]
                named += branches if conditional or len(branches) != 2 else branches[:1]
            todo |= set(named) - done
    return done


def bodies(lines: Iterable[str]) -> set[str]:
    """Return the names of the bodies of all loops in these lines."""
    return {name for line in lines for name in re.findall(r"body=%?([\w.\-]+)", line)}


def copied(text: str, *, conditional: bool = True, nested: bool = False) -> list[str]:
    """Return the copies of whole histories `(batch, slots, n)` inside of loops, or only of loops inside of loops."""
    parts = computations(text)
    inside = reached(parts, bodies(text.splitlines()), conditional)
    if nested:
        inside = reached(parts, bodies(line for name in inside for line in parts.get(name, ())), conditional)
    lines = [line for name in inside for line in parts.get(name, ())]
    histories = rf"= \w+\[{BATCH},\d+,{N}\]\S* copy(?:-start)?\("
    return [line.strip() for line in lines if re.search(histories, line)]


def program(gradient: bool, **settings: object) -> str:
    def loss(w, x):
        f = lambda z, w, x: jnp.tanh(w * z + x)
        return deqcore.fixed_point(f, jnp.zeros_like(x), w, x, **settings).value.sum()

    of = jax.grad(loss) if gradient else loss
    return jax.jit(of).lower(jnp.full((N,), 0.5, jnp.float32), jnp.ones((BATCH, N), jnp.float32)).compile().as_text()


@pytest.mark.parametrize(
    ("solver", "options"), [("auto", {"escalate": False}), ("anderson", {}), ("broyden", {"history_size": 12})]
)
def test_a_solve_copies_no_history(solver, options):
    text = program(False, forward__solver=solver, forward__options=options)
    assert "while(" in text
    restarts = solver == "broyden"  # a step that restarts a full history copies it twice
    assert copied(text, conditional=not restarts) == []


def test_a_solve_allocates_no_history_before_a_sample_accelerates():
    text = program(False, forward__solver="auto", forward__options={"escalate": False})
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)[1]
    history = re.compile(rf"\[{BATCH},\d+,{N}\]")
    parts = computations(text)
    assert any(history.search(line) for lines in parts.values() for line in lines)
    plain = reached(parts, {entry}, conditional=False)
    assert [line for name in plain for line in parts.get(name, ()) if history.search(line)] == []


@pytest.mark.parametrize("options", [{"direct": 0}, {"direct": 0, "max_relative_error": 0.1}])
def test_a_step_of_gmres_copies_no_basis(options):
    text = program(True, forward__solver="picard", backward__options=options)
    restarts = "max_relative_error" not in options  # a loop around that of the steps, which copies once a restart
    assert copied(text, nested=restarts) == []


def test_a_copy_would_be_seen():
    """A branch that returns the history is such a case: XLA copies it."""

    def step(carry):
        history, i = carry
        written = history.at[:, i % 4].set(1.0 + history.sum(1))
        return jax.lax.cond(history.sum() > 9.0, lambda h: h, lambda _: written, history), i + 1

    run = jax.jit(lambda h: jax.lax.while_loop(lambda c: c[1] < 9, step, (h, 0)))
    assert copied(run.lower(jnp.zeros((BATCH, 4, N), jnp.float32)).compile().as_text())

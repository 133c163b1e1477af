"""Value and gradient in JAX beside jaxopt and optimistix (CPU).

    python -m benchmarks.backward_jax --json docs/benchmarks/backward_jax.json --page

A dense tanh cell; the loss is a fixed product with the equilibrium, its gradient is that of the weights and of a shift
that is added to f. The gradient of the shift is u, the solution of the adjoint equation, so that both residuals are
measured for every contender: the largest of a sample, ‖f(z) − z‖/‖f(z)‖ and ‖g − u + Jᵀu‖/‖g‖. Both have to be at most
1e-4. deqcore stops each sample by these residuals, so that its tolerances are 1e-4. The peers stop the whole batch by
norms of their own. Their tolerances are arguments of the compiled step, and the loosest ones that reach both residuals
are found by bisection. Then all take turns, one call each in every round. Times are those of the wall; *first call* is
tracing and compiling, without a cache.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import jaxopt
import lineax
import numpy as np
import optimistix

import deqcore
from deqcore.bench.machine import describe
from deqcore.bench.report import machine_text, markdown
from deqcore.bench.timing import Spread

RESIDUAL: Final = 1e-4
PACKAGES: Final = ("jax", "jaxlib", "jaxopt", "optimistix", "lineax")
ROUNDING: Final = 1.01
"""By what the residual that a solve stops at may differ from the one that is measured."""
LOOSEST, TIGHTEST, HALVINGS = 1e-1, 1e-7, 7
"""Range of the peers' tolerances, and how often it is halved: to a factor of 1.11."""
SIZES: Final = ((192, 384), (256, 512))
STEPS: Final = 100
RESTART: Final = 20
"""Dimensions of the peers' GMRES: their default, of which one space is enough here."""
SPACES: Final = 5
"""Krylov spaces that jaxopt may take. Its own limit is ten for each unknown; tolerances below rounding take all."""
QUICK: Final = ((8, 16),)
COLUMNS: Final = (
    "cell", "contender", "ms, median", "quartiles", "of the best peer", "first call, s", "residual", "adjoint residual",
)  # fmt: skip


def f(z: jax.Array, w: jax.Array, x: jax.Array, shift: jax.Array) -> jax.Array:
    """Return the cell."""
    return jnp.tanh(z @ w.T + x) + shift


def ours(data: Data, w: Any, shift: Any, tolerances: Any, **settings: Any) -> Any:
    """Solve with deqcore; without settings, with its defaults for functions but the tolerance."""
    return deqcore.fixed_point(
        f, data.z0, w, data.x, shift, forward__rtol=RESIDUAL, backward__strategy="exact-ift",
        backward__options={"rtol": RESIDUAL} | settings.pop("adjoint", {}), **settings,
    ).value  # fmt: skip


def with_jaxopt(data: Data, w: Any, shift: Any, tolerances: Any, solver: Any, linear: Any) -> Any:
    """Solve with jaxopt, whose tolerance is that of the whole batch."""
    forward, backward = tolerances
    solve = partial(linear, tol=backward)
    made = solver(f, maxiter=STEPS, tol=forward * data.z0.size**0.5, implicit_diff=True, implicit_diff_solve=solve)
    return made.run(data.z0, w, data.x, shift).params


def with_optimistix(data: Data, w: Any, shift: Any, tolerances: Any) -> Any:
    """Solve with optimistix' fixed-point iteration, and lineax' GMRES for the adjoint equation."""
    forward, backward = tolerances
    # Its criterion holds for each number, so that a small one of g needs an absolute tolerance.
    adjoint = optimistix.ImplicitAdjoint(linear_solver=lineax.GMRES(rtol=backward, atol=backward, restart=RESTART))
    solver = optimistix.FixedPointIteration(rtol=forward, atol=forward)
    return optimistix.fixed_point(
        lambda z, args: f(z, *args), solver, data.z0, (w, data.x, shift), adjoint=adjoint, max_steps=STEPS, throw=False
    ).value


GMRES: Final = partial(jaxopt.linear_solve.solve_gmres, restart=RESTART, maxiter=SPACES)
EARLY: Final = partial(GMRES, solve_method="incremental")
"""Ends a space at the tolerance; the default fills it."""
OURS: Final[dict[str, Any]] = {
    "deqcore, defaults (auto, exact-ift)": ours,
    "deqcore, auto without Newton–Krylov": partial(ours, forward__options={"escalate": False}),
    "deqcore, picard": partial(ours, forward__solver="picard"),
    "deqcore, picard, without the dense solve": partial(ours, forward__solver="picard", adjoint={"direct": 0}),
    "deqcore, picard, adjoint by picard": partial(ours, forward__solver="picard", adjoint={"solver": "picard"}),
    "deqcore, anderson": partial(ours, forward__solver="anderson"),
}
PEERS: Final[dict[str, Any]] = {
    "jaxopt, fixed-point iteration": partial(with_jaxopt, solver=jaxopt.FixedPointIteration, linear=GMRES),
    "jaxopt, fixed-point iteration, incremental GMRES": partial(
        with_jaxopt, solver=jaxopt.FixedPointIteration, linear=EARLY
    ),
    "jaxopt, fixed-point iteration, BiCGSTAB": partial(
        with_jaxopt,
        solver=jaxopt.FixedPointIteration,
        linear=partial(jaxopt.linear_solve.solve_bicgstab, maxiter=STEPS),
    ),
    "jaxopt, Anderson": partial(with_jaxopt, solver=jaxopt.AndersonAcceleration, linear=GMRES),
    "optimistix, fixed-point iteration": with_optimistix,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Data:
    """Weights, inputs, shift, start and cotangent."""

    w: jax.Array
    x: jax.Array
    shift: jax.Array
    z0: jax.Array
    g: jax.Array

    @classmethod
    def of(cls, batch: int, width: int) -> Data:
        """Draw a cell of spectral radius .9."""
        rng = np.random.default_rng(0)
        w = (0.9 * rng.standard_normal((width, width)) / width**0.5).astype(np.float32)
        x, g = rng.standard_normal((2, batch, width)).astype(np.float32)
        return cls(*map(jnp.asarray, (w, x, 0 * x, 0 * x, g)))


def compiled(solve: Any, data: Data) -> tuple[Callable[..., Any], float]:
    """Return the value and gradient of a contender as a function of its two tolerances, and the seconds it took."""

    def loss(w: jax.Array, shift: jax.Array, data: Data, tolerances: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = solve(data, w, shift, tolerances)
        return jnp.sum(z * data.g), z

    jax.clear_caches()
    begin, step = time.perf_counter(), jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    program = step.lower(data.w, data.shift, data, jnp.zeros(2)).compile()
    return partial(program, data.w, data.shift, data), time.perf_counter() - begin


@jax.jit
def _residuals(data: Data, z: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    fz, vjp = jax.vjp(lambda z: f(z, data.w, data.x, data.shift), z)
    size = lambda v: jnp.linalg.norm(v, axis=1)  # noqa: E731
    return (size(fz - z) / size(fz)).max(), (size(data.g - u + vjp(u)[0]) / size(data.g)).max()


def reached(program: Callable[..., Any], data: Data, tolerances: tuple[float, float]) -> tuple[float, float]:
    """Return the largest relative residuals of the two equations.

    A tolerance at which a library raises, as lineax does where its GMRES stagnates, is not reached.
    """
    try:
        (_, z), (_, u) = program(jnp.asarray(tolerances, jnp.float32))
    except jax.errors.JaxRuntimeError:
        return math.inf, math.inf
    ahead, back = _residuals(data, z, u)
    return float(ahead), float(back)


def loosest(program: Callable[..., Any], data: Data) -> tuple[float, float] | None:
    """Return the loosest tolerances with which both residuals are small enough; None if there are none."""
    found = [LOOSEST, LOOSEST]
    for which in (0, 1):
        met, missed = math.log(TIGHTEST), math.log(LOOSEST)
        for _ in range(HALVINGS):
            middle = (met + missed) / 2
            found[which] = math.exp(middle)
            small = reached(program, data, (found[0], found[1]))[which] <= RESIDUAL
            met, missed = (middle, missed) if small else (met, middle)
        found[which] = math.exp(met)
    tolerances = found[0], found[1]
    return tolerances if max(reached(program, data, tolerances)) <= RESIDUAL else None


def measure(batch: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Tune and time all contenders on one cell."""
    data, rows, programs = Data.of(batch, width), [], {}
    for name, solve in (OURS | PEERS).items():
        program, first = compiled(solve, data)
        tolerances = (RESIDUAL, RESIDUAL) if name in OURS else loosest(program, data)
        if tolerances is None:
            print(f"{name}: no tolerance reaches {RESIDUAL:g}", flush=True)
            continue
        ahead, back = reached(program, data, tolerances)
        if max(ahead, back) > ROUNDING * RESIDUAL:
            print(f"{name}: its residuals are {ahead:.1e} and {back:.1e}", flush=True)
            continue
        print(f"{batch}×{width} {name}: {first:.2f} s; tolerances {tolerances}; {ahead:.1e} {back:.1e}", flush=True)
        programs[name] = partial(program, jnp.asarray(tolerances, jnp.float32))
        rows.append(
            {
                "cell": f"dense {batch}×{width}", "contender": name, "first": first, "tolerances": tolerances,
                "residual": ahead, "adjoint": back, "ms": [],
            }
        )  # fmt: skip
    for _ in range(rounds):
        for row in rows:
            begin = time.perf_counter()
            jax.block_until_ready(programs[row["contender"]]())
            row["ms"].append(1e3 * (time.perf_counter() - begin))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = []
    for row in rows:
        spread = Spread.of(row["ms"])
        peers = [Spread.of(other["ms"]).median for other in rows if _is_peer(other) and other["cell"] == row["cell"]]
        cells = (
            row["cell"], row["contender"], f"{spread.median:.1f}", f"{spread.low:.1f} – {spread.high:.1f}",
            f"{spread.median / min(peers):.2f}" if peers else "", f"{row['first']:.2f}",
            f"{row['residual']:.1e}", f"{row['adjoint']:.1e}",
        )  # fmt: skip
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    return markdown(lines, COLUMNS)


def _is_peer(row: dict[str, Any]) -> bool:
    return row["contender"] in PEERS


def page(rows: list[dict[str, Any]], machine: Any) -> str:
    """Return docs/benchmarks/backward_jax.md."""
    command, _, rest = (__doc__ or "").partition("\n\n")[2].partition("\n\n")
    return "\n\n".join(
        [
            "# Value and gradient in JAX",
            f"Written by `{command.strip()}`. {machine_text(machine)} Load before: {machine['load_before'][0]}.",
            rest.strip(),
            table(rows) + "\n",
        ]
    )


def main() -> None:
    """Measure and print; the file of --json is complete after each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one small cell")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--page", action="store_true", help="write the page beside the file of --json")
    options = parser.parse_args()
    if options.page and options.json is None:
        parser.error("--page needs --json")
    jax.config.update("jax_enable_compilation_cache", False)
    rows, machine = [], describe(PACKAGES)
    for size in QUICK if options.quick else SIZES:
        rows += measure(*size, options.rounds)
        print(table(rows), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        if options.page:
            options.json.with_suffix(".md").write_text(page(rows, machine), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Value and gradient in JAX beside jaxopt and optimistix (CPU).

    python -m benchmarks.backward_jax --json docs/benchmarks/backward_jax.json --page

A dense tanh cell; the loss is a fixed product with the equilibrium, its gradient is that of the weights and of a shift
that is added to f. The gradient of the shift is u, the solution of the adjoint equation, so that both residuals are
measured for every contender: the largest of a sample, ‖f(z) − z‖/‖f(z)‖ and ‖g − u + Jᵀu‖/‖g‖. Each contender gets the
loosest tolerances with which both are at most 1e-4. The search changes both at once, since each try is a program to
compile. Then all take turns, one call each in every round. Times are those of the wall; *first call* is tracing and
compiling, without a cache.
"""

from __future__ import annotations

import argparse
import json
import time
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
TOLERANCES: Final = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
START: Final = TOLERANCES.index(RESIDUAL)
SIZES: Final = ((192, 384), (256, 512))
STEPS: Final = 100
COLUMNS: Final = (
    "cell", "contender", "ms, median", "quartiles", "of the best peer", "first call, s", "residual", "adjoint residual",
)  # fmt: skip


def f(z: jax.Array, w: jax.Array, x: jax.Array, shift: jax.Array) -> jax.Array:
    """Return the cell."""
    return jnp.tanh(z @ w.T + x) + shift


def ours(w: Any, x: Any, shift: Any, z0: Any, forward: float, backward: float, **settings: Any) -> Any:
    """Solve with deqcore; without settings, with its defaults for functions."""
    options = {"rtol": backward} | {name: settings.pop(name) for name in ("direct",) if name in settings}
    return deqcore.fixed_point(
        f, z0, w, x, shift, forward__rtol=forward, backward__strategy="exact-ift", backward__options=options, **settings
    ).value  # fmt: skip


def with_jaxopt(w: Any, x: Any, shift: Any, z0: Any, forward: float, backward: float, solver: Any = None) -> Any:
    """Solve with jaxopt, whose tolerance is that of the whole batch, and GMRES for the adjoint equation."""
    solve = partial(jaxopt.linear_solve.solve_gmres, tol=backward)
    made = solver(f, maxiter=STEPS, tol=forward * z0.size**0.5, implicit_diff=True, implicit_diff_solve=solve)
    return made.run(z0, w, x, shift).params


def with_optimistix(w: Any, x: Any, shift: Any, z0: Any, forward: float, backward: float) -> Any:
    """Solve with optimistix' fixed-point iteration, and lineax' GMRES for the adjoint equation."""
    # Its criterion holds for each number, so that a small one of g needs an absolute tolerance.
    adjoint = optimistix.ImplicitAdjoint(linear_solver=lineax.GMRES(rtol=backward, atol=backward, restart=40))
    solver = optimistix.FixedPointIteration(rtol=forward, atol=forward)
    return optimistix.fixed_point(
        lambda z, args: f(z, *args), solver, z0, (w, x, shift), adjoint=adjoint, max_steps=STEPS, throw=False
    ).value


CONTENDERS: Final[dict[str, Any]] = {
    "deqcore, defaults (auto, exact-ift)": ours,
    "deqcore, auto without Newton–Krylov": partial(ours, forward__options={"escalate": False}),
    "deqcore, picard": partial(ours, forward__solver="picard"),
    "deqcore, picard, without the dense solve": partial(ours, forward__solver="picard", direct=0),
    "deqcore, anderson": partial(ours, forward__solver="anderson"),
    "jaxopt, fixed-point iteration": partial(with_jaxopt, solver=jaxopt.FixedPointIteration),
    "jaxopt, Anderson": partial(with_jaxopt, solver=jaxopt.AndersonAcceleration),
    "optimistix, fixed-point iteration": with_optimistix,
}


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


def step(solve: Any, data: Data, forward: float, backward: float) -> Any:
    """Return the compiled value and gradient of a contender."""

    def loss(w: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = solve(w, data.x, shift, data.z0, forward, backward)
        return jnp.sum(z * data.g), z

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def residuals(data: Data, result: Any) -> tuple[float, float]:
    """Return the largest relative residuals of the two equations."""
    (_, z), (_, u) = result
    fz, vjp = jax.vjp(lambda z: f(z, data.w, data.x, data.shift), z)
    size = lambda v: jnp.linalg.norm(v, axis=1)  # noqa: E731
    ahead = size(fz - z) / size(fz)
    back = size(data.g - u + vjp(u)[0]) / size(data.g)
    return float(ahead.max()), float(back.max())


def loosest(solve: Any, data: Data) -> tuple[float, float] | None:
    """Return the loosest tolerances with which both residuals are small enough; None if there are none.

    A tolerance at which a library raises, as lineax does where its GMRES stagnates, is not reached.
    """
    places, least, most = [START, START], [0, 0], [len(TOLERANCES)] * 2  # those from `most` on are met or not tried
    while any(low < high for low, high in zip(least, most, strict=True)):
        tried = [min(place, len(TOLERANCES) - 1) for place in places]
        try:
            reached = residuals(data, step(solve, data, *(TOLERANCES[i] for i in tried))(data.w, data.shift))
        except jax.errors.JaxRuntimeError:
            reached = float("inf"), float("inf")
        for which, place in enumerate(tried):
            if reached[which] <= RESIDUAL:
                most[which] = min(most[which], place)
                places[which] = max(least[which], place - 1)
            else:
                least[which] = max(least[which], place + 1)
                places[which] = min(place + 1, most[which])
    if max(most) == len(TOLERANCES):
        return None
    return TOLERANCES[most[0]], TOLERANCES[most[1]]


def measure(batch: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """Tune and time all contenders on one cell."""
    data, rows, programs = Data.of(batch, width), [], {}
    for name, solve in CONTENDERS.items():
        if (tolerances := loosest(solve, data)) is None:
            print(f"{name}: no tolerance reaches {RESIDUAL:g}", flush=True)
            continue
        forward, backward = tolerances
        jax.clear_caches()
        begin = time.perf_counter()
        program = step(solve, data, forward, backward).lower(data.w, data.shift).compile()
        first = time.perf_counter() - begin
        reached = residuals(data, program(data.w, data.shift))
        programs[name] = program
        rows.append(
            {
                "cell": f"dense {batch}×{width}", "contender": name, "first": first, "forward": forward,
                "backward": backward, "residual": reached[0], "adjoint": reached[1], "ms": [],
            }
        )  # fmt: skip
    for _ in range(rounds):
        for row in rows:
            begin = time.perf_counter()
            jax.block_until_ready(programs[row["contender"]](data.w, data.shift))
            row["ms"].append(1e3 * (time.perf_counter() - begin))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = []
    for row in rows:
        spread = Spread.of(row["ms"])
        peers = [Spread.of(other["ms"]).median for other in rows if other["cell"] == row["cell"] and _is_peer(other)]
        cells = (
            row["cell"], row["contender"], f"{spread.median:.1f}", f"{spread.low:.1f} – {spread.high:.1f}",
            f"{spread.median / min(peers):.2f}" if peers else "", f"{row['first']:.2f}",
            f"{row['residual']:.1e}", f"{row['adjoint']:.1e}",
        )  # fmt: skip
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    return markdown(lines, COLUMNS)


def _is_peer(row: dict[str, Any]) -> bool:
    return not row["contender"].startswith("deqcore")


def page(rows: list[dict[str, Any]], machine: Any) -> str:
    """Return docs/benchmarks/backward_jax.md."""
    command, _, rest = (__doc__ or "").partition("\n\n")[2].partition("\n\n")
    return "\n\n".join(
        [
            "# Value and gradient in JAX",
            f"Written by `{command.strip()}`. {machine_text(machine)}",
            rest.strip(),
            table(rows) + "\n",
        ]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--page", action="store_true", help="write the page beside the file of --json")
    options = parser.parse_args()
    if options.page and options.json is None:
        parser.error("--page needs --json")
    rows, machine = [row for size in SIZES for row in measure(*size, options.rounds)], describe(PACKAGES)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, default=str) + "\n")
        if options.page:
            options.json.with_suffix(".md").write_text(page(rows, machine), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()

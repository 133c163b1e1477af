"""Solves standard systems of nonlinear equations with `deqcore.root` and with SciPy, and writes the page of results.

    python -m benchmarks.nonlinear            # prints the table
    python -m benchmarks.nonlinear --write    # writes docs/benchmarks/nonlinear.{json,md}

A problem is solved if the method ends within its budget and ‖g‖ ≤ 1e-8 where it ends. A status is honest if it is
CONVERGED for such points only.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import optimize

import deqcore

Vector = NDArray[np.float64]
Equations = Callable[[Vector], Any]

GOAL: Final = 1e-8
STEPS: Final = 400
EVALUATIONS: Final = 5000
PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "nonlinear"

OURS: Final[dict[str, tuple[str, dict[str, object]]]] = {
    "auto": ("auto", {}),
    "newton-krylov": ("newton-krylov", {}),
    "broyden": ("broyden", {}),
    "broyden, guard 2": ("broyden", {"max_residual_growth": 2.0}),
    "anderson": ("anderson", {}),
    "picard": ("picard", {}),
}
SCIPY: Final = ("hybr", "lm", "krylov", "df-sane", "broyden1", "anderson")


TEXT: Final = """# Nonlinear equations

Each cell has the evaluations (with Jacobian products) until {0}, or – if the method does not get there within
{1} (SciPy: {2}, and ten times the goal counts). Lower is better. The starts are the standard ones.

{table}

Solves of ours that end as CONVERGED with a larger ‖g‖: {false}.

The problems are the first fourteen systems of Moré, Garbow & Hillstrom (1981), "Testing unconstrained optimization
software", in MINPACK's form, Rosenbrock's chain, Hammarling's matrix square roots, and small systems of Dennis &
Schnabel (1983), Freudenstein & Roth (1963), Boggs (1971) and Chandrasekhar. They test what a solver does far from a
solution; implicit layers are mostly kinder ([choosing a solver](../choosing.md)).

Command: `python -m benchmarks.nonlinear --write` (NumPy {numpy}, SciPy {scipy}, float64).
"""


def rosenbrock(x: Vector) -> Any:
    """Return Rosenbrock's function, and its generalisation to a chain."""
    return [1 - x[0], *(10 * (x[1:] - x[:-1] ** 2))]


def powell_singular(x: Vector) -> Any:
    """Return Powell's singular function."""
    return [x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2]


def powell_badly_scaled(x: Vector) -> Any:
    """Return Powell's badly scaled function."""
    return [1e4 * x[0] * x[1] - 1, np.exp(-x[0]) + np.exp(-x[1]) - 1.0001]


def wood(x: Vector) -> Any:
    """Return Wood's function: the gradient, as in MINPACK."""
    a, b = x[1] - x[0] ** 2, x[3] - x[2] ** 2
    return [
        -200 * x[0] * a - (1 - x[0]),
        200 * a + 20.2 * (x[1] - 1) + 19.8 * (x[3] - 1),
        -180 * x[2] * b - (1 - x[2]),
        180 * b + 20.2 * (x[3] - 1) + 19.8 * (x[1] - 1),
    ]


def helical_valley(x: Vector) -> Any:
    """Fletcher and Powell's helical valley."""
    angle = np.arctan2(x[1], x[0]) / (2 * np.pi)
    angle = angle if angle >= -0.25 else angle + 1.0
    return [10 * (x[2] - 10 * angle), 10 * (np.hypot(x[0], x[1]) - 1), x[2]]


def watson(x: Vector) -> Any:
    """Return Watson's function, n = 2: the gradient of its sum of squares, as in MINPACK."""
    n, total = len(x), np.zeros(len(x))
    powers = np.arange(n)
    for i in range(1, 30):
        t = i / 29
        basis = t**powers
        slope = np.array([j * t ** (j - 1) if j else 0.0 for j in powers])
        inner = basis @ x
        total = total + (slope @ x - inner**2 - 1) * (slope - 2 * inner * basis)
    total[0] += x[0] * (1 - 2 * (x[1] - x[0] ** 2 - 1))
    total[1] += x[1] - x[0] ** 2 - 1
    return total


def chebyquad(x: Vector) -> Any:
    """Return the Chebyquad function: equal weights integrate the Chebyshev polynomials."""
    n = len(x)
    sums = [np.mean(np.polynomial.chebyshev.chebval(2 * x - 1, [0] * i + [1])) for i in range(1, n + 1)]
    return [s + (1 / (i * i - 1) if i % 2 == 0 else 0.0) for i, s in enumerate(sums, 1)]


def brown_almost_linear(x: Vector) -> Any:
    """Return Brown's almost linear function, n = 10."""
    return [*(x[:-1] + np.sum(x) - (len(x) + 1)), np.prod(x) - 1]


def boundary_value(x: Vector) -> Any:
    """Discrete boundary value problem."""
    n = len(x)
    h, t = 1 / (n + 1), np.arange(1, n + 1) / (n + 1)
    wide = np.concatenate([[0.0], x, [0.0]])
    return 2 * x - wide[:-2] - wide[2:] + h * h * (x + t + 1) ** 3 / 2


def integral_equation(x: Vector) -> Any:
    """Discrete integral equation."""
    n = len(x)
    h, t = 1 / (n + 1), np.arange(1, n + 1) / (n + 1)
    cube = (x + t + 1) ** 3
    below = np.cumsum(t * cube)
    above = np.sum((1 - t) * cube) - np.cumsum((1 - t) * cube)
    return x + h * ((1 - t) * below + t * above) / 2


def trigonometric(x: Vector) -> Any:
    """Trigonometric function, n = 10."""
    n, c = len(x), np.cos(x)
    return n - np.sum(c) + np.arange(1, n + 1) * (1 - c) - np.sin(x)


def variably_dimensioned(x: Vector) -> Any:
    """Variably dimensioned function: the gradient, as in MINPACK."""
    i = np.arange(1, len(x) + 1)
    total = i @ (x - 1)
    return x - 1 + i * total * (1 + 2 * total**2)


def broyden_tridiagonal(x: Vector) -> Any:
    """Return Broyden's tridiagonal function."""
    wide = np.concatenate([[0.0], x, [0.0]])
    return (3 - 2 * x) * x - wide[:-2] - 2 * wide[2:] + 1


def broyden_banded(x: Vector) -> Any:
    """Return Broyden's banded function."""
    n = len(x)
    near = [sum(x[j] * (1 + x[j]) for j in range(max(0, i - 5), min(n, i + 2)) if j != i) for i in range(n)]
    return x * (2 + 5 * x**2) + 1 - np.array(near)


def square_root(size: int) -> Equations:
    """Return Hammarling's problem: the square root of a matrix near a defective one."""
    target = 1e-4 * np.eye(size)
    target[0, 1] = 1.0

    def g(x: Vector) -> Any:
        m = x.reshape(size, size)
        return (m @ m - target).ravel()

    return g


def dennis_schnabel(x: Vector) -> Any:
    """Return Dennis and Schnabel's example."""
    return [x[0] + x[1] - 3, x[0] ** 2 + x[1] ** 2 - 9]


def quotients(x: Vector) -> Any:
    """Return a system that is not defined on the axes, with limits there."""
    parts = [-np.expm1(-(v**2)) / v if v != 0 else 0.0 for v in x]
    return [x[1] ** 2 * parts[0], x[0] * parts[1]]


def cubic(x: Vector) -> Any:
    """Return a system with a threefold root at 0."""
    return x * np.sum(x**2)


def double_root(x: Vector) -> Any:
    """Return x (x − 5)², which has a double root."""
    return x * (x - 5) ** 2


def freudenstein_roth(x: Vector) -> Any:
    """Freudenstein and Roth's function, which has a local minimum of ‖g‖."""
    return [
        -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1],
        -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1],
    ]


def boggs(x: Vector) -> Any:
    """Boggs' function, whose Jacobian is singular on a curve near the start."""
    return [x[0] ** 2 - x[1] + 1, x[0] - np.cos(np.pi * x[1] / 2)]


def chandrasekhar(x: Vector) -> Any:
    """Return Chandrasekhar's H-equation with c = 0.9."""
    n = len(x)
    mu = (np.arange(1, n + 1) - 0.5) / n
    return x - 1 / (1 - 0.9 / (2 * n) * (mu[:, None] / (mu[:, None] + mu[None, :]) @ x))


PROBLEMS: Final[dict[str, tuple[Equations, list[float]]]] = {
    "Rosenbrock, 2": (rosenbrock, [-1.2, 1.0]),
    "Rosenbrock, 10": (rosenbrock, [-1.2, *[1.0] * 9]),
    "Powell singular": (powell_singular, [3.0, -1.0, 0.0, 1.0]),
    "Powell badly scaled": (powell_badly_scaled, [0.0, 1.0]),
    "Wood": (wood, [-3.0, -1.0, -3.0, -1.0]),
    "helical valley": (helical_valley, [-1.0, 0.0, 0.0]),
    "Watson, 2": (watson, [0.0, 0.0]),
    "Chebyquad, 2": (chebyquad, [1 / 3, 2 / 3]),
    "Brown almost linear, 10": (brown_almost_linear, [0.5] * 10),
    "boundary value, 10": (boundary_value, [i / 11 * (i / 11 - 1) for i in range(1, 11)]),
    "integral equation, 10": (integral_equation, [i / 11 * (i / 11 - 1) for i in range(1, 11)]),
    "trigonometric, 10": (trigonometric, [0.1] * 10),
    "variably dimensioned, 10": (variably_dimensioned, [1 - i / 10 for i in range(1, 11)]),
    "Broyden tridiagonal, 10": (broyden_tridiagonal, [-1.0] * 10),
    "Broyden banded, 10": (broyden_banded, [-1.0] * 10),
    "matrix square root, 2": (square_root(2), [1.0, 0.0, 0.0, 1.0]),
    "matrix square root, 3": (square_root(3), [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]),
    "Dennis–Schnabel": (dennis_schnabel, [1.0, 5.0]),
    "quotients": (quotients, [2.0, 2.0]),
    "threefold root": (cubic, [3.0, 3.0]),
    "double root": (double_root, [1.0]),
    "Freudenstein–Roth": (freudenstein_roth, [6.0, 3.0]),
    "Boggs": (boggs, [1.0, 0.0]),
    "Chandrasekhar, 10": (chandrasekhar, [1.0] * 10),
}


def size(g: Equations, x: Vector) -> float:
    """Return ‖g(x)‖."""
    return float(np.linalg.norm(np.asarray(g(x), float)))


def ours(name: str, g: Equations, start: list[float]) -> dict[str, object]:
    """Solve with one of our solvers."""
    solver, options = OURS[name]

    def rows(z: Vector) -> Vector:
        return np.stack([np.asarray(g(row), z.dtype) for row in z])

    sol = deqcore.root(
        rows,
        np.array([start]),
        forward__solver=solver,
        forward__options=options,
        forward__rtol=0.0,
        forward__atol=GOAL,
        forward__max_steps=STEPS,
        forward__on_failure="ignore",
    )
    left = size(g, np.asarray(sol.value)[0])
    status = deqcore.Status(int(sol.status[0]))
    honest = (status is not deqcore.Status.CONVERGED) or left <= GOAL * (1 + 1e-6)
    return {
        "solved": status is deqcore.Status.CONVERGED and left <= GOAL * (1 + 1e-6),
        "status": status.name,
        "honest": bool(honest),
        "evaluations": int(sol.evaluations[0]),
        "residual": left,
    }


def scipys(method: str, g: Equations, start: list[float]) -> dict[str, object]:
    """Solve with a method of `scipy.optimize.root`."""
    count = [0]

    def counted(x: Vector) -> Vector:
        count[0] += 1
        if count[0] > EVALUATIONS:
            raise RuntimeError("budget")
        return np.asarray(g(np.asarray(x, float)), float)

    options: dict[str, object] = {"fatol": GOAL} if method not in ("hybr", "lm") else {}
    try:
        found = optimize.root(counted, start, method=method, tol=None, options=options)
        left, claimed = size(g, found.x), bool(found.success)
    except Exception as error:  # a method's own failures have many types
        return {"solved": False, "status": type(error).__name__, "evaluations": count[0], "residual": None}
    return {
        "solved": left <= GOAL * 10,
        "status": "success" if claimed else "failure",
        "evaluations": count[0],
        "residual": left if np.isfinite(left) else None,
    }


def measured() -> dict[str, Any]:
    """Return the results by problem and method."""
    found: dict[str, Any] = {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for problem, (g, start) in PROBLEMS.items():
            found[problem] = {name: ours(name, g, start) for name in OURS}
            found[problem] |= {f"scipy {method}": scipys(method, g, start) for method in SCIPY}
    versions = {"deqcore": deqcore.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
    return {"goal": GOAL, "steps": STEPS, "evaluations": EVALUATIONS, "versions": versions, "problems": found}


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    problems = results["problems"]
    names = list(next(iter(problems.values())))
    lines = [f"| problem | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for problem, row in problems.items():
        cells = [str(row[name]["evaluations"]) if row[name]["solved"] else "–" for name in names]
        lines.append(f"| {problem} | {' | '.join(cells)} |")
    solved = [sum(row[name]["solved"] for row in problems.values()) for name in names]
    lines.append(f"| **solved of {len(problems)}** | {' | '.join(f'**{count}**' for count in solved)} |")
    false = sum(not row[name]["honest"] for row in problems.values() for name in OURS)
    limits = f"‖g‖ ≤ {results['goal']:g}", f"{results['steps']} steps", f"{results['evaluations']} evaluations"
    return TEXT.format(*limits, table="\n".join(lines), false=false, **results["versions"])


def main() -> None:
    """Print the table, or write the page."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--write", action="store_true", help="write docs/benchmarks/nonlinear.{json,md}")
    results = measured()
    text = page(results)
    print(text)
    if asked.parse_args().write:
        PAGE.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

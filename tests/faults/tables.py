"""Which checks of the public suite, and which tests of ours, judge a module. Fixed before a sample is drawn."""

from __future__ import annotations

import json

from deqcore.testing.runner.conformance import SuiteRequest

Options = dict[str, object]


def checks(kind: str, name: str, *variants: tuple[Options, Options], backend: str = "numpy"):
    """Return a check per set of options with its cost bounds; without any, the defaults and theirs."""
    return [
        (SuiteRequest(kind, name, options=text(options), cost_bounds=text(cost_bounds), first=True), backend)
        for options, cost_bounds in variants or [({}, {})]
    ]


def text(given: Options) -> str | None:
    return json.dumps(given) if given else None


PLAIN = {"certify": False, "max_relative_error": None, "fallback": "none"}, {}
MEASURED = {"certify": True, "max_relative_error": None, "fallback": "none"}, {}
DEFAULT = {}, {}
SPENT = {"max_relative_error": 0.001, "max_refine_vjps": 2}  # a target that this budget misses

ANDERSON = checks(
    "solver",
    "anderson",
    DEFAULT,
    ({"history_size": 3}, {"affine": 28, "expansive": 42, "monotone": 67, "tree": 41}),
    ({"mixing": 0.5}, {"affine": 10, "expansive": 12, "monotone": 15, "tree": 33}),
    ({"max_residual_growth": 1.5, "history_size": 3}, {"affine": 28, "expansive": 28, "overshoot": 19, "tree": 41}),
)
ANDERSON += checks("solver", "anderson", backend="strict")  # where samples that are done stay in the batch
BROYDEN = checks(
    "solver",
    "broyden",
    DEFAULT,
    ({"history_size": 5}, {"affine": 29, "expansive": 37, "slow-modes": 175, "tree": 34}),
    ({"history_size": 2}, {"affine": 34, "mlp": 25, "overshoot": 21, "tree": 43}),
    (
        {"max_residual_growth": 2.0},
        {"affine": 14, "expansive": 21, "monotone": 19, "overshoot": 15, "slow-modes": 43, "walled": 31},
    ),
    (
        {"max_residual_growth": 2.0, "history_size": 5},
        {"affine": 29, "expansive": 41, "overshoot": 18, "slow-modes": 160},
    ),
)
BROYDEN += checks("solver", "broyden", backend="strict")
EXACT = checks(
    "strategy",
    "exact-ift",
    DEFAULT,
    ({"start": "cotangent"}, {"affine": 7, "slow-modes": 22, "tree": 12}),
    ({"start": "reuse"}, {"affine": 7, "slow-modes": 22, "tree": 12}),
    ({"solver": "anderson", "max_steps": 300}, {"affine": 8, "slow-modes": 130, "tree": 15}),
    ({"solver": "anderson", "max_steps": 300, "start": "zero"}, {"affine": 8, "tree": 15}),
    ({"rtol": 0.01}, {"affine": 5, "slow-modes": 16, "tree": 5}),
)
REUSE = checks(
    "strategy",
    "broyden-reuse",
    DEFAULT,
    ({"max_relative_error": 1e-3}, {"affine": 6, "conv": 7, "slow-modes": 18, "tree": 8}),
    ({"max_relative_error": 1e-6}, {"conv": 12, "ring": 13, "slow-modes": 21, "tree": 10}),
    (SPENT, {}),
    ({**SPENT, "fallback": "exact-ift"}, {}),
    ({**SPENT, "fallback": "none"}, {}),
)
AUTO = [
    *checks("solver", "auto"),
    *checks("solver", "auto", ({"escalate": False}, {})),
    *checks("solver", "auto", backend="strict"),
]
ADAPTIVE = [
    *checks("strategy", "adaptive", DEFAULT, ({"max_relative_error": 0.2, "fallback": "none"}, {})),
    *checks("strategy", "adaptive", backend="strict"),
]
LOOPED = checks(
    "strategy",
    "looped",
    DEFAULT,
    ({"distribution": "log-normal-poisson", "seed": 3}, {}),
    ({"distribution": "uniform", "seed": 1, "damping": 0.5, "max_depth": 6, "measure": True}, {}),
    ({"distribution": "poisson", "seed": 2, "noise": 0.1, "start_noise": 0.1}, {}),
)
ESTIMATED = checks(
    "strategy",
    "exact-ift",
    ({"max_relative_error": 0.01}, {}),
    ({"max_relative_error": 0.01, "reuse": "witness"}, {}),
    ({"max_relative_error": 0.01, "reuse": "precondition"}, {}),
)
# The strict backend runs what only tracing frameworks run, as JAX does.
TRACED = [*checks("strategy", "broyden-reuse", backend="strict"), *checks("strategy", "exact-ift", backend="strict")]
GMRES = [EXACT[0], REUSE[0], EXACT[1], REUSE[1], *checks("solver", "newton-krylov"), *TRACED]

CHECKS = {
    "deqcore.solvers.picard": checks("solver", "picard", DEFAULT, ({"damping": 0.9}, {"affine": 80, "expansive": 96})),
    "deqcore.solvers.anderson": ANDERSON,
    "deqcore.solvers.broyden": BROYDEN,
    "deqcore.solvers.newton_krylov": [
        *checks("solver", "newton-krylov"),
        *checks("solver", "newton-krylov", backend="torch"),
        *checks("solver", "newton-krylov", backend="strict"),
    ],
    "deqcore.backward.exact_ift": [*EXACT, TRACED[1]],
    "deqcore.backward.broyden_reuse": [*REUSE, *checks("strategy", "broyden-reuse", PLAIN, MEASURED), TRACED[0]],
    "deqcore.backward.jacobian_free": checks("strategy", "jacobian-free"),
    "deqcore.backward.neumann": checks("strategy", "neumann", DEFAULT, ({"terms": 1}, {}), ({"terms": 0}, {})),
    "deqcore.backward.phantom": checks("strategy", "phantom", DEFAULT, ({"damping": 1.0}, {}), backend="torch"),
    "deqcore.backward.unrolled": checks("strategy", "unrolled", DEFAULT, ({"checkpoint": True}, {}), backend="torch"),
    "deqcore.linear.gmres": GMRES,
    "deqcore.linear.lowrank": [*BROYDEN[:2], ANDERSON[0], REUSE[0], BROYDEN[-1]],
    "deqcore.linear.certified": [*REUSE, TRACED[0]],
    "deqcore.solvers.auto": AUTO,
    "deqcore.solvers.levels": AUTO,
    "deqcore.backward.adaptive": ADAPTIVE,
    "deqcore.backward.controller": ADAPTIVE,
    "deqcore.backward.depth": LOOPED,
    "deqcore.backward.looped": LOOPED,
    "deqcore.backward.reversible": checks("strategy", "reversible", DEFAULT, backend="torch"),
    "deqcore.backward.to_error": [*REUSE, *ESTIMATED, TRACED[0]],
    "deqcore.linear.direct": [EXACT[0], TRACED[1], *checks("strategy", "exact-ift", ({"max_steps": 9}, {}))],
    "deqcore.linear.figures": [REUSE[0], ESTIMATED[0]],
    "deqcore.linear.grouped": [EXACT[0], REUSE[0], ADAPTIVE[0], *TRACED],
    "deqcore.linear.norms": [EXACT[0], ANDERSON[0], *TRACED],
    "deqcore.linear.powers": ADAPTIVE,
    "deqcore.linear.rules": [*REUSE, *ESTIMATED, TRACED[0]],
    "deqcore.linear.transposed": [
        *checks("strategy", "exact-ift", ({"start": "reuse"}, {}), backend="torch"),
        (SuiteRequest("backend", "torch", first=True), "torch"),
    ],
}


SOLVES = ["core/test_counts.py", "core/test_safeguard.py", "core/test_solvers.py"]
ROUTES = ["core/test_counts.py", "core/test_strategies.py"]
CERTIFIES = ["core/test_counts.py", "core/test_certified_counts.py", "core/test_certified.py"]

TESTS = {
    "deqcore.solvers.picard": SOLVES,
    "deqcore.solvers.anderson": SOLVES,
    "deqcore.solvers.broyden": [*SOLVES, "core/test_costs.py"],
    "deqcore.solvers.newton_krylov": SOLVES,
    "deqcore.solvers.auto": [
        *("core/test_auto.py", "core/test_counts.py", "core/test_safeguard.py"),
        "backends/test_torch_native.py",
    ],
    "deqcore.solvers.levels": ["core/test_levels.py", "core/test_auto.py", "core/test_counts.py"],
    "deqcore.backward.adaptive": ["core/test_adaptive_model.py", "backends/test_adaptive.py"],
    "deqcore.backward.controller": ["core/test_controller.py"],
    "deqcore.backward.depth": ["core/test_depth.py"],
    "deqcore.backward.looped": ["core/test_linear.py", "core/test_depth.py", "backends/test_looped.py"],
    "deqcore.backward.reversible": ["backends/test_reversible.py"],
    "deqcore.backward.exact_ift": [*ROUTES, "core/test_direct.py", "core/test_certified.py"],
    "deqcore.backward.broyden_reuse": [*ROUTES, "core/test_certified.py", "backends/test_no_pairs.py"],
    "deqcore.backward.jacobian_free": ROUTES,
    "deqcore.backward.neumann": ROUTES,
    "deqcore.backward.phantom": ["backends/test_truncated.py"],
    "deqcore.backward.unrolled": ["backends/test_unrolled.py"],
    "deqcore.backward.to_error": [*CERTIFIES, "backends/test_torch_krylov.py"],
    "deqcore.linear.gmres": ["core/test_gmres.py", "core/test_counts.py", "backends/test_torch_krylov.py"],
    "deqcore.linear.lowrank": ["core/test_linear.py", *ROUTES, "core/test_solvers.py"],
    "deqcore.linear.certified": CERTIFIES,
    "deqcore.linear.direct": ["core/test_direct.py"],
    "deqcore.linear.figures": CERTIFIES,
    "deqcore.linear.grouped": ["core/test_linear.py", "backends/test_units.py"],
    "deqcore.linear.norms": [
        *("core/test_linear.py", "core/test_gmres.py", "core/test_counts.py", "core/test_api.py"),
        "backends/test_torch_krylov.py",
    ],
    "deqcore.linear.powers": ["core/test_adaptive_model.py", "backends/test_adaptive.py"],
    "deqcore.linear.rules": CERTIFIES,
    "deqcore.linear.transposed": ["core/test_linear.py", *ROUTES],
}
"""Our own tests of a module, the quick ones first; those of JAX and, in the folder core, of torch are left out."""

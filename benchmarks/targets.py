"""What the project set out to reach, computed from measured results: target, figure, peer, verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from benchmarks.results import Results
from benchmarks.roofline import least_overhead
from benchmarks.steps import Step
from deqcore.bench.report import spread
from deqcore.bench.rows import BenchRow
from deqcore.bench.timing import Spread

COLUMNS: Final = ("what", "target", "measured", "peer", "verdict")
DEFAULT: Final = "deqcore auto"
COMPACT: Final = " (compact)"
TORCHDEQ: Final = {"picard": "fixed_point_iter", "anderson": "anderson", "broyden": "broyden"}


@dataclass(frozen=True)
class Target:
    """One figure and its limit.

    Attributes:
        what: is measured.
        limit: that the figure must not exceed.
        figure: measured; None: not measured.
        shown: the figure with its spread.
        peer: the same of a peer, or what it was compared with.
        strict: whether the limit itself is too much.
    """

    what: str
    limit: float
    figure: float | None
    shown: str = ""
    peer: str = ""
    strict: bool = False

    @property
    def verdict(self) -> Literal["met", "not measured"] | str:
        """Met, or missed by how much."""
        if self.figure is None:
            return "not measured"
        if self.figure < self.limit or (self.figure == self.limit and not self.strict):
            return "met"
        if self.limit > 0:
            return f"missed: {self.figure / self.limit:.2f} × the limit"
        return f"missed by {self.figure - self.limit:.3g}"

    def cells(self) -> dict[str, str]:
        """Return a row of the table."""
        sign = "<" if self.strict else "≤"
        return {
            "what": self.what,
            "target": f"{sign} {self.limit:.3g}",
            "measured": self.shown or ("" if self.figure is None else f"{self.figure:.3g}"),
            "peer": self.peer,
            "verdict": self.verdict,
        }


def targets(results: Mapping[str, Any]) -> list[Target]:
    """Return all of them, in the order of the table."""
    result = Results(results)
    makers: tuple[Callable[[Results], list[Target]], ...] = (
        _default,
        _overheads,
        _against_torchdeq,
        _counts,
        _jax,
        _compaction,
        _memory,
        _fixed_cost,
        _training,
    )
    return [target for make in makers for target in make(result)]


def _ratio(what: str, limit: float, ours: Spread | None, peer: str = "") -> Target:
    if ours is None:
        return Target(what, limit, None, peer=peer)
    return Target(what, limit, ours.median, spread(ours), peer)


def _overheads(found: Results) -> list[Target]:
    limits = {
        ("broyden", "conv"): 1.4,
        ("broyden", "dense"): 1.8,
        ("anderson", "conv"): 1.25,
        ("anderson", "dense"): 1.5,
        ("picard", "conv"): 1.12,
        ("picard", "dense"): 1.12,
    }
    speed = found.fact("bandwidth", "bytes per second")
    made = []
    for (solver, case), limit in limits.items():
        ours = found.row("torch", case, f"deqcore {solver}")
        peer = found.row("torch", case, f"torchdeq {TORCHDEQ[solver]}")
        beside = [] if peer is None else [f"torchdeq {spread(peer.overhead)}"]
        if ours is not None and speed is not None:
            bound = least_overhead(solver, ours.evaluations, ours.state, ours.reference, speed)
            beside.append(f"memory bound {bound:.2f}")
        made.append(_ratio(f"{solver}: overhead, {case}", limit, ours.overhead if ours else None, "; ".join(beside)))
    return made


def _default(found: Results) -> list[Target]:
    """Compare the default solver with the best of our others and of the peers, on every problem.

    Compaction is a setting that needs to know more of f, so a solve with it is compared with others that have it.
    """
    made = []
    for framework, case in found.problems():
        default, compact = (found.row(framework, case, DEFAULT + kind) for kind in ("", COMPACT))
        own, own_compact = (_best_other(found, framework, case, compact) for compact in (False, True))
        peer = found.fastest(framework, case, lambda row: row.library != "deqcore")
        fair = _fair(0.95, default, peer) if default is not None and peer is not None else 0.95
        compared = [
            ("default", default, own, 1.1, "our best other solver"),
            ("default", default, peer, fair, "the best peer"),
        ]
        if compact is not None:
            compared.append(("default, compact", compact, own_compact, 1.1, "our best other solver, compact"))
        for which, ours, other, limit, kind in compared:
            ratio = ours.against(other) if ours is not None and other is not None else None
            what = f"{which}: seconds / {kind}, {framework}, {case}"
            made.append(_ratio(what, limit, ratio, "" if other is None else other.contender))
    return made


def _best_other(found: Results, framework: str, case: str, compact: bool) -> BenchRow | None:
    def wanted(row: BenchRow) -> bool:
        solver, compacts, _ = row.contender.partition(COMPACT)
        return row.library == "deqcore" and solver != DEFAULT and bool(compacts) == compact

    return found.fastest(framework, case, wanted)


def _fair(limit: float, default: BenchRow, peer: BenchRow) -> float:
    """Return the limit, or 1.05 × the time in f where the peer needs at most 1.1 × that."""
    floor = Spread.of_ratios([default.evaluations * item for item in default.reference], peer.seconds).median
    return max(limit, 1.05 * floor) if floor >= 1 / 1.1 else limit


def _against_torchdeq(found: Results) -> list[Target]:
    limits = {
        ("broyden", "conv"): 1 / 4,
        ("broyden", "dense"): 1 / 2.5,
        ("anderson", "conv"): 1 / 2.5,
        ("anderson", "dense"): 1 / 1.8,
    }
    made = []
    for (solver, case), limit in limits.items():
        what = f"{solver}: seconds / torchdeq's, equal residual, {case}"
        ours = found.row("torch", case, f"deqcore {solver}")
        peer = found.row("torch", case, f"torchdeq {solver}")
        both = ours is not None and peer is not None
        made.append(_ratio(what, limit, ours.against(peer) if both and ours and peer else None))
    return made


def _counts(found: Results) -> list[Target]:
    ours = found.listed("torch", "dense", "deqcore anderson")
    peer = found.listed("torch", "dense", "torchdeq anderson")
    plain = found.listed("torch", "dense", "deqcore picard")
    others = [
        "" if peer is None else f"torchdeq {peer.evaluations}{'' if peer.reached else ' (not reached)'}",
        "" if plain is None else f"plain {plain.evaluations}",
    ]
    linear, memory = found.fact("anderson linear"), found.fact("limited memory")
    newton, broyden = (found.fact("slow modes", name, "evaluations") for name in ("newton-krylov", "broyden"))
    expansive = found.fact("not a contraction", "newton-krylov")
    seeds = "" if memory is None else f" of {memory['seeds']}"
    return [
        Target(
            "anderson: evaluations to 1e-5, dense",
            24,
            ours.evaluations if ours and ours.reached else None,
            peer=", ".join(filter(None, others)),
        ),
        Target(
            "anderson: evaluations, linear ρ = .95, 1e-6, median",
            86,
            None if linear is None else linear["evaluations"],
            peer=_peer(linear, "torchdeq evaluations"),
        ),
        Target(
            "broyden: failures with 10 pairs, linear ρ = .95, 200 steps",
            2,
            None if memory is None else memory["failures"],
            "" if memory is None else f"{memory['failures']}{seeds}",
            _peer(memory, "torchdeq failures"),
        ),
        Target(
            "newton-krylov: distance to the solution where f does not contract",
            1e-8,
            None if expansive is None else (expansive["distance"] if expansive["converged"] else float("inf")),
            peer="plain iteration diverges",
        ),
        Target(
            "newton-krylov: evaluations and products, 20 slow modes, 1e-8",
            float("inf") if broyden is None else broyden,
            newton if broyden is not None else None,
            peer=f"broyden {broyden}",
            strict=True,
        ),
    ]


def _peer(found: Mapping[str, Any] | None, key: str) -> str:
    return f"torchdeq {found[key]:g}" if found and found.get(key) is not None else ""


def _jax(found: Results) -> list[Target]:
    made = []
    limits = {
        "dense": {"anderson": 0.8, "broyden": 1.3, "auto": 0.7},
        "conv": {"anderson": 0.8, "broyden": 0.8, "auto": 0.8},
    }
    for case, solvers in limits.items():
        best = found.fastest("jax", case, lambda row: row.contender.startswith("jaxopt anderson"))
        for solver, limit in solvers.items():
            ours = found.row("jax", case, f"deqcore {solver}")
            ratio = ours.against(best) if ours is not None and best is not None else None
            peer = "" if best is None else f"{best.contender}, its best"
            made.append(_ratio(f"JAX {solver}: seconds / jaxopt's Anderson, {case}", limit, ratio, peer))
    plain = found.row("jax", "dense", "deqcore picard")
    peer = found.fastest("jax", "dense", lambda row: row.contender.startswith("optimistix fixed"))
    ratio = plain.against(peer) if plain is not None and peer is not None else None
    return [*made, _ratio("JAX picard: seconds / optimistix' fixed point, dense", 1.0, ratio)]


def _compaction(found: Results) -> list[Target]:
    made = []
    for solver in ("picard", "anderson"):
        plain = found.row("torch", "mixed-conv", f"deqcore {solver}")
        compact = found.row("torch", "mixed-conv", f"deqcore {solver} (compact)")
        ratio = compact.against(plain) if plain is not None and compact is not None else None
        made.append(_ratio(f"{solver}: seconds with compaction / without, 1 hard sample of 64", 0.25, ratio))
    return made


def _memory(found: Results) -> list[Target]:
    default = found.fact("memory of the default")
    extra = None
    if default is not None and None not in (default["auto"], default["picard"]):
        extra = default["auto"] - default["picard"]
    made = [Target("default: states of memory beyond picard's where f contracts well", 4.0, extra)]
    facts = found.fact("stored vectors")
    if facts is None:
        return [*made, Target("broyden: states of memory after 24 steps", 31, None)]
    steps = facts["steps"]
    limits = {"float32": steps + 1 + 6, "bfloat16": (steps + 1) / 2 + 6}
    return made + [
        Target(
            f"broyden: states of memory after {steps} steps, {dtype} history",
            limit,
            facts[dtype],
            peer=_peer(facts, "torchdeq"),
        )
        for dtype, limit in limits.items()
    ]


def _fixed_cost(found: Results) -> list[Target]:
    steps = {"picard": 0.08, "anderson": 0.38, "broyden": 0.38}
    calls = [
        Target(f"{solver}: ms per call, tiny f", 0.2, found.fact("fixed cost", solver, "ms per call"))
        for solver in ("auto", "picard", "anderson", "broyden")
    ]
    each = [
        Target(f"{solver}: ms per step, tiny f", limit, found.fact("fixed cost", solver, "ms per step"))
        for solver, limit in steps.items()
    ]
    return calls + each


def _training(found: Results) -> list[Target]:
    def step(layer: str, case: str = "conv") -> Step | None:
        return found.steps.get((case, layer))

    certified, plain = (step(f"deqcore broyden, {kind} reuse") for kind in ("certified", "plain"))
    free, heavy = step("deqcore broyden, jacobian-free"), step("torchdeq broyden, IFT broyden")
    extra = None
    if certified is not None and certified.solver_evaluations is not None:
        extra = certified.forward_evaluations + certified.backward_evaluations - certified.solver_evaluations

    def against(a: Step | None, b: Step | None, part: str = "step") -> Spread | None:
        return a.against(b, part) if a is not None and b is not None and a.step and b.step else None

    made = [
        _ratio("backward of plain reuse / of jacobian-free, conv", 1.15, against(plain, free, "backward")),
        _ratio(
            "training step, certified reuse (0.1) / torchdeq Broyden forward and backward, conv",
            1 / 3,
            against(certified, heavy),
        ),
        _ratio(
            "training step, certified reuse (0.1) / torchdeq's default, conv",
            1.0,
            against(certified, step("torchdeq defaults")),
        ),
    ]
    for case in ("conv", "dense"):
        peer = step("torchdeq defaults", case)
        for layer in ("defaults", "gradient error 0.1", "exact-ift to 0.07"):
            ours = step(f"deqcore, {layer}", case)
            beside = _beside(ours, peer) if ours is not None and peer is not None else ""
            made.append(
                _ratio(f"training step, our {layer} / torchdeq's default, {case}", 1.25, against(ours, peer), beside)
            )
    return [*made, Target("evaluations of f in a training step beyond the solver's", 1, extra)]


def _beside(ours: Step, peer: Step) -> str:
    """Return both gradient errors, and the ratio that is left without any overhead of ours."""
    parts = []
    if ours.error is not None and peer.error is not None:
        parts.append(f"gradient error {ours.error:.2g}, torchdeq's {peer.error:.2g}")
    if ours.floor:
        parts.append(f"floor {Spread.of_ratios(ours.floor, peer.step).median:.3g}")
    return "; ".join(parts)

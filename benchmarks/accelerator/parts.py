"""The parts of the comparison: each a list of items, each item a function that returns plain values for JSON."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

import deqcore
from benchmarks.accelerator import device as on
from benchmarks.cells import attention, conv, mixed_conv
from benchmarks.peers import LIBRARIES
from deqcore.bench.cases import Case, dense
from deqcore.bench.compare import compare
from deqcore.bench.harness import Contender, Harness, Ready, SolveFunction, ours
from deqcore.solve.step import fused_step
from deqcore.solvers.broyden import Broyden

SOLVERS: Final = ("picard", "anderson", "broyden", "newton-krylov")
ROUNDS, QUICK_ROUNDS = 9, 3
SETTLING: Final = 0.75  # of an item's seconds: after them no further contender begins


@dataclass(frozen=True)
class Setting:
    """Device, quick or not, seconds that the item may take, and a function for messages."""

    device: str
    quick: bool
    seconds: float
    say: Callable[[str], object]

    @property
    def rounds(self) -> int:
        """Of timing."""
        return QUICK_ROUNDS if self.quick else ROUNDS


@dataclass(frozen=True)
class Sized:
    """A case at its size here.

    Attributes:
        make: the case.
        full: its sizes; empty: those it has on a CPU.
        small: its sizes for a first look.
        dtype: of state and parameters.
        rtol: residual that every sample reaches: what this dtype, or TF32, allows.
        tf32: whether convolutions of float32 run in TF32, as torch does by default.
        weight: share of the time.
    """

    make: Callable[..., Case]
    full: Mapping[str, int]
    small: Mapping[str, int]
    dtype: str = "float32"
    rtol: float = 1e-5
    tf32: bool = False
    weight: float = 1.0

    def case(self, name: str, quick: bool) -> Case:
        """Under this name, with this residual."""
        made = self.make(**self.small if quick else self.full)
        note = f"{made.note}, {self.dtype}{', TF32' if self.tf32 else ''}"
        return replace(made, problem=replace(made.problem, name=name), rtol=self.rtol, note=note)


TINY_CONV: Final = {"batch": 4, "size": 16, "side": 8}
CASES: Final[Mapping[str, Sized]] = {
    "dense": Sized(dense, {}, {"batch": 16, "size": 32}, weight=3.0),  # the first: libraries are loaded
    "dense-large": Sized(dense, {"batch": 1024, "size": 4096}, {"batch": 32, "size": 64}),
    "conv": Sized(conv, {}, TINY_CONV),
    "conv-tf32": Sized(conv, {}, TINY_CONV, rtol=2e-3, tf32=True),
    "conv-large": Sized(conv, {"batch": 128, "size": 128, "side": 32}, TINY_CONV, "bfloat16", 5e-3, weight=1.5),
    "attention-large": Sized(
        attention,
        {"batch": 64, "tokens": 256, "size": 512},
        {"batch": 4, "tokens": 8, "size": 16},
        "bfloat16",
        5e-3,
        weight=1.5,
    ),
    "mixed-conv": Sized(mixed_conv, {}, {"batch": 16, "size": 8, "side": 8}, weight=1.5),
}


QUICK_SOLVERS: Final = tuple(name for name in SOLVERS if name != "newton-krylov")  # it takes most of the time


class Bounded(Contender):
    """A contender that does not begin once the time is over."""

    def __init__(self, contender: Contender, until: float) -> None:
        self.contender, self.until = contender, until
        self.library, self.solver = contender.library, contender.solver
        self.exact, self.recompiles = contender.exact, contender.recompiles

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        if time.perf_counter() > self.until:
            raise TimeoutError("not run: the budget of this case was spent. Give a larger --budget.")
        return self.contender.prepare(harness, ready, max_steps)


class Unusable(Contender):
    """A library that is installed, but cannot be imported with these versions."""

    solver = "(import)"

    def __init__(self, library: str, error: Exception) -> None:
        self.library, self.error = library, error

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        raise self.error


def _peers(framework: str) -> list[Contender]:
    results: list[Contender] = []
    for name in LIBRARIES[framework]:
        if find_spec(name) is None:
            continue
        try:
            results += import_module(f"benchmarks.peers.with_{name}").CONTENDERS
        except Exception as error:  # whatever a library raises is a result, and costs the others nothing
            results.append(Unusable(name, error))
    return results


def _by_need(contenders: Sequence[Contender]) -> list[Contender]:
    """Order the items by importance for the page, in case time runs out."""
    first = ("picard", "anderson", "broyden", "fixed_point_iter", "fixed-point")
    return sorted(contenders, key=lambda item: item.solver == "newton-krylov" or 2 * (item.solver not in first))


def cases(name: str, setting: Setting, peers: bool = True) -> dict[str, Any]:
    """Return every solver on one case, and the peers that are installed."""
    sized = CASES[name]
    measured = on.harness(setting.device, sized.dtype)
    made = sized.case(name, setting.quick)
    own = ours(SOLVERS if peers else QUICK_SOLVERS, made, traced=False)
    contenders = _by_need([*own, *(_peers("torch") if peers else ())])
    with on.tf32(sized.tf32):
        rows = _compared(measured, made, contenders, setting)
        by_name = {contender.name: contender for contender in contenders}
        ready = measured.ready(made)
        for row in rows:
            if row["reached"]:
                tolerance = row["tolerance"]
                row["waits"] = on.waits(measured, ready, by_name[row["contender"]], tolerance)
    return {"rows": rows, "note": _note(made)}


def portable(name: str, setting: Setting) -> dict[str, Any]:
    """Return the same without peers, in a process that native steps are turned off in."""
    return cases(name, setting, peers=False)


def jax_cases(name: str, setting: Setting) -> dict[str, Any]:
    """Measure compiled JAX and its peers."""
    import jax

    from benchmarks.harnesses import jax_harness

    result = jax.default_backend()
    if result != {"cuda": "gpu"}.get(setting.device, setting.device):
        raise RuntimeError(f"JAX runs on {result!r} here, not on {setting.device!r}")
    made = CASES[name].case(name, setting.quick)
    measured = replace(jax_harness(), queued=on.QUEUED, peak=lambda _: None)
    contenders = _by_need([*ours(SOLVERS, made, traced=True), *_peers("jax")])
    return {"rows": _compared(measured, made, contenders, setting), "note": _note(made)}


def _note(case: Case) -> str:
    return f"{case.note}; relative residual {case.rtol:g}, at most {case.max_steps} steps"


def _compared(measured: Harness, case: Case, contenders: list[Contender], setting: Setting) -> list[dict[str, Any]]:
    start = time.perf_counter()
    until = start + SETTLING * setting.seconds
    rows = compare(
        measured,
        case,
        [Bounded(contender, until) for contender in contenders],
        rounds=setting.rounds,
        budget=(1 - SETTLING) * setting.seconds,
        say=setting.say,
    )
    return [row.as_dict() for row in rows]


@dataclass(frozen=True)
class StepResult:
    """Vectors that Broyden steps are timed on."""

    batch: int
    size: int
    dtype: str
    history: str | None = None


STEPPED: Final[Mapping[str, StepResult]] = {
    "64×262144 float32": StepResult(64, 2**18, "float32"),
    "64×262144 float32, history in bfloat16": StepResult(64, 2**18, "float32", "bfloat16"),
    "64×262144 bfloat16": StepResult(64, 2**18, "bfloat16"),
    "32×12288 float32": StepResult(32, 12288, "float32"),
}
PAIRS, QUICK_PAIRS = 24, 5
BYTES: Final = {"float32": 4, "bfloat16": 2}
COPIED, QUICK_COPIED = 2**30, 2**22
LOAD: Final = 2000  # copies
FIXED, COPY = "fixed cost", "copy"


def steps(name: str, setting: Setting) -> dict[str, Any]:
    """Return a step's own work, the fixed cost of a call and a step, or a copy on the device."""
    if name == COPY:
        return copied(setting)
    if name == FIXED:
        from benchmarks.facts import fixed_cost

        return {"facts": fixed_cost(setting.quick, setting.device, setting.seconds)}
    return stepped(STEPPED[name], setting)


def least_bytes(shape: StepResult, held: int) -> int:
    """Return what a Broyden step must move when it begins with `held` vectors in the history.

    It reads them twice (next iterate; products with the new residual), then writes the new residual and reads it once
    more; of the state's own vectors it reads z, writes z₊, and reads z₊ and f(z₊) for the residual. Coefficients are
    left out.
    """
    vector = shape.batch * shape.size
    return vector * ((2 * held + 2) * BYTES[shape.history or shape.dtype] + 4 * BYTES[shape.dtype])


def stepped(shape: StepResult, setting: Setting) -> dict[str, Any]:
    """Return seconds of a step's own work by the number of vectors held before it; f is timed inside and taken off."""
    backend = deqcore.get_backend(backend="torch")
    solver = Broyden(history_dtype=shape.history)
    if setting.quick:
        shape = replace(shape, batch=4, size=1024)
    pairs = QUICK_PAIRS if setting.quick else PAIRS
    kind = {"dtype": getattr(torch, shape.dtype), "device": setting.device}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, shape.size, generator=generator).to(**kind).expand(shape.batch, -1).contiguous()
    rate = torch.linspace(-0.9, 0.95, shape.size).to(**kind)
    own: list[list[float]] = [[] for _ in range(pairs)]
    wall, native, began = [], 0, time.perf_counter()
    rounds = 0
    on.settle(setting.device)
    while rounds <= setting.rounds and (rounds < 3 or time.perf_counter() - began < setting.seconds):
        start = time.perf_counter()
        with torch.no_grad():
            laps, taken = _solve_of_steps(backend, solver, x, rate, pairs, setting.device)
        seconds = laps.seconds()
        if rounds:  # the first is a warm-up
            wall.append((time.perf_counter() - start) / pairs)
            for k in range(pairs):
                own[k].append(seconds[4 * k] + seconds[4 * k + 2])
        native, rounds = taken, rounds + 1
    points = [
        {"held": k + 1, "bytes": least_bytes(shape, k + 1), "seconds": result} for k, result in enumerate(own) if result
    ]
    return {"points": points, "wall": wall, "native": native, "of": pairs}


def _solve_of_steps(
    backend: Any, solver: Broyden, x: Tensor, rate: Tensor, pairs: int, device: str
) -> tuple[on.Laps, int]:
    """Return steps in a row with four marks each: before it, before f, after f, after it; and how many were native."""
    laps = on.Laps(device)

    def f(z: Tensor) -> Tensor:
        laps.mark()
        result = torch.addcmul(x, rate, z)
        laps.mark()
        return result

    z = torch.zeros_like(x)
    fz = torch.addcmul(x, rate, z)
    state = solver.init(backend, z, fz)
    taken = 0
    for _ in range(pairs):
        laps.mark()
        result = fused_step(backend, solver, f, z, fz, state)
        taken += result is not None
        z, fz, state = (result or solver.step(backend, f, z, fz, state))[:3]
        laps.mark()
    return laps, taken


def copied(setting: Setting) -> dict[str, Any]:
    """Return the bytes read and written per second by a copy on the device."""
    size = QUICK_COPIED if setting.quick else COPIED
    source = torch.zeros(size // 4, device=setting.device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(3 + (5 if setting.quick else 20)):
        laps = on.Laps(setting.device)
        laps.mark()
        target.copy_(source)
        laps.mark()
        rates.append(2 * size / laps.seconds()[0])
    result = {"bytes": 2 * size, "bytes per second": rates[3:], "median": statistics.median(rates[3:])}
    if setting.device != "cuda":
        return result
    for _ in range(LOAD):  # about two seconds of work in the queue, to read the clocks beside
        target.copy_(source)
    return result | {"clocks under load": on.smi()}


def training(name: str, setting: Setting) -> dict[str, Any]:
    """Return a training step of every layer on the convolutional block, float32 without TF32."""
    from benchmarks.cells import case
    from benchmarks.training import training

    failed: dict[str, str] = {}
    with on.tf32(False):
        result = training(
            on.harness(setting.device, "float32"),
            case("conv", setting.quick),
            rounds=setting.rounds,
            budget=setting.seconds / 2,
            say=setting.say,
            failed=failed,
        )
    return {"steps": [step.as_dict() for step in result], "failed": failed, "case": name}


def about(name: str, setting: Setting) -> dict[str, Any]:
    """Return the device as it is found."""
    return on.describe_device(setting.device)


@dataclass(frozen=True)
class Part:
    """Items that share a process.

    Attributes:
        measure: one item.
        weights: share of the time by item.
        seconds: share of the whole budget, in seconds of the default one.
        environment: of its process.
        needs: module without which it is left out.
    """

    measure: Callable[[str, Setting], dict[str, Any]]
    weights: Mapping[str, float]
    seconds: float
    environment: Mapping[str, str]
    needs: str = "torch"


_OFF: Final = {"DEQCORE_NATIVE": "0"}
_CASES: Final = {name: sized.weight for name, sized in CASES.items()}
_STEPS: Final = {COPY: 0.3, FIXED: 1.5, **dict.fromkeys(STEPPED, 0.7)}
PARTS: Final[Mapping[str, Part]] = {
    "device": Part(about, {"before": 1.0}, 8, {}),
    "steps": Part(steps, _STEPS, 20, {}),
    "steps-portable": Part(steps, _STEPS, 14, _OFF),
    "cases": Part(cases, _CASES, 85, {}),
    "cases-portable": Part(portable, _CASES, 30, _OFF),
    "training": Part(training, {"conv": 1.0}, 30, {}),
    "jax": Part(
        jax_cases,
        {"dense": 1.0, "conv": 1.0},
        50,
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        needs="jax",
    ),
}

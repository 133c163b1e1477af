"""Equilibrium, and what the state of a layer depends on: batch mates, start, dtype, device, chance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np

from deqcore.abc.arrays import is_inexact, precision_of
from deqcore.diagnostics.check.gradient import ExactAdjoint
from deqcore.diagnostics.check.report import FAILED, NOTE, OK, SKIPPED, Finding
from deqcore.diagnostics.check.subject import Subject, first_line, mapped
from deqcore.diagnostics.linearization import host
from deqcore.solve.verification import leaking_pair
from deqcore.types import Array, Tree

ROUNDING: Final = 100.0  # units of rounding of a state
ITERATIONS: Final = 400  # of the cell from random numbers
EVERY: Final = 20
SAMPLES: Final = 3  # whose batch mates are replaced


def equilibrium(subject: Subject) -> Finding:
    """Measure ‖f(z) − z‖ / ‖f(z)‖ of the state."""
    backend, z = subject.backend, subject.z
    fz = backend.detach(subject.f(z))
    residual, size = host(backend, backend.norm(fz - z)), host(backend, backend.norm(fz))
    ratio = np.where(residual == 0, 0.0, residual / np.where(size > 0, size, 1.0))
    worst = int(np.argmax(ratio)) if len(ratio) else 0
    largest = float(ratio[worst]) if len(ratio) else 0.0
    expected = f"‖f(z) − z‖ ≤ {subject.rtol:.2g} ‖f(z)‖ in each sample"
    found = f"{largest:.2g} in sample {worst}, the largest of {len(ratio)}"
    if largest <= subject.rtol:
        return Finding("equilibrium", OK, expected, found, figures={"residual": largest})
    remedy = (
        "Let the solve take more steps or use a smaller tolerance; check that the cell named is the one it iterates."
    )
    return Finding("equilibrium", FAILED, expected, found, remedy, {"residual": largest})


def repeatable(subject: Subject) -> Finding:
    """Run the layer and the cell twice with the same inputs."""
    expected = "two calls give the same state"
    first, second = (host(subject.backend, subject.run()) for _ in range(2))
    apart = float(np.max(np.abs(first - second), initial=0.0))
    one, two = (host(subject.backend, subject.f(subject.z)) for _ in range(2))
    cell = float(np.max(np.abs(one - two), initial=0.0))
    allowed = ROUNDING * subject.backend.eps(subject.z) * float(np.max(np.abs(first), initial=0.0))
    figures = {"layer": apart, "cell": cell}
    if max(apart, cell) <= allowed:
        return Finding("repeatable", OK, expected, f"they differ by {apart:.1g}", figures=figures)
    which = "The cell draws random numbers" if cell > allowed else "The layer draws random numbers or keeps a state"
    remedy = (
        f"{which}: call it in evaluation mode (`eval()`), or fix the mask for the whole solve. Checks that compare two "
        f"runs are left out."
    )
    return Finding("repeatable", FAILED, expected, f"the layer by {apart:.2g}, the cell by {cell:.2g}", remedy, figures)


def coupled(subject: Subject, vjp: Any) -> tuple[int, int] | None:
    """Return a pair of samples (i, j) of which j changes i in the cell; None if there is none."""
    if subject.z.shape[0] < 2:
        return None
    with subject.backend.errstate():
        return leaking_pair(subject.backend, vjp, subject.z)[0]


def batch_mates(subject: Subject, exact: ExactAdjoint, pair: tuple[int, int] | None) -> Finding:
    """Replace all batch mates of a sample by copies of it, and compare the sample's state."""
    expected = "a sample's state does not depend on the others"
    batch = subject.z.shape[0]
    if not subject.record.claims.independent:
        return Finding("batch mates", SKIPPED, "no independence is promised", "not measured")
    if not subject.record.batch or batch < 2:
        return Finding("batch mates", SKIPPED, expected, "the batch has fewer than two samples")
    if pair is not None:
        remedy = (
            "Use LayerNorm or GroupNorm instead of batch normalisation (or evaluation mode), and no operation over the "
            "batch axis; or claim independent=False."
        )
        found = f"in the cell, sample {pair[0]} of f(z) changes with sample {pair[1]} of z"
        return Finding("batch mates", FAILED, expected, found, remedy)
    worst, at, bound = 0.0, 0, 0.0
    for i in np.unique(np.linspace(0, batch - 1, min(SAMPLES, batch)).round().astype(int)):
        inputs = tuple(mapped(subject.backend, tree, _mates(subject, int(i))) for tree in subject.inputs)
        moved = subject.backend.detach(subject.run(inputs=inputs))
        gap = host(subject.backend, subject.backend.norm(moved - subject.z))[i]
        allowed = distance_allowed(subject, exact, moved, inputs=inputs)[i]
        if not gap <= worst:
            worst, at, bound = float(gap), int(i), float(allowed)
        if not gap <= allowed:
            break
    return _distance("batch mates", expected, subject, (worst, bound), f"sample {at} moves by", (
        "The solve couples the samples: stop and mix each sample on its own, or use a smaller tolerance."
    ))  # fmt: skip


def _mates(subject: Subject, i: int) -> Any:
    batch = subject.z.shape[0]

    def copies(leaf: Array) -> Array:
        if not leaf.ndim or leaf.shape[0] != batch:
            return leaf
        return subject.backend.take(leaf, subject.backend.asarray(np.full(batch, i)))

    return copies


def distance_allowed(subject: Subject, exact: ExactAdjoint, moved: Array, **changed: Any) -> Any:
    """Return how far apart two states near one equilibrium may be: ‖(I − J)⁻¹‖ times their residuals, twice."""
    size = host(subject.backend, subject.backend.norm(subject.z))
    residuals = subject.residual(subject.z) + subject.residual(moved, **changed)
    return exact.gain * (2 * residuals + ROUNDING * subject.backend.eps(subject.z) * size)


def _distance(
    check: str, expected: str, subject: Subject, measured: tuple[float, float], words: str, remedy: str
) -> Finding:
    gap, allowed = measured
    figures = {"distance": gap, "allowed": allowed}
    size = float(np.max(host(subject.backend, subject.backend.norm(subject.z)), initial=0.0))
    found = f"{words} {gap:.2g}"
    if not gap <= allowed:
        return Finding(check, FAILED, expected, f"{found}, residuals explain {allowed:.2g}", remedy, figures)
    rounding = ROUNDING * subject.backend.eps(subject.z) * size
    explained = "" if gap <= rounding else f", within what its residuals allow ({allowed:.2g})"
    return Finding(check, OK, expected, found + explained, figures=figures)


def start(subject: Subject, exact: ExactAdjoint) -> Finding:
    """Start the layer elsewhere; without an argument for that, solve the cell from elsewhere."""
    expected = "the state does not depend on the start"
    if not subject.record.claims.unique:
        return Finding("start", SKIPPED, "no independence of the start is promised", "not measured")
    if not subject.record.start:
        return _another_equilibrium(subject, exact, expected)
    worst, bound, label = 0.0, 0.0, "zeros"
    for name, tree in _starts(subject):
        moved = subject.backend.detach(subject.run(start=tree))
        gap = host(subject.backend, subject.backend.norm(moved - subject.z))
        allowed = distance_allowed(subject, exact, moved)
        i = int(np.argmax(np.where(np.isfinite(gap), gap - allowed, np.inf)))
        if not gap[i] - allowed[i] <= worst - bound:
            worst, bound, label = float(gap[i]), float(allowed[i]), name
    return _distance("start", expected, subject, (worst, bound), f"from {label} it moves by", (
        "The cell has several equilibria, or the solve ends before it reaches one. Make the cell contractive, solve to "
        "a smaller tolerance, or claim unique=False."
    ))  # fmt: skip


def _starts(subject: Subject) -> Iterator[tuple[str, Tree]]:
    backend, z = subject.backend, subject.z
    noise = np.random.default_rng(7).standard_normal(z.shape)
    scale = float(np.sqrt(np.mean(host(backend, z) ** 2))) if z.shape[0] and z.shape[1] else 1.0
    yield "zeros", subject.space.unravel(0 * z)
    yield "random numbers", subject.space.unravel(backend.cast(backend.asarray(scale * noise, like=z), z))
    if subject.record.z0 is not None:
        yield "z0", subject.record.z0


def _another_equilibrium(subject: Subject, exact: ExactAdjoint, expected: str) -> Finding:
    """Iterate the cell from random numbers, and compare where that ends with the layer's state."""
    moved, words = _iterated(subject), "the layer takes no start"
    if moved is None:
        return Finding("start", SKIPPED, expected, f"{words}, and plain iteration of the cell does not converge")
    gap = host(subject.backend, subject.backend.norm(moved - subject.z))
    excess = gap - distance_allowed(subject, exact, moved)
    i = int(np.argmax(excess))
    figures = {"distance": float(gap[i])}
    if excess[i] <= 0:
        found = f"{words}; iterating the cell from random numbers ends {gap[i]:.2g} away, as its residual allows"
        return Finding("start", OK, expected, found, figures=figures)
    return Finding(
        "start",
        NOTE,
        expected,
        f"{words}; the cell has another equilibrium, {gap[i]:.2g} away in sample {i}",
        "Make the cell contractive if its answer must be unique, and always start the solve from the same point.",
        figures,
    )


def _iterated(subject: Subject) -> Array | None:
    """Return the cell's fixed point from random numbers by plain iteration; None if a sample does not converge."""
    backend = subject.backend
    z = subject.space.ravel(dict(_starts(subject))["random numbers"])
    for _ in range(ITERATIONS // EVERY):
        for _ in range(EVERY):
            z = backend.detach(subject.f(z))
        residual, size = subject.residual(z), host(backend, backend.norm(z))
        if not np.isfinite(residual).all():
            return None
        if np.all(residual <= subject.rtol * size):
            return z
    return None


def dtypes(subject: Subject, exact: ExactAdjoint) -> Iterator[Finding]:
    """Convert the layer and its inputs to other dtypes and compare."""
    own = subject.space.dtype
    claimed = subject.record.claims.dtypes
    before = subject.residual(subject.z)  # with the user's precision: a constant of the cell may have the default dtype
    for dtype in claimed if claimed is not None else [{"float32": "float64", "float64": "float32"}.get(own, "float32")]:
        with subject.backend.harness.high_precision():
            yield _converted(subject, exact, {"dtype": dtype}, before, claimed is not None)


def devices(subject: Subject, exact: ExactAdjoint) -> Iterator[Finding]:
    """Move the layer and its inputs to other kinds of device and compare."""
    here = str(subject.space.device)
    others = [name for name in subject.backend.harness.devices() if name not in here]
    for name in others:
        yield _converted(subject, exact, {"device": name}, subject.residual(subject.z), claimed=False)
    if not others:
        yield Finding("device", SKIPPED, "the same state on each device", f"this process has {here} alone")


def _converted(subject: Subject, exact: ExactAdjoint, to: dict[str, str], before: Any, claimed: bool) -> Finding:
    """Compare with a copy in another dtype or on another device; `before`: the residuals here, `(batch,)`."""
    ((what, target),) = to.items()
    check, expected = f"{what} {target}", "the same state up to rounding"
    backend = subject.backend

    def change(leaf: Array) -> Array:
        if "device" in to:
            return backend.to_device(leaf, to["device"])
        kind = backend.dtype_name(leaf)
        return backend.astype(leaf, precision_of(kind, to["dtype"])) if is_inexact(kind) else leaf

    try:
        inputs = tuple(mapped(backend, tree, change) for tree in subject.inputs)
        layer = backend.harness.converted(subject.layer, **to)
        keywords = {name: mapped(backend, value, change) for name, value in subject.keywords.items()}
        dtype = to.get("dtype", subject.space.dtype)
        pairs = tuple(kind and precision_of(kind, dtype) for kind in subject.space.complex)
        space = replace(subject.space, dtype=dtype, complex=pairs, device=None)
        other = replace(subject, layer=layer, inputs=inputs, keywords=keywords, space=space)
        moved = backend.detach(other.run())
        residual = other.residual(moved)
    except Exception as error:  # whatever the user's code raises where it was never run
        text = f"it does not run there: {first_line(error)}"
        remedy = "Take dtype and device from the inputs and the parameters." if claimed else ""
        return Finding(check, FAILED if claimed else SKIPPED, expected, text, remedy)
    here, there = host(backend, subject.z), host(backend, moved)
    size = np.linalg.norm(here, axis=1)
    gap = np.linalg.norm(there - here, axis=1)
    eps = max(backend.eps(subject.z), backend.eps(moved))
    allowed = exact.gain * (2 * (before + residual) + ROUNDING * eps * size)
    i = int(np.argmax(np.where(np.isfinite(gap), gap - allowed, np.inf)))
    measured = (float(gap[i]), float(allowed[i]))
    return _distance(check, expected, subject, measured, f"sample {i} moves by", (
        "An operation leaves its range or loses digits there: see where values become large, or claim no such dtype."
    ))  # fmt: skip

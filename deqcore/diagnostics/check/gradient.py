"""The gradient of a layer against the exact one at its own solution, and which well-known gradient it is instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deqcore.diagnostics.check.report import FAILED, OK, SKIPPED, Finding
from deqcore.diagnostics.check.subject import Subject, first_line
from deqcore.diagnostics.linearization import host
from deqcore.errors import ProblemError
from deqcore.linear.gmres import gmres
from deqcore.solve.verification import adjoint_residual
from deqcore.types import Array, Map

DENSE: Final = 200  # numbers in a row up to which I − J is formed
MAX_VJPS: Final = 300
SEPARATED: Final = 1e-3  # relative distance at which a gradient is recognised as another one
ROUNDED: Final = 30.0  # units of rounding of f that hide a difference of f
TERMS: Final = 12  # of Neumann's series that are recognised
EXPECTED: Final = "the implicit gradient (∂f/∂θ)ᵀ(I − Jᵀ)⁻¹g at its own state"


@dataclass(frozen=True)
class ExactAdjoint:
    """The solution of (I − Jᵀ) u = g at the layer's own state.

    Attributes:
        g: the cotangent `(batch, n)`, standard normal numbers from a fixed seed.
        u: the solution.
        vjp: `v ↦ Jᵀv`.
        gain: ‖(I − J)⁻¹‖ per row `(batch,)`; with GMRES an estimate, three times ‖u‖/‖g‖.
        residual: ‖g + Jᵀu − u‖ / ‖g‖, the largest.
        jacobian: J of each row on the host `(batch, n, n)`, None if GMRES was used.
    """

    g: Array
    u: Array
    vjp: Map
    gain: Any
    residual: float
    jacobian: Any


def exact_adjoint(subject: Subject) -> ExactAdjoint:
    """Solve the adjoint equation densely up to `DENSE` numbers in a row, else by GMRES.

    Raises:
        ProblemError: the cell cannot be differentiated.
    """
    backend, z = subject.backend, subject.z
    noise = np.random.default_rng(20).standard_normal(z.shape)
    g = backend.cast(backend.asarray(noise, like=z), z)
    with backend.errstate():
        vjp = _linearized(subject)
        if z.shape[1] <= DENSE:
            jacobian = _jacobian(subject, vjp)
            eye = np.eye(z.shape[1])
            try:
                inverse = np.linalg.inv(eye - np.swapaxes(jacobian, 1, 2))
            except np.linalg.LinAlgError:
                inverse = np.full(jacobian.shape, np.nan)
            solution = np.einsum("bij,bj->bi", inverse, host(backend, g))
            gain = np.array([np.linalg.norm(a, 2) if np.isfinite(a).all() else np.inf for a in inverse])
            u = backend.cast(backend.asarray(solution, like=z), z)
        else:
            jacobian = None
            rtol = max(1e-10, 100 * backend.eps(z))
            u = gmres(backend, vjp, g, rtol=rtol, max_steps=min(MAX_VJPS, z.shape[1]), shifted=True).x
            gain = 3 * host(backend, backend.norm(u)) / host(backend, backend.norm(g))
        residual = float(np.max(host(backend, adjoint_residual(backend, vjp, g, u)), initial=0.0))
    return ExactAdjoint(g, u, vjp, gain, residual, jacobian)


def _linearized(subject: Subject) -> Map:
    """Return `v ↦ Jᵀv` at the state."""
    backend, layer = subject.backend, subject.layer
    try:
        _, vjp = backend.autodiff.linearize(lambda z: subject.f(z, layer=backend.harness.in_trace(layer)), subject.z)
        vjp(subject.z)
    except Exception as error:  # whatever the user's cell raises
        raise ProblemError(
            f"The cell cannot be differentiated: {first_line(error)}. Make it of operations of {backend.name} that "
            f"autodiff sees, without float(), NumPy or a block that records no gradient."
        ) from error
    return vjp


def _jacobian(subject: Subject, vjp: Map) -> Any:
    """J of each row, `(batch, n, n)`, by one product for each number of a row."""
    backend, z = subject.backend, subject.z
    rows = []
    for i in range(z.shape[1]):
        unit = np.zeros(z.shape)
        unit[:, i] = 1.0
        rows.append(host(backend, vjp(backend.cast(backend.asarray(unit, like=z), z))))
    return np.stack(rows, axis=1)


def gradient(subject: Subject, exact: ExactAdjoint) -> Finding:
    """Compare the layer's own gradient of ⟨g, z⟩, for all parameters and inputs, with the exact one."""
    claims = subject.record.claims
    expected = EXPECTED if claims.gradient == "exact" else "a descent direction (cosine above 0)"
    if claims.gradient == "none":
        return Finding("gradient", SKIPPED, "none is promised", "not measured")
    if not subject.backend.capabilities.autodiff:
        return Finding("gradient", SKIPPED, expected, f"{subject.backend.name} functions have no gradient of their own")
    if not exact.residual <= 0.01:
        found = f"the exact gradient is not known: its adjoint residual is {exact.residual:.1g}"
        remedy = "I − J is near singular at this state. Regularise the cell (spectral norm, Jacobian penalty)."
        return Finding("gradient", FAILED, expected, found, remedy, {"adjoint_residual": exact.residual})
    share = _derivative_share(subject, exact)
    if not 0.5 <= share <= 2.0:
        found = f"autodiff gives {share:.2g} times the change of f(z) with z"
        remedy = (
            "The cell must be recorded: without detaching z, NumPy or a block that records no gradient. A cell with "
            "another derivative on purpose claims gradient='none'."
        )
        return Finding("gradient", FAILED, expected, found, remedy, {"derivative_share": share})
    try:
        own = _own(subject, exact.g)
    except Exception as error:  # whatever the user's backward pass raises
        remedy = (
            "Give the layer a derivative: a custom backward pass that solves (I − Jᵀ)u = g, or claim gradient='none'."
        )
        return Finding("gradient", FAILED, expected, f"none: {first_line(error)}", remedy)
    truth = _through_cell(subject, exact.u)
    return _compared(subject, exact, own, truth, expected)


def _derivative_share(subject: Subject, exact: ExactAdjoint) -> float:
    """⟨Jᵀd, v⟩ / ‖d‖² of the row where it is farthest from 1, with d = J v by central differences of f.

    1 where J is the derivative of f, 0 where f is detached from z. Rows where rounding hides d count as 1.
    """
    backend, z = subject.backend, host(subject.backend, subject.z)
    eps = backend.eps(subject.z)
    v = np.random.default_rng(21).standard_normal(z.shape)
    v = v * (np.sqrt(np.mean(z**2, axis=1, keepdims=True)) + 1e-3)
    h = eps ** (1 / 3)

    def f(point: Any) -> Any:
        return host(backend, backend.detach(subject.f(backend.cast(backend.asarray(point, like=subject.z), subject.z))))

    ahead, behind = f(z + h * v), f(z - h * v)
    d = (ahead - behind) / (2 * h)
    back = host(backend, exact.vjp(backend.cast(backend.asarray(d, like=subject.z), subject.z)))
    size = np.sum(d * d, axis=1)
    seen = np.sqrt(size) > ROUNDED * eps * np.linalg.norm(ahead, axis=1) / h
    share = np.divide(np.sum(back * v, axis=1), size, out=np.ones_like(size), where=seen & np.isfinite(size))
    return float(share[np.argmax(np.abs(share - 1.0))])


def _compared(
    subject: Subject, exact: ExactAdjoint, own: dict[str, Any], truth: dict[str, Any], expected: str
) -> Finding:
    a, b = _vector(own), _vector(truth)
    if not np.isfinite(a).all():
        bad = next(name for name, value in own.items() if not np.isfinite(value).all())
        return Finding("gradient", FAILED, expected, f"NaN or inf in that of {bad}", "See which operation makes it.")
    size, length = float(np.linalg.norm(b)), float(np.linalg.norm(a))
    error = float(np.linalg.norm(a - b)) / size if size else float(length > 0)
    cosine = float(a @ b) / (size * length) if size * length else float(size == length)
    figures = {"error": error, "cosine": cosine, "norm_ratio": length / size if size else 1.0}
    claims = subject.record.claims
    measured = f"relative error {error:.2g}, cosine {cosine:.4f}, norm ratio {figures['norm_ratio']:.3g}"
    good = error <= claims.gradient_rtol if claims.gradient == "exact" else cosine > 0
    if good:
        return Finding("gradient", OK, expected, measured, figures=figures)
    pattern, remedy = recognised(subject, exact, own, truth)
    worst, at = _worst(own, truth)
    where = f"worst in {worst} ({at:.2g})" if len(truth) > 1 else ""
    found = "; ".join(part for part in (measured, pattern, where) if part)
    return Finding("gradient", FAILED, expected, found, remedy, figures)


def recognised(subject: Subject, exact: ExactAdjoint, own: dict[str, Any], truth: dict[str, Any]) -> tuple[str, str]:
    """Name the well-known gradient that the layer returns instead of the exact one, and what to do about it."""
    target = _vector(own)
    if not target.any():
        return "it is zero", "The state is detached from the graph: attach an implicit gradient to it."
    for u, name, remedy in _candidates(subject, exact):
        guess = _vector(_through_cell(subject, u))
        size = float(np.linalg.norm(guess))
        if size and np.linalg.norm(target - guess) <= SEPARATED * size:
            return f"it is {name}", remedy
    if lost := [name for name, value in truth.items() if value.any() and not own[name].any()]:
        return (
            f"none reaches {', '.join(lost)}",
            "Do not detach it in the evaluation of f that is differentiated.",
        )
    return "", "Solve (I − Jᵀ)u = g at the returned state, to a smaller tolerance, and apply one vjp of f with u."


def _candidates(subject: Subject, exact: ExactAdjoint) -> Iterator[tuple[Array, str, str]]:
    """Yield u of gradients that are often meant or mistaken for the exact one."""
    backend, g = subject.backend, exact.g
    sign = "The sign of Jᵀ in the backward solve is wrong: solve u = g + Jᵀu."
    yield -exact.u, "the exact gradient with the opposite sign", "Turn the sign of the result of the backward solve."
    approximate = "Solve the adjoint equation, or claim gradient='approximate'."
    yield g, "the one-step gradient (u = g): one evaluation of f is differentiated", approximate
    u = g
    for terms in range(2, TERMS + 1):
        u = g + exact.vjp(u)
        yield u, f"the gradient of {terms} steps of f, or of Neumann's series with {terms} terms", approximate
    yield exact.u - g, "one product with Jᵀ too many (Jᵀu)", "Apply the vjp of f with u once, at the returned state."
    if exact.jacobian is None:
        return
    eye = np.eye(g.shape[1])
    with np.errstate(all="ignore"):
        for matrix, name, remedy in (
            (eye + np.swapaxes(exact.jacobian, 1, 2), "the solution of (I + Jᵀ)u = g", sign),
            (
                eye - exact.jacobian,
                "the solution of (I − J)u = g",
                "J is used where Jᵀ is needed: use vjps, not jvps.",
            ),
        ):
            try:
                solution = np.linalg.solve(matrix, host(backend, g)[..., None])[..., 0]
            except np.linalg.LinAlgError:
                continue
            yield backend.cast(backend.asarray(solution, like=g), g), name, remedy


def _own(subject: Subject, g: Array) -> dict[str, Any]:
    return _gradients(subject, lambda layer, *inputs: subject.run(layer, inputs), g)


def _through_cell(subject: Subject, u: Array) -> dict[str, Any]:
    """(∂f/∂θ)ᵀ u at the state, for the parameters of the layer and its inputs."""
    z = subject.z
    return _gradients(subject, lambda layer, *inputs: subject.f(z, layer=layer, inputs=inputs), u)


def _gradients(subject: Subject, call: Any, cotangent: Array) -> dict[str, Any]:
    backend = subject.backend
    gradients = backend.harness.module_gradients(subject.layer, call, subject.inputs, cotangent)
    if gradients is None:
        _, _, parts = backend.autodiff.vjp(
            lambda *inputs: (call(subject.layer, *inputs), None), subject.inputs, cotangent
        )
        leaves = [leaf for leaf in backend.flatten(parts)[0] if leaf is not None]
        gradients = {f"inputs leaf {i}": leaf for i, leaf in enumerate(leaves)}
    return {name: host(backend, value) for name, value in gradients.items()}


def _vector(gradients: dict[str, Any]) -> Any:
    return np.concatenate([np.zeros(0), *(value.ravel() for value in gradients.values())])


def _worst(own: dict[str, Any], truth: dict[str, Any]) -> tuple[str, float]:
    """Return the leaf with the largest error relative to its gradient, and that error."""
    largest = max((float(np.linalg.norm(value)) for value in truth.values()), default=0.0) or 1.0
    errors = {
        name: float(np.linalg.norm(own[name] - value)) / max(float(np.linalg.norm(value)), 1e-6 * largest)
        for name, value in truth.items()
    }
    name = max(errors, key=lambda leaf: errors[leaf])
    return name, errors[name]

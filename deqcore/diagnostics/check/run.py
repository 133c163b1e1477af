"""Run all checks of a layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np

from deqcore.config import Config
from deqcore.diagnostics.check import causality, independence, naming
from deqcore.diagnostics.check.effects import EffectWatch, side_effects
from deqcore.diagnostics.check.gradient import ExactAdjoint, exact_adjoint, gradient
from deqcore.diagnostics.check.record import LayerUnderTest
from deqcore.diagnostics.check.report import FAILED, OK, SKIPPED, Finding, LayerReport
from deqcore.diagnostics.check.subject import Subject, bind
from deqcore.diagnostics.linearization import host
from deqcore.errors import ConfigError, InitialIterateError, described
from deqcore.solve.dispatch import pick_backend

COMPARED: Final = ("batch mates", "start", "dtype", "device", "causal")


def check_layer(subject: LayerUnderTest, *, say: Callable[[str], object] = lambda _: None) -> LayerReport:
    """Check a trained layer with a fixed point inside, of any library or written by hand.

    - *finite*, *repeatable*, *side effects*: it returns numbers, the same ones in each call, and changes nothing else.
    - *equilibrium*: ‖f(z) − z‖ / ‖f(z)‖ of the state that it returns, with the cell f that you name.
    - *gradient*: its own gradient, for all parameters and inputs, against the implicit one at its own state, with a
      dense solve of the adjoint equation (up to 200 numbers in a sample) or GMRES. A gradient that is well known (one
      step, k steps, a wrong sign, no gradient) is named.
    - *batch mates*, *start*, *dtype*, *device*, *causal*: what its state depends on. Two states may be apart by what
      their residuals allow, 2 ‖(I − J)⁻¹‖ (r₁ + r₂).

    The layer runs about 10 to 30 times. Its output is kept from the terminal; settings, random generators, parameters
    and statistics that it changes are reported and restored.

    Args:
        subject: the layer, its cell, its inputs and its claims.
        say: takes messages on progress.

    Returns:
        A finding for each property, with what was expected, what was found and what to do.

    Raises:
        ConfigError: a name does not exist, or the inputs hold no arrays.
        ProblemError: the layer or its cell raises, or they do not fit each other.
        InitialIterateError: the state is not a tree of floating-point arrays.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models", theorem 1, for the gradient.

    Example:
        >>> import torch
        >>> from deqcore.diagnostics import LayerUnderTest, check_layer
        >>> class Layer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        ...     def cell(self, z, x):
        ...         return self.a * z + x
        ...     def forward(self, x):
        ...         with torch.no_grad():
        ...             z = x
        ...             for _ in range(60):
        ...                 z = self.cell(z, x)
        ...         return self.cell(z, x)
        >>> report = check_layer(LayerUnderTest(Layer(), "cell", (torch.ones(2, 3, dtype=torch.float64),)))
        >>> report.finding("gradient").found.split("; ")[1]
        'it is the one-step gradient (u = g): one evaluation of f is differentiated'
    """
    if not isinstance(subject, LayerUnderTest):
        raise ConfigError.bad_value("check_layer", "subject", described(subject), "a LayerUnderTest")
    try:
        backend = pick_backend(Config(), subject.inputs, ())
    except InitialIterateError as error:
        raise ConfigError("LayerUnderTest: inputs must hold at least one array (got none).") from error
    watch = EffectWatch(backend)
    try:
        with watch(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a layer's warnings are its own; what they are about is measured here
            layer = naming.follow(subject.layer, subject.inner, "inner")
            cell = naming.cell_of(layer, subject.cell)
            if subject.start:
                naming.check_start(layer, subject.start)
            with backend.harness.preserved(subject.layer) as kept:
                part, inputs, keywords = kept, subject.inputs, dict[str, Any]()
                if subject.inner:
                    part, inputs, keywords = naming.record_call(kept, subject.inner, inputs)
                    keywords.pop(subject.start, None)
                bound = bind(subject, part, inputs, keywords, cell, watch)
                findings = list(_findings(bound, watch, say))
    finally:
        watch.close()
    batch, n = bound.z.shape
    name = getattr(layer, "__name__", type(layer).__name__)
    return LayerReport(name, backend.name, batch, n, bound.space.dtype, findings)


def _findings(subject: Subject, watch: EffectWatch, say: Callable[[str], object]) -> Iterator[Finding]:
    values = host(subject.backend, subject.z)
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
        found = f"NaN or inf in {len(rows)} of {len(values)} samples, the first is {rows[0]}"
        remedy = "See whether the inputs are finite, and whether the solve diverges. Nothing else was checked."
        yield Finding("finite", FAILED, "finite numbers", found, remedy)
        return
    yield Finding("finite", OK, "finite numbers", f"all {values.size} are")
    say("repeatable")
    repeated = independence.repeatable(subject)
    yield repeated
    yield side_effects(subject.backend, watch, subject.layer, subject.inputs, subject.run)
    if repeated.status == FAILED and repeated.figures["cell"] > 0:
        reason = "the cell is random, so that it has no fixed point"
        yield from (Finding(check, SKIPPED, "", reason) for check in ("equilibrium", "gradient", *COMPARED))
        return
    say("equilibrium")
    yield independence.equilibrium(subject)
    if repeated.status == FAILED:
        reason = "two calls give different states already"
        yield from (Finding(check, SKIPPED, "", reason) for check in ("gradient", *COMPARED))
        return
    say("the exact gradient")
    exact = exact_adjoint(subject)
    pair = independence.coupled(subject, exact.vjp)
    if pair is not None:  # one system in all: I − J couples the samples
        whole = subject.whole()
        exact_whole = exact_adjoint(whole)
        yield gradient(whole, exact_whole)
        exact = replace(exact, gain=np.full(len(values), float(exact_whole.gain[0])))
    else:
        yield gradient(subject, exact)
    yield from _dependence(subject, exact, pair, say)


def _dependence(
    subject: Subject, exact: ExactAdjoint, pair: tuple[int, int] | None, say: Callable[[str], object]
) -> Iterator[Finding]:
    say("batch mates")
    yield independence.batch_mates(subject, exact, pair)
    say("start")
    yield independence.start(subject, exact)
    say("dtype")
    yield from independence.dtypes(subject, exact)
    yield from independence.devices(subject, exact)
    say("causal")
    yield causality.causal(subject, exact)

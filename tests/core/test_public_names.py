"""The names that users may rely on. A change here is a change of contract: it needs a line in the changelog."""

import enum
import importlib
import inspect
import re
import typing

import pytest

PUBLIC = {
    "deqcore": """AdjointReport Backend Capabilities Config History InverseJacobian Solution Solver StatefulStrategy
        Status StepStrategy Stepper Strategy StrategyState StreamResult __version__ custom_fixed_point custom_root
        errors fixed_point get_backend root solve_stream using vjp""",
    "deqcore.errors": """BackendError BackendMismatchError ConfigError ConvergenceError ConvergenceWarning
        CoupledRowsWarning DeqcoreError DtypeToleranceWarning LayerWarning MissingExtraError MissingFrameworkError
        MonitorError MonitorWarning NonDeterministicWarning PluginError ProblemError InitialIterateError StrategyError
        UnknownNameError""",
    "deqcore.config.sections": "Backward Forward Plugins",
    "deqcore.config.schedule": "Ramp Schedule",
    "deqcore.abc.backward": "report",
    "deqcore.solvers.picard": "Picard",
    "deqcore.solvers.anderson": "Anderson",
    "deqcore.solvers.broyden": "Broyden",
    "deqcore.solvers.newton_krylov": "NewtonKrylov",
    "deqcore.backward.exact_ift": "ExactIFT",
    "deqcore.backward.broyden_reuse": "BroydenReuse",
    "deqcore.backward.adaptive": "Adaptive",
    "deqcore.backward.jacobian_free": "JacobianFree",
    "deqcore.backward.neumann": "Neumann",
    "deqcore.backward.phantom": "Phantom",
    "deqcore.backward.unrolled": "Unrolled",
    "deqcore.backward.reversible": "Reversible",
    "deqcore.backward.looped": "Looped",
    "deqcore.backward.depth": "probabilities",
    "deqcore.breadth": "Best best_of",
    "deqcore.equilibrium_cache": "CacheStatistics EquilibriumCache",
    "deqcore.warm_start": "closer_start restart_changed",
    "deqcore.halting": "Learnt Settled Within halting_distribution halting_loss ponder_loss until",
    "deqcore.plugins": """BackendSpec CommandSpec DataSpec ModelSpec SinkSpec SolverSpec StrategySpec TrainerSpec
        hookimpl register""",
    "deqcore.diagnostics": """Audit CausalityLeak Claims Curve Finding LayerReport LayerUnderTest SpectralPenalty
        SpectralState Spectrum check_causality check_layer gradient_audit jacobian_penalty layer_audit residual_curve
        residual_penalty spectral_penalty spectral_radius""",
    "deqcore.monitor": "Event Metric Metrics Measurement Monitor Profile Record Row RunInfo Sink Trigger",
    "deqcore.monitor.adapters": "lightning_callback transformers_callback",
    "deqcore.testing": "BackendTests Problem SinkTests SolverTests StrategyTests golden weights",
    "deqcore.testing.strict": "StrictError register",
    "deqcore.testing.pytest_gradients": "check_gradients",
    "deqcore.study.models": "Model",
    "deqcore.study.models.base": "Ops Shape",
    "deqcore.study.data": "Dataset",
    "deqcore.study.data.base": "Split",
    "deqcore_torch.nn": "DEQ synchronize_strategies",
    "deqcore_torch.cells": "MonotoneCell VariationalDropout begin_solve",
    "deqcore_torch.compat.torchdeq": """DEQBase VariationalDropout add_deq_args apply_norm fp_correction get_deq
        get_solver install jac_reg mem_gc mixed_init power_method register_deq register_norm register_norm_module
        register_solver register_weight_func remove_norm reset_deq reset_dropout reset_norm
        solver_stat_from_final_step uninstall""",
    "deqcore_jax.cells": "Monotone dropout_mask spectrally_normalized weight_normalized",
    "deqcore_jax.nnx": "DEQ",
    "deqcore_jax.equinox": "DEQ",
    "deqcore_jax.adjoint_tap": "AdjointTap new read reporting",
    "deqcore_jax.strategy_state": "carrying new",
    "deqcore_jax.equilibrium_cache": "EquilibriumCache",
    "deqcore_jax.callbacks": "collecting observe observe_backward",
}
NAMES = [(home, name) for home, names in PUBLIC.items() for name in names.split()]
FRAMEWORKS = {
    "deqcore_torch": "torch",
    "deqcore_jax": "jax",
    "deqcore_jax.nnx": "flax",
    "deqcore_jax.equinox": "equinox",
}
# An alias of types, a version, a marker that pluggy makes, and plain records need no sections.
NO_DOCSTRING = {"Record", "__version__", "hookimpl", "errors"}


def load(home, name):
    for module in (home, home.split(".")[0]):
        if module in FRAMEWORKS:
            pytest.importorskip(FRAMEWORKS[module])
    return getattr(importlib.import_module(home), name)


@pytest.mark.parametrize(("home", "name"), NAMES)
def test_public_names_are_there(home, name):
    assert load(home, name) is not None


def annotated(found):
    """Yield a function, or a class with its methods, also those that it inherits from a class of deqcore."""
    if inspect.isclass(found) or inspect.isfunction(found):
        yield found
    for cls in inspect.getmro(found) if inspect.isclass(found) else ():
        if cls.__module__.startswith("deqcore"):
            members = [inspect.unwrap(getattr(member, "__func__", member)) for member in vars(cls).values()]
            yield from (member for member in members if inspect.isfunction(member))


@pytest.mark.parametrize(("home", "name"), NAMES)
def test_type_hints_can_be_read_at_run_time(home, name):
    """Sphinx, beartype and pydantic evaluate the hints: a name that only type checkers import is an error there."""
    found = load(home, name)
    for member in annotated(found):
        public = member is found or not member.__name__.startswith("_") or member.__name__ in ("__init__", "__call__")
        if public and member.__module__.startswith("deqcore"):
            typing.get_type_hints(member)


def test_deqcore_offers_these_names_and_no_others():
    import deqcore

    assert sorted(deqcore.__all__) == sorted(PUBLIC["deqcore"].split())
    assert set(deqcore.__all__) <= set(dir(deqcore))


@pytest.mark.parametrize(
    "home", ["deqcore.diagnostics", "deqcore.monitor", "deqcore.monitor.adapters", "deqcore.testing"]
)
def test_modules_with_a_list_of_names_offer_these_and_no_others(home):
    assert sorted(importlib.import_module(home).__all__) == sorted(PUBLIC[home].split())


def test_the_contract_of_a_backend_reads_in_one_sitting():
    from deqcore import Backend

    methods = [name for name, member in vars(Backend).items() if name[0] != "_" and inspect.isfunction(member)]
    assert len(methods) <= 30
    assert len(inspect.getsource(inspect.getmodule(Backend)).splitlines()) < 250


def callables(home, name):
    """A function, or a class with its own public methods (conformance tests are named by what they check)."""
    found = load(home, name)
    if inspect.isclass(found):
        yield name, found
        for each, member in vars(found).items():
            inherited = any(hasattr(base, each) for base in found.__mro__[1:])
            if not each.startswith(("_", "test_")) and inspect.isfunction(member) and not inherited:
                yield f"{name}.{each}", member
    elif callable(found):
        yield name, found


def parameters(found):
    """Names of the parameters that need words."""
    if inspect.isclass(found):
        if issubclass(found, BaseException | enum.Enum) or getattr(found, "_is_protocol", False):
            return []
        if found.__init__ is object.__init__ and not hasattr(found, "_fields"):
            return []
        found = found.__init__ if found.__init__ is not object.__init__ else found  # a metaclass may hide it
    names = inspect.signature(found).parameters
    return [each for each in names if each not in ("self", "cls", "unknown")]


def lacking(label, found):
    """What a docstring does not say."""
    text = inspect.getdoc(found) or ""
    if len(text.split()) < 2:
        yield "has no docstring"
    taken = parameters(found)
    whole = "." not in label  # a method of one or two arguments may explain them in its sentence
    if whole and len(taken) > 1 and not re.search(r"^(Args|Attributes):", text, re.M):
        yield "has no section Args or Attributes"
    if whole and len(taken) > 1:
        missing = [each for each in taken if not re.search(rf"^\s+\*{{0,2}}{each}\b|, {each}[:,]|`{each}`", text, re.M)]
        if missing:
            yield f"does not mention {missing}"
    raised = set(re.findall(r"raise (\w+Error)\b", source(found))) - {"NotImplementedError"}
    if raised and inspect.isfunction(found) and not re.search(r"^Raises:", text, re.M):
        yield f"raises {sorted(raised)} and does not say so"


def source(found):
    try:
        return inspect.getsource(inspect.unwrap(found))
    except (OSError, TypeError):
        return ""


@pytest.mark.parametrize(("home", "name"), NAMES)
def test_public_names_have_docstrings_with_their_sections(home, name):
    if name in NO_DOCSTRING:
        return
    found = [f"{label} {each}" for label, made in callables(home, name) for each in lacking(label, made)]
    assert not found, "\n".join(found)


def test_a_docstring_without_its_sections_is_found():
    def bad(first, second):
        """Do it."""
        raise ValueError(first, second)

    assert list(lacking("bad", bad)) == [
        "has no section Args or Attributes",
        "does not mention ['first', 'second']",
        "raises ['ValueError'] and does not say so",
    ]


@pytest.mark.parametrize(("home", "name"), NAMES)
def test_public_names_have_an_example(home, name):
    found = load(home, name)
    if name in NO_DOCSTRING or (inspect.isclass(found) and issubclass(found, Exception)):
        return
    assert re.search(r"^Examples?:", inspect.getdoc(found) or "", re.M)

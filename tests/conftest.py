"""What tests share: independent truths, the eager backends, and a quiet environment."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The settings of the user who runs the tests do not apply; threads cost more than they bring at these sizes.
for _name in [name for name in os.environ if name.startswith("DEQCORE_")]:
    del os.environ[_name]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # the width of the terminal from which the tests run
# XLA compiles the tests' programs in a fifth of the time without its emitters of fused loops and most optimizations.
# A value from outside stays: with `XLA_FLAGS=`, as in `make coverage`, JAX compiles what users compile.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=0",
)

# Lowering records where each operation was written, a fifth of the time of a JAX test; a value from outside stays.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

MOST_PROGRAMS = 400  # of JAX that a process holds

pytest_plugins = ["deqcore.testing.plugin"]

settings.register_profile(
    "deqcore",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=8,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("deqcore")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Spare the garbage collector what the test files import, half a million objects that live as long as the tests.

    Without this, each full collection in a test takes 0.4 s.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture
def small_heap():
    """Spare the garbage collector what earlier tests have left, for tests of code that collects often."""
    gc.collect()
    gc.freeze()


def _load(name: str):
    path = Path(__file__).parent / "helpers" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tests_helpers_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _no_counts_of_earlier_tests():
    """Each test sees the first warning of its functions, which are shown at the 1st, 10th, 100th failure."""
    from deqcore.solve import ledger

    ledger.forget()


@pytest.fixture(scope="session")
def truth():
    """Closed forms, SciPy and textbook methods; see helpers/truth.py."""
    return _load("truth")


@pytest.fixture(scope="session", params=["numpy", "torch"])
def be(request):
    """An eager backend."""
    import deqcore

    if request.param == "torch":
        pytest.importorskip("torch")
    return deqcore.get_backend(backend=request.param)


@pytest.fixture(params=["numpy", "torch", "jax"])
def every(request):
    """Every backend, in double precision."""
    import deqcore

    pytest.importorskip(request.param)
    double = contextlib.nullcontext()
    if request.param == "jax":
        import jax

        double = jax.enable_x64(True)
    with double:
        yield deqcore.get_backend(backend=request.param)


@pytest.fixture
def no_plugins():
    """No plugin, before and after, and no folder of one in the search path afterwards."""
    from deqcore import plugins

    path = list(sys.path)
    plugins.reset()
    yield
    plugins.reset()
    sys.path[:] = path


@pytest.fixture
def quiet_forward_mode():
    """Without PyTorch's warning of its own use of torch.jit when forward mode is first used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture
def no_settings(monkeypatch):
    """No setting from the environment."""
    for name in [name for name in os.environ if name.startswith("DEQCORE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def project(no_settings, no_plugins, monkeypatch, tmp_path):
    """An empty project as the working directory, without settings and plugins from elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEQCORE_PLUGIN_AUTOLOAD", "0")
    return tmp_path


@pytest.fixture(scope="module")
def quick_compiles():
    """Compile JAX's programs without most optimisations, for files that compare no rounding and no compiled text.

    `XLA_FLAGS` above does more; this one is left where they are emptied, in `make coverage`.

    Programs compile in two thirds of the time. The conformance suite, the transformations and the tests of scale run
    what users run.
    """
    jax = pytest.importorskip("jax")
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Programs:
    """The number of programs that JAX has compiled since its caches were dropped."""

    def __init__(self, jax) -> None:
        self.jax, self.held = jax, 0
        jax.monitoring.register_event_duration_secs_listener(self.count)

    def count(self, event: str, _seconds: float, **_details: object) -> None:
        self.held += event == "/jax/core/compile/backend_compile_duration"

    def limit(self) -> None:
        if self.held > MOST_PROGRAMS:
            self.jax.clear_caches()
            self.held = 0


@functools.cache
def _programs() -> Programs:
    return Programs(sys.modules["jax"])


@pytest.fixture(autouse=True)
def few_programs():
    """Drop JAX's compiled programs when there are many.

    Each holds the MLIR context in which it was lowered, about 1.4 MB. To create a context, MLIR walks over all that are
    alive: beside 3000 of them a small program compiles in three times as long. Each program takes memory maps, too, of
    which Linux allows 65530.
    """
    yield
    if "jax" in sys.modules:
        _programs().limit()

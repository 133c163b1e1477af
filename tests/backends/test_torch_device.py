"""Native steps on a GPU are the steps that solvers define; without a GPU, Triton's interpreter runs them here.

Truth: the solvers' own steps, products of matrices, and other batches.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

import deqcore
from deqcore.linear.gmres import gmres
from deqcore.solve.loop import iterate
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.auto import Auto
from deqcore.solvers.broyden import Broyden
from deqcore.solvers.picard import Picard
from deqcore.types import StoppingCriteria

torch = pytest.importorskip("torch")
if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from deqcore_torch import compiled  # noqa: E402
from deqcore_torch.backend import TorchBackend  # noqa: E402
from deqcore_torch.host import TorchHost  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(not RUNS, reason="needs a GPU, or TRITON_INTERPRET=1 from the start")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, that interprets
SOLVERS = [
    Broyden(),
    Broyden(history_size=3),
    Broyden(history_size=5),
    Anderson(),
    Anderson(history_size=2),
    Anderson(max_residual_growth=1.001),
    Auto(history_size=2, slow=0.3),  # samples move up one after the other
]
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12}
# An interpreted operation takes as long for one number as for a thousand, so that programs work on few numbers there:
# short rows have several blocks, several spans, and more spans than are added up at once.
SMALL = {"SPAN": 32, "PARTS": 2, "BLOCK": 16, "COLUMNS": 32, "AT_ONCE": 32}
BATCH, NARROW, WIDE, STEPS = (9, 30, 4500, 8) if DEVICE == "cuda" else (3, 12, 70, 5)


def keep_the_language_patched():
    """Have the interpreter replace Triton's operations once, and not again at each call of each function.

    Its search for what to replace takes milliseconds, more than most functions, and finds the same every time.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    done = {}  # by module: functions of one module see the same language

    def patched(function):
        home = function.__module__
        if home not in done:
            done[home] = patch(function)
            done[home].restore = lambda: None
        return done[home]

    interpreter._patch_lang = patched
    original = interpreter._get_np_dtype
    dtypes = {}  # by name: otherwise it makes a table of all dtypes in each call

    def numpy_dtype(kind):
        if kind.name not in dtypes:
            dtypes[kind.name] = original(kind)
        return dtypes[kind.name]

    interpreter._get_np_dtype = numpy_dtype


if RUNS and DEVICE == "cpu":
    keep_the_language_patched()


@pytest.mark.skipif(RUNS, reason="runs directly")
def test_kernels_in_triton_s_interpreter():
    """Triton decides when it is imported whether it interprets, so this has a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert " passed" in process.stdout


class Compiled:
    """Stands for a Triton function and for what it is compiled to; notes how it is called."""

    arg_names = ("x", "n", "slot", "wide", "block")

    def __init__(self, code=None):
        self.code, self.calls = code, []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.calls.append((grid, arguments, options))
            if isinstance(self.code, Exception):
                raise self.code
            return self.code

        return run


def test_compiled_code_is_launched_directly():
    launch = pytest.importorskip("deqcore_torch.native.launch")
    code = Compiled()
    function = Compiled(code)
    kernel = launch.Kernel(function)
    assert not kernel.direct  # no function of Triton's
    kernel.direct = True
    x = torch.zeros(64)
    for slot in (1, 2):
        kernel((3,), x, 32, slot, block=4, wide="f")
    assert function.calls == [((3,), (x, 32, 1, "f", 4), {"num_warps": 4})]
    assert code.calls == [((3, 1, 1), (x, 32, 2, "f", 4), {})]
    for other, n, block in [(x.double(), 32, 4), (x, 33, 4), (x, 1, 4), (x, 32, 8), (x[1:], 32, 4), (x[1:], 32, 4)]:
        kernel((3,), other, n, 1, wide="f", block=block)
    assert len(function.calls) == 7  # each is compiled for itself, and what is not aligned is left to Triton
    assert len(code.calls) == 1
    code.code = TypeError("takes other arguments")
    kernel((3,), x, 32, 1, wide="f", block=4)
    kernel((3,), x, 32, 1, wide="f", block=4)
    assert not kernel.direct
    assert len(function.calls) == 9
    assert len(code.calls) == 2


def test_a_gpu_that_triton_cannot_compile_for(monkeypatch):
    device = pytest.importorskip("deqcore_torch.native.device")
    monkeypatch.setattr(device, "probe", lambda: (_ for _ in ()).throw(RuntimeError("Failed to find C compiler.")))
    load = compiled.loaded.__wrapped__
    with pytest.warns(
        UserWarning, match=r"because Triton does not work here: Failed to find C compiler\. Set DEQCORE_NATIVE=0"
    ):
        assert load("cuda") is None
    monkeypatch.setattr(device, "probe", lambda: None)
    assert load("cuda") is device


@pytest.fixture(autouse=True)
def fused(monkeypatch, request):
    """The GPU's native steps for whatever device there is, in tests marked `kernels`."""
    if not RUNS or not any(mark == kernels.mark for mark in request.node.iter_markers()):
        return None
    device = pytest.importorskip("deqcore_torch.native.device")
    if DEVICE == "cpu":
        for name, size in SMALL.items():
            monkeypatch.setattr(device.fused if hasattr(device.fused, name) else device, name, size)
        monkeypatch.setattr(device, "plain", lambda x: x.dtype in device.KINDS and x.numel() > 0 and x.is_contiguous())
        monkeypatch.setattr(compiled, "loaded", lambda kind: device)
        monkeypatch.setattr(TorchHost, "numpy_view", lambda self, x: None)  # as a device that must be asked
        monkeypatch.setattr("deqcore_torch.kernels.native_steps", lambda host, x: compiled.reading(x))
    return device


def problem(dtype, batch, n, gain=0.9):
    """A tanh cell; sample b has the gain b/batch of it, so that samples stop one after the other."""
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    x = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    gains = gain * torch.arange(1, batch + 1, dtype=torch.float64)[:, None] / batch
    w, x, gains = (each.to(DEVICE, dtype) for each in (w, x, gains))
    return (lambda z: torch.tanh(gains * (z @ w) + x)), torch.zeros(batch, n, dtype=dtype, device=DEVICE)


def solve(f, z, solver, rtol=0.0, max_steps=8, resume=None):
    with torch.no_grad():
        return iterate(
            TorchBackend(), solver, f, z, StoppingCriteria(rtol=rtol, max_steps=max_steps, check_every=4), resume
        )


# Each size in one dtype, since an interpreted test takes a second.
SIZES = [
    (torch.float64, 1, 3, 0.0),
    (torch.float32, BATCH, NARROW, 0.0),
    (torch.float64, BATCH, NARROW, 1e-2),
    (torch.float32, 2, WIDE, 0.0),
]
# A GPU runs all pairs. Kernels treat the slots of a history and the numbers of a row apart, so that the interpreter
# meets each kind of history with one size of rows, and each size of rows with one history of each solver.
PAIRS = [(solver, *size) for solver in [*SOLVERS, Picard()] for size in SIZES]
if DEVICE == "cpu":
    ALL_SIZES = (Broyden(), Anderson(), Auto(history_size=2, slow=0.3), Picard())
    PAIRS = [pair for pair in PAIRS if pair[0] in ALL_SIZES or pair[1:] == SIZES[2]]


@kernels
@pytest.mark.parametrize(("solver", "dtype", "batch", "n", "rtol"), PAIRS, ids=repr)
def test_steps_are_those_of_the_solver(without, solver, dtype, batch, n, rtol):
    f, z = problem(dtype, batch, n)
    run = lambda: solve(f, z, solver, rtol, 6)
    found, expected = run(), without(run)
    assert torch.equal(found.steps, expected.steps)
    assert torch.equal(found.status, expected.status)
    for ours, own in [(found.z, expected.z), (found.fz, expected.fz), (found.carry.z, expected.carry.z)]:
        assert float((ours - own).norm() / own.norm()) < TOLERANCE[dtype]


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rtol", [0.0, 1e-3, 0.5])
def test_growth_meets_no_tolerance(without, dtype, rtol):
    """The kernel judges samples that run away, and some that converge, as `verdict` does."""
    z = torch.tensor([0.0, 1.0, 1.0, 1e5, 0.5], dtype=dtype, device=DEVICE)[:, None].repeat(1, 3)
    kinds = torch.arange(5, device=DEVICE)[:, None]

    def f(z):
        found = torch.where(kinds == 0, z + 1.0, 8.0 * z + 1.0)
        jump = z + torch.where(z.abs() > 1e5, torch.ones_like(z), 1e6 * torch.ones_like(z))
        found = torch.where(kinds == 2, jump, found)
        return torch.where(kinds == 3, 0.5 * z + 1.0, torch.where(kinds == 4, 0.0 * z, found))

    run = lambda: solve(f, z, Picard(), rtol, 6)
    found, expected = run(), without(run)
    for name in ("status", "steps"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("mark", "peak", "since", "reference", "best_residual"):
        ours, own = getattr(found.carry, name), getattr(expected.carry, name)
        torch.testing.assert_close(ours, own, rtol=1e-6, atol=0.0, msg=name)
    assert (found.status[:2] != 1).all()
    assert int(found.status[4]) == 1


@kernels
@pytest.mark.parametrize("solver", [Broyden(), Broyden(history_dtype="bfloat16"), Anderson()], ids=repr)
def test_narrow_states_and_histories(without, solver):
    f, z = problem(torch.bfloat16, BATCH, 4 * NARROW // 3, gain=0.5)
    run = lambda: solve(f, z, solver, rtol=2e-2, max_steps=12)
    found, expected = run(), without(run)
    assert found.z.dtype is torch.bfloat16
    assert (found.status == 1).all()
    assert (expected.status == 1).all()
    assert float((found.z - expected.z).float().norm() / expected.z.float().norm()) < 0.03


@kernels
@pytest.mark.parametrize("solver", [Broyden(), Anderson()], ids=repr)
def test_the_estimates_are_those_of_the_solver(without, solver):
    f, z = problem(torch.float64, BATCH, NARROW)
    v = torch.randn(BATCH, NARROW, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    backend = TorchBackend()

    def applied():
        state = solve(f, z, solver, rtol=1e-3, max_steps=5).carry.state
        found = [solver.inverse_jacobian(backend, state).apply(v), solver.secant_estimate(backend, state).apply(v)]
        return torch.stack(found)

    assert torch.allclose(applied(), without(applied), rtol=1e-7, atol=1e-9)


@kernels
@pytest.mark.parametrize("solver", [Broyden(), Anderson()], ids=repr)
def test_a_solve_goes_on(without, solver):
    f, z = problem(torch.float64, BATCH, NARROW)

    def twice():
        first = solve(f, z, solver, rtol=1e-2, max_steps=20)
        return solve(f, z, solver, rtol=1e-6, max_steps=20, resume=first.carry)

    found, expected = twice(), without(twice)
    assert torch.equal(found.steps, expected.steps)
    assert (found.status == 1).all()
    assert torch.allclose(found.z, expected.z, rtol=1e-9)


def systems(dtype, batch, n):
    """Sample b has b slow modes; the last one is singular, and the one before it not finite."""
    generator = torch.Generator().manual_seed(n)
    a = (
        torch.eye(n, dtype=torch.float64)
        + 0.3 * torch.randn(batch, n, n, generator=generator, dtype=torch.float64) / n**0.5
    )
    a[-1, :, 0] = 0.0
    right = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    right[-2, 0] = float("nan")
    a, right = a.to(DEVICE, dtype), right.to(DEVICE, dtype)
    return (lambda v: torch.einsum("bij,bj->bi", a, v)), right


@kernels
@pytest.mark.parametrize(("dtype", "twice"), [(torch.float32, True), (torch.float64, False)])
@pytest.mark.parametrize(("batch", "n", "steps"), [(3, 4, 8), (4, NARROW, 9), (3, WIDE // 2, 5)])
def test_gmres_is_that_of_the_core(without, monkeypatch, fused, dtype, twice, batch, n, steps):
    product, right = systems(dtype, batch, n)
    rtol = torch.logspace(-1, -4, batch, device=DEVICE, dtype=torch.float64)
    taken = []
    own = fused.arnoldi
    monkeypatch.setattr(fused, "arnoldi", lambda *given: taken.append(own(*given)) or taken[-1])
    run = lambda: gmres(TorchBackend(), product, right, rtol=rtol, max_steps=steps, reorthogonalize=twice)
    with torch.no_grad():
        found, expected = run(), without(run)
    assert taken
    assert None not in taken
    sound = [b for b in range(batch) if b < batch - 2]
    assert torch.equal(found.products[:-1], expected.products[:-1])  # in the singular one rounding has a say
    assert torch.equal(found.converged[:-1], expected.converged[:-1])
    assert torch.allclose(found.x[sound], expected.x[sound], rtol=1e-3 if dtype is torch.float32 else 1e-9, atol=1e-5)
    assert torch.allclose(found.residual[sound], expected.residual[sound], rtol=1e-2, atol=1e-5)


@kernels
def test_certified_solves_are_those_of_the_core(without):
    f, z = problem(torch.float64, BATCH, NARROW)
    run = lambda: deqcore.fixed_point(
        lambda z, x: f(z) + x, z, x, forward__rtol=1e-6, backward__strategy="broyden-reuse"
    )
    gradients = []
    for way in (lambda do: do(), without):
        x = torch.zeros_like(z, requires_grad=True)
        sol = run()
        way(lambda sol=sol: sol.value.square().sum().backward())
        gradients.append((x.grad, sol.backward.vjps))
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert torch.allclose(gradients[0][0], gradients[1][0], rtol=1e-6, atol=1e-9)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, WIDE])
def test_norms(fused, dtype, n):
    z, fz = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    fz[1, 0] = float("nan")
    residual, size = fused.measure(z, fz)
    wide = [each.double() for each in (fz.double() - z.double(), fz)]
    assert torch.allclose(residual.double(), wide[0].norm(dim=1), rtol=1e-6, equal_nan=True)
    assert torch.allclose(size.double(), wide[1].norm(dim=1), rtol=1e-6, equal_nan=True)


@kernels
@pytest.mark.parametrize(("history_size", "masked"), [(3, True), (35, False)])
@pytest.mark.parametrize("stored", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("n", [5, WIDE])
def test_products_and_combinations(fused, without, history_size, masked, stored, n):
    backend, generator = TorchBackend(), torch.Generator().manual_seed(0)
    vectors = torch.randn(7, 3, n, generator=generator).to(DEVICE)
    history = backend.history(vectors[0], history_size, stored)
    for k, v in enumerate(vectors):
        active = torch.tensor([True, k % 2 == 0, k > 4], device=DEVICE) if masked else None
        history = history.masked(active).append(v)
    history = history.masked(None)
    c = torch.randn(3, history_size, generator=generator, dtype=torch.float64).to(DEVICE)
    v = vectors[0] + vectors[3]
    run = lambda: (history.dot(v), history.combine(c), history.add_combination(v, c))
    taken = []
    assert fused.dots(history, v) is not None
    found, expected = run(), without(run)
    for ours, own in zip(found, expected, strict=True):
        taken.append(ours.dtype)
        assert ours.dtype is own.dtype
        assert torch.allclose(ours, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))
    assert taken == [torch.float64, torch.float32, torch.float32]


@kernels
@pytest.mark.parametrize("solver", [Broyden(), Anderson(), Auto()], ids=repr)
def test_bits_do_not_depend_on_the_batch(solver):
    rates = torch.linspace(0.1, 0.9, BATCH, device=DEVICE)[:, None]
    x = torch.randn(BATCH, WIDE // 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    everyone = solve(lambda z: torch.tanh(rates * z.roll(1, 1) + x), torch.zeros_like(x), solver, 1e-4, STEPS)
    for b in (0, BATCH - 1):
        alone = solve(
            lambda z, b=b: torch.tanh(rates[b] * z.roll(1, 1) + x[b]), torch.zeros_like(x[:1]), solver, 1e-4, STEPS
        )
        assert torch.equal(alone.fz[0], everyone.fz[b])
        assert int(alone.steps[0]) == int(everyone.steps[b])


@kernels
@pytest.mark.parametrize("solver", [Broyden(), Anderson(), Auto(slow=0.3), Picard()], ids=repr)
def test_a_neighbour_changes_nothing(solver):
    clean, poisoned = [0, 3], [1, 2, 4]
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bad = torch.zeros(5, 12, device=DEVICE)
    bad[poisoned] = torch.tensor([float("nan"), float("inf"), 1e30], device=DEVICE)[:, None]
    f = lambda z, x, shift: torch.tanh(0.7 * z.roll(1, 1) + x) + shift * (1 + z)
    dirty = solve(lambda z: f(z, x, bad), torch.zeros_like(x), solver, max_steps=STEPS)
    alone = solve(lambda z: f(z, x[clean], 0.0), torch.zeros_like(x[clean]), solver, max_steps=STEPS)
    assert torch.equal(alone.fz, dirty.fz[clean])
    assert torch.equal(alone.status, dirty.status[clean])
    assert (dirty.status[poisoned] != 1).all()


@kernels
@pytest.mark.parametrize("solver", [Broyden(), Anderson()], ids=repr)
def test_a_native_step_is_taken(fused, monkeypatch, solver):
    taken = []
    own = fused.step
    monkeypatch.setattr(fused, "step", lambda *given: taken.append(own(*given)) or taken[-1])
    f, z = problem(torch.float32, 3, 10)
    solve(f, z, solver, rtol=1e-3)
    assert taken
    assert all(found is not None and found.frozen for found in taken)


@kernels
def test_what_has_no_native_version(fused):
    f, z = problem(torch.float32, 3, 10)
    backend = TorchBackend()
    for solver in (Broyden(history_size=80), Broyden(max_residual_growth=2.0), Anderson(mixing=0.5), Picard()):
        fz = f(z)
        assert fused.step(backend, solver, f, z, fz, solver.init(backend, z, fz)) is None


@kernels
@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 83), (torch.float64, 664)])
@pytest.mark.parametrize("solver", [Picard(), Broyden(history_size=3), Anderson()], ids=repr)
def test_powers_of_two_change_no_bit(solver, dtype, k):
    """s f(z/s) with s near the ends of the range, where all squares vanish or overflow: steps are those of f."""
    weights, x = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((7, 7), (3, 7)))
    weights, x = (0.7 * torch.linalg.qr(weights)[0]).to(DEVICE, dtype), x.to(DEVICE, dtype)
    rtol = 1e-3 if DEVICE == "cuda" else 0.1  # an interpreted step takes a quarter of a second
    found = []
    for s in (1.0, 2.0**-k, 2.0**k):
        f = lambda z, s=s: s * torch.tanh((z / s) @ weights) + s * x
        with torch.no_grad():
            found.append(iterate(TorchBackend(), solver, f, 0 * x, StoppingCriteria(rtol)))
            krylov = gmres(TorchBackend(), lambda v: v - v @ weights, s * x, rtol=rtol, max_steps=3)
        found[-1] = [found[-1].z.double() / s, found[-1].steps, found[-1].status, krylov.x.double() / s]
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))

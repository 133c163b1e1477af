"""Complex states in every framework: values, gradients by each framework's own convention, and refusals."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.errors import ProblemError
from deqcore.testing.suite.complex_states import ComplexAffine

N = 3
TIGHT = {"forward__rtol": 1e-12, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}
pytestmark = pytest.mark.usefixtures("quick_compiles")


def problem(seed=0):
    r = np.random.default_rng(seed)
    a = 0.3 * (r.standard_normal((N, N)) + 1j * r.standard_normal((N, N))) / np.sqrt(N)
    b, g = (r.standard_normal((2, N)) + 1j * r.standard_normal((2, N)) for _ in range(2))
    return a, b, g


def cell(xp):
    """Not holomorphic: the conjugate of z enters."""
    return lambda z, a, b: 0.5 * xp.tanh(z @ a.T) + 0.3 * xp.conj(z) + b


def iterated(a, b):
    z = np.zeros_like(b)
    for _ in range(200):
        z = cell(np)(z, a, b)
    return z


def differences(a, b, g, h=1e-6):
    """∂L/∂Re A + i ∂L/∂Im A of L = Re Σ conj(g) z*, by central differences of real numbers."""
    loss = lambda a: float(np.sum(np.conj(g) * iterated(a, b)).real)
    found = np.zeros_like(a)
    for i in np.ndindex(a.shape):
        for unit in (1.0, 1j):
            step = np.zeros_like(a)
            step[i] = unit * h
            found[i] += unit * (loss(a + step) - loss(a - step)) / (2 * h)
    return found


@pytest.mark.supports("complex states", backends="numpy torch jax", strategies="exact-ift")
def test_gradients_of_complex_parameters_are_those_of_differences(every):
    a, b, g = problem()
    turned = np.conj if every.autodiff.conjugates else np.asarray
    array = every.asarray
    z, (da, _) = deqcore.vjp(
        cell(every.xp), array(0 * b), array(a), array(b), cotangent=array(turned(g)),
        **TIGHT,
    )  # fmt: skip
    assert np.abs(every.to_numpy(z) - iterated(a, b)).max() <= 1e-10
    assert np.abs(turned(every.to_numpy(da)) - differences(a, b, g)).max() <= 1e-7


OTHERS = ["broyden-reuse", "jacobian-free", "neumann", "phantom", "unrolled", "adaptive"]


@pytest.mark.parametrize("strategy", OTHERS)
@pytest.mark.supports(
    "complex states",
    backends="jax",
    strategies="broyden-reuse, jacobian-free, neumann, phantom, unrolled, adaptive",
)
def test_other_strategies_in_jax_are_as_far_from_the_truth_as_they_may_be(strategy):
    """The suite runs these on the other backends; JAX conjugates cotangents and gradients."""
    xp = pytest.importorskip("jax").numpy
    known = ComplexAffine.make(norm=0.05)
    g = np.random.default_rng(8).standard_normal((2, 3)) * (1 + 2j)
    single = lambda x: xp.asarray(x.astype(np.complex64))
    a, b_conj, b = map(single, (known.a, known.b_conj, known.b))

    def f(z, b):
        return xp.einsum("bij,bj->bi", a, z) + xp.einsum("bij,bj->bi", b_conj, xp.conj(z)) + b

    solver = "broyden" if strategy == "broyden-reuse" else "picard"
    settings = {"forward__solver": solver, "forward__rtol": 1e-6, "backward__strategy": strategy}
    z, (db,) = deqcore.vjp(f, 0 * b, b, cotangent=single(np.conj(g)), **settings)
    assert np.abs(np.asarray(z) - known.root).max() <= 1e-4
    truth = known.adjoint(g)
    apart = np.linalg.norm(np.conj(np.asarray(db)) - truth) / np.linalg.norm(truth)
    assert apart <= 0.06


def test_single_precision_keeps_its_dtypes(every):
    a, b, g = (every.asarray(x.astype(np.complex64)) for x in problem())
    z, (da, db) = deqcore.vjp(cell(every.xp), 0 * b, a, b, cotangent=g, forward__rtol=1e-5)
    assert {every.dtype_name(x) for x in (z, da, db)} == {"complex64"}
    sol = deqcore.fixed_point(cell(every.xp), 0 * b, a, b, forward__rtol=1e-5)
    assert every.dtype_name(sol.residual) == "float32"
    assert sol.residual.shape == (2,)


def test_a_complex_root_is_found(every):
    """z² = c, whose factor of each sample is found from a complex Jacobian."""
    c = every.asarray(np.array([[3.0 + 4j], [-1.0 + 0j]]))
    start = every.asarray(np.array([[1.5 + 0.5j], [0.2 + 0.8j]]))
    sol = deqcore.root(lambda z, c: z * z - c, start, c, forward__solver="newton-krylov", forward__rtol=1e-10)
    assert np.abs(every.to_numpy(sol.value) - np.array([[2 + 1j], [1j]])).max() <= 1e-8


def test_a_whole_complex_scalar_is_one_system(every):
    z0 = every.asarray(np.array(0j))
    sol = deqcore.fixed_point(lambda z: 0.5j * z + 1.0, z0, forward__batch=False, forward__rtol=1e-10)
    assert np.abs(every.to_numpy(sol.value) - 1 / (1 - 0.5j)) <= 1e-8
    assert sol.value.shape == ()


@pytest.mark.supports("complex states, second derivatives", backends="torch", strategies="exact-ift")
def test_torch_gradients_follow_its_convention():
    torch = pytest.importorskip("torch")
    a, b, _ = (torch.tensor(x) for x in problem())
    solved = lambda a, b: deqcore.fixed_point(cell(torch), torch.zeros_like(b), a, b, **TIGHT).value
    a.requires_grad_()
    assert torch.autograd.gradcheck(solved, (a, b[:1]), atol=1e-5)
    assert torch.autograd.gradgradcheck(lambda a: solved(a[:1, :1], b[:1, :1]), (a,), atol=1e-4)
    grad = torch.func.grad(lambda a: solved(a, b).abs().square().sum())(a.detach())
    expected = torch.autograd.grad(solved(a, b).abs().square().sum(), a)[0]
    assert torch.allclose(grad, expected, atol=1e-9)


def test_jax_gradients_follow_its_convention():
    jax = pytest.importorskip("jax")
    xp = jax.numpy
    with jax.enable_x64(True):
        a, b, _ = (xp.asarray(x) for x in problem())
        backward = {"rtol": 1e-12, "solver": "picard", "max_steps": 200}
        plain = {**TIGHT, "forward__solver": "picard", "forward__max_steps": 200, "backward__options": backward}
        solved = lambda a: deqcore.fixed_point(cell(xp), 0 * b, a, b, **plain).value

        def unrolled(a):
            return jax.lax.fori_loop(0, 60, lambda _, z: cell(xp)(z, a, b), 0 * b)

        loss = lambda value: lambda a: xp.sum(xp.abs(value(a)) ** 2)
        implicit, explicit = (jax.jit(jax.grad(loss(value)))(a) for value in (solved, unrolled))
        assert xp.allclose(implicit, explicit, atol=1e-8)
        tangents = [jax.jvp(value, (a,), (1j * a,))[1] for value in (solved, unrolled)]
        assert xp.allclose(*tangents, atol=1e-8)


@pytest.mark.parametrize("kind", ["linear", "relu"])
@pytest.mark.supports("complex states with a real cell", backends="torch", strategies="any", answer="refused")
def test_a_real_cell_refuses_a_complex_state_with_a_remedy(kind):
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(2, 2)
    f = linear if kind == "linear" else torch.relu
    with pytest.raises(ProblemError, match=r"f must take complex numbers, because z0 is complex64 \(got \w*Error"):
        deqcore.fixed_point(f, torch.zeros(1, 2, dtype=torch.complex64))


@pytest.mark.supports("complex states with a real cell", backends="jax", strategies="any", answer="refused")
def test_a_real_cell_in_jax_refuses_a_complex_state_with_a_remedy():
    jax = pytest.importorskip("jax")
    with pytest.raises(ProblemError, match=r"complex64 \(got TypeError.*two real leaves"):
        deqcore.fixed_point(jax.numpy.floor, jax.numpy.zeros((1, 2), "complex64"))


def test_other_errors_of_a_complex_cell_are_its_own(be):
    def f(z):
        raise ValueError("the user's own")

    with pytest.raises(ValueError, match="the user's own") as caught:
        deqcore.fixed_point(f, be.asarray(np.zeros((1, 2), complex)))
    assert type(caught.value) is ValueError


@pytest.mark.slow
@pytest.mark.supports("complex states, compiled and exported", backends="torch", strategies="exact-ift")
def test_compiled_and_exported_solves_of_complex_states():
    torch = pytest.importorskip("torch")
    from deqcore_torch.nn import DEQ

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(problem()[0]))

        def forward(self, z, x):
            return cell(torch)(z, self.a, x)

    torch._dynamo.reset()
    layer = DEQ(Cell(), forward__rtol=1e-10)
    x = torch.tensor(problem()[1])
    grads = []
    for fn in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        grads.append(torch.autograd.grad(fn(x).abs().square().sum(), layer.cell.a)[0])
    assert torch.equal(*grads)
    program = torch.export.export(layer.eval(), (x,))
    assert torch.allclose(program.module()(x), layer(x), atol=1e-7)

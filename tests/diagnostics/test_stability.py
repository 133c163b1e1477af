"""`spectral_penalty` against dense eigenvalues and their differences, and in a training that would lose stability."""

import numpy as np
import pytest

from deqcore.diagnostics import jacobian_penalty, spectral_penalty, spectral_radius
from deqcore.errors import BackendError, InitialIterateError

torch = pytest.importorskip("torch")


def matrix(kind, seed=0):
    """A non-normal matrix whose dominant eigenvalues are a complex pair, or one real number."""
    rng = np.random.default_rng(seed)
    blocks = np.diag(np.linspace(-0.4, 0.5, 6))
    if kind == "pair":
        blocks[:2, :2] = [[0.3, 1.0], [-1.0, 0.3]]
    else:
        blocks[0, 0] = -1.3
    basis = rng.standard_normal((6, 6))
    return basis @ blocks @ np.linalg.inv(basis)


def radius(a):
    return abs(np.linalg.eigvals(a)).max()


def slopes(a):
    """Central differences of the radius."""
    found = np.zeros_like(a)
    for at in np.ndindex(*a.shape):
        shift = np.zeros_like(a)
        shift[at] = 1e-6
        found[at] = (radius(a + shift) - radius(a - shift)) / 2e-6
    return found


@pytest.mark.parametrize("kind", ["pair", "real"])
def test_radius_and_gradient_are_those_of_the_dominant_eigenvalue(kind):
    a = matrix(kind)
    w, state = torch.tensor(a, requires_grad=True), None
    for _ in range(30):  # one iteration a step, the blocks carried
        found = spectral_penalty(lambda z: z @ w.T, torch.zeros(2, 6, dtype=torch.float64), state=state)
        state = found.state
    np.testing.assert_allclose(found.radius.detach().numpy(), radius(a), rtol=1e-6)
    (gradient,) = torch.autograd.grad(found.radius[0], w)
    np.testing.assert_allclose(gradient.numpy(), slopes(a), atol=1e-4 * abs(slopes(a)).max())
    np.testing.assert_allclose(found.penalty.detach().numpy(), (radius(a) - 0.95) ** 2, rtol=1e-5)


def test_jax_finds_the_same_inside_one_compiled_step():
    jax = pytest.importorskip("jax")
    a = matrix("pair")

    with jax.enable_x64(True):

        def step(w, state):
            found = spectral_penalty(lambda z: z @ w.T, jax.numpy.zeros((1, 6)), state=state, iterations=4)
            return found.radius.sum(), found.state

        run = jax.jit(jax.grad(step, has_aux=True))
        _, state = jax.eval_shape(lambda w: step(w, None), jax.numpy.asarray(a))
        state = step(jax.numpy.asarray(a), None)[1]
        for _ in range(8):
            gradient, state = run(jax.numpy.asarray(a), state)
        np.testing.assert_allclose(np.asarray(gradient), slopes(a), atol=1e-4 * abs(slopes(a)).max())


@pytest.mark.parametrize("size", [1, 2])
def test_small_states(size):
    a = 1.2 * np.array([[0.0, 1.0], [-1.0, 0.0]])[:size, :size] + (0.7 if size == 1 else 0.0) * np.eye(size)
    found = spectral_penalty(lambda z: z @ torch.tensor(a), torch.zeros(1, size, dtype=torch.float64), iterations=3)
    assert found.radius.item() == pytest.approx(radius(a), rel=1e-9)


def test_a_zero_jacobian_has_radius_zero_and_a_finite_gradient():
    w = torch.zeros(3, 3, requires_grad=True)
    found = spectral_penalty(lambda z: z @ w, torch.zeros(1, 3))
    assert found.radius.item() == 0.0
    assert torch.isfinite(torch.autograd.grad(found.radius.sum(), w)[0]).all()


def trained(penalty):
    """Train z ← tanh(W z + x), 4 loops, to outputs that ask for long memory; return the largest radius at the end."""
    generator = torch.Generator().manual_seed(0)
    w = (0.5 * torch.randn(8, 8, generator=generator) / 8**0.5).requires_grad_()
    x, y = (torch.randn(16, 8, generator=generator) for _ in range(2))
    optimizer = torch.optim.Adam([w], 0.03)
    state = None
    for _ in range(120):
        z = torch.zeros_like(x)
        for _ in range(4):
            z = torch.tanh(z @ w + 0.1 * x)
        loss = (z - torch.tanh(3 * y)).square().mean()
        f = lambda z: torch.tanh(z @ w + 0.1 * x)
        if penalty == "spectral":
            found = spectral_penalty(f, torch.zeros_like(x), state=state, bound=0.8, iterations=2)
            state, loss = found.state, loss + 300 * found.penalty.mean()
        elif penalty == "frobenius":
            noise = torch.randn(16, 8, generator=generator)
            loss = loss + jacobian_penalty(f, torch.zeros_like(x), noise=noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return spectral_radius(lambda z: torch.tanh(z @ w.detach() + 0.1 * x), torch.zeros_like(x)).radius.max()


def test_both_penalties_keep_a_training_contractive_that_loses_it_without():
    assert trained(None) > 1.0
    assert trained("spectral") < 0.95
    assert trained("frobenius") < 1.0


def test_what_cannot_be_is_refused():
    with pytest.raises(BackendError, match=r"differentiates f itself \(got 'numpy'\).*spectral_radius"):
        spectral_penalty(lambda z: z, np.zeros((1, 2)))
    state = spectral_penalty(lambda z: 0.5 * z, torch.zeros(3, 2)).state
    with pytest.raises(InitialIterateError, match=r"as many samples and numbers, \(2, 2\).*state=None"):
        spectral_penalty(lambda z: 0.5 * z, torch.zeros(2, 2), state=state)
    for wrong in ({"iterations": 0}, {"bound": -1.0}):
        with pytest.raises(InitialIterateError, match="iterations of at least 1 and a bound of at least 0"):
            spectral_penalty(lambda z: 0.5 * z, torch.zeros(2, 2), **wrong)

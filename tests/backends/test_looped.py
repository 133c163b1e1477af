"""`looped` against the loop as people write it by hand, and its random depths against SciPy."""

import numpy as np
import pytest

import deqcore
from deqcore.backward.depth import draw, probabilities
from deqcore.breadth import best_of
from deqcore.config.schedule import Ramp, Schedule
from deqcore.diagnostics import residual_penalty
from deqcore.errors import ConfigError, StrategyError

torch = pytest.importorskip("torch")
stats = pytest.importorskip("scipy.stats")
pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(0)
W, X = 0.3 * RNG.standard_normal((5, 5)), RNG.standard_normal((3, 5))
RANDOM = {"depth": 8, "distribution": "log-normal-poisson", "seed": 1, "recorded": 3}


def looped(step=0, **options):
    return {"backward__strategy": "looped", "backward__options": options, "backward__step": step}


def by_hand(w, x, total, recorded, damping):
    """The loop of a recurrent-depth model; gradients through its last steps."""
    z = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(total - recorded):
            z = z + damping * (torch.tanh(z @ w + x) - z)
    for _ in range(min(total, recorded)):
        z = z + damping * (torch.tanh(z @ w + x) - z)
    return z


def test_torch_has_the_bits_of_the_loop_by_hand():
    depths = set()
    for step in range(8):
        w, x = (torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in (W, X))
        sol = deqcore.fixed_point(
            lambda z, x, w=w: torch.tanh(z @ w + x), torch.zeros(3, 5), x, **looped(step, damping=0.7, **RANDOM)
        )
        depths.add(int(sol.steps[0]))
        right = by_hand(w, x, int(sol.steps[0]), 3, 0.7)
        assert torch.equal(sol.value, right)
        for a, b in zip(*(torch.autograd.grad(v.square().sum(), [w, x]) for v in (sol.value, right)), strict=True):
            assert torch.equal(a, b)
    assert len(depths) > 3
    assert min(depths) < 3 < max(depths)


def test_jax_compiles_once_for_all_depths():
    jax = pytest.importorskip("jax")
    deqcore.get_backend(backend="jax")  # registers its trees, after which JAX traces once more
    traced = []

    def loss(w, x, step):
        traced.append(step)
        f = lambda z, x: jax.numpy.tanh(z @ w + x)
        sol = deqcore.fixed_point(f, 0 * x, x, **looped(step, damping=0.7, **RANDOM))
        return (sol.value**2).sum(), sol.steps

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    with jax.enable_x64(True):
        for step in range(8):
            found, steps = gradient(jax.numpy.asarray(W), jax.numpy.asarray(X), jax.numpy.int32(step))
            w, x = torch.tensor(W, requires_grad=True), torch.tensor(X, requires_grad=True)
            total = deqcore.fixed_point(lambda z: 0.5 * z, torch.zeros(1, 1), **looped(step, **RANDOM)).steps
            assert steps.tolist() == [int(total)] * 3  # the depth of PyTorch
            right = torch.autograd.grad(by_hand(w, x, int(total), 3, 0.7).square().sum(), [w, x])
            for a, b in zip(found, right, strict=True):
                np.testing.assert_allclose(np.asarray(a), b.numpy(), rtol=1e-6, atol=1e-12)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("name", "depth", "law"),
    [
        ("uniform", 4.5, stats.randint(1, 9)),
        ("poisson", 6.0, stats.poisson(5.0, loc=1)),
        ("log-normal-poisson", 12.0, None),
    ],
)
def test_depths_follow_their_distribution(name, depth, law):
    be = deqcore.get_backend(backend="numpy")
    table = probabilities(name, depth)
    support = np.arange(1, len(table) + 1)
    if law is None:  # by integration over the rate
        integrate = pytest.importorskip("scipy.integrate")
        rate = stats.lognorm(0.5, scale=np.exp(np.log(depth - 1) - 0.125))
        for k in (1, 5, 12, 40):
            mass = integrate.quad(lambda r, k=k: rate.pdf(r) * stats.poisson.pmf(k - 1, r), 0, 200, limit=200)[0]
            assert table[k - 1] == pytest.approx(mass, rel=1e-6)
    else:
        np.testing.assert_allclose(table, law.pmf(support), atol=1e-12)
    assert table @ support == pytest.approx(depth, rel=1e-9)
    drawn = np.array([draw(be, name, depth, 0.5, 7, step, None) for step in range(4000)])
    edges = np.flatnonzero(4000 * table >= 5)
    expected = 4000 * np.append(table[edges], 1 - table[edges].sum())
    counts = np.bincount(drawn, minlength=len(table) + 1)[1:][edges]
    observed = np.append(counts, 4000 - counts.sum())
    big = expected > 1
    assert stats.chisquare(observed[big], expected[big] * observed[big].sum() / expected[big].sum()).pvalue > 1e-3
    others = np.array([draw(be, name, depth, 0.5, 8, step, None) for step in range(4000)])
    assert abs(np.corrcoef(drawn, others)[0, 1]) < 0.06  # another seed
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.06  # the next step


def test_noise_and_a_random_start_follow_seed_and_step(every):
    be, z0 = every, every.asarray(np.zeros((200, 50)))

    def value(step, **options):
        sol = deqcore.fixed_point(lambda z: 0.5 * z, z0, **looped(step, depth=3, seed=5, **options))
        return be.to_numpy(be.detach(sol.value))

    first = value(2, noise=0.1)
    assert np.array_equal(first, value(2, noise=0.1))
    assert not np.array_equal(first, value(3, noise=0.1))
    assert first.std() == pytest.approx(0.1 * (1 + 0.25 + 0.0625) ** 0.5, rel=0.05)
    assert value(2, start_noise=2.0).std() == pytest.approx(2.0 / 8, rel=0.05)


def test_a_learnt_start_gets_its_gradient_where_all_steps_are_recorded(every):
    be = every
    if not be.capabilities.autodiff:
        pytest.skip("gradients of arguments only")
    for recorded, expected in ((3, 0.125), (2, 0.0)):
        f = lambda z0, recorded=recorded: be.xp.sum(
            deqcore.fixed_point(lambda z: 0.5 * z, z0, **looped(depth=3, recorded=recorded)).value
        )
        value = be.autodiff.vjp(lambda z0, f=f: (f(z0), None), (be.asarray([[1.0]]),), be.asarray(1.0))
        assert be.to_numpy(value[2][0]).tolist() == [[expected]]


def test_measured_residuals_and_statuses(be):
    x = be.asarray(X)
    f = lambda z, x: 0.5 * be.xp.tanh(z) + x
    for depth, converged in ((40, True), (2, False)):
        sol = deqcore.fixed_point(f, 0 * x, x, forward__rtol=1e-6, **looped(depth=depth, measure=True))
        z = be.to_numpy(be.detach(sol.value))
        np.testing.assert_allclose(
            be.to_numpy(sol.residual), np.linalg.norm(0.5 * np.tanh(z) + X - z, axis=1), rtol=1e-6, atol=1e-15
        )
        assert be.to_numpy(sol.converged).all() == converged
    assert np.isnan(be.to_numpy(deqcore.fixed_point(f, 0 * x, x, **looped(depth=2)).residual)).all()


def test_a_detached_carry_continues_the_loop(be):
    x = be.asarray(X)
    f = lambda z, x: 0.5 * be.xp.tanh(z) + x
    carry = 0 * x
    for _ in range(3):
        carry = deqcore.fixed_point(f, carry, x, **looped(depth=4)).z
    whole = deqcore.fixed_point(f, 0 * x, x, **looped(depth=12)).z
    assert np.array_equal(be.to_numpy(carry), be.to_numpy(whole))


def test_breadth_keeps_the_start_that_comes_to_rest():
    wells = lambda z: z - 0.1 * z * (z**2 - 1)  # stable at ±1, and divergence far away
    settings = {**looped(depth=30, measure=True), "forward__on_failure": "ignore"}  # other starts are there for that
    solve = lambda z0: deqcore.fixed_point(wells, z0, **settings)
    unmeasured = settings | looped(depth=3)
    starts = [torch.tensor([[8.0], [0.9]]), torch.tensor([[-1.2], [float("nan")]]), torch.tensor([[0.01], [0.01]])]
    best = best_of(solve, starts)
    assert best.index.tolist() == [1, 0]
    assert torch.allclose(best.value, torch.tensor([[-1.0], [1.0]]), atol=1e-2)
    with pytest.raises(StrategyError, match="measure = true"):
        best_of(lambda z0: deqcore.fixed_point(wells, z0, **unmeasured), starts[1:])
    with pytest.raises(ConfigError, match="at least one start"):
        best_of(solve, [])


def test_a_loss_on_the_residual_has_the_right_gradient():
    z, w = torch.tensor(X, requires_grad=True), torch.tensor(W, requires_grad=True)
    (found,) = torch.autograd.grad(residual_penalty(lambda z, w: torch.tanh(z @ w), z, w).sum(), w, retain_graph=True)
    fz = torch.tanh(z @ w)
    right = ((fz - z).square().sum(1) / fz.detach().square().sum(1)).sum()
    assert torch.allclose(found, torch.autograd.grad(right, w)[0], rtol=1e-12)


def test_options_have_schedules():
    schedule = Schedule([(0, {"backward__strategy": "looped", "backward__options": {"depth": Ramp(4, 16, until=10)}})])
    depths = []
    for step in (0, 5, 10):
        sol = deqcore.fixed_point(lambda z: 0.5 * z, torch.ones(1, 1), **schedule.at(step), backward__step=step)
        depths.append(int(sol.steps[0]))
    assert depths == [4, 8, 16]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 0.5}, "depth must be from 1"),
        ({"depth": 2.5}, "depth must be a whole number / 1 for 'fixed'"),
        ({"depth": 2.25, "distribution": "uniform", "seed": 0}, "whole number / 2"),
        ({"distribution": "poisson"}, "seed must be set for random depths"),
        ({"noise": 0.1}, "seed must be set"),
        ({"seed": -1}, "seed must be from 0"),
        ({"sigma": 0.1}, "sigma belongs to 'log-normal-poisson'"),
        ({"recorded": 0}, "recorded must be at least 1"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"distribution": "normal"}, "distribution must be"),
        ({"noise": float("nan"), "seed": 1}, "noise must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        deqcore.fixed_point(lambda z: z, torch.zeros(1, 1), **looped(**options))


def test_a_training_step_below_zero_is_refused():
    for step in (-1, torch.tensor(-1)):
        with pytest.raises(ConfigError, match="step must be an integer"):
            deqcore.fixed_point(lambda z: z, torch.zeros(1, 1), **looped(step, **RANDOM))


def test_max_depth_caps_what_is_drawn():
    f = lambda z: 0.5 * z
    depths = [
        int(deqcore.fixed_point(f, torch.ones(1, 1), **looped(step, max_depth=6, **RANDOM)).steps) for step in range(30)
    ]
    assert max(depths) == 6
    assert min(depths) < 6

"""Halting per sample: closed forms of steps, states and gradients; batch mates are not disturbed."""

import math

import numpy as np
import pytest

import deqcore
from deqcore.errors import BackendError, ConfigError, ProblemError
from deqcore.halting import Settled, until

PICARD = {"forward__solver": "picard", "forward__rtol": 1e-12, "forward__max_steps": 400}
RATE, START = 0.9, np.array([[0.0, 0.0], [0.5, 0.5], [0.99, 0.99]])


@pytest.fixture(params=["torch", "jax"])
def be(request):
    pytest.importorskip(request.param)
    if request.param == "torch":
        yield deqcore.get_backend(backend="torch")
    else:
        import jax

        with jax.enable_x64(True):
            yield deqcore.get_backend(backend="jax")


def geometric(z):
    """1 − z shrinks by the rate."""
    return RATE * z + (1 - RATE)


def steps_until(tolerance):
    """The first k at which (1 − z₀)·0.1·0.9ᵏ, the next change, is within the tolerance."""
    return [max(0, math.ceil(math.log(tolerance / ((1 - RATE) * (1 - z0))) / math.log(RATE))) for z0 in START[:, 0]]


def test_each_sample_halts_where_the_closed_form_says(be):
    z0 = be.asarray(START)
    sol = deqcore.fixed_point(until(geometric, Settled(lambda z: z, 1e-4)), z0, **PICARD)
    expected = steps_until(1e-4)
    assert len(set(expected)) == 3
    assert be.to_numpy(sol.steps).tolist() == expected
    assert be.to_numpy(sol.converged).all()
    assert be.to_numpy(sol.residual).tolist() == [0.0] * 3
    state = 1 - (1 - START) * RATE ** np.array(expected)[:, None]
    assert be.to_numpy(sol.value) == pytest.approx(state, rel=1e-12)


def test_an_answer_settles_with_its_slowest_number(be):
    rate = be.asarray(np.array([[0.2, 0.9]]))  # the change after k steps is rate to the power k
    f = until(lambda z, rate: rate * z + 1.0, Settled(lambda z: z, 0.01))
    assert int(deqcore.fixed_point(f, 0 * rate, rate, **PICARD).steps[0]) == 44


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_a_sample_does_not_feel_its_batch_mates(be, solver):
    rng = np.random.default_rng(0)
    x = be.asarray(rng.standard_normal((4, 6)))
    rule = Settled(lambda z: z[:, :2], 1e-3)

    def solve(x):
        f = until(lambda z, x: 0.9 * be.xp.tanh(z) + x, rule)
        return deqcore.fixed_point(f, 0 * x, x, forward__solver=solver, forward__rtol=1e-10, forward__max_steps=300)

    whole = solve(x)
    halted = be.to_numpy(whole.residual) == 0
    assert halted.any()
    for i in range(4):
        alone = solve(x[i : i + 1])
        assert int(alone.steps[0]) == int(whole.steps[i])
        assert be.to_numpy(alone.value)[0] == pytest.approx(be.to_numpy(whole.value)[i], abs=1e-12)


def test_nan_in_one_sample_halts_no_other(be):
    x = be.asarray(np.array([[1.0, 1.0], [np.nan, 1.0]]))
    f = until(lambda z, x: 0.5 * z + x, Settled(lambda z: z, 1e-3))
    sol = deqcore.fixed_point(f, be.asarray(np.zeros((2, 2))), x, forward__on_failure="ignore", **PICARD)
    assert sol.status.tolist() == [int(deqcore.Status.CONVERGED), int(deqcore.Status.NONFINITE)]
    assert np.isfinite(be.to_numpy(sol.value)).all()


@pytest.mark.parametrize("strategy", ["exact-ift", "phantom"])
def test_the_gradient_is_that_of_f_where_a_sample_halted(be, strategy):
    a = 0.8
    x = be.asarray(np.array([[0.3, -0.2], [1.0, 2.0]]))
    f = until(lambda z, a, x: be.xp.tanh(a * z + x), Settled(lambda z: z, 0.05))
    options = {"rtol": 1e-12} if strategy == "exact-ift" else {"steps": 3, "damping": 1.0}
    settings = {**PICARD, "backward__strategy": strategy, "backward__options": options}
    rate = be.asarray(np.array(a))
    sol = deqcore.fixed_point(f, 0 * x, rate, x, **settings)
    z = be.to_numpy(sol.value)
    assert (be.to_numpy(sol.residual) == 0).all() or strategy == "phantom"
    _, (da, dx) = deqcore.vjp(f, 0 * x, rate, x, cotangent=1 + 0 * x, **settings)
    slope = 1 - np.tanh(a * z + be.to_numpy(x)) ** 2
    u = 1 / (1 - a * slope) if strategy == "exact-ift" else 1 + a * slope + (a * slope) ** 2
    assert be.to_numpy(dx) == pytest.approx(slope * u, rel=1e-9)
    assert float(da) == pytest.approx((z * slope * u).sum(), rel=1e-9)


def test_one_system_halts_as_one(be):
    z0 = be.asarray(np.zeros(3))
    rule = Settled(lambda z: z, 1e-2, batch=False)
    sol = deqcore.fixed_point(until(geometric, rule), z0, forward__batch=False, **PICARD)
    assert sol.steps.tolist() == steps_until(1e-2)[:1]


def test_states_are_trees(be):
    def f(z):
        return {"a": geometric(z["a"]), "b": geometric(z["a"])}

    z0 = {"a": be.asarray(START), "b": be.asarray(START)}
    sol = deqcore.fixed_point(until(f, Settled(lambda z: z["a"], 1e-4)), z0, **PICARD)
    assert be.to_numpy(sol.steps).tolist() == steps_until(1e-4)


@pytest.mark.parametrize(
    ("rule", "given"),
    [
        (lambda z, fz: fz > 0, r"bool \(3, 2\)"),
        (lambda z, fz: fz[:, 0], r"float64 \(3,\)"),
        (lambda z, fz: (fz > 0)[:2, 0], r"bool \(2,\)"),
        (lambda z, fz: True, r"bool\). Reduce"),
    ],
)
def test_a_rule_that_says_something_else_is_told(be, rule, given):
    with pytest.raises(ProblemError, match=f"halting rule must return one bool per sample.*got {given}"):
        deqcore.fixed_point(until(geometric, rule), be.asarray(START), **PICARD)


def test_what_cannot_be_is_refused(be):
    with pytest.raises(ConfigError, match="tolerance must be a number above 0 .got 0.0"):
        Settled(lambda z: z, 0.0)
    with pytest.raises(
        ProblemError, match="must keep the shape|tree like z"
    ):  # errors of f itself are reported as usual
        deqcore.fixed_point(until(lambda z: (z, z), Settled(lambda z: z)), be.asarray(START), **PICARD)
    with pytest.raises(BackendError, match=r"only on backends that differentiate f.*got 'numpy'.*forward\.rtol"):
        deqcore.fixed_point(until(geometric, Settled(lambda z: z)), START, **PICARD)


def test_the_layers_take_a_rule():
    torch, nnx, eqx = (pytest.importorskip(name) for name in ("torch", "flax.nnx", "equinox"))
    import deqcore_jax.equinox
    import deqcore_jax.nnx
    import deqcore_torch.nn
    import jax

    settings = {**PICARD, "forward__rtol": 1e-6}
    rule = Settled(lambda z: z, 1e-3)
    found = {}
    read = torch.nn.Linear(2, 2, bias=False)  # of the model around the layer
    torch.nn.init.eye_(read.weight)
    layer = deqcore_torch.nn.DEQ(lambda z, x: RATE * z + x, **settings)
    x = np.full((3, 2), 1 - RATE, dtype=np.float32)
    z0 = START.astype(np.float32)
    found["torch"] = layer.solve(torch.tensor(x), z0=torch.tensor(z0), until=Settled(read, 7e-4)).steps.tolist()
    assert layer(torch.tensor(x), z0=torch.tensor(z0), until=rule).shape == (3, 2)
    assert not layer.state_dict().keys() - {"_extra_state"}  # the answer's weights are none of the layer's
    for name, kind in {"nnx": deqcore_jax.nnx.DEQ, "equinox": deqcore_jax.equinox.DEQ}.items():
        made = kind(lambda z, x: RATE * z + x, **settings)
        weight = jax.numpy.eye(2)

        @jax.jit
        def steps(weight, x, z0, made=made):
            return made.solve(x, z0=z0, until=Settled(lambda z: z @ weight, 7e-4)).steps

        found[name] = steps(weight, x, z0).tolist()
        assert made(jax.numpy.asarray(x), until=rule).shape == (3, 2)
    assert found == dict.fromkeys(found, steps_until(7e-4))
    assert nnx
    assert eqx


def test_halted_samples_are_no_longer_evaluated_when_a_solve_compacts():
    torch = pytest.importorskip("torch")
    seen = []

    def f(z):
        seen.append(len(z))
        return geometric(z)

    z0 = torch.tensor(np.repeat(START, [1, 3, 4], axis=0))
    rule = Settled(lambda z: z, 1e-4)
    sol = deqcore.fixed_point(until(f, rule), z0, forward__compact=True, **PICARD)
    assert sol.steps.tolist() == np.repeat(steps_until(1e-4), [1, 3, 4]).tolist()
    assert min(seen) == 1


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "newton-krylov"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_rule_does_not_make_a_runaway_sample_converge(be, solver, dtype):
    """z + 1 changes nothing once rounding hides it, so that the answer looks settled; it has no fixed point."""
    for step in (lambda z: z + 1.0, lambda z: z + 1.0 + 0.5 * be.xp.tanh(z)):
        z0 = be.asarray(np.zeros((2, 3)), dtype=dtype)
        f = until(step, Settled(lambda z: z, 1e-3))
        settings = {"forward__solver": solver, "forward__max_steps": 200, "forward__on_failure": "ignore"}
        sol = deqcore.fixed_point(f, z0, **settings)
        assert not (be.to_numpy(sol.status) == int(deqcore.Status.CONVERGED)).any()


@pytest.mark.parametrize("solver", ["anderson", "broyden", "newton-krylov"])
def test_a_rule_obeys_refused_steps(be, solver):
    """z − 3 (√z − ½) = z at ¼. The first step leads to where f is NaN: neither rule may halt a sample there."""
    g = lambda z: z - 3.0 * (be.xp.sqrt(z) - 0.5)
    settings = {"forward__solver": solver, "forward__max_steps": 60, "forward__on_failure": "ignore"}
    broken = lambda z, fz: ~be.xp.all(be.xp.isfinite(fz), axis=1)  # done where f is not finite
    for rule, atol in ((Settled(lambda z: z, 1e-2), 1e-2), (broken, 1e-5)):
        sol = deqcore.fixed_point(until(g, rule), be.asarray(np.full((2, 3), 4.0)), forward__rtol=1e-6, **settings)
        assert be.to_numpy(sol.status).tolist() == [int(deqcore.Status.CONVERGED)] * 2
        np.testing.assert_allclose(be.to_numpy(sol.value), 0.25, atol=atol)

"""`forward.batch = 2`: the first two axes are units, each with its own solve, which f may couple within a sample."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConfigError, CoupledRowsWarning, InitialIterateError, ProblemError
from deqcore.halting import Settled, until
from deqcore.testing.suite.fixtures import Kit, tokens
from deqcore.types import Status

pytestmark = pytest.mark.usefixtures("no_settings", "no_plugins")
PICARD = {"forward__batch": 2, "forward__solver": "picard", "forward__rtol": 1e-6, "forward__max_steps": 100}


@pytest.fixture(params=["numpy", "torch"])  # JAX compiles each of these: one test below has it all in one program
def be(request):
    pytest.importorskip(request.param)
    return deqcore.get_backend(backend=request.param)


@pytest.fixture
def problem(be):
    """f(z, b) whose unit i reads units up to i, its data, and the kit that made them."""
    kit, made = Kit(be), tokens()
    b = kit.array(made.b)
    return kit, made, kit.token_map(made), 0 * b, b


def test_figures_have_the_shape_of_units(problem):
    kit, _, f, z0, b = problem
    sol = deqcore.fixed_point(f, z0, b, forward__batch=2)
    for name in ("residual", "status", "steps", "evaluations", "converged"):
        assert tuple(getattr(sol, name).shape) == (2, 4), name
    assert sol.value.shape == z0.shape
    assert sol.summary().startswith("8 of 8 units CONVERGED")
    again = deqcore.fixed_point(f, z0, b, state=sol.state, forward__batch=2)
    assert (kit.numpy(again.steps) == kit.numpy(sol.steps)).all()  # nothing was left to do


def test_a_unit_that_had_converged_runs_again_when_another_one_moves_it(be):
    """Unit 1 is at rest until unit 0, which needs longer, reaches the part of f that moves it."""
    kit = Kit(be)
    xp = be.xp

    def f(z):
        first, second = z[:, :1], z[:, 1:]
        moved = xp.where(first > 0.9, first - 0.9, 0 * first)
        return xp.concat([0.5 * first + 0.5, 0.25 * second + moved], axis=1)

    sol = deqcore.fixed_point(f, kit.array(np.zeros((1, 2, 1))), **PICARD)
    value, steps = kit.numpy(sol.value)[0, :, 0], kit.numpy(sol.steps)[0]
    assert kit.numpy(sol.converged).all()
    assert abs(value - [1.0, 0.1 / 0.75]).max() < 1e-5  # the second unit was at 0, where it had converged at once
    assert 0 < steps[1] < steps[0]


def test_masked_units_never_run_and_never_count(problem):
    kit, made, f, z0, b = problem
    mask = np.array([[True, True, False, False], [True, True, True, True]])
    sol = deqcore.fixed_point(f, z0 + 1.5, b, mask=mask, **PICARD)
    steps, value = kit.numpy(sol.steps), kit.numpy(sol.value)
    assert (steps[~mask] == 0).all()
    assert (steps[mask] > 0).all()
    assert (kit.numpy(sol.evaluations)[~mask] == 0).all()
    assert (value[~mask] == 1.5).all()
    assert sol.summary().startswith("6 of 6 units CONVERGED")
    alone = deqcore.fixed_point(
        kit.token_map(type(made)(made.m[:2, :2], made.w, made.b[:, :2])), z0[:, :2], b[:, :2], **PICARD
    )
    assert abs(value[0, :2] - kit.numpy(alone.value)[0]).max() < 1e-5
    _, (db,) = deqcore.vjp(f, z0, b, cotangent=0 * b + 1.0, mask=mask, **PICARD)
    assert (kit.numpy(db)[~mask] == 0).all()
    idle = deqcore.fixed_point(f, z0 + 1.5, b, mask=np.zeros((2, 4), bool), **PICARD)
    assert (kit.numpy(idle.value) == 1.5).all()
    assert idle.summary() == "The mask leaves no units to solve."


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("looped", {"depth": 3, "noise": 0.1, "start_noise": 0.1, "seed": 0}), ("reversible", {"steps": 3})],
)
def test_masked_units_stay_out_of_a_loop(problem, strategy, options):
    kit, _, f, z0, b = problem
    mask = np.array([[True, True, False, False], [True, True, True, True]])
    sol = deqcore.fixed_point(
        f, z0 + 1.5, b, mask=mask, forward__batch=2, backward__strategy=strategy, backward__options=options
    )
    assert (kit.numpy(sol.steps) == 3 * mask).all()
    assert (kit.numpy(sol.value)[~mask] == 1.5).all()
    assert (kit.numpy(sol.value)[mask] != 1.5).all()


def test_samples_are_checked_for_coupling_and_units_are_not(problem):
    kit, _, f, z0, b = problem
    g = kit.array(np.random.default_rng(1).standard_normal(b.shape))

    def caught(fn):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            deqcore.vjp(fn, z0, b, cotangent=g, forward__batch=2)
        return [str(each.message) for each in found if each.category is CoupledRowsWarning]

    assert not caught(f)
    assert "row 0" in " ".join(caught(lambda z, b: 0.5 * kit.backend.xp.roll(z, 1, axis=0) + b))


def test_units_declared_uncoupled_are_solved_alone_backward_too(be):
    kit = Kit(be)
    b = kit.array(np.random.default_rng(0).standard_normal((2, 3, 2)))
    own = {"forward__batch": 2, "forward__coupled": False, "forward__solver": "broyden"}
    z, (db,) = deqcore.vjp(lambda z, b: 0.5 * z + b, 0 * b, b, cotangent=b, **own)
    assert abs(kit.numpy(z) - 2 * kit.numpy(b)).max() < 1e-3
    assert abs(kit.numpy(db) - 2 * kit.numpy(b)).max() < 1e-3


def test_a_sample_in_which_f_overflows_leaves_the_others_alone(problem):
    kit, _, f, z0, b = problem
    xp = kit.backend.xp
    cut = kit.array(np.array([1.0, np.inf]).reshape(2, 1, 1))
    bad = lambda z, b: xp.where(xp.abs(z) > cut, float("nan") + 0 * z, f(z, b) * 3.0)
    sol = deqcore.fixed_point(bad, z0, b, forward__on_failure="ignore", **PICARD)
    good = deqcore.fixed_point(lambda z, b: f(z, b) * 3.0, z0, b, forward__on_failure="ignore", **PICARD)
    assert np.isfinite(kit.numpy(sol.value)).all()
    assert (kit.numpy(sol.status)[0] == int(Status.NONFINITE)).any()
    assert (kit.numpy(sol.value)[1] == kit.numpy(good.value)[1]).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"z0": np.zeros((3, 4))}, InitialIterateError, r"two axes of units.*\(3, 4\).*forward.batch = true"),
        ({"z0": [np.zeros((2, 3, 1)), np.zeros((2, 4, 1))]}, InitialIterateError, "first two axes of every leaf"),
        ({"forward__compact": True}, ConfigError, "f needs all units of a sample"),
        ({"forward__solver": "newton-krylov"}, ConfigError, "forward.coupled = false"),
        ({"forward__batch": 3}, ConfigError, "true, false or 2"),
        ({"mask": np.ones((2, 3))}, ConfigError, r"shape \(2, 4\).*got the shape \(2, 3\)"),
        ({"mask": np.ones(1), "forward__batch": False}, ConfigError, "one system"),
    ],
)
def test_what_cannot_be_solved_says_why(change, error, words):
    given = {"z0": np.zeros((2, 4, 3)), "forward__batch": 2, **change}
    z0 = given.pop("z0")
    with pytest.raises(error, match=words):
        deqcore.fixed_point(lambda z: z, z0, **given)


def test_the_setting_can_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("DEQCORE_FORWARD__BATCH", "2")
    assert deqcore.fixed_point(lambda z: 0.5 * z, np.ones((2, 3, 1))).steps.shape == (2, 3)


def test_the_check_names_the_position_that_breaks_causality(be):
    kit = Kit(be)
    xp, check = be.xp, deqcore.diagnostics.check_causality
    z = kit.array(np.random.default_rng(0).standard_normal((2, 5, 3)))
    one = kit.array(np.eye(5)[3].reshape(1, 5, 1))

    def peeks(z, x):  # position 2 reads position 3
        return 0.5 * z + 0.1 * xp.roll(one, -1, axis=1) * xp.roll(z, -1, axis=1) + x

    leak = check(peeks, z, z)
    assert (leak.position, leak.source, leak.argument) == (2, 3, "z")
    assert "Position 2 of f(z)" in str(leak)
    assert check(lambda z, x: 0.5 * z + x, z, z, unit_args=(0,)) is None
    leak = check(lambda z, x: 0.5 * z + xp.roll(x, -1, axis=1), z, z, unit_args=(0,))
    assert (leak.position, leak.source, leak.argument) == (0, 1, 0)


def test_the_check_refuses_what_it_cannot_check():
    rng, z = np.random.default_rng(0), np.ones((1, 3, 2))
    with pytest.raises(ProblemError, match="other values for the same arguments"):
        deqcore.diagnostics.check_causality(lambda z: z + rng.standard_normal(z.shape), z)
    with pytest.raises(ConfigError, match="unit_args"):
        deqcore.diagnostics.check_causality(lambda z: z, z, unit_args=(0,))
    with pytest.raises(ConfigError, match="first two axes"):
        deqcore.diagnostics.check_causality(lambda z, x: z, z, np.ones((2, 3, 1)), unit_args=(0,))


def test_complex_units_are_masked_and_checked_like_real_ones(be):
    """Both looked for floating-point dtypes alone: the mask was ignored, and no leak was found."""
    z0 = be.asarray(np.zeros((1, 3, 2), complex))
    sol = deqcore.fixed_point(lambda z: 0.5j * z + 1.0, z0, mask=np.array([[True, False, True]]), **PICARD)
    value = be.to_numpy(sol.value)
    assert (value[:, 1] == 0).all()
    assert abs(value[:, [0, 2]] - 1.0 / (1.0 - 0.5j)).max() < 1e-5
    assert be.to_numpy(sol.steps)[0, 1] == 0
    leak = deqcore.diagnostics.check_causality(lambda z: 0.5 * be.xp.roll(z, -1, axis=1), z0 + 1.0)
    assert (leak.position, leak.source) == (0, 1)


def test_torch_layers_take_units():
    torch = pytest.importorskip("torch")
    from deqcore_torch.nn import DEQ

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.mix = torch.nn.Linear(3, 3)

        def forward(self, z, x):
            return torch.tanh(0.3 * self.mix(torch.cumsum(z, 1)) + x)

    x = torch.randn(2, 4, 3)
    layer = DEQ(Cell(), forward__batch=2, forward__rtol=1e-5)
    sol = layer.solve(x)
    sol.value.sum().backward()
    assert sol.steps.shape == (2, 4)
    assert sol.backward.status.shape == (2, 4)
    assert bool(sol.backward.per_sample.all())
    assert "share one set of coefficients" in repr(sol.backward)
    mask = torch.tensor([[True, True, False, False]] * 2)
    assert layer.solve(x, mask=mask).steps[:, 2:].sum() == 0
    halted = layer.solve(x, until=Settled(lambda z: z, 0.05, batch=2))
    assert int(halted.steps.sum()) < int(sol.steps.sum())


def test_an_exported_program_refuses_units():
    torch = pytest.importorskip("torch")
    from deqcore_torch import exported

    from deqcore.errors import BackendError

    with pytest.raises(BackendError, match="forward.batch = true before the export"):
        exported.numbers(None, {"forward__batch": 2}, torch.float32)


def test_jax_takes_units_inside_jit_with_a_tap_of_their_shape(quick_compiles):
    jax = pytest.importorskip("jax")
    import deqcore_jax.adjoint_tap as taps

    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((2, 3, 2)), jax.numpy.float32)

    @jax.jit
    def run(x, tap):
        def loss(x, tap):
            with taps.reporting(tap):
                sol = deqcore.fixed_point(
                    lambda z, x: 0.4 * jax.numpy.cumsum(z, 1) / 3 + x, 0 * x, x, forward__solver="picard",
                    forward__batch=2, mask=jax.numpy.arange(3) < 2 + jax.numpy.zeros((2, 1), int),
                )  # fmt: skip
            return sol.value.sum(), sol.steps

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, tap)

    (_, steps), (dx, figures) = run(x, taps.new((2, 3)))
    report = taps.read(figures)
    assert report.status.shape == steps.shape == (2, 3)
    assert bool(report.per_sample.all())
    assert int(steps[:, 2].sum()) == 0
    assert float(abs(dx[:, 2]).max()) == 0.0


def test_halting_needs_one_bool_per_unit():
    torch = pytest.importorskip("torch")
    z0 = torch.zeros(2, 3, 2, dtype=torch.float64)
    rule = lambda z, fz: fz.amin(-1) > torch.tensor([[0.3, 0.9, 0.9]])
    sol = deqcore.fixed_point(until(lambda z: 0.5 * z + 0.5, rule), z0, **PICARD)
    assert sol.steps[0].tolist() == [0, 3, 3]  # 0.5 is enough for the first unit
    with pytest.raises(ProblemError, match="one bool per sample"):
        deqcore.fixed_point(until(lambda z: 0.5 * z + 0.5, lambda z, fz: fz > 0.5), z0, **PICARD)


def test_an_audit_compares_samples_of_coupled_units():
    kit, made = Kit(deqcore.get_backend(backend="numpy")), tokens()
    f, g = kit.token_map(made), np.random.default_rng(3).standard_normal(made.b.shape)
    found = deqcore.diagnostics.gradient_audit(
        f, 0 * made.b, made.b, cotangent=g, forward__batch=2, backward__strategy="jacobian-free"
    )
    u = made.adjoint(g).reshape(2, -1)
    assert found.coupling == 0
    assert found.error == pytest.approx(
        np.linalg.norm(g.reshape(2, -1) - u, axis=1) / np.linalg.norm(u, axis=1), rel=1e-5
    )


def test_the_monitor_leaves_masked_units_out():
    with deqcore.monitor.Monitor(sinks=[]) as monitor:
        mask = np.array([[True, False, False, False]])
        z0 = np.array([[[0.0], [9.0], [9.0], [9.0]]])
        sol = deqcore.fixed_point(lambda z: 0.5 * z + 0.5, z0, mask=mask, **PICARD)
        monitor.flush()
    assert monitor.rows[-1].values["deq_forward_steps"] == float(sol.steps[0, 0])


def test_each_unit_halts_by_itself():
    torch = pytest.importorskip("torch")
    rate = torch.tensor([[0.15, 0.5, 0.9], [0.5, 0.9, 0.2]], dtype=torch.float64)[..., None]
    f = until(lambda z, rate: rate * z + 1.0, Settled(lambda z: z, 1e-3, batch=2))
    z0 = torch.zeros_like(rate)
    picard = {"forward__solver": "picard", "forward__rtol": 1e-9, "forward__max_steps": 100}
    sol = deqcore.fixed_point(f, z0, rate, forward__batch=2, **picard)
    expected = np.ceil(np.log(1e-3) / np.log(rate[..., 0].numpy()))  # the change after k steps is rate to the power k
    assert len(np.unique(sol.steps.numpy())) == len(np.unique(expected)) == 4
    np.testing.assert_array_equal(sol.steps.numpy(), expected)

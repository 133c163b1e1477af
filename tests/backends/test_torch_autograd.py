"""What PyTorch's users do around a fixed point: mixed precision, copies, modes, several passes, and mistakes."""

from __future__ import annotations

import copy
import pickle
import weakref

import numpy as np
import pytest

import deqcore
from deqcore.errors import BackendError, ConvergenceWarning, NonDeterministicWarning, ProblemError
from deqcore.types import Status

torch = pytest.importorskip("torch")

from deqcore_torch.nn import DEQ  # noqa: E402 (after importorskip)

N = 6
TIGHT = {"forward__rtol": 1e-12, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}
EXACT = {"backward__strategy": "exact-ift"}
STRATEGIES = ["exact-ift", "broyden-reuse", "jacobian-free", "neumann", "phantom", "unrolled"]


@pytest.fixture
def module():
    torch.manual_seed(0)
    made = torch.nn.Linear(N, N)
    made.weight.data *= 0.5
    return made


@pytest.fixture
def x():
    return torch.randn(3, N, generator=torch.Generator().manual_seed(1))


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# -- f that changes after the call ------------------------------------------------------------------------------------


class Switching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * torch.eye(N))
        self.gain = torch.ones(())

    def forward(self, z, x):
        return torch.tanh(z @ self.weight + self.gain * x * (1.0 if self.training else 0.2))


CHECKPOINTS = {
    "unrolled": lambda f, z0, x, kept: (
        deqcore.fixed_point(
            f, z0, x, backward__strategy="unrolled", backward__options={"steps": 4, "checkpoint": kept}
        ).value
    ),
    "layer": lambda f, z0, x, kept: DEQ(f, checkpoint=kept)(x, z0=z0),
}


@pytest.mark.parametrize("change", [lambda f: setattr(f, "gain", torch.tensor(3.0)), lambda f: f.eval()])
@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_a_checkpoint_refuses_an_f_that_has_changed_since_the_call(x, how, scale, change):
    """PyTorch's own checkpoint differentiates the changed f without a warning (here 2 to 5 times off)."""
    module, x = Switching().train(), x.requires_grad_()
    f = lambda z, x: scale * module(z / scale, x)
    values = [CHECKPOINTS[how](f, torch.zeros_like(x), x, kept) / scale for kept in (False, True, True)]
    expected, found = (torch.autograd.grad(value.sum(), x)[0] for value in values[:2])
    assert relative(found, expected) < 1e-6
    change(module)
    with pytest.raises(ProblemError, match="A checkpoint evaluates f again"):
        values[2].sum().backward()


@pytest.mark.parametrize("turn", [1.0, 1j])
def test_a_checkpoint_compares_complex_values_with_their_phase(turn):
    """f multiplies by a number of modulus 1, so that a change of it turns the value and keeps its size."""
    x = torch.full((2, 3), 0.5 + 0.25j, requires_grad=True)
    kept = [torch.tensor(1.0 + 0j)]
    layer = DEQ(lambda z, x: 0.5 * kept[0] * (0.4 * z + x), checkpoint=True, backward__strategy="exact-ift")
    value = layer(x)
    kept[0] = torch.tensor(turn + 0j)
    if turn == 1.0:
        value.abs().square().sum().backward()
        assert torch.allclose(x.grad, 2 * value.detach() * 0.625, rtol=1e-4)  # value = x / 1.6
        return
    with pytest.raises(ProblemError, match="A checkpoint evaluates f again"):
        value.abs().square().sum().backward()


# -- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse", "jacobian-free", "neumann"])
def test_one_evaluation_beyond_the_solvers_serves_vjps_and_parameters(module, x, strategy):
    calls = []

    def f(z):
        calls.append(torch.is_grad_enabled())
        return torch.tanh(module(z) + x)

    solution = deqcore.fixed_point(f, torch.zeros_like(x), backward__strategy=strategy)
    assert len(calls) == int(solution.evaluations.max()) + 1
    assert calls == [False] * (len(calls) - 1) + [True]
    solution.value.sum().backward()
    assert len(calls) == int(solution.evaluations.max()) + 1
    assert int(solution.backward.vjps.max()) == {"jacobian-free": 0, "neumann": 5}.get(
        strategy, int(solution.backward.vjps.max())
    )


def test_checkpointing_keeps_fewer_tensors_for_the_same_gradient(module, x):
    found, kept = [], []
    for checkpoint in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            value = deqcore.fixed_point(
                lambda z: torch.tanh(torch.tanh(module(z)) + x),
                torch.zeros_like(x),
                forward__solver="picard",
                backward__strategy="unrolled",
                backward__options={"steps": 10, "checkpoint": checkpoint},
            ).value
        kept.append(sum(saved))
        found.append(torch.autograd.grad(value.sum(), module.weight)[0])
    assert torch.equal(*found)
    assert kept[1] < kept[0] / 2


# -- mixed precision and modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast_gives_gradients_near_those_of_float32(module, x, dtype, strategy):
    def gradient():
        module.zero_grad()
        options = {"steps": 12} if strategy in ("phantom", "unrolled") else {}
        solution = deqcore.fixed_point(
            lambda z, x: torch.tanh(module(z) + x),
            torch.zeros_like(x),
            x,
            forward__solver="broyden",
            backward__strategy=strategy,
            backward__options=options,
        )
        (solution.value**2).sum().backward()
        return solution, module.weight.grad.clone()

    _, expected = gradient()
    with torch.autocast("cpu", dtype=dtype):
        solution, found = gradient()
    assert solution.value.dtype is torch.float32
    assert found.dtype is torch.float32
    assert relative(found, expected) < (0.15 if strategy == "broyden-reuse" else 0.06)
    if strategy != "unrolled":
        assert bool(solution.converged.all())  # to what the narrow dtype can reach


@pytest.mark.parametrize("solver", ["broyden", "anderson"])
def test_autocast_does_not_reach_the_solvers_own_products(solver):
    """f takes no part in autocast here (no matrix product), so that nothing may change."""
    x = torch.linspace(-1, 1, 40).reshape(2, 20)
    settings = {"forward__solver": solver, "forward__rtol": 1e-6}
    solve = lambda: deqcore.fixed_point(lambda z: torch.tanh(0.8 * z.roll(1, 1)) + x, torch.zeros_like(x), **settings)
    plain = solve()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = solve()
    assert torch.equal(plain.value, cast.value)
    assert torch.equal(plain.steps, cast.steps)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_recording_the_value_is_the_same_and_nothing_is_kept(module, x, mode):
    f = lambda z: torch.tanh(module(z) + x)
    recorded = deqcore.fixed_point(f, torch.zeros_like(x))
    with mode():
        plain = deqcore.fixed_point(f, torch.zeros_like(x))
        inside = deqcore.fixed_point(f, torch.zeros_like(x).clone(), forward__solver="anderson")
    assert torch.equal(recorded.value, plain.value)
    assert not plain.value.requires_grad
    assert plain.backward is None
    assert bool(inside.converged.all())


def test_training_flags_do_not_matter_to_gradients(module, x):
    found = []
    for flag in (True, False):
        module.train(flag)
        value = deqcore.fixed_point(lambda z: torch.tanh(module(z) + x), torch.zeros_like(x)).value
        found.append(torch.autograd.grad(value.sum(), module.weight)[0])
    assert torch.equal(*found)


# -- objects --------------------------------------------------------------------------------------------------------


def test_solutions_and_states_are_copied_and_pickled(module, x):
    f = lambda z: torch.tanh(module(z) + x)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, torch.zeros_like(x), forward__rtol=1e-2)
    straight = deqcore.fixed_point(f, torch.zeros_like(x), state=solution.state, forward__rtol=1e-6)
    for twin in (copy.deepcopy(solution), pickle.loads(pickle.dumps(solution))):
        assert torch.equal(twin.value, solution.value)
        assert twin.summary() == solution.summary()
        resumed = deqcore.fixed_point(f, torch.zeros_like(x), state=twin.state, forward__rtol=1e-6)
        assert torch.equal(resumed.value, straight.value)


def test_a_state_made_while_recording_is_copied_and_pickled(module, x):
    solution = deqcore.fixed_point(lambda z: torch.tanh(module(z) + x), torch.zeros_like(x))
    for twin in (copy.deepcopy(solution.state), pickle.loads(pickle.dumps(solution.state))):
        assert torch.equal(twin.carry.z, solution.state.carry.z)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.usefixtures("collect_new")  # which nothing calls here
def test_nothing_outlives_its_last_reference(strategy, order):
    """A solve and its backward pass are freed without the garbage collector, since they form no reference cycle."""
    if order == 2 and strategy != "exact-ift":
        pytest.skip("refused")
    a = torch.full((2, 2), 0.2, dtype=torch.float64, requires_grad=True)
    marked = torch.zeros(3, 2, dtype=torch.float64)
    f = lambda z, a: torch.tanh(z @ a + marked[:] + 1)  # noqa: F821 (it is deleted below)
    solution = deqcore.fixed_point(f, torch.zeros(3, 2, dtype=torch.float64), a, backward__strategy=strategy)
    found = []
    if order:
        found = torch.autograd.grad((solution.value**2).sum(), a, create_graph=order == 2)
    if order == 2:
        torch.autograd.grad(found[0].sum(), a)
    references = [weakref.ref(marked), weakref.ref(f), weakref.ref(solution)]
    del marked, f, solution, found
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_object_that_keeps_its_own_equilibrium_is_freed(strategy, order, collect_new):
    """The graph refers to no f: a cycle through it is one that the garbage collector cannot see."""
    if order == 2 and strategy != "exact-ift":
        pytest.skip("refused")

    class Trainer:
        def __init__(self):
            self.linear = torch.nn.Linear(4, 4)
            self.linear.weight.data *= 0.3
            self.x = torch.ones(2, 4, requires_grad=True)
            self.layer = DEQ(self.step, backward__strategy=strategy)

        def step(self, z, x):
            return torch.tanh(self.linear(z) + x)

        def run(self):
            self.z = deqcore.fixed_point(self.step, torch.zeros(2, 4), self.x, backward__strategy=strategy).value
            self.loss = (self.layer(self.x) ** 2).sum() + (self.z**2).sum()
            if order:
                (self.g,) = torch.autograd.grad(self.loss, self.x, retain_graph=True, create_graph=order == 2)
            if order == 2:
                (self.g**2).sum().backward(retain_graph=True)

    trainer = Trainer()
    trainer.run()
    references = [weakref.ref(trainer), weakref.ref(trainer.linear)]
    del trainer
    collect_new()
    assert [reference() for reference in references] == [None] * 2


class Counted(torch.nn.Module):
    """A cell that counts its evaluations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(N, N, dtype=torch.float64)
        self.linear.weight.data *= 0.8
        self.calls = 0
        self.linear.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("solves", [1, 2])
def test_a_checkpoint_around_layers_solves_once_more_and_not_for_each_vjp(strategy, solves):
    def gradients(wrap):
        cell = Counted()
        layer = DEQ(cell, backward__strategy=strategy, forward__rtol=1e-8, forward__on_failure="ignore")
        x = torch.ones(3, N, dtype=torch.float64, requires_grad=True)

        def through(x):
            for _ in range(solves):
                x = layer(x)
            return x

        y = wrap(through, x)
        forward = cell.calls
        found = []
        for kept in (True, False):  # two backward passes through one graph
            before = cell.calls
            found.append(torch.autograd.grad((y**2).sum(), [x, *layer.parameters()], retain_graph=kept))
            counts.append((forward, cell.calls - before))
        return [g for each in found for g in each]

    counts = []
    plain = gradients(lambda f, x: f(x))
    assert [backward for _, backward in counts] == [0, 0]
    counts.clear()
    kept = gradients(lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False))
    assert all(backward <= forward for forward, backward in counts)
    for found, expected in zip(kept, plain, strict=True):
        assert torch.equal(found, expected)


def test_second_derivatives_through_a_checkpoint():
    cell = Counted()
    tight = {"forward__rtol": 1e-12, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}
    layer, x = DEQ(cell, **tight), torch.ones(3, N, dtype=torch.float64, requires_grad=True)

    def second(y):
        (g,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return torch.autograd.grad((g**3).sum(), [x, *layer.parameters()])

    kept = second(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
    for found, expected in zip(kept, second(layer(x)), strict=True):
        assert torch.allclose(found, expected, rtol=1e-12)


def test_saved_tensors_that_hooks_keep_elsewhere_are_brought_back_once(module, x):
    """Once for the pass, though the route makes a pass of its own for each vjp."""
    back = []

    def unpack(t):
        back.append(1)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
        solution = deqcore.fixed_point(
            lambda z, x: torch.tanh(module(z) + x), torch.zeros_like(x), x.requires_grad_(), **EXACT
        )
    before = len(back)
    solution.value.sum().backward()
    assert int(solution.backward.vjps.max()) > 3
    assert len(back) - before < 12


# -- passes ---------------------------------------------------------------------------------------------------------


def test_two_forwards_before_one_backward_and_a_report_each(module, x):
    def solve(sign, strategy):
        f = lambda z: torch.tanh(module(z) + sign * x)
        return deqcore.fixed_point(f, torch.zeros_like(x), backward__strategy=strategy)

    first, second = solve(1, "exact-ift"), solve(-1, "neumann")
    (first.value.sum() + second.value.sum()).backward()
    together = module.weight.grad.clone()
    module.zero_grad()
    for sign, strategy in ((1, "exact-ift"), (-1, "neumann")):
        solve(sign, strategy).value.sum().backward()
    assert torch.allclose(module.weight.grad, together, rtol=1e-4, atol=1e-5)
    assert second.backward.vjps.tolist() == [5] * 3
    assert first.backward.vjps.tolist() != [5] * 3


@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse", "jacobian-free"])
def test_backward_twice_with_the_graph_kept_and_an_error_without(module, x, strategy):
    value = deqcore.fixed_point(
        lambda z: torch.tanh(module(z) + x), torch.zeros_like(x), backward__strategy=strategy
    ).value.sum()
    value.backward(retain_graph=True)
    once = module.weight.grad.clone()
    value.backward()
    assert torch.equal(module.weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_the_state_and_cotangents_of_intermediate_tensors(module, x):
    """z0 gets no gradient, an intermediate tensor does, and hooks on it fire once."""
    z0 = torch.zeros_like(x).requires_grad_()
    middle = (2 * x.requires_grad_()).clone()
    fired = []
    middle.register_hook(fired.append)
    value = deqcore.fixed_point(lambda z, m: torch.tanh(module(z) + m), z0, middle).value
    value.sum().backward()
    assert z0.grad is None
    assert len(fired) == 1
    assert torch.equal(x.grad, 2 * fired[0])


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse"])
def test_bad_cotangents_stay_in_their_sample(module, x, strategy):
    value = deqcore.fixed_point(lambda z, x: torch.tanh(module(z) + x), torch.zeros_like(x), x.requires_grad_()).value
    solution = deqcore.fixed_point(
        lambda z, x: torch.tanh(module(z) + x), torch.zeros_like(x), x, backward__strategy=strategy
    )
    g = torch.ones_like(x)
    g[0, 0], g[1] = float("nan"), 0.0
    (found,) = torch.autograd.grad(solution.value, x, g)
    alone = torch.autograd.grad(value, x, torch.ones_like(x))[0][2]
    assert solution.backward.status.tolist() == [Status.NONFINITE, Status.CONVERGED, Status.CONVERGED]
    assert bool(found[0].isnan().any())
    assert not bool(found[1].any())
    assert relative(found[2], alone) < 0.1


def test_a_singular_equation_is_reported_per_sample():
    """Sample 0 has I − J singular at its solution; its mate is unharmed."""
    a = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    x = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    solution = deqcore.fixed_point(lambda z, x: a * z + x, torch.zeros_like(a), x, **TIGHT)
    with pytest.warns(ConvergenceWarning, match="1 of 2 samples.*STALLED.*regularize the Jacobian"):
        solution.value.sum().backward()
    assert solution.backward.status.tolist() == [Status.STALLED, Status.CONVERGED]
    assert solution.backward.residual.tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    assert x.grad[1].item() == pytest.approx(2.0)
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["state", "tree", "inference", "unrolled"])
def test_f_that_writes_to_its_state_is_refused(x, kind):
    if kind == "tree":
        f = lambda z: {"a": z["a"].mul_(0.5) + 1, "b": 0.5 * z["b"]}
        with pytest.raises(ProblemError, match="in place"):
            deqcore.fixed_point(f, {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)})
        return
    f = lambda z: z.mul_(0.5).add_(x)
    strategy = "unrolled" if kind == "unrolled" else "exact-ift"
    with pytest.raises(ProblemError, match="in place"), torch.inference_mode(kind == "inference"):
        deqcore.fixed_point(f, torch.zeros_like(x), backward__strategy=strategy)


def test_f_may_write_to_a_copy_of_its_state(x):
    solution = deqcore.fixed_point(lambda z: z.clone().mul_(0.5).add_(x), torch.zeros_like(x), forward__rtol=1e-6)
    assert torch.allclose(solution.value, 2 * x, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::deqcore.errors.ConvergenceWarning")
@pytest.mark.parametrize("recording", [True, False])
def test_dropout_is_found_out_and_explained(module, x, recording):
    cell = torch.nn.Sequential(module, torch.nn.Dropout(0.5))
    solve = lambda: deqcore.fixed_point(lambda z: torch.tanh(cell(z) + x), torch.zeros_like(x))
    with torch.set_grad_enabled(recording):
        with pytest.warns(NonDeterministicWarning, match=r"eval\(\)"):
            solve()
        cell.eval()
        assert bool(solve().converged.all())  # and no warning, which would be an error here


def test_noise_that_the_tolerance_swallows_is_found_out_by_the_recorded_evaluation(x):
    x.requires_grad_()
    f = lambda z: 0.5 * z + x + 3e-3 * torch.randn_like(x)
    settings = {"forward__rtol": 0.1, "forward__solver": "picard"}
    with pytest.warns(NonDeterministicWarning, match="differ by up to 0.00"):
        deqcore.fixed_point(f, torch.zeros_like(x), backward__strategy="jacobian-free", **settings)
    with pytest.warns(NonDeterministicWarning):
        deqcore.vjp(lambda z, x: f(z) + 0 * x, torch.zeros_like(x), x, cotangent=x.detach(), **settings)


@pytest.mark.filterwarnings("ignore::deqcore.errors.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::deqcore.errors.DerivativeWarning")  # of Newton's products by differences
def test_numpy_finds_out_too():
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 4))
    noisy = lambda z, x: 0.3 * z * (random.random(z.shape) > 0.5) + x
    with pytest.warns(NonDeterministicWarning):
        deqcore.fixed_point(noisy, 0 * x, x)

    def writes(z, x):
        z *= 0.5
        z += x
        return z

    with pytest.raises(ProblemError, match="in place"):
        deqcore.fixed_point(writes, 0 * x, x)
    z0 = 0 * x
    deqcore.fixed_point(lambda z, x: 0.5 * z + x, z0, x)
    z0 += 1.0  # the caller's array may be written to again


def test_a_deterministic_f_under_autocast_is_no_false_alarm(module, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        deqcore.fixed_point(lambda z: torch.tanh(module(z) + x), torch.zeros_like(x))


# -- tracers ---------------------------------------------------------------------------------------------------------


def _made_fx(layer, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    make_fx(layer)(x)


def _fake(layer, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        deqcore.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3))


def _jit(layer, x):
    torch.jit.trace(layer, (x,))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", [_made_fx, _fake, _jit])
def test_tracers_that_see_no_values_are_refused(trace):
    layer = DEQ(lambda z, x: torch.tanh(0.3 * z + x))
    with pytest.raises(BackendError, match="Export the cell alone"):
        trace(layer, torch.ones(2, 3))

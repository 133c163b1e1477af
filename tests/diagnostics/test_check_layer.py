"""`check_layer` on layers of PyTorch written by hand: right ones, and each with one fault that it must name."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.diagnostics import Claims, LayerUnderTest, check_layer
from deqcore.errors import ConfigError, InitialIterateError, ProblemError

torch = pytest.importorskip("torch")
nn = torch.nn

BATCH, SIZE = 3, 4


class Hand(nn.Module):
    """z = tanh(W z + x) by plain iteration; the gradient by a hook that solves u = g + Jᵀu, as in lecture notes."""

    steps = 80

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(SIZE, SIZE, generator=generator, dtype=dtype)
        self.weight = nn.Parameter(0.3 * weight)

    def cell(self, z, x):
        return torch.tanh(z @ self.weight.T + x)

    def iterate(self, x, z):
        with torch.no_grad():
            for _ in range(self.steps):
                z = self.cell(z, x)
        return z

    def forward(self, x, z0=None):
        z = self.cell(self.iterate(x, torch.zeros_like(x) if z0 is None else z0), x)
        if not z.requires_grad:
            return z
        z1 = z.detach().requires_grad_()
        f1 = self.cell(z1, x)
        z.register_hook(lambda g: self.adjoint(f1, z1, g))
        return z

    def adjoint(self, f1, z1, g):
        u = g
        for _ in range(80):
            u = g + torch.autograd.grad(f1, z1, u, retain_graph=True)[0]
        return u


class WrongSign(Hand):
    def adjoint(self, f1, z1, g):
        u = g
        for _ in range(80):
            u = g - torch.autograd.grad(f1, z1, u, retain_graph=True)[0]
        return u


class Flipped(Hand):
    def adjoint(self, f1, z1, g):
        return -super().adjoint(f1, z1, g)


class Truncated(Hand):
    def adjoint(self, f1, z1, g):
        return g


class ThreeTerms(Hand):
    def adjoint(self, f1, z1, g):
        u = g + torch.autograd.grad(f1, z1, g, retain_graph=True)[0]
        return g + torch.autograd.grad(f1, z1, u, retain_graph=True)[0]


class Transposed(Hand):
    def adjoint(self, f1, z1, g):
        rows = torch.autograd.functional.jacobian(lambda z: self.cell(z, self.x).sum(0), z1)
        eye = torch.eye(SIZE, dtype=g.dtype)
        return torch.linalg.solve(eye - rows.transpose(0, 1), g[..., None])[..., 0]

    def forward(self, x, z0=None):
        self.x = x.detach()
        return super().forward(x, z0)


class Detached(Hand):
    def forward(self, x, z0=None):
        return super().forward(x, z0).detach()


class Raising(Hand):
    def adjoint(self, f1, z1, g):
        raise RuntimeError("the adjoint solve diverged")


class Early(Hand):
    steps = 2


class WithBatchNorm(Hand):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(SIZE, affine=False, dtype=torch.float64)

    def cell(self, z, x):
        return self.norm(torch.tanh(z @ self.weight.T + x)) * 0.05


class Joint(Hand):
    """Steps along a damped direction whose length depends on the whole batch, and stops too early for it to vanish."""

    def iterate(self, x, z):
        with torch.no_grad():
            for _ in range(4):
                step = self.cell(z, x) - z
                z = z + step / (1 + step.norm())
        return z


class Random(Hand):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def cell(self, z, x):
        return torch.tanh(self.drop(z) @ self.weight.T + x)


class Twins(nn.Module):
    """z = tanh(3 z): three equilibria."""

    def cell(self, z, x):
        return torch.tanh(3 * z) + 0 * x

    def forward(self, x, z0=None):
        z = torch.full_like(x, 0.5) if z0 is None else z0
        for _ in range(60):
            z = self.cell(z, x)
        return z


class Rude(Hand):
    def forward(self, x, z0=None):
        print("solving")
        torch.manual_seed(3)
        torch.set_default_dtype(torch.float64)
        x.add_(0.0).mul_(1.5)
        return super().forward(x / 1.5, z0)


class Sequence(Hand):
    """Positions (batch, length, size), where each reads the one before it."""

    reach = -1

    def cell(self, z, x):
        other = torch.roll(z, -self.reach, dims=1)
        mask = torch.ones(z.shape[1], dtype=z.dtype)
        mask[0 if self.reach < 0 else -1] = 0
        return torch.tanh(other @ self.weight.T * mask[:, None] + x)


class Future(Sequence):
    reach = 1


class Half(Hand):
    """Overflows in float32."""

    def cell(self, z, x):
        return super().cell(z, x) + (0 * z if z.dtype == torch.float64 else 1e-3 * z.sign())


class HalfDetached(Hand):
    """The gradient reaches the weight, but not the input."""

    def forward(self, x, z0=None):
        return super().forward(x.detach(), z0)


class Unrecorded(Hand):
    """Its cell records nothing, so that a gradient of zero agrees with the cell's own."""

    @torch.no_grad()
    def cell(self, z, x):
        return super().cell(z, x)

    def forward(self, x, z0=None):
        return self.iterate(x, torch.zeros_like(x))


class Frozen(Hand):
    """Its cell is detached from z, so that its J is 0 and one step looks exact."""

    def cell(self, z, x):
        return super().cell(z.detach(), x)

    def forward(self, x, z0=None):
        return self.cell(self.iterate(x, torch.zeros_like(x)), x)


class ByNumPy(Hand):
    def cell(self, z, x):
        return torch.as_tensor(np.tanh(z.numpy() @ self.weight.detach().numpy().T + x.detach().numpy()))


def inputs(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def checked(layer, *, cell="cell", x=None, **more):
    x = inputs(BATCH, SIZE) if x is None else x
    return check_layer(LayerUnderTest(layer, cell, (x,), **more))


def test_a_right_layer_fails_nothing():
    report = checked(Hand(), start="z0", z0=torch.ones(BATCH, SIZE, dtype=torch.float64))
    assert report.ok, report.as_dict()
    statuses = {finding.check: finding.status for finding in report.findings}
    assert statuses["equilibrium"] == statuses["gradient"] == statuses["start"] == statuses["batch mates"] == "ok"
    assert report.finding("dtype float32").status == "ok"
    assert report.finding("side effects").status == "ok"
    assert report.finding("gradient").figures["error"] < 1e-6


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (WrongSign, "(I + Jᵀ)u = g"),
        (Flipped, "opposite sign"),
        (Truncated, "one-step"),
        (ThreeTerms, "3 steps"),
        (Transposed, "(I − J)u = g"),
        (Detached, "it is zero"),
        (Raising, "the adjoint solve diverged"),
        (HalfDetached, "none reaches inputs[0]"),
        (Unrecorded, "autodiff gives 0 times"),
        (Frozen, "autodiff gives 0 times"),
    ],
)
def test_a_wrong_gradient_is_named(layer, words):
    report = checked(layer())
    assert [finding.check for finding in report.failures()] == ["gradient"]
    finding = report.finding("gradient")
    assert words in finding.found
    assert finding.remedy


def test_large_states_are_judged_by_gmres_as_small_ones_are_densely():
    class Wide(Hand):
        wide = 260

        def cell(self, z, x):
            part = torch.tanh(z[:, :SIZE] @ self.weight.T + x[:, :SIZE])
            return torch.cat([part, 0.5 * torch.sin(z[:, SIZE:]) + x[:, SIZE:]], 1)

    class WideOneStep(Wide):
        def adjoint(self, f1, z1, g):
            return g

    x = inputs(BATCH, Wide.wide)
    assert checked(Wide(), x=x).finding("gradient").figures["error"] < 1e-6
    assert "one-step" in checked(WideOneStep(), x=x).finding("gradient").found


def test_an_approximate_gradient_that_is_claimed_is_none_to_complain_about():
    assert checked(Truncated(), claims=Claims(gradient="approximate")).ok
    assert not checked(Flipped(), claims=Claims(gradient="approximate")).ok
    assert checked(Detached(), claims=Claims(gradient="none")).finding("gradient").status == "skipped"


def test_a_layer_that_stops_early_is_no_equilibrium():
    layer, x = Early(), inputs(BATCH, SIZE)
    finding = checked(layer, x=x).finding("equilibrium")
    z = layer(x).detach()
    fz = layer.cell(z, x).detach()
    ratio = ((fz - z).norm(dim=1) / fz.norm(dim=1)).max()
    assert finding.status == "failed"
    assert finding.figures["residual"] == pytest.approx(float(ratio))


def test_batch_normalisation_couples_the_samples_and_its_gradient_is_judged_as_one_system():
    layer = WithBatchNorm()
    before = layer.norm.running_mean.clone()
    report = checked(layer)
    assert [finding.check for finding in report.failures()] == ["batch mates"]
    assert "in the cell, sample" in report.finding("batch mates").found
    assert report.finding("side effects").found.startswith("a call changes norm.running_mean")
    assert torch.equal(layer.norm.running_mean, before)
    assert checked(WithBatchNorm().eval()).finding("batch mates").status == "ok"


def test_a_solver_that_couples_the_samples_is_told_apart_from_the_cell():
    finding = checked(Joint(), claims=Claims(rtol=1.0)).finding("batch mates")
    assert "in the cell" not in finding.found
    layer, x = Joint(), inputs(BATCH, SIZE)
    alone = torch.stack([layer(x[:1].expand(BATCH, -1))[0], layer(x)[0]]).detach()
    assert (alone[0] - alone[1]).norm() > 1e-4  # it does depend on them
    assert finding.figures["distance"] > 1e-4


def test_a_layer_that_draws_random_numbers_is_told_and_not_compared():
    report = checked(Random())
    finding = report.finding("repeatable")
    assert finding.status == "failed"
    assert "eval" in finding.remedy
    assert {finding.status for finding in report.findings[3:]} == {"skipped"}
    assert checked(Random().eval()).finding("repeatable").status == "ok"


def test_a_random_start_leaves_what_can_be_measured():
    class Restless(Hand):
        steps = 10

        def forward(self, x, z0=None):
            return super().forward(x, torch.randn_like(x))

    report = checked(Restless(), claims=Claims(rtol=0.5))
    assert report.finding("repeatable").status == "failed"
    assert report.finding("equilibrium").status == "ok"
    assert report.finding("gradient").status == "skipped"


def test_several_equilibria_show_in_another_start():
    claims = Claims(gradient="none")
    assert checked(Twins(), start="z0", claims=claims).finding("start").status == "failed"
    assert checked(Twins(), claims=claims).finding("start").status == "note"
    assert checked(Hand()).finding("start").status == "ok"


def test_side_effects_are_told_and_undone(capsys):
    x = inputs(BATCH, SIZE)
    torch.manual_seed(11)
    np.random.seed(11)
    kept = torch.get_rng_state()
    finding = checked(Rude(), x=x.clone()).finding("side effects")
    assert finding.status == "failed"
    assert all(words in finding.found for words in ("overwritten", "default dtype", "random state", "solving"))
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), kept)
    assert capsys.readouterr().out == ""


def test_causality_names_the_position_that_breaks_it():
    x = inputs(2, 5, SIZE)
    claims = Claims(causal=1)
    assert checked(Sequence(), x=x, claims=claims).finding("causal").status == "ok"
    finding = checked(Future(), x=x, claims=claims).finding("causal")
    assert finding.status == "failed"
    assert finding.figures["read"] == finding.figures["reader"] + 1
    with pytest.raises(ConfigError, match="causal"):
        checked(Hand(), claims=Claims(causal=2))


def test_a_dtype_in_which_the_answer_differs():
    finding = checked(Half()).finding("dtype float32")
    assert finding.status == "failed"
    assert (
        checked(Hand(torch.float32), x=inputs(BATCH, SIZE, dtype=torch.float32)).finding("dtype float64").status == "ok"
    )


class Elsewhere(Hand):
    """Right on each device, but on one that is not the first it answers for another input."""

    shift = 0.0

    def cell(self, z, x):
        return super().cell(z, x + self.shift)


def test_complex_layers_are_compared_in_the_other_precision():
    x = inputs(BATCH, SIZE, dtype=torch.complex128)
    finding = checked(Hand(torch.complex128), x=0.3 * x).finding("dtype float32")
    assert finding.status == "ok", finding
    narrow = checked(Hand(torch.complex64), x=0.3 * x.to(torch.complex64)).finding("dtype float64")
    assert narrow.status == "ok", narrow


class Turned(Hand):
    """The adjoint equation with J instead of its conjugate."""

    def adjoint(self, f1, z1, g):
        return super().adjoint(f1, z1, g.conj()).conj()


@pytest.mark.parametrize(("made", "status"), [(Hand, "ok"), (Turned, "failed")])
def test_the_gradient_of_a_complex_layer_is_compared_with_its_imaginary_part(made, status):
    layer = made(torch.complex128)
    report = checked(layer, x=0.3 * inputs(BATCH, SIZE, dtype=torch.complex128))
    assert report.finding("gradient").status == status, report.finding("gradient")


@pytest.mark.parametrize(("shift", "status"), [(0.0, "ok"), (0.1, "failed")])
def test_another_device_is_compared(monkeypatch, shift, status):
    """A second device in name only: what is moved there stays on the host, and the layer notes that it was moved."""
    harness = type(deqcore.get_backend(backend="torch").harness)
    convert = harness.converted

    def converted(self, module, *, dtype=None, device=None):
        made = convert(self, module, dtype=dtype)
        made.shift = shift if device == "other" else 0.0
        return made

    monkeypatch.setattr(harness, "devices", lambda self: ("cpu", "other"))
    monkeypatch.setattr(harness, "converted", converted)
    monkeypatch.setattr(type(deqcore.get_backend(backend="torch")), "to_device", lambda self, x, device: x.clone())
    finding = checked(Elsewhere()).finding("device other")
    assert finding.status == status, finding


def test_a_nan_ends_the_check():
    report = checked(Hand(), x=torch.full((BATCH, SIZE), torch.nan, dtype=torch.float64))
    assert [finding.check for finding in report.findings] == ["finite"]
    assert not report.ok


class Model(nn.Module):
    """A whole model around the layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, SIZE, dtype=torch.float64)
        self.deq = Hand()
        self.head = nn.Linear(SIZE, 1, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.deq(self.first(x), z0=None))


def test_a_part_of_a_model_is_checked_with_the_inputs_that_it_gets():
    model = Model()
    calls = Hand.__dict__.get("__call__")
    report = checked(model, x=inputs(BATCH, 2), inner="deq", start="z0")
    assert report.ok, report.as_dict()
    assert report.name == "Hand"
    assert Hand.__dict__.get("__call__") is calls


def test_the_cell_and_the_state_may_be_given_in_several_ways():
    layer = Hand()
    names = {"cell": layer.cell, "state": lambda out: out}
    assert checked(layer, **names).ok
    assert checked(layer, cell=lambda owner, z, x: owner.cell(z, x)).ok

    class Tuple(Hand):
        def forward(self, x, z0=None):
            return {"z": [super().forward(x, z0)]}, 3

    assert checked(Tuple(), state="0.z.0").ok
    with pytest.raises(ConfigError, match="a dict has no part 'y'. Its parts: z"):
        checked(Tuple(), state="0.y")
    with pytest.raises(ProblemError, match="Name the state in it with `state`"):
        checked(Tuple())


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"cell": "cel"}, ConfigError, "Did you mean 'cell'"),
        ({"cell": "weight"}, ConfigError, "cell must be"),
        ({"cell": 3}, ConfigError, "cell must be"),
        ({"cell": nn.Linear(SIZE, SIZE)}, ConfigError, "part of the layer"),
        ({"cell": lambda owner, z: z}, ProblemError, "The cell raised TypeError"),
        ({"cell": lambda owner, z, x: z[:, :2]}, ProblemError, "keep the shape of z"),
        ({"state": "hidden"}, ConfigError, "no part 'hidden'"),
        ({"state": lambda out: out.shape}, InitialIterateError, "state must be a tree"),
        ({"x": torch.ones(BATCH, 2, dtype=torch.float64)}, ProblemError, "The layer raised RuntimeError"),
        ({"inner": "nothing"}, ConfigError, "no part 'nothing'"),
        ({"x": "text"}, ConfigError, "inputs must hold at least one array"),
        ({"x": torch.ones(0, SIZE, dtype=torch.float64)}, InitialIterateError, "at least one sample"),
        ({"start": "z1"}, ConfigError, "no argument 'z1'. Did you mean 'z0'"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(more, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        checked(Hand(), **more)


def test_a_cell_that_cannot_be_differentiated_is_an_error():
    layer = ByNumPy()
    layer.forward = lambda x: layer.iterate(x, torch.zeros_like(x))
    with pytest.raises(ProblemError, match="cannot be differentiated"):
        checked(layer)


def test_a_name_that_is_found_in_a_part_is_suggested():
    with pytest.raises(ConfigError, match=r"Did you mean 'deq.cell'\? Its parts: deq, first, forward, head, training"):
        checked(Model(), x=inputs(BATCH, 2))

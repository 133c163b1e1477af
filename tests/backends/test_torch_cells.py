"""Parts of cells: a mask per solve, and a cell that always has one fixed point."""

from contextlib import nullcontext

import numpy as np
import pytest

from deqcore.errors import ConfigError, ProblemError

torch = pytest.importorskip("torch")
from deqcore_torch.cells import MonotoneCell, VariationalDropout, begin_solve  # noqa: E402
from deqcore_torch.nn import DEQ  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.nn.utils.parametrizations import spectral_norm, weight_norm  # noqa: E402


class Dropped(torch.nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.drop = VariationalDropout(p)

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.drop(z)) + x


def test_one_mask_serves_a_solve_and_the_next_gets_another():
    torch.manual_seed(0)
    layer = DEQ(Dropped(), forward__rtol=1e-6)
    x = torch.rand(4, 64, requires_grad=True)
    first = layer.solve(x)
    mask = layer.cell.drop.mask
    assert first.converged.all()
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    z = first.value
    assert torch.allclose(z, 0.5 * torch.tanh(z * mask) + x, atol=1e-5)
    z.sum().backward()
    slope = 0.5 * (1 - torch.tanh(z * mask) ** 2) * mask  # the same mask in the gradient
    assert torch.allclose(x.grad, 1 / (1 - slope), rtol=1e-3)
    assert not torch.equal(layer(x), z)


def test_a_mask_keeps_the_mean_and_may_be_shared():
    torch.manual_seed(0)
    drop = VariationalDropout(0.25, shared=(1,))
    y = drop(torch.ones(400, 3, 50))
    assert torch.equal(y[:, 0], y[:, 2])
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)


def test_outside_training_nothing_is_dropped():
    drop = VariationalDropout(0.5).eval()
    x = torch.rand(3, 2)
    assert drop(x) is x
    assert VariationalDropout(0.0)(x) is x


def test_a_mask_of_another_shape_is_refused():
    drop = VariationalDropout()
    drop(torch.ones(3, 2))
    with pytest.raises(ProblemError, match="begin_solve"):
        drop(torch.ones(4, 2))
    begin_solve(drop)
    assert drop(torch.ones(4, 2)).shape == (4, 2)


def test_bad_options_are_refused():
    with pytest.raises(ConfigError, match="below 1"):
        VariationalDropout(1.0)
    with pytest.raises(ConfigError, match="other than the batch"):
        VariationalDropout(0.5, shared=(0,))
    with pytest.raises(ConfigError, match="above 0"):
        MonotoneCell(2, 3, margin=0.0)


def test_a_mask_is_on_the_device_of_its_input():
    drop = VariationalDropout(0.5, shared=(1,))
    assert drop(torch.ones(3, 2, device="meta")).device.type == drop.mask.device.type == "meta"


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_cell_has_one_mask_per_solve_too():
    torch.manual_seed(0)
    torch._dynamo.reset()
    cell = Dropped()
    layer = DEQ(torch.compile(cell, backend="aot_eager"), forward__rtol=1e-6)
    x = torch.rand(4, 64, requires_grad=True)
    masks = []
    for _ in range(2):
        x.grad = None
        z = layer(x)
        z.sum().backward()
        masks.append(cell.drop.mask)
        assert torch.allclose(z, 0.5 * torch.tanh(z * masks[-1]) + x, atol=1e-5)
        slope = 0.5 * (1 - torch.tanh(z * masks[-1]) ** 2) * masks[-1]
        assert torch.allclose(x.grad, 1 / (1 - slope), rtol=1e-3)
    assert not torch.equal(*masks)


class Scaled(torch.nn.Module):
    """A normalised linear map inside a contraction."""

    def __init__(self, normalised):
        super().__init__()
        self.linear = normalised(torch.nn.Linear(6, 6, dtype=torch.float64))

    def forward(self, z, x):
        return torch.tanh(0.7 * self.linear(z) + x)


TIGHT = {"forward__rtol": 1e-11, "backward__options": {"rtol": 1e-10}}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("normalised", [weight_norm, spectral_norm])
def test_normalised_weights_have_the_gradients_of_an_unrolled_cell(normalised, cached, recwarn):
    torch.manual_seed(0)
    layer = DEQ(Scaled(normalised), **TIGHT)
    x = torch.randn(4, 6, dtype=torch.float64)
    with parametrize.cached() if cached else nullcontext():
        z = layer(x)
    z.square().sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    assert not recwarn.list  # in training mode too
    layer.zero_grad()
    z = torch.zeros_like(x)
    layer.eval()  # the power iteration's vectors are those of the solve
    for _ in range(200):
        z = layer.cell(z, x)
    z.square().sum().backward()
    for name, p in layer.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-7, atol=1e-9), name
        assert p.grad.norm() > 0, name


def test_the_power_iteration_goes_on_from_solve_to_solve_in_training_only():
    torch.manual_seed(0)
    layer = DEQ(Scaled(spectral_norm), forward__rtol=1e-6)
    with torch.no_grad():
        layer.cell.linear.parametrizations.weight.original.copy_(torch.randn(6, 6))  # the estimate is far off
    x = torch.randn(2, 6, dtype=torch.float64)

    def norm():
        with torch.no_grad():
            return float(torch.linalg.matrix_norm(layer.eval().cell.linear.weight, 2))

    layer(x)
    for _ in range(200):
        layer.train()(x)
    assert norm() == pytest.approx(1.0, abs=1e-6)
    before = layer.cell.linear.parametrizations.weight[0]._u.clone()
    layer.eval()(x)
    assert torch.equal(layer.cell.linear.parametrizations.weight[0]._u, before)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_monotone_cell_finds_the_one_solution_whatever_its_weights(scale):
    torch.manual_seed(1)
    cell = MonotoneCell(3, 6, margin=0.5).double()
    with torch.no_grad():
        cell.a.mul_(scale**0.5), cell.b.mul_(scale**0.5)
    x = torch.randn(2, 3, dtype=torch.float64)
    plain = {"forward__solver": "picard", "forward__max_steps": 200_000, "forward__rtol": 1e-9}
    z = DEQ(cell, **plain)(x).detach().numpy()
    w = cell.apply_w(torch.eye(6, dtype=torch.float64)).T.detach().numpy()
    assert np.linalg.eigvalsh(np.eye(6) - (w + w.T) / 2).min() >= 0.5 - 1e-9
    for i in range(2):
        drive = cell.inject(x[i]).detach().numpy()
        residual = z[i] - np.maximum(w @ z[i] + drive, 0)
        assert np.abs(residual).max() < 1e-5


def test_the_step_follows_the_weights():
    cell = MonotoneCell(2, 4)
    before = cell.step_size()
    with torch.no_grad():
        cell.a.mul_(2)
    assert cell.step_size() < before
    eye = torch.eye(4)
    norm = torch.linalg.matrix_norm(eye - cell.apply_w(eye).T.detach(), ord=2).item()
    assert cell.step_size() == pytest.approx(0.1 / norm**2)


def test_gradients_of_a_monotone_cell_have_their_closed_form():
    torch.manual_seed(2)
    cell = MonotoneCell(3, 6, margin=0.5).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    layer = DEQ(cell, forward__rtol=1e-12, forward__max_steps=300, backward__options={"rtol": 1e-12})
    z = layer(x)
    (bias,) = torch.autograd.grad(z.sum(), cell.inject.bias)
    on = (cell(z, x) > 0).double()[0].detach()  # z = D (W z + drive) with D the units that are on
    w = cell.apply_w(torch.eye(6, dtype=torch.float64)).T.detach()
    expected = torch.linalg.solve((torch.eye(6) - on[:, None] * w).T, torch.ones(6, dtype=torch.float64)) * on
    assert torch.allclose(bias, expected, atol=1e-8)

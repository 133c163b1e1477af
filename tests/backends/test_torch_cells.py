"""Parts of cells: a mask per solve, and a cell that always has one fixed point."""

import numpy as np
import pytest

from deqcore.errors import ConfigError, ProblemError

torch = pytest.importorskip("torch")
from deqcore_torch.cells import MonotoneCell, VariationalDropout, begin_solve  # noqa: E402
from deqcore_torch.nn import DEQ  # noqa: E402


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
    on = (z > 0).double()[0].detach()  # z = D (W z + drive) with D the units that are on
    w = cell.apply_w(torch.eye(6, dtype=torch.float64)).T.detach()
    expected = torch.linalg.solve((torch.eye(6) - on[:, None] * w).T, torch.ones(6, dtype=torch.float64)) * on
    assert torch.allclose(bias, expected, atol=1e-8)

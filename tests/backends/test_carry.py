"""The carry of a torch layer, and a halting head with its losses."""

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConfigError, LayerWarning
from deqcore.halting import Learnt, halting_distribution, halting_loss, ponder_loss, until

torch = pytest.importorskip("torch")
nn = pytest.importorskip("deqcore_torch.nn")


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def layer(reuse="carry"):
    torch.manual_seed(0)
    return nn.DEQ(Cell(), reuse=reuse, backward__strategy="looped", backward__options={"depth": 3, "recorded": 2})


X = torch.linspace(-1, 1, 12).reshape(4, 3)


def test_a_carry_continues_where_the_last_step_ended_and_has_no_gradient():
    deep, carried = layer(None), layer()
    carried(X)
    second = carried(X)
    z = deep(X, z0=deep(X).detach())
    assert torch.equal(second, z)
    second.sum().backward()
    z.sum().backward()
    assert torch.equal(carried.cell.linear.weight.grad, deep.cell.linear.weight.grad)


def test_no_gradient_reaches_the_segment_before():
    carried = layer()
    first, second = X.clone().requires_grad_(), X.clone().requires_grad_()
    every_step = {"backward__options": {"depth": 2, "recorded": 2}}  # so few that z0 would get a gradient
    carried.solve(first, **every_step)
    carried.solve(second, **every_step).value.sum().backward()
    assert second.grad.abs().sum() > 0
    assert first.grad is None, "the gradient has reached the segment before"


def test_a_checkpoint_has_the_carry(tmp_path):
    first, second = layer(), layer()
    first(X)
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(first(X), second(X))
    assert "carry.0" not in layer().state_dict()
    fresh = layer()
    fresh.load_state_dict(layer().state_dict())  # one without a carry
    assert torch.equal(fresh(X), layer()(X))


def test_a_layer_without_a_carry_drops_that_of_a_checkpoint():
    first = layer()
    first(X)
    other = layer(None)
    with pytest.warns(LayerWarning, match="reuse"):
        other.load_state_dict(first.state_dict())
    assert torch.equal(other(X), layer(None)(X))


def test_samples_that_are_reset_start_cold_also_after_a_checkpoint():
    carried, loaded = layer(), layer()
    carried(X)
    mask = torch.tensor([True, False, False, True])
    carried.reset(mask)
    loaded.load_state_dict(carried.state_dict())
    cold, warm = layer()(X), layer()
    warm(X)
    expected = torch.where(mask[:, None], cold, warm(X))
    assert torch.equal(carried(X), expected)
    assert torch.equal(loaded(X), expected)
    assert torch.equal(carried(X), loaded(X))  # the mask holds once


def test_a_reset_that_cannot_be_is_refused():
    carried = layer()
    carried(X)
    for samples in (torch.tensor([True]), torch.zeros(4)):
        with pytest.raises(ConfigError, match=r"samples must be bools of the shape \(4,\)"):
            carried.reset(samples)
    with pytest.raises(ConfigError, match="reuse must be None, 'batch', 'sequence' or 'carry'"):
        layer("steps")


def test_a_learnt_head_halts_each_sample(be):
    if be.name == "numpy":
        pytest.skip("halting needs a backend that differentiates f")
    z0 = be.asarray(np.array([[0.0], [0.8]]))
    for threshold in (0.5, 0.9):
        level = 0.9 + np.log(threshold / (1 - threshold)) / 50  # where the head reaches the threshold
        halts = lambda s, level=level: next(k for k in range(99) if 1 - (1 - s) * 0.5 ** (k + 1) >= level)
        rule = Learnt(lambda z: 50 * (z - 0.9), threshold)
        sol = deqcore.fixed_point(until(lambda z: 0.5 * z + 0.5, rule), z0, forward__solver="picard")
        assert sol.steps.tolist() == [halts(0.0), halts(0.8)]


def test_the_halting_distribution_and_its_losses(be):
    rng = np.random.default_rng(0)
    logits, losses = rng.standard_normal((3, 5)), rng.random((3, 5))
    chance = 1 / (1 + np.exp(-logits))
    p = np.array([chance[0], (1 - chance[0]) * chance[1], (1 - chance[0]) * (1 - chance[1])])
    prior = np.array([0.3, 0.7 * 0.3, 0.7**2])[:, None]
    arrays, costs = [be.asarray(a) for a in logits], [be.asarray(a) for a in losses]
    np.testing.assert_allclose([be.to_numpy(a) for a in halting_distribution(arrays)], p, rtol=1e-12)
    right = (p * losses).sum(0) + 0.2 * (p * np.log(p / prior)).sum(0)
    np.testing.assert_allclose(be.to_numpy(ponder_loss(arrays, costs, prior=0.3, weight=0.2)), right, rtol=1e-12)
    correct = be.asarray(np.array([True, False, True, True, False]))
    target = np.array([1, 0, 1, 1, 0])
    right = -(target * np.log(chance[0]) + (1 - target) * np.log(1 - chance[0]))
    np.testing.assert_allclose(be.to_numpy(halting_loss(arrays[0], correct)), right, rtol=1e-12)


def test_the_loss_of_a_sure_head_is_finite_with_a_finite_gradient():
    logits = [torch.tensor([200.0, -200.0], requires_grad=True) for _ in range(3)]
    loss = ponder_loss(logits, [torch.ones(2)] * 3).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(part.grad).all() for part in logits[:-1])


def test_training_with_the_loss_learns_when_to_halt():
    """Easy samples are right after one step, hard ones after three: the head learns to tell them apart."""
    head = torch.nn.Linear(1, 1)
    hard = torch.tensor([[0.0], [1.0]]).repeat(8, 1)
    losses = [torch.where(hard[:, 0] > 0, torch.tensor(2.0 if n < 2 else 0.0), torch.tensor(0.3 * n)) for n in range(3)]
    optimizer = torch.optim.Adam(head.parameters(), 0.1)
    for _ in range(150):
        logits = [head(hard)[:, 0]] * 3
        loss = ponder_loss(logits, losses, weight=0.001).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert Learnt(head)(hard, hard).tolist() == (hard[:, 0] == 0).tolist()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Learnt(lambda z: z, 1.0), "threshold must be a number above 0 and below 1"),
        (lambda: ponder_loss([np.zeros(1)], []), "as many losses as logits"),
        (lambda: ponder_loss([np.zeros(1)], [np.zeros(1)], prior=1.0), "prior"),
        (lambda: halting_distribution([]), "at least one step"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()

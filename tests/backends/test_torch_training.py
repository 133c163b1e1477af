"""What a training step puts around a layer: scaled losses, sums of gradients, activation checkpointing, DTensors."""

import copy

import pytest

import deqcore
from deqcore.errors import InitialIterateError

torch = pytest.importorskip("torch")
from deqcore_torch.nn import DEQ  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

N = 6


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(N, N)
        torch.nn.init.normal_(self.linear.weight, std=0.4 / N**0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


EXACT = {"backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-6}}
REUSE = {
    "backward__strategy": "broyden-reuse",
    "backward__options": {"max_relative_error": 1e-5, "max_refine_vjps": 60},
}


@pytest.fixture(params=[EXACT, REUSE], ids=["exact-ift", "broyden-reuse"])
def layer(request):
    torch.manual_seed(0)
    return DEQ(Cell(), forward__rtol=1e-6, forward__max_steps=100, **request.param)


@pytest.fixture
def x():
    return torch.randn(4, N, generator=torch.Generator().manual_seed(1))


def gradient(layer, x, run=lambda layer, x: layer(x)):
    layer.zero_grad()
    run(layer, x).square().sum().backward()
    return layer.cell.linear.weight.grad.clone()


def test_a_scaled_loss_gives_the_step_of_an_unscaled_one(layer, x):
    twin = copy.deepcopy(layer)
    plain = torch.optim.SGD(twin.parameters(), 0.1)
    gradient(twin, x)
    plain.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler.scale(layer(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    # A power of two changes no bit of a product, so only thresholds for rounding could differ.
    torch.testing.assert_close(layer.cell.linear.weight, twin.cell.linear.weight, rtol=1e-5, atol=1e-6)


def test_a_scale_that_overflows_skips_the_step_and_falls(layer, x):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    before = layer.cell.linear.weight.detach().clone()
    scaler.scale(layer(x).square().sum() * 3e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.cell.linear.weight, before)
    assert scaler.get_scale() < 2.0**10


def test_gradients_of_parts_add_up_to_those_of_the_batch(layer, x):
    whole = gradient(layer, x)
    layer.zero_grad()
    for part in x.split([1, 3]):
        layer(part).square().sum().backward()
    assert (layer.cell.linear.weight.grad - whole).norm() < 2e-5 * whole.norm()


def test_checkpointing_around_a_layer_solves_again_for_the_same_gradient(layer, x):
    x = x.requires_grad_()
    again = gradient(layer, x, lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    torch.testing.assert_close(again, gradient(layer, x), rtol=0, atol=0)


def test_a_state_split_by_torch_is_refused_in_words():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this build of torch has no distributed package")
    from torch.distributed.tensor import Replicate, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        state = distribute_tensor(torch.zeros(2, N), mesh, [Replicate()])
        with pytest.raises(InitialIterateError, match=r"DTensor.*full_tensor\(\)"):
            deqcore.fixed_point(lambda z: 0.5 * z + 1, state)
    finally:
        distributed.destroy_process_group()

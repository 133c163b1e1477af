"""The memory and the evaluations that docs/scale.md promises, counted at small size."""

from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")
from deqcore_torch.nn import DEQ  # noqa: E402

BATCH, WIDTH = 5, 16
STATE = BATCH * WIDTH * 4


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.init.normal_(self.linear.weight, std=0.5 / WIDTH**0.5)
        self.evaluations = 0

    def forward(self, z, x):
        self.evaluations += 1
        return torch.tanh(self.linear(z) + x)


@contextmanager
def saved():
    """Bytes that the tape holds inside the block, parameters left out, each storage once."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.grad_fn is not parameter_view(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(size for _, size in kept.values())


def parameter_view(tensor):
    """The history of a transposed weight, which shares its storage; another object for everything else."""
    shared = isinstance(tensor._base, torch.nn.Parameter)
    return tensor.grad_fn if shared else object()


def solve(steps, **settings):
    torch.manual_seed(0)
    layer = DEQ(Cell(), forward__rtol=0.0, forward__max_steps=steps, forward__on_failure="ignore", **settings)
    return layer, layer.solve(torch.randn(BATCH, WIDTH))


def explicit(layers):
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(BATCH, WIDTH)
    z = torch.zeros_like(x)
    for _ in range(layers):
        z = cell(z, x)
    return z


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_what_is_saved_does_not_grow_with_the_steps(solver):
    sizes = []
    for steps in (2, 16):
        with saved() as count:
            solve(steps, forward__solver=solver, backward__strategy="exact-ift")
        sizes.append(count())
    assert sizes[0] == sizes[1]
    with saved() as count:
        explicit(1)
    assert sizes[0] <= count() + 2 * STATE  # A + 2 b n s


def test_an_explicit_network_saves_a_cell_for_each_layer():
    sizes = []
    for layers in (2, 16):
        with saved() as count:
            explicit(layers)
        sizes.append(count())
    assert sizes[1] - sizes[0] == 14 * STATE  # of this cell, tanh's output, which is the next one's input


def test_a_step_takes_the_evaluations_of_the_model():
    layer, solution = solve(6, forward__solver="picard", backward__strategy="neumann", backward__options={"terms": 4})
    # f at z0, one a step, and the recorded one, which serves all vjps.
    assert layer.cell.evaluations == 1 + 6 + 1
    solution.value.sum().backward()
    assert layer.cell.evaluations == 8
    assert solution.backward.vjps.max() == 4

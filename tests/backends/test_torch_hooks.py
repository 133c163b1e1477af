"""Hooks of modules in f run once in a backward pass, with the true adjoint; and what a checkpointed cell evaluates.

The truth for u is a dense solve with the closed form of the Jacobian of tanh(W z + x).
"""

import threading
import weakref

import pytest

import deqcore

torch = pytest.importorskip("torch")
from deqcore_torch.backend import TorchBackend  # noqa: E402
from deqcore_torch.nn import DEQ  # noqa: E402

IMPLICIT = ["exact-ift", "broyden-reuse", "neumann", "jacobian-free"]
ROWS, WIDTH = 3, 6


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.linear = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        self.linear.weight.data = 0.3 * torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
        self.evaluations = 0

    def forward(self, z, x):
        self.evaluations += 1
        return torch.tanh(self.linear(z) + x)


class Counts(dict):
    """Counts of calls by kind of hook."""

    def hook(self, kind, result=None):
        self[kind] = 0

        def count(*_):
            self[kind] += 1
            return result

        return count


@pytest.fixture
def x():
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()


def layer(strategy="exact-ift", cell=None, **settings):
    return DEQ(cell or Cell(), forward__rtol=1e-10, backward__strategy=strategy, **settings)


def hooked(module):
    counts = Counts()
    module.register_forward_hook(counts.hook("forward"))
    module.register_full_backward_pre_hook(counts.hook("before"))
    module.register_full_backward_hook(counts.hook("after"))
    return counts


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # jacobian-free records no path to z
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("strategy", IMPLICIT)
def test_backward_hooks_run_once_and_forward_hooks_with_each_evaluation(strategy, checkpoint, x):
    deq = layer(strategy, checkpoint=checkpoint)
    inner, whole = hooked(deq.cell.linear), hooked(deq.cell)
    sol = deq.solve(x)
    assert whole["forward"] == deq.cell.evaluations == int(sol.evaluations.max()) + 1
    sol.value.sum().backward()
    assert deq.cell.evaluations == int(sol.evaluations.max()) + 1 + checkpoint
    assert inner == {"forward": deq.cell.evaluations, "before": 1, "after": 1}
    assert whole == inner | {"forward": whole["forward"]}  # a checkpoint stops at the last tensor that it needs


@pytest.mark.parametrize(("strategy", "steps"), [("phantom", 5), ("unrolled", 10)])
def test_step_strategies_run_backward_hooks_once_a_step(strategy, steps, x):
    deq = layer(strategy, backward__options={"steps": steps})
    counts = hooked(deq.cell)
    deq(x).sum().backward()
    assert counts["before"] == counts["after"] == steps


def test_the_hook_sees_the_true_adjoint(x):
    deq, seen = layer(backward__options={"rtol": 1e-12}), []
    deq.cell.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].clone()))
    z = deq(x)
    g = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(7))
    z.backward(g)
    slope = 1 - z.detach() ** 2
    jacobian = slope[:, :, None] * deq.cell.linear.weight.detach()
    u = torch.linalg.solve((torch.eye(WIDTH, dtype=z.dtype) - jacobian).mT, g)
    torch.testing.assert_close(seen[0], u, rtol=1e-8, atol=0)
    torch.testing.assert_close(x.grad, slope * u, rtol=1e-8, atol=0)


def test_a_hook_that_changes_gradients_changes_the_last_pass_only(x):
    plain, halved = layer(), layer()
    halved.cell.register_full_backward_pre_hook(lambda module, outputs: (0.5 * outputs[0],))
    for each in (plain, halved):
        each(x).sum().backward()
    torch.testing.assert_close(halved.cell.linear.weight.grad, 0.5 * plain.cell.linear.weight.grad)


def test_hooks_of_modules_that_a_function_closes_over(x):
    cells = [Cell()]
    counts = hooked(cells[0].linear)

    def f(z, x):
        return cells[0](z, x)

    z = deqcore.fixed_point(f, torch.zeros_like(x), x, backward__strategy="exact-ift").value
    z.sum().backward()
    assert counts["before"] == counts["after"] == 1


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
def test_deprecated_backward_hooks_run_once(x):
    deq, counts = layer(), Counts()
    deq.cell.linear.register_backward_hook(counts.hook("old"))
    deq(x).sum().backward()
    assert counts == {"old": 1}


def test_hooks_for_all_modules_run_once_for_each(x):
    deq, counts = layer(), Counts()
    handle = torch.nn.modules.module.register_module_full_backward_hook(counts.hook("all"))
    try:
        deq(x).sum().backward()
    finally:
        handle.remove()
    assert counts["all"] == 2 + 1  # the cell and its linear map, and the layer itself


def test_each_pass_through_a_retained_graph_runs_the_hooks(x):
    deq = layer()
    counts = hooked(deq.cell)
    z = deq(x)
    for _ in range(3):
        z.sum().backward(retain_graph=True)
    assert counts["after"] == 3


def test_hooks_before_and_behind_the_layer_run_once(x):
    network = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, dtype=x.dtype) for _ in range(2)))
    deq = layer()
    counts = [hooked(module) for module in (network[0], deq.cell, network[1])]
    network[1](deq(network[0](x))).sum().backward()
    assert [each["after"] for each in counts] == [1, 1, 1]


def test_second_derivatives_with_hooks(x):
    plain, watched = layer(), layer()
    counts = hooked(watched.cell)
    (expected,), (found,) = (
        torch.autograd.grad(deq(x).square().sum(), x, create_graph=True) for deq in (plain, watched)
    )
    assert counts["before"] == counts["after"] == 1
    (expected,), (found,) = (torch.autograd.grad(first.square().sum(), x) for first in (expected, found))
    torch.testing.assert_close(found, expected)
    assert counts["before"] <= 3  # the second derivative goes through f, and through the solution


def test_products_for_diagnostics_run_no_backward_hooks(x):
    cell, backend = Cell(), TorchBackend()
    counts = hooked(cell)
    _, vjp = backend.autodiff.linearize(lambda z: cell(z, x.detach()), torch.zeros_like(x))
    vjp(torch.ones_like(x))
    backend.autodiff.differentiable_vjp(lambda z: cell(z, x.detach()), torch.zeros_like(x))(torch.ones_like(x))
    assert counts["before"] == counts["after"] == 0


@pytest.mark.parametrize("strategy", IMPLICIT)
def test_a_checkpointed_cell_is_evaluated_once_more_in_each_backward_pass(strategy, x):
    deq = layer(strategy, checkpoint=True)
    sol = deq.solve(x)
    for passes in (1, 2):
        sol.value.sum().backward(retain_graph=True)
        assert deq.cell.evaluations == int(sol.evaluations.max()) + 1 + passes


def test_a_checkpointed_cell_inside_a_checkpoint(x):
    deq = layer(checkpoint=True)
    sol = deq.solve(x)
    once = deq.cell.evaluations
    (expected,) = torch.autograd.grad(sol.value.square().sum(), x)
    deq.cell.evaluations = 0
    z = torch.utils.checkpoint.checkpoint(deq, x, use_reentrant=False)
    (found,) = torch.autograd.grad(z.square().sum(), x)
    torch.testing.assert_close(found, expected)
    assert deq.cell.evaluations <= 2 * once + 1


def test_a_checkpointed_cell_keeps_no_activations_before_or_after_the_backward_pass(x):
    kept = []

    class Watched(Cell):
        def forward(self, z, x):
            y = super().forward(z, x)
            kept.append(torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage()))
            return torch.sin(y)

    alive = {}
    for checkpoint in (False, True):
        kept.clear()
        deq = layer(cell=Watched(), checkpoint=checkpoint)
        z = deq(x)
        before = sum(not each.expired() for each in kept)
        z.sum().backward(retain_graph=True)
        alive[checkpoint] = before, sum(not each.expired() for each in kept)
    assert alive == {False: (1, 1), True: (0, 0)}


def test_a_checkpointed_cell_under_functional_transformations(x):
    kept, plain = layer(checkpoint=True), layer()
    found, expected = (torch.func.grad(lambda x, deq=deq: deq(x).sum())(x.detach()) for deq in (kept, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strategy", IMPLICIT)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_object_that_keeps_its_equilibrium_is_freed(strategy, checkpoint, x, collect_new):
    class Owner:
        def __init__(self):
            self.cell = Cell()
            hooked(self.cell)
            self.layer = layer(strategy, cell=self.step, checkpoint=checkpoint)

        def step(self, z, x):
            return self.cell(z, x)

        def run(self):
            self.z = self.layer(x)
            self.z.sum().backward()

    owner = Owner()
    owner.run()
    alive = weakref.ref(owner)
    del owner
    collect_new()
    assert alive() is None


@pytest.mark.parametrize("strategy", ["exact-ift", "neumann", "reversible"])
def test_hooks_run_once_where_the_last_passes_of_two_threads_overlap(strategy):
    w, seen, gradients = torch.full((1, 1), 3.0, dtype=torch.float64, requires_grad=True), [], {}
    w.register_hook(lambda g: seen.append(g.item()) or 2 * g)
    begun, ended = {True: threading.Event(), False: threading.Event()}, threading.Event()

    class Meet(torch.autograd.Function):
        """Identity, where the first thread waits until the other has begun, and the other until the first has ended."""

        @staticmethod
        def forward(ctx, w, first):
            ctx.first = first
            return w.view_as(w)

        @staticmethod
        def backward(ctx, g):
            begun[ctx.first].set()
            assert (begun[False] if ctx.first else ended).wait(60)
            return g, None

    def solved(first):
        f = lambda z: 0.5 * z + Meet.apply(w, first) ** 2
        return deqcore.fixed_point(f, torch.zeros_like(w), forward__rtol=1e-12, backward__strategy=strategy).value

    def backward(first):
        (gradients[first],) = torch.autograd.grad(values[first], w)
        if first:
            ended.set()

    values = {first: solved(first) for first in begun}
    first, second = (threading.Thread(target=backward, args=(first,)) for first in begun)
    first.start()
    assert begun[True].wait(60)
    second.start()
    first.join()
    second.join()
    assert len(seen) == 2
    assert [g.item() for g in gradients.values()] == pytest.approx([2 * g for g in seen])

"""The torch layer with an `EquilibriumCache`, and masked warm starts of `reuse`."""

import copy

import numpy as np
import pytest

from deqcore.equilibrium_cache import EquilibriumCache
from deqcore.errors import ConfigError, StrategyError

torch = pytest.importorskip("torch")
nn = pytest.importorskip("deqcore_torch.nn")

X = torch.linspace(-1, 1, 12).reshape(4, 3)


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        torch.nn.init.normal_(self.linear.weight, std=0.3)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def layer(capacity=10, reuse=None, **options):
    torch.manual_seed(0)
    cache = None if reuse or capacity is None else EquilibriumCache(capacity, **options)
    return nn.DEQ(Cell(), reuse=reuse, warm_start=cache, forward__solver="picard", forward__rtol=1e-5)


def test_samples_start_warm_in_another_batch_with_the_same_gradient():
    warm, cold = layer(), layer()
    warm(X[:2], ids=[0, 1])
    warm(X[2:], ids=torch.tensor([2, 3]))
    order = [3, 0, 2, 1]
    solution = warm.solve(X[order], ids=np.array(order))
    assert solution.steps.max() == 0
    assert warm.warm_start.statistics.hits == 4
    solution.value.sum().backward()
    cold(X[order]).sum().backward()
    for one, other in zip(warm.parameters(), cold.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    start = warm.warm_start.start([0], X[:1])
    assert not start.requires_grad
    assert torch.equal(warm(X), cold(X))


def test_states_stored_in_inference_mode_serve_training():
    warm = layer()
    with torch.inference_mode():
        warm(X, ids=range(4))
    warm(X, ids=range(4)).sum().backward()
    assert warm.cell.linear.weight.grad.abs().sum() > 0


def test_a_write_to_the_value_changes_no_stored_state():
    warm = layer()
    with torch.no_grad():
        z = warm(X, ids=range(4))
        kept = z.clone()
        z.zero_()
    assert torch.equal(warm.warm_start.start(range(4), 0 * X), kept)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_states_are_in_the_checkpoint_if_persistent(tmp_path, dtype):
    warm = layer(persistent=True, dtype=dtype)
    warm(X, ids=[5, 6, 7, 8])
    torch.save(warm.state_dict(), tmp_path / "all.pt")
    saved = torch.load(tmp_path / "all.pt", weights_only=True)
    again, small = layer(), layer(2)
    again.load_state_dict(saved)
    small.load_state_dict(saved)
    assert torch.equal(again.warm_start.start([5, 8], X[:2]), warm.warm_start.start([5, 8], X[:2]))
    assert len(small.warm_start) == 2
    assert set(saved) > set(layer().state_dict())
    layer(None).load_state_dict(saved)  # a layer without a cache
    again.load_state_dict(layer().state_dict())  # weights without states make those of the layer stale
    assert len(again.warm_start) == 0


def test_a_checkpoint_of_a_layer_with_another_width_starts_cold():
    warm, other = layer(persistent=True), layer()
    warm(X, ids=range(4))
    states = {name: value for name, value in warm.state_dict().items() if "warm_start" in name}
    other.load_state_dict(other.state_dict() | states)
    start = other.warm_start.start(range(4), torch.zeros(4, 5))
    assert not start.any()
    assert other.warm_start.statistics.mismatches == 4


def test_copies_and_reset():
    warm = layer()
    warm(X, ids=range(4))
    other = copy.deepcopy(warm)
    warm.reset()
    assert (len(warm.warm_start), len(other.warm_start)) == (0, 4)


def test_stale_states_are_compared_with_z0():
    warm = layer(compare=True)
    warm(X, ids=range(4))
    with torch.no_grad():
        for rows in warm.warm_start._entries.values():
            rows.rows[0].mul_(1e3)
    assert torch.equal(warm.solve(X, ids=range(4)).steps, layer().solve(X).steps)


def test_changed_parts_of_a_sequence_restart():
    sequence = layer(reuse="sequence")
    first = sequence(X).detach()
    changed = torch.tensor([True, False, False, False])
    seen = []
    hook = sequence.cell.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    sequence(X, changed=changed)
    hook.remove()
    assert not seen[0][0].any()
    assert torch.equal(seen[0][1:], first[1:])


def test_a_compiled_layer_takes_ids():
    warm = layer()
    run = torch.compile(lambda x, ids: warm(x, ids=ids), backend="eager")
    run(X, torch.arange(4))
    run(X, torch.arange(4))
    assert warm.warm_start.statistics[:2] == (4, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: layer(reuse="sequence")(X, ids=range(4)), "ids must be None without a cache"),
        (lambda: layer()(X, ids=[0.0, 1.0, 2.0, 3.0]), "ids must be integers"),
        (lambda: layer()(X, ids=[0, 1]), "one id for each sample"),
        (lambda: layer(3)(X, ids=range(4)), "capacity must be at least the batch"),
        (lambda: layer()(X, changed=torch.ones(4, dtype=torch.bool)), "changed must be None without ids"),
        (lambda: nn.DEQ(Cell(), warm_start=100), "warm_start must be None or a deqcore EquilibriumCache"),
        (lambda: nn.DEQ(Cell(), reuse="batch", warm_start=EquilibriumCache(3)), "reuse must be None beside warm_start"),
    ],
)
def test_what_does_not_fit_is_refused(call, text):
    with pytest.raises(ConfigError, match=text):
        call()


def test_ids_inside_vmap_are_refused():
    warm = layer()
    with pytest.raises(StrategyError, match="sample ids cannot run inside"):
        torch.func.vmap(lambda x: warm(x, ids=[0, 1]))(X.reshape(2, 2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("device", [None, "cpu"])
def test_states_on_the_host_or_on_the_device(device):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    warm = layer(device=device).cuda()
    x = X.cuda()
    warm(x, ids=torch.arange(4, device="cuda"))
    assert warm.solve(x, ids=range(4)).steps.max() == 0
    kept = next(iter(warm.warm_start._entries.values())).rows[0]
    assert kept.device.type == (device or "cuda")

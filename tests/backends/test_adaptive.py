"""The adaptive strategy in NumPy and PyTorch, against dense solves and least squares."""

from __future__ import annotations

import warnings
from typing import ClassVar

import numpy as np
import pytest

import deqcore
from deqcore.backward.adaptive import Adaptive
from deqcore.backward.controller import RIDGE, judged, nested
from deqcore.linear.gmres import KrylovSpace
from deqcore.linear.powers import ENTRIES, powers_gram
from deqcore.types import Status

torch = pytest.importorskip("torch")
from deqcore_torch.nn import DEQ, synchronize_strategies  # noqa: E402

QUIET = {"forward__on_failure": "ignore", "backward__on_failure": "ignore", "backward__verify_every": 0}
ADAPTIVE = {"forward__rtol": 1e-6, "forward__max_steps": 200, "backward__strategy": "adaptive", **QUIET}
WIDTH = 12


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class Cell(torch.nn.Module):
    def __init__(self, radius=0.6, seed=0):
        super().__init__()
        w = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.w = torch.nn.Parameter(radius * w / torch.linalg.matrix_norm(w, 2))
        self.b = torch.nn.Parameter(torch.zeros(WIDTH))

    def forward(self, z, x):
        return torch.tanh(z @ self.w + x + self.b)


def exact_gradient(layer, x, g):
    """dW and db by a dense solve in float64."""
    w, b = (p.detach().double() for p in (layer.cell.w, layer.cell.b))
    z = torch.zeros(len(x), WIDTH, dtype=torch.float64)
    for i in range(3000):
        last, z = z, torch.tanh(z @ w + x.double() + b)
        if i % 20 == 0 and float((z - last).abs().max()) < 1e-15:
            break
    slope = 1 - z**2
    a = torch.eye(WIDTH, dtype=torch.float64) - slope[:, None, :] * w[None]
    v = torch.linalg.solve(a, g.double()) * slope
    return torch.cat([(z.T @ v).flatten(), v.sum(0)])


def own_gradient(layer):
    return torch.cat([p.grad.flatten().double() for p in (layer.cell.w, layer.cell.b)])


def batch(seed, size=16):
    drawn = torch.Generator().manual_seed(seed)
    return (torch.randn(size, WIDTH, generator=drawn) + 0.3 for _ in range(2))


def learned(layer, **options):
    return Adaptive(**options).learned(layer.strategy_state)


def passes(layer, count, first=0, size=16, scale=1.0):
    """Backward passes without an update: the error of each one's gradient, and its vjps."""
    errors, vjps = [], []
    for seed in range(first, first + count):
        x, g = batch(seed, size)
        layer.zero_grad()
        sol = layer.solve(x)
        (scale * sol.value * g).sum().backward()
        exact = exact_gradient(layer, x, scale * g)
        errors.append(float((own_gradient(layer) - exact).norm() / exact.norm()))
        vjps.append(int(sol.backward.vjps.max()))
    return np.array(errors), np.array(vjps)


def test_powers_from_the_krylov_space_are_those_of_the_jacobian(be, rng):
    a = 0.5 * rng.standard_normal((5, 7, 7)) / np.sqrt(7)
    g, z, m = rng.standard_normal((5, 7)), rng.standard_normal((5, 3)), 5
    dense, zs = be.asarray(a), be.asarray(z)
    space = KrylovSpace(be, lambda u: be.xp.sum(dense * u[:, :, None], axis=1), shifted=True)
    first = space.begin(be.asarray(g), 20)
    k = space.grow(first, be.asarray(np.full(5, 1e-12)), 20)
    sound = be.asarray(np.array([True, True, False, True, True]))
    parameter_vjp = lambda u: (be.xp.matmul(be.xp.permute_dims(u, (1, 0)), zs),)
    kept = np.array([1, 1, 0, 1, 1.0])[:, None]
    vectors = [np.linalg.solve(np.eye(7) - a.swapaxes(1, 2), g[..., None])[..., 0], g]
    for _ in range(m - 1):
        vectors.append(np.einsum("bij,bi->bj", a, vectors[-1]))
    p = np.stack([((kept * v).T @ z).ravel() for v in vectors])
    for formed in (m, 2):  # the entries of the others are zero
        gram, products = powers_gram(
            be, k, first.null_vector, space.solution(k), sound, m, parameter_vjp, formed=formed
        )
        whole = p @ p.T / (p[0] @ p[0]) * np.outer(there := np.arange(m + 1) <= formed, there)
        np.testing.assert_allclose(be.to_numpy(gram), whole, rtol=1e-8, atol=1e-10)
        assert products == formed + 1


def test_an_array_that_carries_the_batch_counts_as_its_sum(be, rng):
    g, kept = rng.standard_normal((4, 3)), {}
    space = KrylovSpace(be, lambda u: 0.5 * u, shifted=True)
    first = space.begin(be.asarray(g), 6)
    k = space.grow(first, be.asarray(np.zeros(4)), 2)
    for name, parameter_vjp in {"rows": lambda u: (2 * u,), "sum": lambda u: (2 * be.xp.sum(u, axis=0),)}.items():
        sound = be.asarray(np.ones(4, bool))
        kept[name] = be.to_numpy(powers_gram(be, k, first.null_vector, be.asarray(2 * g), sound, 3, parameter_vjp)[0])
    np.testing.assert_allclose(kept["rows"], kept["sum"], rtol=1e-10)


def test_large_gradients_are_thinned(be):
    width = ENTRIES // 2
    u = be.asarray(np.ones((2, 2)))
    space = KrylovSpace(be, lambda v: 0.5 * v, shifted=True)
    first = space.begin(u, 4)
    k = space.grow(first, be.asarray(np.zeros(2)), 1)
    weights = be.asarray(np.random.default_rng(0).standard_normal((8, width)))
    parameter_vjp = lambda v: (be.xp.sum(v) * weights,)
    gram, _ = powers_gram(be, k, first.null_vector, 2 * u, be.asarray(np.ones(2, bool)), 2, parameter_vjp)
    np.testing.assert_allclose(be.to_numpy(gram)[0], [1.0, 0.5, 0.25], rtol=1e-6)


def test_coefficients_are_those_of_least_squares(rng):
    p, target = rng.standard_normal((6, 40)), rng.standard_normal(40)
    unit = target @ target
    gram, right = p @ p.T / unit, p @ target / unit
    fits = nested(np, gram, right, np.eye(6))
    error, cosine = judged(np, fits, gram, right)
    for j in range(6):
        own = p[: j + 1]
        size = np.linalg.norm(own, axis=1)
        padded = np.concatenate([(own / size[:, None]).T, np.sqrt(RIDGE) * np.eye(j + 1)])
        truth = np.linalg.lstsq(padded, np.concatenate([target, np.zeros(j + 1)]), rcond=None)[0] / size
        np.testing.assert_allclose(fits[j, : j + 1], truth, rtol=1e-6, atol=1e-9)
        assert not fits[j, j + 1 :].any()
        found = truth @ own
        assert error[j] == pytest.approx(np.linalg.norm(found - target) / np.linalg.norm(target), rel=1e-6)
        assert cosine[j] == pytest.approx(found @ target / np.linalg.norm(found) / np.linalg.norm(target), rel=1e-6)


def test_it_keeps_its_promise_with_few_vjps():
    layer = DEQ(Cell(), **ADAPTIVE, backward__options={"max_relative_error": 0.1})
    errors, vjps = passes(layer, 60)
    assert np.mean(errors > 0.1) <= 0.05
    assert np.median(vjps[10:]) <= 3 < vjps[0]
    found = learned(layer, max_relative_error=0.1)
    assert found.passes == 60
    assert found.vjps == vjps.sum()
    assert 4 <= found.audits <= 20
    assert found.excluded == 0


def test_k_rises_while_the_cell_is_stiff_and_falls_again():
    layer = DEQ(Cell(0.8), **ADAPTIVE, backward__options={"max_relative_error": 0.1, "audit_every": 10})
    taken, begin = [], layer.cell.w.detach().clone()
    for stage, factor in enumerate((0.5, 2.0, 0.5)):
        with torch.no_grad():
            layer.cell.w.copy_(factor * begin)
        errors, vjps = passes(layer, 50, 100 * stage)
        taken.append(np.median(vjps[20:]))
        assert np.mean(errors[20:] > 0.1) <= 0.2
    assert taken[1] >= taken[0] + 2
    assert taken[2] <= taken[1] - 2


def test_where_no_polynomial_is_good_enough_it_is_exact_or_says_so():
    options = {"max_relative_error": 1e-3, "max_vjps": 1}
    errors, _ = passes(DEQ(Cell(), **ADAPTIVE, backward__options=options), 12)
    assert errors.max() < 1e-3
    capped = DEQ(Cell(), **ADAPTIVE, backward__options=options | {"fallback": "none", "audit_every": 8})
    x, g = batch(0)
    statuses = []
    for _ in range(6):
        sol = capped.solve(x)
        (sol.value * g).sum().backward()
        statuses.append(set(sol.backward.status.tolist()))
    assert {int(deqcore.Status.MAX_STEPS)} in statuses
    assert int(sol.backward.vjps.max()) <= WIDTH


@pytest.mark.parametrize("harm", ["nan", "zero"])
def test_one_bad_sample_spoils_no_decision(harm):
    layer = DEQ(Cell(), **ADAPTIVE, backward__options={"max_relative_error": 0.1})
    passes(layer, 10)
    for seed in range(200, 206):
        x, g = batch(seed)
        g[0] = float("nan") if harm == "nan" else 0.0
        (layer(x) * g).sum().backward()
    assert torch.isfinite(layer.strategy_state).all()
    errors, _ = passes(layer, 20, 300)
    assert np.mean(errors > 0.1) <= 0.1


def test_an_audit_in_an_unconverged_forward_is_excluded_and_counted():
    layer = DEQ(Cell(), **ADAPTIVE | {"forward__max_steps": 1})
    for seed in range(6):
        x, g = batch(seed)
        (layer(x) * g).sum().backward()
    found = learned(layer)
    assert found.audits == 0
    assert found.excluded >= 1
    assert found.begun == 0, "nothing is known, so nothing may be used"


@pytest.mark.parametrize("kind", ["frozen", "none", "inputs"])
def test_without_parameters_the_vectors_themselves_are_compared(kind):
    cell = Cell()
    if kind != "inputs":
        for p in cell.parameters():
            p.requires_grad_(False)
    if kind == "none":
        w = cell.w.detach()
        cell = lambda z, x: torch.tanh(z @ w + x)
    layer = DEQ(cell, **ADAPTIVE, backward__options={"max_relative_error": 0.1})
    for seed in range(12):
        x, g = batch(seed)
        x.requires_grad_()
        sol = layer.solve(x)
        (sol.value * g).sum().backward()
        assert torch.isfinite(x.grad).all()
    assert learned(layer, max_relative_error=0.1).audits >= 3


def test_frozen_everything_takes_a_backward_pass():
    cell = Cell()
    for p in cell.parameters():
        p.requires_grad_(False)
    layer = DEQ(cell, **ADAPTIVE)
    x, _ = batch(0)
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("size", [1, 2])
def test_small_batches(size):
    layer = DEQ(Cell(), **ADAPTIVE, backward__options={"max_relative_error": 0.3})
    errors, _ = passes(layer, 40, size=size)
    assert np.median(errors) <= 0.3
    passes(layer, 2, size=7)
    x = torch.zeros(0, WIDTH)
    layer(x).sum().backward()
    assert torch.isfinite(layer.strategy_state).all()


def test_accumulated_gradients_are_those_of_their_passes():
    one, two = (DEQ(Cell(), **ADAPTIVE) for _ in range(2))
    separate = []
    for seed in range(8):
        x, g = batch(seed)
        one.zero_grad()
        (one(x) * g).sum().backward()
        separate.append(own_gradient(one))
        (two(x) * g).sum().backward()
    torch.testing.assert_close(own_gradient(two), sum(separate), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.strategy_state, two.strategy_state)


def test_a_scaled_loss_changes_no_decision():
    plain, scaled = (DEQ(Cell(), **ADAPTIVE, backward__options={"max_relative_error": 0.1}) for _ in range(2))
    errors, vjps = passes(plain, 20)
    again, spent = passes(scaled, 20, scale=65536.0)
    np.testing.assert_array_equal(vjps, spent)
    np.testing.assert_allclose(again, errors, atol=2e-3)


def test_autocast_audits():
    layer = DEQ(Cell(), **ADAPTIVE | {"forward__rtol": 1e-2})
    for seed in range(6):
        x, g = batch(seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (layer(x).float() * g).sum()
        (1024 * loss).backward()
    found = learned(layer)
    assert found.audits + found.excluded >= 2
    assert torch.isfinite(own_gradient(layer)).all()


class Watched(torch.autograd.Function):
    """Identity on z that notes whether its product is wanted."""

    wanted: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, z):
        return z.view_as(z)

    @staticmethod
    def backward(ctx, g):
        Watched.wanted.append(True)
        return g


class WatchedCell(Cell):
    def forward(self, z, x):
        return super().forward(Watched.apply(z), x)


def test_a_pass_without_a_vjp_differentiates_nothing_with_respect_to_z():
    layer = DEQ(WatchedCell(0.05), **ADAPTIVE)
    spent = []
    for step in range(16):
        x, g = batch(step)
        Watched.wanted.clear()
        sol = layer.solve(x)
        (sol.value * g).sum().backward()
        spent.append((int(sol.backward.vjps.max()), len(Watched.wanted)))
    none = [products for vjps, products in spent if vjps == 0]
    assert len(none) >= 6
    assert not any(none)
    assert all(products > 0 for vjps, products in spent if vjps > 0)


def test_a_pass_recorded_without_z_leaves_the_audit_to_the_next():
    """Two losses: the pass of the first changes the state after f of the second was recorded."""
    layer = DEQ(Cell(0.05), **ADAPTIVE)
    rules, seed = Adaptive().controller, 0
    while learned(layer).audits < 4 or Adaptive().next_uses_vjp(layer.strategy_state.numpy()):
        x, g = batch(seed := seed + 1)
        (layer(x) * g).sum().backward()
    x, g = batch(100)
    cases = [(1.0, 0.0, Status.CONVERGED), (1.0, 2.0, Status.MAX_STEPS), (0.0, 0.0, Status.MAX_STEPS)]
    for begun, chosen, status in cases:  # the last state is a new one
        sol, s = layer.solve(x), learned(layer)
        raised = s._replace(jumped=np.float32(1), chosen=np.float32(chosen), square=np.float32(chosen**2))
        changed = rules.pack(np, raised) if begun else np.asarray(rules.initial(), np.float32)
        layer.strategy_state.copy_(torch.from_numpy(changed))
        layer.zero_grad()
        (sol.value * g).sum().backward()
        report = sol.backward
        assert (report.vjps == 0).all()
        assert (report.status == int(status)).all()
        fit = nested(np, s.gram, s.right, np.eye(rules.candidates))[0, 0] if begun else 1.0
        free = DEQ(layer.cell, **(ADAPTIVE | {"backward__strategy": "jacobian-free"}))
        found = own_gradient(layer)
        layer.zero_grad()
        (free(x) * g).sum().backward()
        torch.testing.assert_close(found, fit * own_gradient(layer), rtol=1e-4, atol=1e-6)
        assert Adaptive().next_uses_vjp(layer.strategy_state.numpy())
        audits = learned(layer).audits
        (layer(x) * g).sum().backward()
        assert learned(layer).audits == audits + 1
        while Adaptive().next_uses_vjp(layer.strategy_state.numpy()):
            (layer(x) * g).sum().backward()


def test_audit_every_beyond_the_training():
    layer = DEQ(Cell(), **ADAPTIVE, backward__options={"max_relative_error": 0.1, "audit_every": 10**6})
    errors, _ = passes(layer, 30)
    assert np.mean(errors > 0.1) <= 0.1
    assert learned(layer, max_relative_error=0.1, audit_every=10**6).audits >= 4


def test_the_state_travels_with_the_weights(tmp_path):
    layer, other = DEQ(Cell(), **ADAPTIVE), DEQ(Cell(), **ADAPTIVE)
    passes(layer, 6)
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other.strategy_state, layer.strategy_state)
    whole = torch.nn.ModuleDict({"deq": DEQ(Cell(), **ADAPTIVE)})
    whole.load_state_dict({f"deq.{name}": value for name, value in layer.state_dict().items()})
    assert torch.equal(whole["deq"].strategy_state, layer.strategy_state)


def test_a_checkpoint_without_a_state_or_with_another_loads():
    layer = DEQ(Cell(), **ADAPTIVE)
    passes(layer, 3)
    state = layer.state_dict()
    bare = {name: value for name, value in state.items() if name != "strategy_state"}
    begin = DEQ(Cell(), **ADAPTIVE)
    begin.load_state_dict(bare)
    assert not begin.strategy_state.any()
    smaller = DEQ(Cell(), **ADAPTIVE, backward__options={"max_vjps": 2})
    stateless = DEQ(Cell(), **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the settings differ
        smaller.load_state_dict(state)
        stateless.load_state_dict(state)
        layer.load_state_dict(stateless.state_dict())
    assert not smaller.strategy_state.any()
    assert stateless.strategy_state is None
    passes(smaller, 2)


def test_evaluation_is_exact_and_leaves_the_state_alone():
    layer = DEQ(Cell(), **ADAPTIVE)
    passes(layer, 5)
    before = layer.strategy_state.clone()
    layer.eval()
    errors, _ = passes(layer, 5, 50)
    assert errors.max() < 1e-3
    assert torch.equal(layer.strategy_state, before)


def test_a_strategy_that_is_chosen_at_the_call_gets_a_state():
    layer = DEQ(Cell(), **QUIET)
    assert layer.strategy_state is None
    with deqcore.using(backward__strategy="adaptive"):
        passes(layer, 2)
    assert learned(layer).passes == 2


def test_numpy_and_torch_decide_alike(rng):
    w = 0.6 * np.linalg.qr(rng.standard_normal((6, 6)))[0]
    states = {name: deqcore.StrategyState() for name in ("numpy", "torch")}
    for _ in range(6):
        x, g = rng.standard_normal((4, 6)), rng.standard_normal((4, 6))
        for name, array, tanh in (("numpy", np.asarray, np.tanh), ("torch", torch.as_tensor, torch.tanh)):
            deqcore.vjp(
                lambda z, w, x, tanh=tanh: tanh(z @ w + x), array(np.zeros((4, 6))), array(w), array(x),
                cotangent=array(g), strategy_state=states[name], **ADAPTIVE | {"forward__rtol": 1e-10},
            )  # fmt: skip
    np.testing.assert_allclose(states["torch"].values.numpy(), states["numpy"].values, rtol=1e-3, atol=1e-4)


def test_the_report_and_the_monitor_show_audits():
    from deqcore.monitor import Monitor

    rows = []
    layer = DEQ(Cell(), **ADAPTIVE)
    with Monitor(every=1) as monitor:
        for seed in range(6):
            x, g = batch(seed)
            sol = layer.solve(x)
            (sol.value * g).sum().backward()
            if bool((sol.backward.gradient_products > 0).all()):
                rows.append(sol.backward)
        monitor.flush()
        latest = monitor.history() if hasattr(monitor, "history") else None
    assert len(rows) >= 2
    assert torch.isnan(rows[0].gradient_error).all(), "nothing was in force before the first audit"
    assert torch.isfinite(rows[1].gradient_error).all()
    assert 0 < float(rows[1].gradient_cosine[0]) <= 1 + 1e-6
    assert latest is None or latest


def test_without_distributed_there_is_nothing_to_synchronize():
    layer = DEQ(Cell(), **ADAPTIVE)
    synchronize_strategies(layer)
    assert not layer.strategy_state.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_relative_error": 1.5}, "max_relative_error must be"),
        ({"audit_every": 0}, "audit_every must be"),
        ({"max_vjps": 40}, "max_vjps must be"),
        ({"fallback": "reuse"}, "fallback must be"),
        ({"audit_rtol": 2.0}, "audit_rtol must be"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        Adaptive(**options)

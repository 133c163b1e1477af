"""The torch layer: where it starts, what it keeps, what it says of cells that have no fixed point."""

import copy
import io
import pickle

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConfigError, LayerWarning, ProblemError, UnknownNameError

torch = pytest.importorskip("torch")
from deqcore_torch.nn import DEQ  # noqa: E402

N, B = 12, 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Cell(torch.nn.Module):
    def __init__(self, made):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(made.w))
        self.u = torch.nn.Parameter(torch.tensor(made.u))
        self.b = torch.nn.Parameter(torch.tensor(made.b))

    def forward(self, z, x):
        return torch.tanh(z @ self.w.T + x @ self.u.T + self.b)

    def initial_state(self, x):
        return x.new_zeros(len(x), N)


class Plain(torch.nn.Module):
    """No initial state of its own."""

    def forward(self, z, x):
        return 0.5 * torch.tanh(z) + x


@pytest.fixture
def made(truth):
    return truth.cell(0, B, N, 4)


def test_a_layer_gives_scipys_root_and_the_closed_gradients(made, truth):
    layer = DEQ(Cell(made), forward__rtol=1e-12, backward__options={"rtol": 1e-12}, forward__max_steps=100)
    x = torch.tensor(made.x, requires_grad=True)
    z = layer(x)
    assert z.detach().numpy() == pytest.approx(made.root, abs=1e-9)
    g = np.random.default_rng(1).standard_normal((B, N))
    z.backward(torch.tensor(g))
    expected = truth.cell_gradients(made, g)
    assert layer.cell.w.grad.numpy() == pytest.approx(expected.w, rel=1e-7, abs=1e-9)
    assert layer.cell.b.grad.numpy() == pytest.approx(expected.b, rel=1e-7, abs=1e-9)
    assert x.grad.numpy() == pytest.approx(expected.x, rel=1e-7, abs=1e-9)


def test_without_an_initial_state_the_first_input_gives_its_shape():
    z = DEQ(Plain())(torch.ones(3, 2))
    assert z.shape == (3, 2)
    with pytest.raises(ConfigError, match="Pass z0"):
        DEQ(lambda z: 0.5 * z)()
    assert DEQ(lambda z: 0.5 * z + 1)(z0=torch.zeros(1, 2)).shape == (1, 2)


def test_states_are_trees():
    layer = DEQ(lambda z, x: {"a": 0.5 * z["b"] + x["a"], "b": 0.2 * z["a"]}, forward__rtol=1e-6)
    z = layer({"a": torch.ones(2, 3), "b": torch.zeros(2, 3)})
    assert z["a"].numpy() == pytest.approx(np.full((2, 3), 1 / 0.9), rel=1e-5)


def test_settings_are_checked_when_the_layer_is_made():
    with pytest.raises(UnknownNameError, match="broyden"):
        DEQ(Plain(), forward__solver="broyde")
    with pytest.raises(ConfigError, match="history_size"):
        DEQ(Plain(), forward__options={"memry": 3})
    with pytest.raises(ConfigError, match="max_steps"):
        DEQ(Plain(), evaluation={"forward__max_stepz": 3})
    with pytest.raises(ConfigError, match="'batch', 'sequence' or 'carry'"):
        DEQ(Plain(), reuse="yes")
    with pytest.raises(ConfigError, match=r"a deqcore\.Config"):
        DEQ(Plain(), {"forward": {}})
    with pytest.raises(ConfigError, match="a module or a function"):
        DEQ(3)


def test_training_and_evaluation_have_budgets_of_their_own():
    layer = DEQ(Plain(), evaluation={"forward__max_steps": 3}, forward__rtol=0.0, forward__max_steps=5)
    x = torch.ones(2, 2, dtype=torch.float64)
    quiet = {"forward__on_failure": "ignore"}
    assert layer.solve(x, **quiet, forward__max_steps=7).steps.tolist() == [7, 7]
    assert layer.train().solve(x, **quiet).steps.tolist() == [5, 5]
    assert layer.eval().solve(x, **quiet).steps.tolist() == [3, 3]


def test_using_reaches_a_layer_without_a_config_of_its_own():
    x = torch.ones(1, 2)
    own = {"forward__solver": "picard", "forward__rtol": 0.0, "forward__on_failure": "ignore"}
    with deqcore.using(forward__max_steps=5):
        assert DEQ(Plain(), **own).solve(x).steps.item() == 5
        complete = deqcore.Config(forward={"max_steps": 2})
        assert DEQ(Plain(), complete, **own).solve(x).steps.item() == 2


def test_a_sequence_starts_from_its_own_equilibria():
    layer = DEQ(Plain(), reuse="sequence", forward__solver="picard", forward__rtol=1e-6)
    x = torch.rand(4, 3)
    cold = layer.solve(x)
    warm = layer.solve(x + 1e-5)
    assert warm.steps.max() < cold.steps.min()
    assert warm.steps.sum() < 0.6 * cold.steps.sum()
    assert not any(leaf.requires_grad for leaf in layer._last)
    assert layer.solve(x[:2]).converged.all()  # another batch: cold again
    layer.reset()
    assert layer.solve(x).steps.tolist() == cold.steps.tolist()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("reuse", ["sequence", "batch"])
def test_writing_into_the_value_does_not_change_the_next_start(reuse, grad):
    layer, x = DEQ(Plain(), reuse=reuse), torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
    with torch.set_grad_enabled(grad):
        z = layer(x.clone().requires_grad_(grad))
        value = z.detach().clone()
        z.relu_()
    start = layer.initial_state(x)
    kept = value if reuse == "sequence" else value.mean(0).expand_as(value)
    assert torch.allclose(start, kept)


def test_a_batch_starts_from_the_mean_of_the_last():
    layer = DEQ(Plain(), reuse="batch", forward__rtol=1e-6)
    x = torch.rand(4, 3)
    first = layer(x).detach()
    start = layer.initial_state(torch.zeros(7, 3))
    assert torch.equal(start, first.mean(0, keepdim=True).expand(7, 3))
    assert layer.solve(torch.rand(7, 3)).converged.all()


def test_a_trajectory_ends_in_the_solution():
    layer = DEQ(Plain(), forward__solver="picard", forward__rtol=1e-7, forward__max_steps=60)
    x = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    states = layer.trajectory(x, steps=[1, 3])
    z = torch.zeros_like(x)
    z = 0.5 * torch.tanh(z) + x
    assert torch.allclose(states[0], z)  # one step from z0
    for _ in range(2):
        z = 0.5 * torch.tanh(z) + x
    assert torch.allclose(states[1], z)
    assert torch.allclose(states[-1], layer(x), atol=1e-7)
    sum(state.sum() for state in states).backward()
    assert torch.isfinite(x.grad).all()
    with pytest.raises(ConfigError, match="increasing"):
        layer.trajectory(x, steps=[3, 3])


def test_checkpointing_changes_no_gradient(made):
    x = torch.tensor(made.x)
    grads = []
    for checkpoint in (False, True):
        layer = DEQ(Cell(made), checkpoint=checkpoint, forward__rtol=1e-10)
        layer(x).square().sum().backward()
        grads.append(layer.cell.w.grad)
    assert torch.allclose(*grads, rtol=1e-12, atol=0)


def test_weights_and_settings_survive_a_round_trip(made, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = DEQ(Cell(made), forward__solver="anderson", forward__rtol=1e-8)
    other = DEQ(Cell(made), forward__solver="anderson", forward__rtol=1e-8)
    with torch.no_grad():
        other.cell.w.zero_()
    path = str(tmp_path / "layer.safetensors")
    safetensors.save_file(layer.state_dict(), path)
    other.load_state_dict(safetensors.load_file(path))
    x = torch.tensor(made.x)
    assert torch.equal(other(x), layer(x))


def test_a_checkpoint_with_other_settings_says_which(made):
    saved = DEQ(Cell(made), forward__rtol=1e-3).state_dict()
    difference = r"overrides\.forward__rtol: 0\.001 in the checkpoint, 1e-08 in the layer"
    with pytest.warns(LayerWarning, match=difference) as warned:
        DEQ(Cell(made), forward__rtol=1e-8).load_state_dict(saved)
    assert warned[0].filename == __file__


def test_weights_without_settings_are_loaded(made):
    layer = DEQ(Cell(made))
    missing, unexpected = layer.load_state_dict({f"cell.{k}": v for k, v in layer.cell.state_dict().items()})
    assert not missing
    assert not unexpected


def test_copies_are_independent(made):
    layer = DEQ(Cell(made), reuse="sequence", forward__rtol=1e-8)
    x = torch.tensor(made.x)
    z = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin.reset()
        assert torch.allclose(twin(x), z, atol=1e-7)
        assert twin.cell.w is not layer.cell.w
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    layer.load_state_dict(torch.load(stored, weights_only=True))


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, z, x):
        return 0.3 * self.norm(z) + x


def test_batch_normalisation_in_training_mode_is_explained_once(recwarn):
    layer = DEQ(Normed(), forward__on_failure="ignore")
    x = torch.rand(4, 3)
    layer(x), layer(x)
    told = [w for w in recwarn if w.category is LayerWarning]
    assert len(told) == 1
    assert "GroupNorm or LayerNorm" in str(told[0].message)
    assert told[0].filename == __file__
    recwarn.clear()
    DEQ(Normed(), forward__on_failure="ignore").eval()(x)
    assert not recwarn.list


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, x):
        self.calls += 1
        return 0.3 * z + x


def test_a_cell_that_writes_to_its_buffers_is_named():
    with pytest.warns(LayerWarning, match="buffers calls"):
        DEQ(Counting())(torch.rand(2, 3))


class Registering(torch.nn.Module):
    """Makes a constant and a module that counts in its first evaluation; a lazy buffer is never filled."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts
        self.register_buffer("lazy", torch.nn.parameter.UninitializedBuffer())

    def forward(self, z, x):
        if not hasattr(self, "factor"):
            self.register_buffer("factor", torch.full((), 0.5))
            self.inner = Counting()
        if self.counts:
            self.inner.calls += 1
        return self.factor * torch.tanh(z) + x


def test_what_a_cell_registers_while_it_runs_is_watched_from_the_next_solve_on(recwarn):
    for counts in (False, True):
        layer = DEQ(Registering(counts))
        for number in range(2):
            recwarn.clear()
            layer(torch.rand(2, 3))
            warned = [str(w.message) for w in recwarn if w.category is LayerWarning]
            assert len(warned) == int(counts and number > 0), warned
            assert all("buffers inner.calls" in text for text in warned)


def test_a_cell_whose_buffers_are_inference_tensors_is_solved():
    """They keep no version."""
    with torch.inference_mode():
        cell = Registering(False)
        x = torch.rand(2, 3)
        cell(x, x)
        assert cell.factor.is_inference()
        assert torch.isfinite(DEQ(cell).eval()(x)).all()


def test_a_cell_that_changes_the_shape_is_refused():
    with pytest.raises(ProblemError, match="must keep the shape"):
        DEQ(lambda z, x: torch.cat([z, x], 1))(torch.rand(2, 3))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("cell", "inputs", "message"),
    [
        (torch.nn.Linear(3, 3), 1, r"1 input.*2 argument.*Linear takes \(input.*too many.*linear\(z\) \+ x"),
        (Plain(), 2, r"2 input.*Plain takes \(z, x\).*too many"),
        (lambda z, x, y: z, 1, r"function takes \(z, x, y\) \(missing a required argument: 'y'\)"),
    ],
)
def test_a_cell_that_takes_other_arguments_is_told(cell, inputs, message, checkpoint):
    with pytest.raises(ProblemError, match=message):
        DEQ(cell, checkpoint=checkpoint)(*[torch.ones(2, 3)] * inputs)


def test_a_type_error_in_a_cell_stays_what_it_is():
    with pytest.raises(TypeError, match="unsupported operand"):
        DEQ(lambda z, x: z + None)(torch.ones(2, 3))


def test_a_mutated_weight_counts_at_the_next_call(made):
    layer = DEQ(Cell(made), forward__rtol=1e-10)
    x = torch.tensor(made.x)
    with torch.no_grad():
        layer.cell.w.mul_(0.5)
    z = layer(x).detach()
    assert torch.allclose(layer.cell(z, x), z, atol=1e-8)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2)])
def test_what_follows_a_layer_may_write_in_place(shape):
    x = torch.randn(shape, requires_grad=True)
    layer = DEQ(lambda z, x: 0.5 * torch.tanh(z) + x, forward__rtol=1e-6)
    kept = layer.solve(x)
    torch.relu_(kept.value).sum().backward()
    (expected,) = torch.autograd.grad(torch.relu(layer(x)).sum(), x)
    assert torch.allclose(x.grad, expected)
    again = deqcore.fixed_point(layer.cell, torch.zeros(shape), x, state=kept.state, forward__rtol=1e-6)
    assert torch.equal(again.value, layer(x))  # the state was not written to


def test_a_layer_compacts_its_batch():
    rate = torch.full((8, 1), 0.2, dtype=torch.float64)
    rate[3] = 0.9
    shift = torch.ones(1, 4, dtype=torch.float64)  # one for all samples
    seen = []

    def cell(z, rate, shift):
        seen.append(len(z))
        return rate * z + shift

    x = torch.zeros(8, 4, dtype=torch.float64)
    settings = {"forward__solver": "picard", "forward__rtol": 1e-6, "forward__max_steps": 200}
    plain = DEQ(cell, **settings)(rate, shift, z0=x)
    seen.clear()
    layer = DEQ(cell, batched_inputs=(0,), forward__compact=True, **settings)
    assert torch.equal(layer(rate, shift, z0=x), plain)
    assert seen.count(1) > seen.count(8)
    with pytest.raises(ConfigError, match="names argument 1, so the first axis"):
        DEQ(cell, forward__compact=True, **settings)(rate, shift, z0=x)

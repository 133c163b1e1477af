"""Evaluations that stored equilibria save: `python -m benchmarks.warm_starts --json docs/benchmarks/warm_starts.json`.

Digits and text are trained over epochs with the same weights and order of samples, from zero ("cold") and from the
equilibrium of each sample in the epoch before. Induced dipoles follow a trajectory of atoms whose positions are a
closed formula, and are compared with a dense solve. The last part starts the adjoint solve from the stored u of a
sample. All figures are counts and errors, which the load of the machine does not change. PyTorch, one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from deqcore_torch.nn import DEQ
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import deqcore
from deqcore.bench.report import markdown
from deqcore.equilibrium_cache import EquilibriumCache
from deqcore.linear.gmres import gmres
from deqcore.study.data.digits import load
from deqcore.warm_start import restart_changed

ARMS: Final[dict[str, dict[str, Any]]] = {
    "cold": {},
    "warm": {"capacity": 2000},
    "warm, bfloat16": {"capacity": 2000, "dtype": "bfloat16"},
}
MODELS: Final = Path(__file__).resolve().parents[1] / "examples" / "models"
PARTS: Final = ("dipoles", "text", "digits", "adjoint, digits")
SAMPLES: Final = 400  # of the digits
BACKEND: Final = deqcore.get_backend(backend="torch")


class Cell(nn.Module):
    """tanh(W z + U x + b)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(width, width, bias=False), nn.Linear(inputs, width)
        nn.init.normal_(self.inside.weight, std=0.5 / width**0.5)

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.inside.in_features)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inside(z) + self.outside(x))


class Classifier(nn.Module):
    """Digits by the equilibrium of a dense cell."""

    def __init__(self, cache: EquilibriumCache | None, width: int = 64) -> None:
        super().__init__()
        settings = {"forward__rtol": 1e-4, "forward__max_steps": 100, "backward__verify_every": 0,
                    "backward__options": {"rtol": 0.1}}  # fmt: skip
        self.deq = DEQ(Cell(64, width), warm_start=cache, **settings)
        self.read = nn.Linear(width, 10)

    def loss(self, x: Tensor, y: Tensor, ids: Any) -> tuple[Tensor, Tensor]:
        solution = self.deq.solve(x, ids=ids)
        return cross_entropy(self.read(solution.value), y), solution.evaluations


def decay(optimizer: torch.optim.Optimizer, epoch: int, epochs: int, rate: float = 4e-3) -> None:
    """Set the learning rate of an epoch: a cosine from `rate` to a twentieth of it."""
    share = 0.5 * (1 + np.cos(np.pi * epoch / max(1, epochs - 1)))
    optimizer.param_groups[0]["lr"] = rate * (0.05 + 0.95 * share)


def digits(seed: int, arm: str, epochs: int) -> dict[str, Any]:
    """Train on digits; return evaluations per sample by epoch, and the test accuracy."""
    data = load()
    torch.manual_seed(seed)
    cache = EquilibriumCache(**ARMS[arm]) if ARMS[arm] else None
    model = Classifier(cache)
    images, labels = torch.tensor(data.train.x[:SAMPLES]).flatten(1), torch.tensor(data.train.y[:SAMPLES])
    optimizer, rng, found = torch.optim.AdamW(model.parameters()), np.random.default_rng(seed), []
    for epoch in range(epochs):
        decay(optimizer, epoch, epochs)
        counts = []
        for ids in np.array_split(rng.permutation(len(images)), len(images) // 50):
            rows = torch.from_numpy(ids)
            loss, evaluations = model.loss(images[rows], labels[rows], None if cache is None else ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            counts.append(float(evaluations.double().mean()))
        found.append(float(np.mean(counts)))
    with torch.no_grad():
        right = model.read(model.deq(torch.tensor(data.test.x).flatten(1))).argmax(1) == torch.tensor(data.test.y)
    return {"evaluations": found, "accuracy": 100 * float(right.double().mean())}


def text(seed: int, arm: str, epochs: int, windows: int = 32) -> tuple[dict[str, Any], Any, Tensor]:
    """Train the equilibrium transformer of `examples/models` on fixed windows of text."""
    sys.path.insert(0, str(MODELS))
    import text as example
    import text_torch

    _, coded = example.data()
    data = torch.tensor(example.windows(coded["train"], windows))
    settings = example.SETTINGS | {"forward__rtol": 1e-3, "forward__max_steps": 60, "backward__verify_every": 0}
    torch.manual_seed(seed)
    shape = {"width": 32, "hidden": 64, "layers": 0}
    model = text_torch.Model(settings, **shape)
    drawn = example.weights(np.random.default_rng(seed), **shape)
    model.load_state_dict({name: torch.tensor(value) for name, value in drawn.items()}, strict=False)
    cache = model.deq.warm_start = EquilibriumCache(**ARMS[arm]) if ARMS[arm] else None
    optimizer, rng, found = torch.optim.AdamW(model.parameters()), np.random.default_rng(seed), []
    for epoch in range(epochs):
        decay(optimizer, epoch, epochs)
        counts = []
        for ids in np.array_split(rng.permutation(windows), windows // 16):
            rows = data[torch.from_numpy(ids)]
            x = model.embed(rows[:, :-1]) + model.place
            solution = model.deq.solve(x, ids=None if cache is None else ids)
            loss = cross_entropy(model.read(text_torch.norm(solution.value)).transpose(1, 2), rows[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            counts.append(float(solution.evaluations.double().mean()))
        found.append(float(np.mean(counts)))
    held = torch.tensor(example.windows(coded["tune"], 64))
    with torch.no_grad():
        perplexity = float(model.loss(held).exp())
    return {"evaluations": found, "perplexity": perplexity}, model, held


@torch.no_grad()
def edited(model: Any, windows: Tensor, seed: int, steps: int = 12) -> dict[str, float]:
    """Replace 5 % of the characters at each step, as a sampler does; evaluations by start."""
    rng, layer = np.random.default_rng(seed), model.deq
    tokens, previous = windows[:16, :-1].clone(), None
    counts: dict[str, list[float]] = {"cold": [], "previous state": [], "changed parts at zero": []}
    for _ in range(steps):
        changed = torch.from_numpy(rng.random(tokens.shape) < 0.05)
        tokens = torch.where(changed, torch.from_numpy(rng.integers(0, 80, tokens.shape)), tokens)
        x = model.embed(tokens) + model.place
        cold = torch.zeros_like(x)
        starts = {"cold": cold}
        if previous is not None:
            starts |= {"previous state": previous, "changed parts at zero": restart_changed(previous, cold, changed)}
        for name, start in starts.items():
            solution = layer.solve(x, z0=start)
            if previous is not None:
                counts[name].append(float(solution.evaluations.double().mean()))
        previous = solution.z
    return {name: float(np.mean(values)) for name, values in counts.items()}


class Dipoles:
    """Induced dipoles of polarisable atoms on a vibrating lattice: μ = α (E + T μ), with Thole's damping.

    Positions are lattice sites plus sums of waves, a closed formula in time. Source: Thole (1981), "Molecular
    polarizabilities calculated with a modified dipole interaction"; T is that of the linear model of that paper.
    """

    def __init__(self, seed: int, systems: int = 4, side: int = 3) -> None:
        rng, axis = np.random.default_rng(seed), 2.6 * np.arange(side)
        self.sites = np.stack(np.meshgrid(axis, axis, axis), -1).reshape(1, -1, 3)
        self.count, self.alpha = side**3, 1.0
        shape = (6, systems, self.count, 3)
        self.waves, self.phases = 0.06 * rng.standard_normal(shape), rng.uniform(0, 6.28, shape)
        self.rates = rng.uniform(5.0, 25.0, shape)
        self.charges = rng.choice([-0.4, 0.4], (systems, self.count))

    def system(self, time: float) -> tuple[Tensor, Tensor]:
        """Return T `(systems, 3n, 3n)` and the field E of the charges `(systems, 3n)` at a time."""
        x = self.sites + (self.waves * np.sin(self.rates * time + self.phases)).sum(0)
        apart = x[:, :, None] - x[:, None]
        r = np.sqrt((apart**2).sum(-1)) + 1e9 * np.eye(self.count)
        v = np.minimum(r / (1.662 * self.alpha ** (1 / 3)), 1.0)
        damp3, damp5 = 4 * v**3 - 3 * v**4, v**4
        outer = apart[..., :, None] * apart[..., None, :]
        tensor = 3 * (damp5 / r**5)[..., None, None] * outer - (damp3 / r**3)[..., None, None] * np.eye(3)
        field = (self.charges[:, None, :, None] * apart / r[..., None] ** 3).sum(2)
        size = 3 * self.count
        return torch.tensor(tensor.swapaxes(2, 3).reshape(-1, size, size)), torch.tensor(field.reshape(-1, size))


def trajectory(seed: int, steps: int, interval: float = 0.002) -> dict[str, Any]:
    """Follow the dipoles from zero, from the last step, and by sample id; compare with the dense solve."""
    dipoles, cache = Dipoles(seed), EquilibriumCache(4)
    settings = {"forward__rtol": 1e-6, "forward__max_steps": 60, "backward__verify_every": 0}
    counts: dict[str, list[float]] = {"cold": [], "warm": []}
    errors, adjoint, u = dict.fromkeys(counts, 0.0), [], None
    for step in range(steps):
        t, field = dipoles.system(step * interval)
        truth = torch.linalg.solve(torch.eye(t.shape[-1], dtype=t.dtype) - dipoles.alpha * t, dipoles.alpha * field)

        def f(z: Tensor, t: Tensor, field: Tensor) -> Tensor:
            return dipoles.alpha * (field + torch.einsum("bij,bj->bi", t, z))

        for name, values in counts.items():
            z0 = torch.zeros_like(field) if name == "cold" else cache.start(range(4), torch.zeros_like(field))
            with torch.no_grad():
                solution = deqcore.fixed_point(f, z0, t, field, **settings)
            if name == "warm":
                cache.store(range(4), solution)
            if step:
                values.append(float(solution.evaluations.double().mean()))
            error = (solution.value - truth).norm(dim=1) / truth.norm(dim=1)
            errors[name] = max(errors[name], float(error.max()))
        figures, u = adjoint_start(lambda v, t=t: dipoles.alpha * torch.einsum("bji,bj->bi", t, v), -field, u, 1e-6)
        adjoint.append(figures)
    return {
        "evaluations": {name: float(np.mean(values)) for name, values in counts.items()},
        "largest error": errors,
        "adjoint": np.mean(adjoint[1:], axis=0).tolist(),
    }


def adjoint_start(product: Any, g: Tensor, stored: Tensor | None, rtol: float) -> tuple[list[float], Tensor]:
    """Return vjps of GMRES from zero and from the stored u, and ‖g − (I − Jᵀ)u‖/‖g‖ of the latter; then the new u."""

    def equation(v: Tensor) -> Tensor:
        return v - product(v)

    cold = gmres(BACKEND, equation, g, rtol=rtol, max_steps=60)
    if stored is None:
        return [float("nan")] * 3, cold.x
    warm = gmres(BACKEND, equation, g, stored, rtol=rtol, max_steps=60)
    left = (g - equation(stored)).norm(dim=1) / g.norm(dim=1).clamp_min(1e-30)
    return [float(cold.products.double().mean()), float(warm.products.double().mean()), float(left.median())], cold.x


def adjoints(seed: int, epochs: int) -> list[list[float]]:
    """Train on digits; before each epoch, solve the adjoint equation of 256 samples from zero and stored u."""
    data, found, stored = load(), [], None
    x, y = torch.tensor(data.train.x[:SAMPLES]).flatten(1), torch.tensor(data.train.y[:SAMPLES])
    torch.manual_seed(seed)
    model, rng = Classifier(None), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(epochs):
        decay(optimizer, epoch, epochs)
        for ids in np.array_split(rng.permutation(len(x)), len(x) // 50):
            loss, _ = model.loss(x[ids], y[ids], None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z = model.deq(x[:256]).detach().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(model.read(z), y[:256], reduction="sum"), z)
        value = model.deq.cell(z, x[:256])

        def product(v: Tensor, value: Tensor = value, z: Tensor = z) -> Tensor:
            return torch.autograd.grad(value, z, v, retain_graph=True)[0]

        figures, stored = adjoint_start(product, g, stored, 1e-3)
        found.append(figures)
    return found[1:]


def texts(seeds: int, epochs: int) -> dict[str, Any]:
    """Return the figures of training on text by start, and those of edited text with the weights of "warm"."""
    found: dict[str, Any] = {"cold": [], "warm": [], "edited": []}
    for seed in range(seeds):
        for arm in ("cold", "warm"):
            figures, model, held = text(seed, arm, epochs)
            found[arm].append(figures)
        found["edited"].append(edited(model, held, seed))
    return found


def run(seeds: int, epochs: int, steps: int, only: list[str] | None, earlier: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the figures by seed after each part; those of parts that are not in `only` are kept from `earlier`."""
    results: dict[str, Any] = {"seeds": seeds, "steps": steps}
    if only is not None and earlier is not None and earlier.is_file():
        results = json.loads(earlier.read_text()) | results
    parts: dict[str, Callable[[], Any]] = {
        "dipoles": lambda: [trajectory(seed, steps) for seed in range(seeds)],
        "text": lambda: texts(seeds, epochs),
        "digits": lambda: {arm: [digits(seed, arm, epochs) for seed in range(seeds)] for arm in ARMS},
        "adjoint, digits": lambda: [adjoints(seed, epochs) for seed in range(seeds)],
    }
    for part in only or parts:
        results[part] = parts[part]()
        spent(part)
        yield results


def spent(part: str) -> None:
    """Report the processor time until the end of a part."""
    print(f"{part}: {time.process_time():.0f} s of processor time so far", file=sys.stderr, flush=True)


def spread(values: Any, digits: int = 2) -> str:
    """Return the mean over seeds and its standard deviation."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.{digits}f}"


def rows(results: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the rows of the table of the parts measured: evaluations per sample after the first epoch or step."""

    def row(problem: str, start: str, evaluations: Any, last: Any = None, quality: str = "") -> dict[str, str]:
        return {"problem": problem, "start": start, "evaluations": spread(evaluations),
                "in the last epoch": "" if last is None else spread(last), "quality": quality}  # fmt: skip

    for part, quality in (("digits", "accuracy"), ("text", "perplexity")):
        for arm, runs in results.get(part, {}).items():
            if arm != "edited":
                counts, last = zip(
                    *((np.mean(one["evaluations"][1:]), one["evaluations"][-1]) for one in runs), strict=True
                )
                yield row(part, arm, counts, last, f"{quality} {spread([one[quality] for one in runs])}")
    edits = results.get("text", {}).get("edited", [])
    for start in edits[0] if edits else ():
        yield row("edited text", start, [one[start] for one in edits])
    dipoles = results.get("dipoles", [])
    for start in dipoles[0]["evaluations"] if dipoles else ():
        error = max(one["largest error"][start] for one in dipoles)
        counts = [one["evaluations"][start] for one in dipoles]
        yield row("dipoles", start, counts, quality=f"largest error {error:.1e}")


def adjoint_rows(results: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield vjps of the adjoint solve from zero and from the stored u, for the parts measured."""
    table = {"dipoles": [one["adjoint"] for one in results.get("dipoles", [])]}
    for name, epoch in (("second", 0), ("last", -1)):
        table[f"digits, {name} epoch"] = [one[epoch] for one in results.get("adjoint, digits", [])]
    for problem, figures in table.items():
        if figures:
            cold, warm, left = np.mean(figures, axis=0)
            yield {"problem": problem, "vjps from zero": f"{cold:.2f}", "vjps from stored u": f"{warm:.2f}",
                   "residual of stored u": f"{left:.2g}"}  # fmt: skip


def main() -> None:
    """Measure, print the tables, and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="of the trajectory")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure only this, keep the rest of the file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for results in run(given.seeds, given.epochs, given.steps, given.part, given.json):
        if given.json is not None:
            given.json.write_text(json.dumps(results, indent=1) + "\n")
    for table in (list(rows(results)), list(adjoint_rows(results))):
        print(markdown(table, tuple(table[0])), end="\n\n")


if __name__ == "__main__":
    main()

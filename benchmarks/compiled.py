"""Compiled and exported models beside eager ones: a training step, and the latency of inference (CPU, one thread).

    python -m benchmarks.compiled --json docs/benchmarks/compiled.json --page

The model is an MLP, a layer whose cell is a transformer block (attention and MLP, both with norms), and an MLP. All
ways of running it take turns in every round, and ratios are taken within a round.

- *graph break*: the layer cannot be captured, so that the compiler splits the model at the solve (PyTorch before 2.6).
- *one graph*: `torch.compile(model, fullgraph=True)`, where the solve is one operator.
- *cell compiled*: the same with `DEQ(torch.compile(cell))`.
- *floor*: the evaluations and vjps of that step as compiled code without its guards, and one compiled step of MLP, cell
  and MLP. Nothing in it decides, mixes or solves.

An exported program has a solver of its own, so steps are given for both. `jax.export` runs in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from deqcore_torch import captured
from deqcore_torch.nn import DEQ
from torch import Tensor, nn

from deqcore.bench.machine import describe
from deqcore.bench.report import machine_text, markdown, spread
from deqcore.bench.timing import Clock, Spread, interleave

BATCH, TOKENS, HEADS = 8, 16, 4
WIDTHS: Final = (64, 128)
PARTS: Final = ("training", "inference", "jax")
STEP_TARGET: Final = 0.85  # of the step with a graph break
LATENCY_TARGET: Final = 1.1  # of eager code
RTOL: Final = 1e-4

Ways = dict[str, Callable[[], object]]
Row = dict[str, Any]


class Block(nn.Module):
    """A transformer block with norms after its two parts, as the cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        for linear in (self.mix, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.5 / linear.in_features**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return f(z, x), `(batch, tokens, width)`."""
        batch, tokens, width = z.shape
        query, key, value = self.mix(z + x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        z = self.first(0.3 * z + self.out(read.reshape(batch, tokens, width)) + x)
        result: Tensor = self.second(z + self.down(nn.functional.gelu(self.up(z))))
        return result


class Model(nn.Module):
    """MLP, layer, MLP, each of the outer two added to its input."""

    def __init__(self, width: int, *, compiled_cell: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = Block(width)
        self.layer = DEQ(torch.compile(block) if compiled_cell else block, forward__rtol=RTOL)
        self.before, self.after = mlp(width), mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, tokens, width)`."""
        z = self.layer(x + self.before(x))
        result: Tensor = z + self.after(z)
        return result


def mlp(width: int) -> nn.Sequential:
    """Return norm, linear, GELU, linear."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def training(width: int) -> Ways:
    """Return a training step for each way of running the model."""
    x = data(width)
    eager, one, region = Model(width), Model(width), Model(width, compiled_cell=True)
    broken = split(width)
    return {
        "eager": step(eager, eager, x),
        "graph break": step(broken, torch.compile(broken), x),
        "one graph": step(one, torch.compile(one, fullgraph=True), x),
        "one graph, cell compiled": step(region, torch.compile(region, fullgraph=True), x),
        "floor": floor(Model(width), x),
    }


def split(width: int) -> Model:
    """Return a model whose layer the compiler cannot capture."""
    known, captured.AVAILABLE = captured.AVAILABLE, False
    try:
        return Model(width)
    finally:
        captured.AVAILABLE = known


def step(model: Model, run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """Return a call that takes the gradients of the parameters."""
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(run(x).square().mean(), parameters)


def floor(model: Model, x: Tensor) -> Callable[[], object]:
    """Return a call of what a step of the model evaluates, compiled."""
    solution = model.layer.solve(x + model.before(x))
    torch.autograd.grad((solution.value + model.after(solution.value)).square().mean(), list(model.parameters()))
    assert solution.backward is not None
    evaluations, vjps = int(solution.evaluations.max()), int(solution.backward.vjps.max())
    z = solution.z.detach().requires_grad_()
    f, whole = torch.compile(model.layer.cell), torch.compile(Once(model))
    frozen = Block(x.shape[2]).requires_grad_(False)
    vjp_of, final = torch.compile(frozen), step(model, lambda x: whole(z.detach(), x), x)
    counted = step_parts(f, vjp_of, z, x, evaluations, vjps)

    def run() -> None:
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            counted()
            final()

    counted(), final()  # compiled with guards
    return run


def step_parts(
    f: Callable[..., Tensor], vjp_of: Callable[..., Tensor], z: Tensor, x: Tensor, evaluations: int, vjps: int
) -> Callable[[], None]:
    """Return a call of the evaluations of f and of the vjps by one record of it."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(evaluations):
                f(z, x)
        y = vjp_of(z, x)
        for _ in range(vjps):
            torch.autograd.grad(y, z, y.detach(), retain_graph=True)

    return run


class Once(nn.Module):
    """The model with one evaluation of its cell in the place of the solve."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return `(batch, tokens, width)`."""
        z = self.model.layer.cell(z, x + self.model.before(x))
        result: Tensor = z + self.model.after(z)
        return result


def data(width: int) -> Tensor:
    """Return the input."""
    return torch.randn(BATCH, TOKENS, width, generator=torch.Generator().manual_seed(1))


def inference(width: int, folder: Path) -> tuple[Ways, dict[str, int]]:
    """Return a call without gradients for each way of exporting the model, and the steps of the slowest sample."""
    model, x = Model(width).eval(), data(width)
    program = torch.export.export(model, (x,))
    exported = program.module()
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    ways: Ways = {
        "eager": lambda: model(x),
        "torch.export": lambda: exported(x),
        "AOTInductor": bound(torch._inductor.aoti_load_package(package), x),
    }
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        ways["ONNX"] = onnx(program, x, folder)
    report = torch.export.export(Steps(model).eval(), (x,)).module()
    with torch.no_grad():
        return ways, {"eager": int(Steps(model)(x)), "exported": int(report(x))}


class Steps(nn.Module):
    """The steps of the slowest sample."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return a scalar."""
        steps: Tensor = self.model.layer.solve(x + self.model.before(x)).steps.max()
        return steps


def bound(run: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    """Return a call of `run` with x."""
    return lambda: run(x)


def onnx(program: Any, x: Tensor, folder: Path) -> Callable[[], object]:
    """Return a call of onnxruntime, on one thread."""
    onnxruntime = import_module("onnxruntime")
    torch.onnx.export(program, (), str(folder / "model.onnx"), verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


def timed(ways: Ways, base: str, target: dict[str, float], given: argparse.Namespace) -> list[Row]:
    """Return a row for each way: seconds, and the ratios to `base` and to eager code within rounds."""
    for way in ways.values():
        for _ in range(3):
            way()
    seconds = interleave(ways, rounds=given.rounds, budget=given.budget, clock=clock_of(given)).seconds
    return [
        {
            "way": name,
            "seconds": each,
            "base": base,
            "ratio": summary(Spread.of_ratios(each, seconds[base])),
            "of eager": summary(Spread.of_ratios(each, seconds["eager"])),
            "target": target.get(name),
        }
        for name, each in seconds.items()
    ]


def summary(found: Spread) -> list[float]:
    """Return median, lower and upper quartile."""
    return [found.median, found.low, found.high]


def clock_of(given: argparse.Namespace) -> Clock:
    """Return the clock that the command line asks for."""
    return time.process_time if given.busy else time.perf_counter


def jax_rows(folder: Path, given: argparse.Namespace) -> list[Row]:
    """Export with JAX here, and time the program in a fresh process beside `jit` of the same function."""
    from benchmarks import compiled_jax

    compiled_jax.write(folder / "program")
    command = [sys.executable, "-m", "benchmarks.compiled_jax", str(folder / "program"), str(given.rounds)]
    done = subprocess.run(command + ["--busy"] * given.busy, capture_output=True, text=True, check=True)
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return the figures that are asked for, and those of the file for the others."""
    torch.set_num_threads(1)
    kept = json.loads(given.json.read_text()) if given.json is not None and given.json.exists() else {}
    result: dict[str, Any] = {"training": {}, "inference": {}, "steps": {}} | kept
    result |= {
        "command": f"python -m benchmarks.compiled --widths {' '.join(map(str, given.widths))} --rounds {given.rounds} "
        f"--budget {given.budget:g}" + " --busy" * given.busy,
        "clock": "processor time" if given.busy else "wall-clock time",
        "machine": describe(["torch", "onnxruntime", "jax"]),
    }
    for width in given.widths if "training" in given.only else ():
        targets = {"one graph": STEP_TARGET, "one graph, cell compiled": STEP_TARGET}
        result["training"][str(width)] = timed(training(width), "graph break", targets, given)
        torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        for width in given.widths if "inference" in given.only else ():
            ways, result["steps"][str(width)] = inference(width, Path(name))
            targets = dict.fromkeys(set(ways) - {"eager"}, LATENCY_TARGET)
            result["inference"][str(width)] = timed(ways, "eager", targets, given)
        if "jax" in given.only and find_spec("jax") and find_spec("flatbuffers"):
            result["inference"]["JAX"] = jax_rows(Path(name), given)
    return result


def table(sections: Mapping[str, list[Row]], heading: str) -> str:
    """Return the rows of one kind as Markdown."""
    shown = []
    for case, rows in sections.items():
        for row in rows:
            median, low, high = row["ratio"]
            target = row["target"]
            verdict = "" if target is None else f"≤ {target:g}: {'met' if median <= target else 'missed'}"
            shown.append(
                {
                    "width": case,
                    "way": row["way"],
                    "ms (quartiles)": spread(Spread.of([1e3 * second for second in row["seconds"]])),
                    heading: f"{median:.2f} ({low:.2f}–{high:.2f})",
                    "of eager": f"{row['of eager'][0]:.2f}",
                    "target": verdict,
                }
            )
    return markdown(shown, tuple(shown[0])) if shown else "Not measured."


def page(result: Mapping[str, Any]) -> str:
    """Return docs/benchmarks/compiled.md."""
    rest = (__doc__ or "").partition("--page\n\n")[2]
    steps = "; ".join(f"width {w}: eager {s['eager']}, exported {s['exported']}" for w, s in result["steps"].items())
    return "\n\n".join(
        [
            "# Compiled and exported models",
            f"Written by `{result['command']} --json docs/benchmarks/compiled.json --page`; {result['clock']}. "
            f"{machine_text(result['machine'])}",
            rest.strip(),
            "## A training step",
            table(result["training"], "of the graph break"),
            "## Inference",
            f"Steps of the slowest sample, {steps}.",
            table(result["inference"], "of the first row"),
            "What was tried to meet the targets is in [the note](../notes/compile.md).\n",
        ]
    )


def main() -> None:
    """Measure, print the tables and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for the rounds of one table and width")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these; keep the others")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--busy", action="store_true", help="count processor time, for a machine that is never quiet")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--page", action="store_true", help="write the page beside the file of --json")
    given = parser.parse_args()
    if given.page and given.json is None:
        parser.error("--page needs --json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = measure(given)
    print(page(result))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if given.page:
            given.json.with_suffix(".md").write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()

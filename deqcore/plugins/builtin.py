"""The records of everything that ships with deqcore. Their names are reserved.

This table is read before any plugin is loaded, so a program that uses built-ins only never pays for discovery. To add
a solver, a strategy or a command, add its line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from deqcore.plugins.specs import (
    BackendSpec,
    CommandSpec,
    DataSpec,
    Kind,
    ModelSpec,
    SinkSpec,
    SolverSpec,
    Spec,
    StrategySpec,
    TrainerSpec,
)

BACKENDS: Final = (
    BackendSpec(
        "numpy",
        "deqcore_numpy.backend:NumpyBackend",
        "reference and oracle; dense derivatives",
        array_modules=("numpy",),
    ),
    BackendSpec(
        "torch",
        "deqcore_torch.backend:TorchBackend",
        "PyTorch, eager; gradients through autograd",
        package="torch",
        extra="torch",
        array_modules=("torch",),
        compiler=("torch._dynamo", "deqcore_torch.captured"),
    ),
    BackendSpec(
        "jax",
        "deqcore_jax.backend:JaxBackend",
        "JAX; traceable by jit, grad and vmap",
        package="jax",
        extra="jax",
        array_modules=("jax", "jaxlib"),
        context="deqcore_jax.jit_context:settings",
    ),
)

SOLVERS: Final = (
    SolverSpec("auto", "deqcore.solvers.auto:Auto", "plain steps; accelerates, then escalates, where that pays"),
    SolverSpec("picard", "deqcore.solvers.picard:Picard", "damped fixed-point iteration"),
    SolverSpec("anderson", "deqcore.solvers.anderson:Anderson", "Anderson acceleration"),
    SolverSpec(
        "broyden",
        "deqcore.solvers.broyden:Broyden",
        "Broyden's good method; leaves an inverse-Jacobian estimate",
    ),
    SolverSpec("newton-krylov", "deqcore.solvers.newton_krylov:NewtonKrylov", "inexact Newton with GMRES"),
)

STRATEGIES: Final = (
    StrategySpec("exact-ift", "deqcore.backward.exact_ift:ExactIFT", "solve the adjoint equation to tolerance"),
    StrategySpec(
        "broyden-reuse",
        "deqcore.backward.broyden_reuse:BroydenReuse",
        "reuse the forward solver's inverse-Jacobian estimate",
    ),
    StrategySpec("adaptive", "deqcore.backward.adaptive:Adaptive", "for training: as few vjps as audits allow"),
    StrategySpec("jacobian-free", "deqcore.backward.jacobian_free:JacobianFree", "take the cotangent as it is"),
    StrategySpec("neumann", "deqcore.backward.neumann:Neumann", "a truncated Neumann series"),
    StrategySpec("phantom", "deqcore.backward.phantom:Phantom", "damped unrolled steps from the fixed point"),
    StrategySpec("unrolled", "deqcore.backward.unrolled:Unrolled", "backpropagation through the steps"),
    StrategySpec("reversible", "deqcore.backward.reversible:Reversible", "through the steps, at constant memory"),
    StrategySpec("looped", "deqcore.backward.looped:Looped", "through the last of a random number of steps"),
)

TRAINERS: Final = (
    TrainerSpec("torch", "deqcore_torch.study:TorchTrainer", "PyTorch training loop", backend="torch"),
    TrainerSpec("jax", "deqcore_jax.study:JaxTrainer", "JAX training loop", backend="jax"),
)

DATA: Final = (
    DataSpec("digits", "deqcore.study.data.digits:load", "scikit-learn's 1797 handwritten digits", gives="image"),
    DataSpec("images", "deqcore.study.data.images:load", "a folder train/CLASS/*.jpg", gives="image"),
    DataSpec("arrays", "deqcore.study.data.arrays:load", "an NPZ, or a folder of IDX files"),
    DataSpec("text", "deqcore.study.data.text:load", "a text file, by characters or words", gives="tokens"),
)

MODELS: Final = (
    ModelSpec("dense", "deqcore.study.models.dense:Dense", "a dense cell"),
    ModelSpec("dense-explicit", "deqcore.study.models.dense:DenseExplicit", "two explicit layers with its weights"),
    ModelSpec("conv", "deqcore.study.models.conv:Conv", "a convolutional cell on two resolutions"),
    ModelSpec("conv-explicit", "deqcore.study.models.conv:ConvExplicit", "its cell applied twice"),
    ModelSpec("slow", "deqcore.study.models.slow:Slow", "the dense cell with slow modes"),
    ModelSpec("attention", "deqcore.study.models.attention:Attention", "a causal transformer block"),
    ModelSpec("attention-explicit", "deqcore.study.models.attention:AttentionExplicit", "its block applied twice"),
)

SINKS: Final = (
    SinkSpec("jsonl", "deqcore.monitor.sinks.jsonl:JsonlSink", "JSON lines; the log that watch and report read"),
    SinkSpec("csv", "deqcore.monitor.sinks.csv:CsvSink", "one column per metric"),
    SinkSpec("tensorboard", "deqcore.monitor.sinks.tensorboard:TensorBoardSink", "scalars over training steps"),
    SinkSpec("prometheus", "deqcore.monitor.sinks.prometheus:PrometheusSink", "the latest values over HTTP"),
    SinkSpec(
        "prometheus-textfile",
        "deqcore.monitor.sinks.prometheus:PrometheusTextfileSink",
        "the latest values for the node exporter",
    ),
    SinkSpec("mlflow", "deqcore.monitor.sinks.mlflow:MlflowSink", "metrics of an MLflow run"),
    SinkSpec("wandb", "deqcore.monitor.sinks.wandb:WandbSink", "metrics of a Weights & Biases run"),
)

# One line per command; the target is a typer app or a function. `deqcore --help` imports none of them.
COMMANDS: Final = (
    CommandSpec("study", "deqcore.cli.study:command", "Train one model under several strategies, compare, report."),
    CommandSpec("backends", "deqcore.cli.backends:command", "List the backends and whether they are installed."),
    CommandSpec("solvers", "deqcore.cli.solvers:command", "List the solvers and their options."),
    CommandSpec("strategies", "deqcore.cli.strategies:command", "List the backward strategies and their options."),
    CommandSpec("check", "deqcore.cli.check:app", "Prove gradients, backends, solvers and strategies right."),
    CommandSpec("explain", "deqcore.cli.explain:command", "Every strategy on your problem, and the cheapest."),
    CommandSpec("monitor", "deqcore.cli.monitor:app", "Watch and report what a Monitor has logged."),
    CommandSpec("bench", "deqcore.cli.bench:command", "Compare the time of solves with the time of f."),
    CommandSpec("plugins", "deqcore.cli.plugins:command", "List the plugins and whether they work."),
    CommandSpec("config", "deqcore.cli.config:app", "Show the settings and where each comes from."),
)


# Sections of a config that the core does not read, each with the function that finds mistakes in it.
SECTIONS: Final[Mapping[str, str]] = MappingProxyType({"monitor": "deqcore.monitor.settings:check_section"})


def _by_name(records: Iterable[Spec]) -> Mapping[str, Spec]:
    return MappingProxyType({record.name: record for record in records})


BUILTIN: Final[Mapping[Kind, Mapping[str, Spec]]] = MappingProxyType(
    {
        "backend": _by_name(BACKENDS),
        "solver": _by_name(SOLVERS),
        "strategy": _by_name(STRATEGIES),
        "sink": _by_name(SINKS),
        "trainer": _by_name(TRAINERS),
        "data": _by_name(DATA),
        "model": _by_name(MODELS),
        "command": _by_name(COMMANDS),
    }
)

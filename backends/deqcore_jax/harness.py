"""The harness for tests, diagnostics and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import jax
import jax.numpy as jnp

from deqcore.abc.arrays import precision_of
from deqcore.abc.harness import Harness
from deqcore.errors import BackendError
from deqcore.types import Tree
from deqcore_jax.closure import is_array, is_differentiable

QUICK: Final = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of XLA for CPUs with which a program compiles in a fifth of the time."""


class JaxHarness(Harness):
    """XLA's compiler, double precision, every device's queue, and modules that are pytrees."""

    def jit(self, fn: Callable[..., Tree]) -> Callable[..., Tree]:
        compiled: Callable[..., Tree] = jax.jit(fn)
        return compiled

    def jit_once(self, fn: Callable[..., Tree]) -> Callable[..., Tree]:
        options = QUICK if jax.default_backend() == "cpu" else None
        compiled: Callable[..., Tree] = jax.jit(fn, compiler_options=options)
        return compiled

    def parameters(self, cell: Tree) -> tuple[Tree, Callable[[Tree], Callable[..., Tree]]]:
        leaves, structure = jax.tree.flatten(cell)
        trained = [i for i, leaf in enumerate(leaves) if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)]

        def bind(given: Tree) -> Callable[..., Tree]:
            changed = dict(zip(trained, given, strict=True))
            made: Callable[..., Tree] = jax.tree.unflatten(structure, [changed.get(i, x) for i, x in enumerate(leaves)])
            return made

        return [leaves[i] for i in trained], bind

    def module_arrays(self, module: Any) -> dict[str, jax.Array]:
        pairs = jax.tree_util.tree_leaves_with_path(module)
        return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in pairs if is_array(leaf)}

    @contextmanager
    def preserved(self, module: Any) -> Iterator[Any]:
        yield self.in_trace(module)

    def in_trace(self, module: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(module), jax.tree.leaves(module))

    def module_gradients(
        self, module: Any, call: Callable[..., jax.Array], inputs: tuple[Tree, ...], cotangent: jax.Array
    ) -> dict[str, jax.Array]:
        paths, structure = jax.tree_util.tree_flatten_with_path((module, inputs))
        leaves = [leaf for _, leaf in paths]
        moving = [i for i, leaf in enumerate(leaves) if is_array(leaf) and is_differentiable(leaf)]

        def of_leaves(moved: list[jax.Array]) -> jax.Array:
            changed = dict(zip(moving, moved, strict=True))
            made, arguments = jax.tree.unflatten(structure, [changed.get(i, x) for i, x in enumerate(leaves)])
            return call(made, *arguments)

        _, vjp = jax.vjp(of_leaves, [leaves[i] for i in moving])
        return {_name(paths[i][0]): gradient for i, gradient in zip(moving, vjp(cotangent)[0], strict=True)}

    def converted(self, module: Any, *, dtype: str | None = None, device: str | None = None) -> Any:
        def change(leaf: Any) -> Any:
            if is_array(leaf) and dtype is not None and jnp.issubdtype(leaf.dtype, jnp.inexact):
                leaf = leaf.astype(precision_of(str(leaf.dtype), dtype))
            return jax.device_put(leaf, jax.devices(device)[0]) if is_array(leaf) and device is not None else leaf

        return jax.tree.map(change, module)

    def devices(self) -> tuple[str, ...]:
        kinds = ("cpu", jax.default_backend())
        return tuple(dict.fromkeys(kinds))

    def global_state(self) -> dict[str, Any]:
        return {f"jax.config.{name}": value for name, value in jax.config.values.items()}

    def restore_global_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            jax.config.update(name.removeprefix("jax.config."), value)

    @contextmanager
    def high_precision(self) -> Iterator[None]:
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            yield

    def synchronize(self) -> None:
        for device in jax.local_devices():  # work on one device runs in order, so the last piece waits for all
            jax.block_until_ready(jax.device_put(0.0, device) + 0.0)

    def peak_memory(self, fn: Callable[..., Any], *args: jax.Array) -> int:
        stats = jax.jit(fn).lower(*args).compile().memory_analysis()
        if stats is None:
            raise BackendError(f"XLA does not tell the memory of a program on {jax.default_backend()!r}.")
        return int(stats.temp_size_in_bytes + stats.output_size_in_bytes)


def _name(path: tuple[Any, ...]) -> str:
    """Return the name of a leaf of `(module, inputs)`."""
    kind, rest = path[0].idx, jax.tree_util.keystr(path[1:])
    return rest.lstrip(".") if kind == 0 else f"inputs{rest}"

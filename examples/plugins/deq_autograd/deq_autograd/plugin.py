"""What the entry point names: hooks and records only, so that listing imports no framework."""

from collections.abc import Iterator

from deqcore.plugins import BackendSpec, hookimpl


@hookimpl
def deqcore_backends() -> Iterator[BackendSpec]:
    yield BackendSpec(
        "autograd",
        "deq_autograd.backend:AutogradBackend",
        summary="NumPy arrays with HIPS autograd's tape",
        package="autograd",
        array_modules=("autograd", "numpy"),  # plain NumPy arrays are its arrays, too, where the config says so
    )

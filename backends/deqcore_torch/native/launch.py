"""Launch Triton kernels, and cache their compiled code.

Triton's own launcher inspects every argument in each launch, which takes several times as long as the launch: we
measured 90 µs for 25 arguments, in a step of 0.6 ms.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor


class Kernel:
    """A Triton function whose constants follow its other parameters.

    Of the numbers only `n` is specialised: if it is 1, or a multiple of 16.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.names: list[str] = list(function.arg_names)
        self.n = self.names.index("n") if "n" in self.names else None
        self.compiled: dict[Any, Any] = {}
        self.direct = isinstance(function, triton.JITFunction)  # the interpreter compiles nothing

    def __call__(self, grid: tuple[int, ...], *arguments: Any, warps: int = 4, **constants: Any) -> None:
        """Run on the current device.

        Args:
            grid: programs, up to three numbers.
            arguments: tensors and numbers, the first one a tensor.
            warps: number of warps of each program.
            constants: by name.
        """
        given = [constants[name] for name in self.names[len(arguments) :]]
        key = self._key(arguments, given, warps) if self.direct else None
        code = None if key is None else self.compiled.get(key)
        if code is not None:
            try:
                code[(*grid, 1, 1)[:3]](*arguments, *given)
            except TypeError:  # this version of Triton launches compiled code differently
                self.direct = False
            else:
                return
        code = self.function[grid](*arguments, *given, num_warps=warps)
        if key is not None:
            self.compiled[key] = code

    def _key(self, arguments: tuple[Any, ...], constants: list[Any], warps: int) -> tuple[Any, ...] | None:
        """Return the cache key of compiled code; None if a tensor is not aligned like allocated ones."""
        addresses, kinds = 0, []
        for x in arguments:
            if type(x) is Tensor:
                addresses |= x.data_ptr()
                kinds.append(x.dtype)
        n = 0 if self.n is None else arguments[self.n]
        aligned = addresses % 16 == 0
        return (arguments[0].device.index, warps, n == 1, n % 16 == 0, *kinds, *constants) if aligned else None

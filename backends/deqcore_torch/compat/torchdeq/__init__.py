"""torchdeq's call signature on deqcore: `deq = get_deq(...)`, then `z_out, info = deq(func, z_init)`.

Replace `import torchdeq` by `import deqcore_torch.compat.torchdeq as torchdeq`, or call `install()` before code that
you do not want to change. Modules have torchdeq's names (`norm`, `loss`, `solver`, `dropout`, `utils`).

The same as in torchdeq: `func` takes the tensors of the state as positional arguments; `z_out` is a list of states
whose last one is the best; options have torchdeq's names. Training returns f of the iterate that `info` describes
(with the phantom gradient: the result of its steps), evaluation the iterate itself. Different, on purpose:

- Residuals are 2-norms of f(z) − z over a sample's whole state, for every solver, and each sample stops separately.
- A func that couples the rows of the state needs `get_deq(batch=False)`; otherwise its first backward pass warns.
- `f_max_iter` counts solver steps; the first evaluation of f comes on top.
- `b_tol` is relative to the cotangent in both stop modes: an absolute tolerance on a gradient has no scale.
- The gradient without `ift` is `phantom`, as in torchdeq; with `ift` the last state has `exact-ift`, the others have
  `phantom`, and `b_solver` may be "gmres".
- `info` has `status` per sample. Its traces hold one number, so that memory does not grow with the steps.
- Unknown options are errors.
"""

from __future__ import annotations

import sys
from typing import Final

from deqcore_torch.compat.torchdeq import config, core, dropout, loss, norm, solver, utils
from deqcore_torch.compat.torchdeq.core import (
    DEQBase,
    DEQIndexing,
    DEQSliced,
    TorchDEQ,
    get_deq,
    register_deq,
    reset_deq,
)
from deqcore_torch.compat.torchdeq.dropout import (
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    VariationalDropToken1d,
    VariationalDropToken2d,
    VariationalDropToken3d,
    reset_dropout,
)
from deqcore_torch.compat.torchdeq.loss import fp_correction, jac_reg, power_method, register_weight_func
from deqcore_torch.compat.torchdeq.norm import apply_norm, register_norm, register_norm_module, remove_norm, reset_norm
from deqcore_torch.compat.torchdeq.solver import get_solver, register_solver, solver_stat_from_final_step
from deqcore_torch.compat.torchdeq.utils import add_deq_args, mem_gc, mixed_init

__all__ = [
    "DEQBase",
    "DEQIndexing",
    "DEQSliced",
    "TorchDEQ",
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "add_deq_args",
    "apply_norm",
    "fp_correction",
    "get_deq",
    "get_solver",
    "install",
    "jac_reg",
    "mem_gc",
    "mixed_init",
    "power_method",
    "register_deq",
    "register_norm",
    "register_norm_module",
    "register_solver",
    "register_weight_func",
    "remove_norm",
    "reset_deq",
    "reset_dropout",
    "reset_norm",
    "solver_stat_from_final_step",
    "uninstall",
]

MODULES: Final = {
    "core": core,
    "dropout": dropout,
    "loss": loss,
    "norm": norm,
    "solver": solver,
    "utils": utils,
    "utils.arg_utils": config,
    "utils.mem": utils,
    "utils.init": utils,
}


def install() -> None:
    """Let `import torchdeq` and `from torchdeq.norm import …` find these modules, in this process.

    Call it before the code that imports torchdeq; the package itself need not be installed. `uninstall` undoes it.

    Example:
        >>> install()
        >>> from torchdeq import get_deq
        >>> from torchdeq.norm import apply_norm
        >>> get_deq.__module__
        'deqcore_torch.compat.torchdeq.core'
        >>> uninstall()
    """
    uninstall()
    sys.modules["torchdeq"] = sys.modules[__name__]
    for name, module in MODULES.items():
        sys.modules[f"torchdeq.{name}"] = module


def uninstall() -> None:
    """Let `import torchdeq` find the package itself again, for code that is imported later.

    Example:
        >>> install()
        >>> uninstall()
        >>> "torchdeq" in sys.modules
        False
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchdeq"]:
        del sys.modules[name]

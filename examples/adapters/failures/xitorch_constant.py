"""xitorch: Anderson acceleration of a constant function returns 0, and no warning."""

import warnings
from importlib.metadata import version

import torch
from xitorch.optimize import equilibrium

print("xitorch", version("xitorch"), "torch", torch.__version__)
b = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for method in ("broyden1", "anderson_acc"):
        z = equilibrium(lambda z, b: 0.0 * z + b, torch.zeros_like(b), params=(b,), method=method, maxiter=300)
        print(method, z.tolist(), "([[1.0, 2.0]] exactly)")
print("warnings:", [str(each.message).splitlines()[0] for each in caught])

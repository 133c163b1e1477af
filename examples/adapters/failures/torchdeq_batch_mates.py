"""torchdeq: a sample changes with the other samples of its batch, since all iterate until the slowest ends."""

import importlib.metadata

import torch
from torchdeq import get_deq

print("torchdeq", importlib.metadata.version("torchdeq"))
slope = torch.tensor([[0.2], [0.95]], dtype=torch.float64)
for solver in ("fixed_point_iter", "anderson", "broyden"):
    deq = get_deq(f_solver=solver, f_max_iter=300, f_tol=1e-3, f_stop_mode="rel", ift=True)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    with torch.no_grad():
        together = deq(lambda z: slope * z + 1.0, zero)[0][-1][0, 0]
        alone = deq(lambda z: slope[:1] * z + 1.0, zero[:1])[0][-1][0, 0]
    print(f"{solver}: {together:.9f} in a batch, {alone:.9f} alone, 1.25 exactly; relative change "
          f"{abs(together - alone) / 1.25:.1e}")  # fmt: skip

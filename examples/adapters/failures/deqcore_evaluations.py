"""deqcore: `sol.evaluations` counts those of the solve; the call evaluates f once more on torch."""

import torch

import deqcore

calls = []


def f(z, b):
    calls.append(1)
    return 0.5 * torch.tanh(z) + b


b = torch.tensor([[0.5, -0.25]], dtype=torch.float64)
sol = deqcore.fixed_point(f, torch.zeros_like(b), b, forward__solver="broyden", forward__rtol=1e-6)
print("reported:", sol.evaluations.tolist(), "calls of f:", len(calls))

"""Cells of the kinds in torchdeq's model collection, written against `import torchdeq`; see `cells` below.

The module is loaded twice, with torchdeq itself and with deqcore's replacement for it.
"""

import argparse

import torch
from torch import nn
from torchdeq import add_deq_args, get_deq, mem_gc, reset_deq
from torchdeq.dropout import VariationalDropout1d
from torchdeq.loss import fp_correction, jac_reg
from torchdeq.norm import apply_norm, register_norm_module, reset_norm
from torchdeq.solver import solver_stat_from_final_step


def options(*words):
    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    return parser.parse_args([*words])


class Spy(nn.Module):
    """A layer that remembers the function and the start of its latest call."""

    def __init__(self, deq):
        super().__init__()
        self.deq = deq

    def forward(self, func, start, **kwargs):
        self.func, self.start = func, list(start)
        return self.deq(func, start, **kwargs)


class Multiscale(nn.Module):
    """Two resolutions, each fused into the other, as in a multiscale equilibrium model of images."""

    def __init__(self, args):
        super().__init__()
        self.block = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(2))
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False)
        self.up = nn.Conv2d(4, 4, 1, bias=False)
        apply_norm(self, args=args)
        self.deq = get_deq(args)

    def f(self, a, b, x):
        a1 = torch.tanh(self.norms[0](0.3 * self.block[0](a) + x))
        b1 = torch.tanh(self.norms[1](0.3 * self.block[1](b) + nn.functional.avg_pool2d(x, 2)))
        up = nn.functional.interpolate(self.up(b1), scale_factor=2, mode="nearest")
        return 0.3 * torch.tanh(a1 + up), 0.3 * torch.tanh(b1 + self.down(a1))

    def forward(self, x):
        reset_norm(self)
        start = [torch.zeros_like(x), x.new_zeros(len(x), 4, *(n // 2 for n in x.shape[2:]))]
        z_out, info = self.deq(lambda a, b: self.f(a, b, x), start)
        return [torch.cat([part.flatten(1) for part in z], 1) for z in z_out], info


class Flow(nn.Module):
    """A hidden state and coordinates that a gated update moves, as in optical flow."""

    def __init__(self, args):
        super().__init__()
        self.gate = nn.Conv2d(6, 4, 3, padding=1)
        self.candidate = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 3, padding=1)
        apply_norm(self, args=args)
        self.deq = get_deq(args)

    def forward(self, x, writer=None, sradius_mode=False, **kwargs):
        reset_norm(self)
        grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=x.dtype) for n in x.shape[2:]), indexing="ij"))
        coords0 = grid.expand(len(x), -1, -1, -1)

        def func(h, c):
            flow = torch.tanh(0.5 * (c - coords0))
            u = torch.sigmoid(self.gate(torch.cat([h, flow], 1)))
            new = torch.tanh(0.4 * self.candidate(torch.cat([h, flow], 1)) + x)
            h = (1 - u) * h + u * new
            return h, coords0 + 0.5 * (c - coords0) + 0.2 * torch.tanh(self.head(h))

        start = torch.zeros_like(x), coords0
        z_out, info = self.deq(func, start, sradius_mode=sradius_mode, backward_writer=writer, **kwargs)
        return [torch.cat([h.flatten(1), (c - coords0).flatten(1)], 1) for h, c in z_out], info


class Filters(nn.Module):
    """Multiplicative filters, as in implicit representations; `skip` asks for no solver step."""

    def __init__(self, args):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        apply_norm(self.maps, args=args)
        self.deq = get_deq(args)

    def forward(self, x, skip=False):
        reset_norm(self.maps)
        u = [0.7 * torch.sin((i + 1) * x) for i in range(3)]

        def func(z):
            z = z + u[0]
            for linear, phase in zip(self.maps, u[1:], strict=True):
                z = linear(z) * phase
            return z

        z_out, info = self.deq(func, torch.zeros_like(x), solver_kwargs={"f_max_iter": 0} if skip else {})
        self.steps = info["nstep"].mean().item()
        return z_out, info


class Sequence(nn.Module):
    """Attention over tokens with one dropout mask for a solve, as in a language model."""

    def __init__(self, args, dropout=0.0):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.drop = VariationalDropout1d(dropout)
        self.args = args
        apply_norm(self, args=args, filter_out=["drop"])
        self.deq = get_deq(args)

    def func(self, z, x):
        q, k, v = (self.qkv(z) + x.repeat(1, 1, 3)).chunk(3, -1)
        mask = torch.triu(torch.ones(z.shape[1], z.shape[1], dtype=torch.bool), 1)
        a = torch.softmax((q @ k.transpose(1, 2) / 8**0.5).masked_fill(mask, -1e9), -1) @ v
        return self.drop(torch.tanh(0.3 * mem_gc(self.out, (a,)) + 0.3 * x))

    def forward(self, x):
        reset_deq(self)
        z_out, _ = self.deq(lambda z: self.func(z, x), torch.zeros_like(x))
        with torch.no_grad():
            info = solver_stat_from_final_step(z_out[-1], self.func(z_out[-1], x), self.args.grad[-1])
        return z_out, info

    def loss(self, x):
        z_out, _ = self.forward(x)
        total = fp_correction(lambda z, y: (z - y).square().mean(), (z_out, 0.5), gamma=self.args.gamma)
        z = z_out[-1].detach().requires_grad_()
        return total + 0.0 * jac_reg(self.func(z, x), z)


class Graph(nn.Module):
    """X = relu(W X A + B), as in implicit graph networks: W couples the rows of the state."""

    def __init__(self, args):
        super().__init__()
        self.W = nn.Parameter(torch.empty(6, 6).uniform_(-0.4, 0.4))
        self.Omega = nn.Parameter(torch.empty(6, 8).uniform_(-0.4, 0.4))
        apply_norm(self, args=args)
        self.deq = get_deq(args)

    def forward(self, x):
        reset_norm(self)
        adjacency = torch.ones(len(x), len(x), dtype=x.dtype) / (2.0 * len(x))
        b = self.Omega @ x.T @ adjacency
        z_out, info = self.deq(lambda z: torch.relu(self.W @ z @ adjacency + b), b)
        return [z.T for z in z_out], info


register_norm_module(Graph, "weight_norm", names=["W", "Omega"], dims=[0, 0])

cells = {"multiscale": Multiscale, "flow": Flow, "filters": Filters, "sequence": Sequence, "graph": Graph}
inputs = {"multiscale": (2, 4, 6, 6), "flow": (2, 4, 4, 4), "filters": (3, 8), "sequence": (2, 5, 8), "graph": (5, 8)}

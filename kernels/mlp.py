"""The feed-forward parts, driven by an MLPSpec: one for all tokens, or experts of which each token asks a few."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.linear import Linear
from headrace.kernels.ops.activation import activate
from headrace.kernels.spec import MLPSpec

__all__ = ["MLP", "Experts", "make_mlp"]


def make_mlp(spec: MLPSpec, hidden_size: int) -> nn.Module:
    """The feed-forward part of a block."""
    return MLP(spec, hidden_size) if spec.experts is None else Experts(spec, hidden_size)


class MLP(nn.Module):
    """Up, activation, down; a gate is stacked on the up projection."""

    def __init__(self, spec: MLPSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.up = Linear(hidden_size, spec.size * (2 if spec.gated else 1), bias=spec.bias)
        self.down = Linear(spec.size, hidden_size, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden]."""
        out: Tensor = self.down(activate(self.up(x), self.spec.activation, gated=self.spec.gated))
        return out


class Experts(nn.Module):
    """Experts behind a router (Jiang et al., 2024, "Mixtral of Experts")."""

    def __init__(self, spec: MLPSpec, hidden_size: int) -> None:
        super().__init__()
        assert spec.experts is not None
        self.per_token = spec.experts.per_token
        self.router = Linear(hidden_size, spec.experts.count)
        self.experts = nn.ModuleList([MLP(spec, hidden_size) for _ in range(spec.experts.count)])

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden]: the chosen experts' answers, weighted by what the router thinks of them."""
        probabilities = self.router(x).float().softmax(-1)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            rows, rank = (chosen == index).nonzero(as_tuple=True)
            answers = self.experts[index](x[rows]) * weights[rows, rank, None]
            out.index_add_(0, rows, answers.to(out.dtype))
        return out

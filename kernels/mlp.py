"""The feed-forward parts, driven by an MLPSpec: one for all tokens, or experts of which each token asks a few."""

from __future__ import annotations

from torch import Tensor, nn

from headrace.kernels.linear import Linear, are_plain
from headrace.kernels.norm import Norm
from headrace.kernels.ops.experts import experts
from headrace.kernels.ops.linears import linear_chain
from headrace.kernels.ops.norm import NormWeights, norm
from headrace.kernels.spec import MLPSpec
from headrace.kernels.weight import Stack

__all__ = ["MLP", "Experts", "make_mlp"]


def make_mlp(spec: MLPSpec, hidden_size: int) -> MLP | Experts:
    """The feed-forward part of a block."""
    return MLP(spec, hidden_size) if spec.experts is None else Experts(spec, hidden_size)


class MLP(nn.Module):
    """Up, activation, down; a gate is stacked on the up projection."""

    def __init__(self, spec: MLPSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.up = Linear(hidden_size, spec.size * (2 if spec.gated else 1), bias=spec.bias)
        self.down = Linear(spec.size, hidden_size, bias=spec.bias)

    def forward(self, x: Tensor, before: NormWeights | None = None, residual: Tensor | None = None) -> Tensor:
        """[T, hidden] to [T, hidden], a norm before and an addition after it; the residual is lost, and may be x."""
        activation, gated = self.spec.activation, self.spec.gated
        if are_plain(self.up, self.down):
            first = self.up.projection(before, activation, gated=gated)
            return linear_chain(x, first, self.down.projection(), residual=residual)
        inner = self.up(x, before=before, activation=activation, gated=gated)
        out: Tensor = self.down(inner, residual=residual)
        return out

    def fold(self, norm: Norm) -> None:
        """Let the only norm that ever comes before be part of the product."""
        if isinstance(self.up, Linear):  # and nothing that an owner put in its place
            self.up.fold(norm)


class Experts(nn.Module):
    """Experts behind a router (Jiang et al., 2024, "Mixtral of Experts"), without biases."""

    def __init__(self, spec: MLPSpec, hidden_size: int) -> None:
        super().__init__()
        assert spec.experts is not None
        assert not spec.bias, "experts have no biases"
        count, rows = spec.experts.count, spec.size * (2 if spec.gated else 1)
        self.spec = spec
        self.per_token = spec.experts.per_token
        self.router = Linear(hidden_size, count)
        self.up = Stack(count, rows, hidden_size)
        self.down = Stack(count, hidden_size, spec.size)

    def forward(self, x: Tensor, before: NormWeights | None = None, residual: Tensor | None = None) -> Tensor:
        """[T, hidden] to [T, hidden]: the chosen experts' answers, weighted by what the router thinks of them.

        Before comes a norm, after it an addition.
        """
        if before is not None:
            x = norm(x, *before)
        probabilities = self.router(x).float().softmax(-1)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        weights /= weights.sum(-1, keepdim=True)
        return experts(
            x,
            chosen,
            weights,
            self.up.matrices,
            self.down.matrices,
            self.spec,
            up_scale=self.up.scale,
            down_scale=self.down.scale,
            residual=residual,
        )

    def fold(self, norm: Norm) -> None:
        """Nothing: router and experts read the same norm, so it is computed once."""

    def extra_repr(self) -> str:
        """For `print(model)`."""
        assert self.spec.experts is not None
        return f"{self.spec.experts.count} experts of {self.spec.size}, {self.per_token} a token"

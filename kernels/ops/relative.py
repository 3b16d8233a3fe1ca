"""T5's relative positions: distances in buckets, a learned number per bucket and head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headrace.kernels.spec import RelativeBias

__all__ = ["relative_bias", "relative_buckets"]


def relative_bias(table: Tensor, distances: Tensor, spec: RelativeBias, *, both_directions: bool) -> Tensor:
    """What is added to the scores: [heads, ...] float32 for `distances` [...] from query to key.

    Args:
        table: [buckets, heads].
        distances: position of the key minus that of the query.
        spec: of the buckets.
        both_directions: as in `relative_buckets`.
    """
    return table.float()[relative_buckets(distances, spec, both_directions=both_directions)].movedim(-1, 0)


def relative_buckets(distances: Tensor, spec: RelativeBias, *, both_directions: bool) -> Tensor:
    """The bucket of each distance; in `both_directions` keys after the query have half of them, else they do not count.

    Everything at least `max_distance` away shares the last bucket of its side.
    """
    num_buckets = spec.num_buckets
    buckets = torch.zeros_like(distances)
    if both_directions:
        num_buckets //= 2
        buckets = torch.where(distances > 0, num_buckets, 0)
        far = distances.abs()
    else:
        far = (-distances).clamp(min=0)
    exact = num_buckets // 2
    growing = torch.log(far.clamp(min=1).float() / exact) / math.log(spec.max_distance / exact) * (num_buckets - exact)
    large = (exact + growing.long()).clamp(max=num_buckets - 1)
    return buckets + torch.where(far < exact, far, large)

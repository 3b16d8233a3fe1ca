"""What vectors of whole texts are made of: the mean of a text's states, and the first one."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.ops.pair import pair

__all__ = ["pool"]


@pair
def pool(states: Tensor, starts: Tensor) -> Tensor:
    """The mean and the first of each text's states: [2, S, d] float32, and zeros of a text without any.

    Args:
        states: [T, d] of texts one after the other.
        starts: [S + 1], where they begin, and where the last one ends.
    """
    lens = starts.long().diff()
    texts = torch.arange(len(lens), device=states.device)
    text_of = torch.repeat_interleave(texts, lens, output_size=len(states))
    sums = torch.zeros(len(lens), states.shape[1], device=states.device).index_add_(0, text_of, states.float())
    first = states[starts[:-1].long().clamp(max=len(states) - 1)].float()
    return torch.stack((sums / lens.clamp(min=1)[:, None], first.masked_fill(lens[:, None] == 0, 0.0)))

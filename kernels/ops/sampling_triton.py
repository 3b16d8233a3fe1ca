"""The kernel of `draw`: the noise of all tokens that are kept, and the best of them, without storing either.

What a token must reach to be kept is found by PyTorch among the largest values; if they are too few to tell, which
happens where thousands of tokens are nearly alike, the row is left UNDECIDED. Programs take parts of rows, and skip
what holds no kept token.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.ops.sampling import CANDIDATES, UNDECIDED, SamplingRows, largest_values, scaled, threshold

__all__ = ["draw"]

_LANES = 256  # of four tokens each, which share the words of one counter: two a thread of four warps
_WARPS = 4
_PROGRAMS = 264  # two for each processor of the largest GPUs


def draw(logits: Tensor, largest: Tensor, rows: SamplingRows, drawn: Tensor) -> Tensor:
    """As `headrace.kernels.ops.sampling.draw`; UNDECIDED where the candidates do not tell what is kept."""
    vocab = logits.shape[1]
    z = scaled(logits, largest, rows, drawn)
    keep, known = rows.min_p[drawn].log(), None
    if rows.max_top_k or rows.any_top_p:
        values, _ = largest_values(z, min(vocab, max(CANDIDATES[-1], rows.max_top_k)))
        keep, known = threshold(z, values, rows, drawn, may_wait=False)
    blocks = triton.cdiv(vocab, 4 * _LANES)
    share = triton.cdiv(blocks, max(1, min(blocks, _PROGRAMS // len(drawn)))) * 4 * _LANES
    parts = triton.cdiv(vocab, share)
    scores = torch.empty((len(drawn), parts), dtype=torch.float32, device=z.device)
    winners = torch.empty((len(drawn), parts), dtype=torch.int64, device=z.device)
    _draw[(len(drawn), parts)](
        z, keep, rows.seeds, rows.choices, rows.positions, drawn, scores, winners, vocab, share,
        LANES=_LANES, num_warps=_WARPS, **OPTIONS,
    )  # fmt: skip
    tokens = winners.gather(1, scores.argmax(-1, keepdim=True))[:, 0]
    return tokens if known is None else torch.where(known, tokens, UNDECIDED)


@triton.jit(do_not_specialize=["vocab", "share"])
def _draw(
    z,
    keep,
    seeds,
    choices,
    positions,
    drawn,
    scores,
    winners,
    vocab,
    share,
    LANES: tl.constexpr,
):
    order = tl.program_id(0)
    row = tl.load(drawn + order)
    seed = tl.load(seeds + row)
    choice = tl.load(choices + row).to(tl.uint32)
    position = tl.load(positions + row).to(tl.uint32)
    least = tl.load(keep + order)
    values = z + order.to(tl.int64) * vocab
    first = tl.program_id(1) * share
    best = tl.full((LANES,), float("-inf"), tl.float32)
    winner = tl.zeros((LANES,), tl.int32)
    for begin in range(first, tl.minimum(first + share, vocab), 4 * LANES):
        lane = begin // 4 + tl.arange(0, LANES)
        z0 = tl.load(values + 4 * lane, mask=4 * lane < vocab, other=float("-inf"))
        z1 = tl.load(values + 4 * lane + 1, mask=4 * lane + 1 < vocab, other=float("-inf"))
        z2 = tl.load(values + 4 * lane + 2, mask=4 * lane + 2 < vocab, other=float("-inf"))
        z3 = tl.load(values + 4 * lane + 3, mask=4 * lane + 3 < vocab, other=float("-inf"))
        if tl.max(tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)), axis=0) >= least:
            zero = lane * 0
            w0, w1, w2, w3 = tl.philox(seed, lane, zero + position, zero + choice, zero)
            best, winner = _better(best, winner, z0, w0, 4 * lane, least)
            best, winner = _better(best, winner, z1, w1, 4 * lane + 1, least)
            best, winner = _better(best, winner, z2, w2, 4 * lane + 2, least)
            best, winner = _better(best, winner, z3, w3, 4 * lane + 3, least)
    largest = tl.max(best, axis=0)
    # Of equal ones the first; lanes have kept theirs, for their tokens come in order.
    token = tl.min(tl.where(best == largest, winner, 2147483647), axis=0)
    part = order.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scores + part, largest)
    tl.store(winners + part, token.to(tl.int64))


@triton.jit
def _better(best, winner, z, word, token, least):
    """The better of what each lane had, and of a token whose score is z plus the noise of its word."""
    score = tl.where(z >= least, z + _noise(word), float("-inf"))
    is_better = score > best
    return tl.where(is_better, score, best), tl.where(is_better, token, winner)


@triton.jit
def _noise(word):
    """As `headrace.kernels.ops.sampling.noise_of`."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # log(1 - u) for small u too: the rounding of 1 - u is divided out again.
    rest = 1.0 - u
    rounded = rest - 1.0
    log1p = tl.where(rounded == 0.0, -u, tl.log(rest) * (-u / tl.where(rounded == 0.0, 1.0, rounded)))
    return -tl.log(-log1p)

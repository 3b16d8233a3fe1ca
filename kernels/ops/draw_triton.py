"""Noise, and the best token of those of which edges have to tell whether they are kept: for the kernels of `choose`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import math

import triton
import triton.language as tl

from headrace.kernels.ops.edges_triton import NOWHERE, edge, open_tokens, reached
from headrace.kernels.ops.sampling import MAX_NOISE

__all__ = ["LEAST_NOISE", "best_of_open", "furthest_of", "noise_of"]

# The largest logit is always kept, and has this much noise at least; from so far off nobody can do better.
LEAST_NOISE = tl.constexpr(-math.log(-math.log(2.0**-24)) - 0.01)
_HOPELESS = tl.constexpr(MAX_NOISE - LEAST_NOISE.value)


@triton.jit
def furthest_of(min_p):
    """The largest distance that min_p allows and that has a chance."""
    return tl.minimum(tl.maximum(-tl.log(tl.maximum(min_p, 1e-30)), 0.0), _HOPELESS)


@triton.jit
def noise_of(word):
    """As `headrace.kernels.ops.sampling.noise_of`."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # log(1 - u) for small u too: the rounding of 1 - u is divided out again.
    rest = 1.0 - u
    rounded = rest - 1.0
    log1p = tl.where(rounded == 0.0, -u, tl.log(rest) * (-u / tl.where(rounded == 0.0, 1.0, rounded)))
    return -tl.log(-log1p)


@triton.jit
def best_of_open(
    score, token, row_logits, distances, names, unlisted, size, largest, temperature, start, end,
    rest, top_p, sure, total, min_p, seed, choice, position, TILE: tl.constexpr,
):  # fmt: skip
    """The best score and its token, of those given and of the tokens from `start` to `end` that are kept.

    Args:
        score, token: of those that are kept anyway.
        row_logits, distances, names, unlisted, size, largest, temperature, start, end: as for `open_tokens`.
        rest: how many of them top_k keeps; 0 for as many as there are.
        top_p, sure, total: what part of `total` is to be reached; `sure` is that of those kept anyway. With `rest` it
            is all that top_k keeps, and found out here.
        min_p, seed, choice, position: of the row.
    """
    last = end - 1
    if rest > 0:
        kth = edge(
            rest, row_logits, distances, names, unlisted, size, largest, temperature, start, end,
            MASSES=False, TILE=TILE,
        )  # fmt: skip
        last = tl.minimum(last, kth)
    if top_p < 1.0:
        if rest > 0:
            total = sure + reached(
                last, row_logits, distances, names, unlisted, size, largest, temperature, start, end,
                MASSES=True, TILE=TILE,
            )[0]  # fmt: skip
        missing = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64) - sure
        if missing > 0:
            nucleus = edge(
                missing, row_logits, distances, names, unlisted, size, largest, temperature, start, end,
                MASSES=True, TILE=TILE,
            )  # fmt: skip
            last = tl.minimum(last, nucleus)
        else:
            last = start - 1
    furthest = furthest_of(min_p)
    for begin in range(0, size, TILE):
        bits, name = open_tokens(
            begin, row_logits, distances, names, unlisted, size, largest, temperature, start, end, TILE
        )
        distance = bits.to(tl.float32, bitcast=True)
        kept = (bits <= last) & (distance <= furthest)
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            zero = name * 0
            w0, w1, w2, w3 = tl.philox(seed, name >> 2, zero + position, zero + choice, zero)
            odd, high = (name & 1) > 0, (name & 2) > 0
            word = tl.where(high, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
            here = tl.where(kept, noise_of(word) - distance, float("-inf"))
            best = tl.max(here, axis=0)
            winner = tl.min(tl.where(here == best, name, NOWHERE), axis=0)
            token = tl.where(best > score, winner, tl.where(best == score, tl.minimum(token, winner), token))
            score = tl.maximum(score, best)
    return score, token

"""Choosing the next token of every row of logits.

The function, row by row, on fp32:

    1. add `bias` (logit_bias; -inf for held-back tokens), then apply repetition, frequency and presence penalties
    2. temperature 0: the first index of the largest logit. Otherwise z = (logit - largest) / temperature, and
    3. keep the tokens with z >= the k-th largest z (top_k; ties stay); of those the likeliest whose probabilities reach
       top_p (ties of the last one stay); of those the ones with z >= log(min_p)
    4. of the kept tokens the one with the largest z + Gumbel noise: a draw from their softmax

Noise is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): any word can be computed alone.

    key      (seed & 0xffffffff, seed >> 32)
    counter  (token_id >> 2, position, choice, 0)    position: absolute index of the token in the output
    word     token_id & 3                            of the four that the counter gives
    u        min((float32(word) + 0.5) * 2**-32, 1 - 2**-24), in float32
    noise    -log(-log(1 - u)); at most MAX_NOISE

A draw depends on (seed, choice, position) and its own logits, never on its neighbours in the batch or on the step it
falls into, so a replayed stream goes on with the draws that would have come. The fourth counter word is for other uses
of the same stream.

`choose` (steps 2 to 4) is a pair; the rest runs anywhere, and on a device none of it waits. Three facts keep the
reference fast on a CPU without changing the function: the k largest values lie in the k blocks with the largest maxima;
a kept set is all tokens above one threshold; and no token further than MAX_NOISE below the best score can win, so
noise is drawn for few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.kernels.ops.pair import pair

__all__ = [
    "MAX_NOISE",
    "Logprobs",
    "SamplingRows",
    "choose",
    "dense_noise",
    "gumbel_noise",
    "logprobs_of",
    "noise_of",
    "philox",
]

MAX_NOISE = -math.log(-math.log1p(-(2.0**-33))) + 1e-4  # rounding of fp32 included

_BLOCK = 64  # tokens whose maximum is taken together
_CANDIDATES = (64, 1024)  # sizes tried before the whole vocabulary
_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """How each of R rows is to be sampled; the values may change under a captured graph."""

    temperature: Tensor  # [R] float32; 0 is greedy
    top_k: Tensor  # [R] int64; 0 keeps all
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32
    seeds: Tensor  # [R] int64: the bits of the unsigned seed
    choices: Tensor  # [R] int64
    positions: Tensor  # [R] int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log probabilities under the raw logits, before step 1."""

    chosen: Tensor  # [L] float32
    top_tokens: Tensor  # [L, n] int64, likeliest first; of equal ones the lower id
    top: Tensor  # [L, n] float32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words for each counter; all values are unsigned 32-bit numbers in int64, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps at 64 bits and the shift drags the sign along; its lower 32 bits are right all the same.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def gumbel_noise(seeds: Tensor, choices: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Noise [R, n] of `tokens` [R, n]; the rest is [R]."""
    words = _words(seeds, choices, positions, tokens >> 2)
    return noise_of(words.gather(-1, (tokens & 3)[..., None])[..., 0])


def dense_noise(seeds: Tensor, choices: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Noise [R, vocab] of all tokens, at a quarter of the cost per token."""
    lanes = torch.arange(-(-vocab // 4), device=seeds.device).expand(len(seeds), -1)
    return noise_of(_words(seeds, choices, positions, lanes).flatten(1)[:, :vocab])


def _words(seeds: Tensor, choices: Tensor, positions: Tensor, lanes: Tensor) -> Tensor:
    key = (seeds[:, None] & _MASK, (seeds[:, None] >> 32) & _MASK)
    counter = (lanes, positions[:, None], choices[:, None], torch.zeros_like(seeds)[:, None])
    return torch.stack(philox(counter, key), -1)


def noise_of(words: Tensor) -> Tensor:
    """Gumbel noise from random words."""
    u = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


# ------------------------------------------------------------------------------------------------ logits and maxima


def _argmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """First index of each row's largest value, and that value (NaN if there is one): `amax` of blocks is vectorized
    on a CPU where `argmax` is not, ten times faster."""
    vocab = values.shape[1]
    if vocab % _BLOCK:
        index = values.argmax(-1)
        return index, values.gather(1, index[:, None])[:, 0].float()
    blocks = values.view(len(values), -1, _BLOCK)
    block = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(len(values), device=values.device), block]
    offset = inside.argmax(-1)
    return block * _BLOCK + offset, inside.gather(1, offset[:, None])[:, 0].float()


def _largest_values(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row, falling, and their indexes; of equal values at the end, any."""
    vocab = values.shape[1]
    num_blocks = vocab // _BLOCK
    if num_blocks <= 2 * count:
        top = values.topk(min(count, vocab))
        return top.values, top.indices
    # Each of the `count` blocks with the largest maxima has a value no smaller than anything outside of them.
    whole = num_blocks * _BLOCK
    blocks = values[:, :whole].view(-1, num_blocks, _BLOCK)
    chosen = blocks.amax(-1).topk(count).indices
    inside = blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1)
    indices = (chosen[..., None] * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)
    if whole < vocab:
        inside = torch.cat((inside, values[:, whole:]), 1)
        tail = torch.arange(whole, vocab, device=values.device).expand(len(values), -1)
        indices = torch.cat((indices, tail), 1)
    top = inside.topk(count)
    return top.values, indices.gather(1, top.indices)


def logprobs_of(logits: Tensor, tokens: Tensor, count: int) -> Logprobs:
    """Log probabilities of the chosen `tokens` [L] and of the `count` likeliest ones, under raw logits [L, vocab]."""
    raw = logits.float()
    total = raw.logsumexp(-1, keepdim=True)
    chosen = raw.gather(1, tokens.clamp(min=0)[:, None]) - total
    if count == 0:
        empty = raw.new_empty((len(raw), 0))
        return Logprobs(chosen=chosen[:, 0], top_tokens=empty.long(), top=empty)
    values, indices = _largest_values(raw, min(raw.shape[1], max(64, count)))
    indices, order = indices.sort(-1)
    values, order = torch.sort(values.gather(1, order), dim=-1, descending=True, stable=True)
    return Logprobs(chosen=chosen[:, 0], top_tokens=indices.gather(1, order)[:, :count], top=values[:, :count] - total)


# ---------------------------------------------------------------------------------------------------------- drawing


@pair
def choose(logits: Tensor, rows: SamplingRows | None = None) -> Tensor:
    """Steps 2 to 4: tokens [R] int64, -1 where the largest logit is no finite number.

    The kernel never waits, and what it launches depends on shapes alone. It adds up probabilities as whole numbers,
    whose sum does not depend on an order, from exponentials in float32: a token is kept or not as here unless it lies
    within 1e-6 of the edge of top_p.

    Args:
        logits: [R, vocab] in any floating type, edited.
        rows: how they are to be sampled; without it all are greedy.
    """
    tokens, largest = _argmax(logits)
    good = largest.isfinite()
    if rows is not None:
        drawn = (good & (rows.temperature > 0)).nonzero()[:, 0]
        if len(drawn):
            tokens[drawn] = _draw(logits, largest, rows, drawn)
    return torch.where(good, tokens, -1)


def _draw(logits: Tensor, largest: Tensor, rows: SamplingRows, drawn: Tensor) -> Tensor:
    """Tokens [D] of the rows `drawn`: tried on the likeliest tokens alone, which nearly always decide."""
    # What a logit is short of the largest, by temperature.
    z = (logits.float() if len(drawn) == len(logits) else logits[drawn].float()) - largest[drawn][:, None]
    z /= rows.temperature[drawn][:, None]
    tokens = torch.empty_like(drawn)
    left = torch.arange(len(drawn), device=drawn.device)
    for size in _CANDIDATES:
        part, picked = z[left] if len(left) < len(z) else z, drawn[left]
        values, indices = _largest_values(part, size)
        keep, known = _threshold(part, values, rows, picked)
        score = values + gumbel_noise(rows.seeds[picked], rows.choices[picked], rows.positions[picked], indices)
        best = score.masked_fill_(values < keep[:, None], -math.inf).amax(-1)
        # A token outside has at most the last candidate's z.
        done = known & (values[:, -1] < torch.maximum(keep, best - MAX_NOISE))
        winners = indices.masked_fill(score < best[:, None], z.shape[1]).amin(-1)
        tokens[left] = winners
        for row in (known & ~done).nonzero()[:, 0].tolist():
            tokens[left[row]] = _draw_alone(part[row], float(keep[row]), float(best[row]), rows, picked[row])
        left = left[~known]
        if len(left) == 0:
            return tokens
    for row in left.tolist():
        values = z[row][None].sort(-1, descending=True).values
        keep, _ = _threshold(z[row][None], values, rows, drawn[row][None])
        tokens[row] = _draw_alone(z[row], float(keep[0]), -math.inf, rows, drawn[row])
    return tokens


def _draw_alone(z: Tensor, keep: float, best: float, rows: SamplingRows, row: Tensor) -> Tensor:
    """The winner of one row among tokens of at least `keep`, `best` being the score of one of them."""
    of_row = (rows.seeds[row][None], rows.choices[row][None], rows.positions[row][None])
    allowed = (z >= max(keep, best - MAX_NOISE)).nonzero()[:, 0]
    if 4 * len(allowed) < len(z):
        score = z[allowed] + gumbel_noise(*of_row, allowed[None])[0]
        return allowed[score.argmax()]
    return (z + dense_noise(*of_row, len(z))[0]).masked_fill_(z < keep, -math.inf).argmax()


def _threshold(z: Tensor, values: Tensor, rows: SamplingRows, picked: Tensor) -> tuple[Tensor, Tensor]:
    """The z that a token must reach (step 3), from the largest `values` of each row, falling.

    The second result is False where they are too few to tell.
    """
    size, vocab = values.shape[1], z.shape[1]
    top_k, top_p = rows.top_k[picked], rows.top_p[picked].double()
    limited = (top_k > 0) & (top_k < vocab)
    known = ~limited | (top_k <= size)
    kth = values.gather(1, top_k.clamp(1, size)[:, None] - 1)[:, 0].masked_fill_(~(limited & known), -math.inf)
    keep = torch.maximum(rows.min_p[picked].log(), kth)
    if bool((top_p < 1.0).any()):
        weights = values.double().exp_().masked_fill_(values < kth[:, None], 0.0)
        complete = (values[:, -1] < kth) | (size == vocab)
        total = weights.sum(-1)
        if not bool(complete.all()):
            total = torch.where(complete, total, z.exp().sum(-1, dtype=torch.float64))
        reached = (weights.cumsum(-1) < (top_p * total)[:, None]).sum(-1)
        nucleus = values.gather(1, reached.clamp(max=size - 1)[:, None])[:, 0]
        # Ties of the k-th token that reach past the candidates leave the sum unknown.
        sure = (complete | kth.isneginf()) & ((reached < size) | (size == vocab))
        known = known & (sure | (top_p >= 1.0))
        keep = torch.where((top_p < 1.0) & known, torch.maximum(keep, nucleus), keep)
    return keep, known

"""The kernels of `choose`: four launches, or two where all rows are greedy, of a shape that only shapes decide.

    _peak      rows x parts   the largest logit of a part and where it stands, and those of its groups of tokens; clears
                              what the others count in
    _count     rows x parts   rows with top_p or a large top_k: how many tokens are how far from the largest, by bins
    _narrow    rows x parts   from these counts, tokens kept for sure, of which the best is found, noise and all; and
                              tokens of the few bins that hold an edge of what is kept, which are listed. With a small
                              top_k all that reach the k-th largest group are listed: that is few more than k
    _decide    rows           the edges, exactly, among what is listed; the best of what is kept of it, and of the parts

Bins give bounds of sums of probabilities that are off by some hundredths, of what is above an edge or of what is below
it, whichever is less: few tokens are left between. If more are than the list holds, as where thousands are alike,
`_decide` reads the row itself, which is slower and as exact.

Probabilities are added up as whole numbers, so that no order matters. What a row needs is read from the device: no
launch depends on it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.ops.chain_triton import chained, let_next_begin, wait_for_earlier
from headrace.kernels.ops.draw_triton import LEAST_NOISE, best_of_open, furthest_of, noise_of
from headrace.kernels.ops.edges_triton import (
    BINS,
    GROUPS,
    INFINITY,
    NOWHERE,
    UNIT,
    bin_of,
    bracket,
    distance_of,
    is_filtered,
    logits_of,
    mass_of,
    nearest_groups,
    takes_groups,
)
from headrace.kernels.ops.math_triton import OPTIONS
from headrace.kernels.ops.sampling import SamplingRows

__all__ = ["choose"]

_LANES = 256  # of four tokens each, which share the words of one counter: two a thread of four warps
_WARPS = 4
_PROGRAMS = 1056  # eight for each processor of the largest GPUs
_MOST_PARTS = 256
_LISTED = 16384  # tokens of a row
_FEW = 512  # as many as a row mostly lists: two a thread
_MANY = 2048
_DECIDING_WARPS = 8

# Arguments of which a program reads one value. They are rows of one tensor, so that their alignment depends on the
# number of sequences, which shall not be a reason to compile a kernel twice.
_SETTINGS = ["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "choices", "positions"]


def choose(logits: Tensor, rows: SamplingRows | None = None) -> Tensor:
    """As `headrace.kernels.ops.sampling.choose`."""
    num_rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = logits.new_empty(num_rows, dtype=torch.int64)
    if not num_rows:
        return tokens
    tile = 4 * _LANES
    tiles = triton.cdiv(vocab, tile)
    share = triton.cdiv(tiles, max(1, min(tiles, _MOST_PARTS, _PROGRAMS // num_rows))) * tile
    grid = num_rows, triton.cdiv(vocab, share)
    of_rows = (logits, logits.stride(0) if num_rows > 1 else vocab, vocab, share)
    peaks = logits.new_empty(grid, dtype=torch.float32), logits.new_empty(grid, dtype=torch.int32)
    options = {"num_warps": _WARPS, **OPTIONS, **chained(logits.device)}
    if rows is None:
        _peak[grid](*of_rows, *peaks, None, None, None, TILE=tile, **options)
        _join[(num_rows,)](*peaks, tokens, grid[1], PARTS=_MOST_PARTS, **options)
        return tokens
    bests = torch.empty_like(peaks[0]), torch.empty_like(peaks[1])
    masses = [logits.new_empty(grid, dtype=torch.int64) for _ in range(2)]  # of all tokens, of those kept for sure
    groups = logits.new_empty((*grid, GROUPS.value), dtype=torch.float32)
    counts = logits.new_empty((num_rows, BINS.value), dtype=torch.int32)
    state = logits.new_empty((num_rows, 4), dtype=torch.int32)  # tokens listed, the first and last edge, rest of top_k
    listed = logits.new_empty((2, num_rows, _LISTED), dtype=torch.int32)  # distances, tokens
    filters = (rows.temperature, rows.top_k, rows.top_p)
    stream = (rows.min_p, rows.seeds, rows.choices, rows.positions)
    assert all(column.is_contiguous() for column in (*filters, *stream))
    _peak[grid](*of_rows, *peaks, groups, counts, state, TILE=tile, **options)
    _count[grid](*of_rows, peaks[0], *filters, counts, masses[0], PARTS=_MOST_PARTS, TILE=tile, **options)
    _narrow[grid](
        *of_rows, peaks[0], *filters, *stream, *bests, groups, counts, *masses, state, listed[0], listed[1],
        PARTS=_MOST_PARTS, LISTED=_LISTED, LANES=_LANES, **options,
    )  # fmt: skip
    _decide[(num_rows,)](
        *of_rows, *peaks, *filters, *stream, *bests, *masses, state, listed[0], listed[1], tokens,
        PARTS=_MOST_PARTS, LISTED=_LISTED, FEW=_FEW, MANY=_MANY, **options | {"num_warps": _DECIDING_WARPS},
    )  # fmt: skip
    return tokens


# --------------------------------------------------------------------------------------------------------- launches


@triton.jit
def _peak(
    logits, stride, vocab, share, peaks, peak_tokens, groups, counts, state, TILE: tl.constexpr, CHAINED: tl.constexpr
):
    """The part's largest logit, NaN if one of them is, and the first token that has it."""
    wait_for_earlier(CHAINED)
    let_next_begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * share
    best = tl.full((TILE,), float("-inf"), tl.float32)
    winner = tl.zeros((TILE,), tl.int32)
    strange = tl.zeros((TILE,), tl.int32)
    for begin in range(first, tl.minimum(first + share, vocab), TILE):
        token = begin + tl.arange(0, TILE)
        value = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        is_better = value > best
        best = tl.where(is_better, value, best)
        winner = tl.where(is_better, token, winner)
        strange = tl.where(value == value, strange, 1)
    # Of equal ones the first; every place has kept its first, for its tokens come in order.
    largest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == largest, winner, NOWHERE), axis=0)
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks + part, tl.where(tl.max(strange, axis=0) > 0, float("nan"), largest))
    tl.store(peak_tokens + part, token)
    if groups is not None:
        best_of_groups = tl.max(tl.reshape(best, (GROUPS, TILE // GROUPS)), axis=1)
        tl.store(groups + part * GROUPS + tl.arange(0, GROUPS), best_of_groups)
        if tl.program_id(1) == 0:
            bins = tl.arange(0, BINS)
            tl.store(counts + row * BINS + bins, bins * 0)
            tl.store(state + row * 4, 0)


@triton.jit(do_not_specialize=["parts"])
def _join(peaks, peak_tokens, tokens, parts, PARTS: tl.constexpr, CHAINED: tl.constexpr):
    """The tokens of greedy rows."""
    wait_for_earlier(CHAINED)
    let_next_begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    _, token = _likeliest(peaks + row * parts, peak_tokens + row * parts, parts, PARTS)
    tl.store(tokens + row, token.to(tl.int64))


@triton.jit(do_not_specialize=_SETTINGS)
def _count(
    logits,
    stride,
    vocab,
    share,
    peaks,
    temperatures,
    top_ks,
    top_ps,
    counts,
    masses,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """How many of the part's tokens fall into each bin, and the sum of their probabilities."""
    wait_for_earlier(CHAINED)
    let_next_begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    parts = tl.num_programs(1)
    temperature = tl.load(temperatures + row)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    if (temperature > 0.0) & is_filtered(top_k, top_p, vocab) & ~takes_groups(top_k, vocab, parts):
        largest = _largest(peaks + row * parts, parts, PARTS)
        if tl.abs(largest) < float("inf"):
            first = tl.program_id(1) * share
            mass = tl.zeros((TILE,), tl.int64)
            found = tl.zeros((BINS,), tl.int32)
            following = logits_of(logits + row * stride, first + tl.arange(0, TILE), vocab)
            for begin in range(first, tl.minimum(first + share, vocab), TILE):
                distance = distance_of(following, largest, temperature)
                following = logits_of(logits + row * stride, begin + TILE + tl.arange(0, TILE), vocab)
                found += tl.histogram(bin_of(distance), BINS)
                mass += mass_of(distance)
            bins = tl.arange(0, BINS)
            tl.atomic_add(counts + row * BINS + bins, found, mask=found > 0, sem="relaxed")
            tl.store(masses + row * parts + tl.program_id(1), tl.sum(mass, axis=0))


@triton.jit(do_not_specialize=_SETTINGS)
def _narrow(
    logits,
    stride,
    vocab,
    share,
    peaks,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    choices,
    positions,
    scores,
    winners,
    groups,
    counts,
    masses,
    sure_masses,
    state,
    listed_distances,
    listed_tokens,
    PARTS: tl.constexpr,
    LISTED: tl.constexpr,
    LANES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """The best of the part's tokens that are kept for sure, and the list of those that may be kept."""
    wait_for_earlier(CHAINED)
    let_next_begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    parts = tl.num_programs(1)
    part = row * parts + tl.program_id(1)
    temperature = tl.load(temperatures + row)
    largest = _largest(peaks + row * parts, parts, PARTS)
    if (temperature > 0.0) & (tl.abs(largest) < float("inf")):
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        filtered = is_filtered(top_k, top_p, vocab)
        start, end = INFINITY, INFINITY
        if filtered:
            if takes_groups(top_k, vocab, parts):
                start, rest = 0, top_k.to(tl.int32)
                end = nearest_groups(groups + row * parts * GROUPS, parts * GROUPS, largest, temperature, rest)
            else:
                total = _total(masses + row * parts, parts, PARTS).to(tl.float32) * (1.0 / UNIT)
                start, end, rest = bracket(counts + row * BINS, total, top_k, top_p, vocab)
            if tl.program_id(1) == 0:
                tl.store(state + row * 4 + 1, start)
                tl.store(state + row * 4 + 2, end)
                tl.store(state + row * 4 + 3, rest)
        furthest = furthest_of(tl.load(min_ps + row))
        seed = tl.load(seeds + row)
        choice = tl.load(choices + row).to(tl.uint32)
        position = tl.load(positions + row).to(tl.uint32)
        best = tl.full((LANES, 4), float("-inf"), tl.float32)
        winner = tl.full((LANES, 4), NOWHERE, tl.int32)
        mass = tl.zeros((LANES, 4), tl.int64)
        least = tl.full((), LEAST_NOISE, tl.float32)  # the best score is no less
        first = tl.program_id(1) * share
        place = 4 * tl.arange(0, LANES)[:, None] + tl.arange(0, 4)[None, :]
        following = logits_of(logits + row * stride, first + place, vocab)
        for begin in range(first, tl.minimum(first + share, vocab), 4 * LANES):
            lane, token = begin // 4 + tl.arange(0, LANES), begin + place
            distance = distance_of(following, largest, temperature)
            following = logits_of(logits + row * stride, token + 4 * LANES, vocab)
            bits = distance.to(tl.int32, bitcast=True)
            nearest = tl.min(bits)
            if filtered & (nearest < end):
                mass += tl.where(bits < start, mass_of(distance), 0)
                is_open = (bits >= start) & (bits < end)
                number = tl.sum(is_open.to(tl.int32))
                if number > 0:
                    before = tl.cumsum(tl.reshape(is_open.to(tl.int32), (4 * LANES,)), 0) - 1
                    slot = tl.atomic_add(state + row * 4, number, sem="relaxed") + tl.reshape(before, (LANES, 4))
                    is_open &= slot < LISTED
                    tl.store(listed_distances + row * LISTED + slot, bits, mask=is_open)
                    tl.store(listed_tokens + row * LISTED + slot, token, mask=is_open)
            if (nearest < start) & (nearest.to(tl.float32, bitcast=True) <= furthest):
                allowed = (bits < start) & (distance <= furthest)
                zero = lane * 0
                w0, w1, w2, w3 = tl.philox(seed, lane, zero + position, zero + choice, zero)
                # Noise falls with its word: no token of a lane does better than the nearest with the smallest word.
                hope = noise_of(tl.minimum(tl.minimum(w0, w1), tl.minimum(w2, w3)))
                hope -= tl.min(tl.where(allowed, distance, float("inf")), axis=1)
                if tl.max(hope, axis=0) > least - 0.001:
                    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (LANES, 4))
                    score = tl.where(allowed, noise_of(words) - distance, float("-inf"))
                    is_better = score > best
                    best = tl.where(is_better, score, best)
                    winner = tl.where(is_better, token, winner)
                    least = tl.maximum(least, tl.max(score))
        score = tl.max(best)
        tl.store(scores + part, score)
        tl.store(winners + part, tl.min(tl.where(best == score, winner, NOWHERE)))
        if filtered:
            tl.store(sure_masses + part, tl.sum(tl.sum(mass, axis=1), axis=0))


@triton.jit(do_not_specialize=_SETTINGS)
def _decide(
    logits,
    stride,
    vocab,
    share,
    peaks,
    peak_tokens,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    choices,
    positions,
    scores,
    winners,
    masses,
    sure_masses,
    state,
    listed_distances,
    listed_tokens,
    tokens,
    PARTS: tl.constexpr,
    LISTED: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """The token of each row."""
    wait_for_earlier(CHAINED)
    let_next_begin(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    parts = (vocab + share - 1) // share
    largest, token = _likeliest(peaks + row * parts, peak_tokens + row * parts, parts, PARTS)
    temperature = tl.load(temperatures + row)
    if (temperature > 0.0) & (token >= 0):
        score, token = _best(scores + row * parts, winners + row * parts, parts, PARTS)
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        if is_filtered(top_k, top_p, vocab):
            number = tl.load(state + row * 4)
            start, end = tl.load(state + row * 4 + 1), tl.load(state + row * 4 + 2)
            rest = tl.load(state + row * 4 + 3)
            sure, total = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
            if top_p < 1.0:
                sure = _total(sure_masses + row * parts, parts, PARTS)
                if rest == 0:
                    total = _total(masses + row * parts, parts, PARTS)
            min_p, seed = tl.load(min_ps + row), tl.load(seeds + row)
            choice, position = tl.load(choices + row).to(tl.uint32), tl.load(positions + row).to(tl.uint32)
            row_logits = logits + row * stride
            distances, names = listed_distances + row * LISTED, listed_tokens + row * LISTED
            if number <= FEW:
                score, token = best_of_open(
                    score, token, row_logits, distances, names, False, number, largest, temperature, start, end,
                    rest, top_p, sure, total, min_p, seed, choice, position, TILE=FEW,
                )  # fmt: skip
            else:
                # If the list was too short, what may be kept is between the edges in the row itself.
                unlisted = number > LISTED
                score, token = best_of_open(
                    score, token, row_logits, distances, names, unlisted, tl.where(unlisted, vocab, number), largest,
                    temperature, start, end, rest, top_p, sure, total, min_p, seed, choice, position, TILE=MANY,
                )  # fmt: skip
    tl.store(tokens + row, token.to(tl.int64))


# ---------------------------------------------------------------------------------------------------- joining parts


@triton.jit
def _best(values, names, parts, PARTS: tl.constexpr):
    """The largest of the parts' values, and the smallest token that has it."""
    part = tl.arange(0, PARTS)
    value = tl.load(values + part, mask=part < parts, other=float("-inf"))
    name = tl.load(names + part, mask=part < parts, other=NOWHERE)
    largest = tl.max(value, axis=0)
    return largest, tl.min(tl.where(value == largest, name, NOWHERE), axis=0)


@triton.jit
def _largest(peaks, parts, PARTS: tl.constexpr):
    """The row's largest logit, or NaN."""
    part = tl.arange(0, PARTS)
    peak = tl.load(peaks + part, mask=part < parts, other=float("-inf"))
    is_number = tl.min((peak == peak).to(tl.int32), axis=0) > 0
    return tl.where(is_number, tl.max(peak, axis=0), float("nan"))


@triton.jit
def _likeliest(peaks, peak_tokens, parts, PARTS: tl.constexpr):
    """The row's largest logit, and the first token that has it; -1 if it is not a finite number."""
    largest = _largest(peaks, parts, PARTS)
    _, token = _best(peaks, peak_tokens, parts, PARTS)
    return largest, tl.where(tl.abs(largest) < float("inf"), token, -1)


@triton.jit
def _total(masses, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(masses + part, mask=part < parts, other=0), axis=0)

"""Where the edges of what top_k and top_p keep lie: for the kernels of `choose`.

How far a token is from the largest is its distance, -z. As a number that is not negative its bits are in order, so
edges are compared and searched as whole numbers, and bins of distances begin at round ones.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "BINS",
    "GROUPS",
    "INFINITY",
    "NOWHERE",
    "UNIT",
    "bin_of",
    "bracket",
    "distance_of",
    "edge",
    "is_filtered",
    "logits_of",
    "mass_of",
    "nearest_groups",
    "open_tokens",
    "reached",
    "takes_groups",
]

# Distances up to 8 fall into bins of 1/16, larger ones into bins of 1/4. The last has no end: it begins so far off that
# no token of it has a chance, and all together have less than 1e-11 of the probability. More bins take longer to count.
BINS = tl.constexpr(256)
_LAST_BIN = tl.constexpr(255)
_NEAR_BINS = tl.constexpr(128)
_NEAR_END = tl.constexpr(8.0)
_NEAR_PER = tl.constexpr(16.0)
_FAR_PER = tl.constexpr(4.0)
GROUPS = tl.constexpr(64)  # of a part's tokens, whose largest logits are known
_SLOTS = tl.constexpr(1024)  # groups that are looked at; if there are more, several are put together
INFINITY = tl.constexpr(0x7F800000)
NOWHERE = tl.constexpr(0x7FFFFFFF)  # past every distance
# Sums of bounds are in float32, as are the exponentials in them; both are far closer than this.
_SLACK = tl.constexpr(1.0 / 1024.0)
UNIT = tl.constexpr(2.0**44)  # in a probability of 1: a sum of 2**19 of them is still less than an int64 holds


@triton.jit
def is_filtered(top_k, top_p, vocab):
    """Whether it takes an edge to tell what is kept."""
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0)


@triton.jit
def takes_groups(top_k, vocab, parts):
    """Whether the largest logits of groups tell the k-th largest well enough: k are at most half of them."""
    return (top_k > 0) & (top_k < vocab) & (2 * top_k <= tl.minimum(parts * GROUPS, _SLOTS))


@triton.jit
def logits_of(row_logits, token, vocab):
    """Logits of a row; past its end as if they were held back."""
    return tl.load(row_logits + token, mask=token < vocab, other=float("-inf"))


@triton.jit
def distance_of(value, largest, temperature):
    """How far logits are from the largest."""
    return tl.abs(tl.div_rn(value.to(tl.float32) - largest, temperature))


@triton.jit
def mass_of(distance):
    """The probability, not yet divided by the sum of all, in units."""
    return (tl.exp(-distance) * UNIT).to(tl.int64)


@triton.jit
def bin_of(distance):
    """The number of the bin that a distance falls into."""
    near = (tl.minimum(distance, _NEAR_END) * _NEAR_PER).to(tl.int32)
    far = ((tl.minimum(distance, 1000.0) - _NEAR_END) * _FAR_PER).to(tl.int32) + _NEAR_BINS
    return tl.where(distance < _NEAR_END, near, tl.minimum(far, _LAST_BIN))


@triton.jit
def _begin_of_bin(number):
    """The smallest distance of a bin; of none past the last, infinity."""
    near = number.to(tl.float32) * (1.0 / _NEAR_PER)
    far = _NEAR_END + (number - _NEAR_BINS).to(tl.float32) * (1.0 / _FAR_PER)
    return tl.where(number > _LAST_BIN, float("inf"), tl.where(number < _NEAR_BINS, near, far))


@triton.jit
def nearest_groups(groups, size, largest, temperature, top_k):
    """Bits of a distance within which k groups have their largest logit, and so k tokens are; seldom many more."""
    slot = tl.arange(0, _SLOTS)
    peak = tl.full((_SLOTS,), float("-inf"), tl.float32)
    for begin in range(0, size, _SLOTS):
        peak = tl.maximum(peak, logits_of(groups, begin + slot, size))
    bits = distance_of(peak, largest, temperature).to(tl.int32, bitcast=True)
    low, high = 0, INFINITY - 1
    for _ in range(14):
        middle = low + (high - low) // 2
        is_enough = tl.sum((bits <= middle).to(tl.int32), axis=0) >= top_k
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, tl.minimum(middle + 1, high))
    return high + 1


@triton.jit
def bracket(counts, total, top_k, top_p, vocab):
    """Where a token is kept for sure, and where not.

    Returns bits of distances: all nearer than the first are kept, none as far as the second; and how many of top_k are
    left for what is between, 0 if it does not limit.
    """
    number = tl.arange(0, BINS)
    found = tl.load(counts + number)
    until_here = tl.cumsum(found, 0)
    limited = (top_k > 0) & (top_k < vocab)
    # In the last bin, to cut or not makes no difference.
    kth = tl.where(limited, tl.sum((until_here < top_k).to(tl.int32), axis=0), _LAST_BIN)
    limited = kth < _LAST_BIN
    start = tl.where(limited, kth, BINS)
    end = tl.where(limited, kth, _LAST_BIN)
    if top_p < 1.0:
        # The tokens of a bin have at most the probability of its begin and at least that of its end; backwards, sums
        # of what is above an edge become sums of what is below it.
        most, least = _bounds(number, found, kth)
        back = _LAST_BIN - number
        back_most, back_least = _bounds(back, tl.load(counts + back), kth)
        total_most = tl.where(limited, tl.sum(most, axis=0), total) * (1.0 + _SLACK)
        total_least = tl.where(limited, tl.sum(least, axis=0), total) * (1.0 - _SLACK)
        above_most, above_least = tl.cumsum(most, 0), tl.cumsum(least, 0)
        below_most, below_least = tl.cumsum(back_most, 0), tl.cumsum(back_least, 0)
        wanted, spared = top_p, 1.0 - top_p
        # Bins whose end is surely nearer than the edge: the sum down to there is too small, or what follows too large.
        nearer = tl.sum((above_most < wanted * total_least).to(tl.int32), axis=0)
        nearer = tl.maximum(nearer, tl.sum((below_least > spared * total_most).to(tl.int32), axis=0) - 1)
        start = tl.minimum(start, nearer)
        # Bins whose end is perhaps nearer.
        perhaps = tl.sum((above_least < wanted * total_most).to(tl.int32), axis=0)
        perhaps = tl.minimum(perhaps, tl.sum((below_most > spared * total_least).to(tl.int32), axis=0) - 1)
        end = tl.minimum(end, tl.maximum(perhaps, 0))
        if limited:
            end = kth  # all of top_k have their share in the sum
    rest = tl.where(limited, top_k.to(tl.int32) - tl.sum(tl.where(number < start, found, 0), axis=0), 0)
    return (
        _begin_of_bin(start).to(tl.int32, bitcast=True),
        _begin_of_bin(end + 1).to(tl.int32, bitcast=True),
        rest,
    )


@triton.jit
def _bounds(number, found, kth):
    """The most and the least that the tokens of bins can add to the sum of what top_k keeps."""
    begin, end = _begin_of_bin(number), _begin_of_bin(number + 1)
    most = tl.where(number <= kth, found * tl.exp(-begin), 0.0)
    return most, tl.where(number < kth, found * tl.exp(-end), 0.0)


@triton.jit
def open_tokens(
    begin, row_logits, distances, names, unlisted, size, largest, temperature, start, end, TILE: tl.constexpr
):
    """Bits of distances and names of a tile of tokens that may be kept; elsewhere NOWHERE."""
    place = begin + tl.arange(0, TILE)
    if unlisted:
        bits = distance_of(logits_of(row_logits, place, size), largest, temperature).to(tl.int32, bitcast=True)
        name = place
    else:
        bits = tl.load(distances + place, mask=place < size, other=NOWHERE)
        name = tl.load(names + place, mask=place < size, other=0)
    return tl.where((bits >= start) & (bits < end), bits, NOWHERE), name


@triton.jit
def reached(
    limit, row_logits, distances, names, unlisted, size, largest, temperature, start, end,
    MASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of tokens that may be kept and are no further than a limit, the sum of probabilities or the number; the furthest
    of them; the nearest of the others."""
    total = tl.zeros((TILE,), tl.int64 if MASSES else tl.int32)
    last = tl.full((TILE,), -1, tl.int32)
    following = tl.full((TILE,), NOWHERE, tl.int32)
    for begin in range(0, size, TILE):
        bits, _ = open_tokens(
            begin, row_logits, distances, names, unlisted, size, largest, temperature, start, end, TILE
        )
        inside = bits <= limit
        if MASSES:
            total += mass_of(tl.where(inside, bits, INFINITY).to(tl.float32, bitcast=True))
        else:
            total += inside.to(tl.int32)
        last = tl.maximum(last, tl.where(inside, bits, -1))
        following = tl.minimum(following, tl.where(inside, NOWHERE, bits))
    return tl.sum(total, axis=0), tl.max(last, axis=0), tl.min(following, axis=0)


@triton.jit
def edge(
    target, row_logits, distances, names, unlisted, size, largest, temperature, start, end,
    MASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The smallest distance within which the tokens that may be kept reach a target above 0, or NOWHERE."""
    low, high = start, end - 1
    while low < high:
        middle = low + (high - low) // 2
        total, last, following = reached(
            middle, row_logits, distances, names, unlisted, size, largest, temperature, start, end, MASSES, TILE
        )
        # Both are distances that there are, so the search takes no more steps than these have bits.
        if total >= target:
            high = last
        else:
            low = following
    return low

"""Which tokens the next step computes: a pure function of the adds and removals so far.

There is no prefill or decode phase. A step has one budget of tokens, given to sequences that need one token first
(decodes), then to the prompts of running sequences, then to waiting ones, always the oldest first; the last prompt
that finds room is cut to what is left of the budget (Dynamic SplitFuse).

Laws:
  1. A sequence runs only if prompt + max_tokens fit the whole cache; `resolve_max_tokens` refuses others at the door.
  2. A sequence enters only when blocks for all its known tokens are there, so only decodes ever ask for more.
  3. Out of blocks, the newest running sequence gives its own up and waits again, at its old place in the queue. An
     older one never yields to a newer, so the oldest always goes on and everything ends.
  4. A source is encoded in one piece, in the step in which its sequence enters; it may exceed the budget, alone.
  5. No clock, thread, tensor or randomness: ranks that see the same calls make the same plans.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import NamedTuple

from headrace.errors import ContextLengthError
from headrace.workers.blocks import BlockManager
from headrace.workers.prefix_cache import PrefixCache, root_digest
from headrace.workers.sequence import Sequence

__all__ = ["Chunk", "Filled", "Plan", "Scheduler", "SchedulerStats"]


class Chunk(NamedTuple):
    """Tokens of one sequence in one step: the next `num_tokens` after those computed."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step ends with this sequence's next token."""
        return self.num_tokens == self.sequence.num_pending


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: sources to encode; then chunks, of every sequence at most one, those with a single token first."""

    chunks: tuple[Chunk, ...]
    encodes: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(chunk.num_tokens for chunk in self.chunks) + sum(len(sequence.source) for sequence in self.encodes)


class Filled(NamedTuple):
    """Blocks of one sequence that a step fills: of its list of `blocks` at that time, those from `start` to `stop`."""

    sequence: Sequence
    blocks: list[int]
    start: int
    stop: int


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start; prefix figures are tokens looked up and tokens found."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


class Scheduler:
    """Running and waiting sequences, their blocks, and the plan of the next step."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        prefix_cache: bool = True,
        salt: bytes = b"",
    ) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self.kv_tokens = num_blocks * block_size
        self.stats = SchedulerStats()
        self.blocks = BlockManager(num_blocks, PrefixCache() if prefix_cache else None)
        self._prefix_cache = prefix_cache
        self._root = root_digest(salt)
        self._running: list[Sequence] = []  # oldest first, as is _waiting
        self._waiting: list[Sequence] = []
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._computing: dict[bytes, int] = {}  # digests of blocks that running prompts will publish
        self._promised = [range(0)] * max_num_seqs  # by row: indexes of those blocks
        self._unnoted: list[Sequence] = []  # promised, but not in `_computing` yet
        self._arrivals = 0
        self._next_deadline = math.inf

    # ------------------------------------------------------------------------------------------------ in and out

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for room, preempted ones included."""
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter((*self._running, *self._waiting))

    def resolve_max_tokens(self, num_prompt: int, max_tokens: int | None, num_source: int = 0) -> int:
        """The most tokens to generate after a prompt or source, or ContextLengthError if they do not fit."""
        num_prompt += -(-num_source // self.block_size) * self.block_size
        limit, name = self.max_model_len, "the model's context"
        if self.kv_tokens < limit:
            limit, name = self.kv_tokens, "the KV cache"
        wanted = 1 if max_tokens is None else max_tokens
        if num_prompt + wanted > limit:
            asked = "max_tokens is not given (at least 1)" if max_tokens is None else f"max_tokens is {max_tokens}"
            raise ContextLengthError(
                f"The prompt has {num_prompt} tokens and {asked}: {num_prompt} + {wanted} = {num_prompt + wanted}, "
                f"but {name} holds {limit}. Shorten the prompt or lower max_tokens.",
                param="prompt" if num_prompt >= limit else "max_tokens",
            )
        return limit - num_prompt if max_tokens is None else max_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose length `resolve_max_tokens` approved."""
        assert sequence.arrival < 0, "a sequence is added once"
        held = sequence.num_prompt + sequence.max_tokens + self._num_source_blocks(sequence) * self.block_size
        assert held <= min(self.max_model_len, self.kv_tokens)
        sequence.root = self._root
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.append(sequence)
        if sequence.deadline is not None:
            self._next_deadline = min(self._next_deadline, sequence.deadline)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is; its blocks are free at once, their content stays cached."""
        if sequence.row >= 0:
            self._stop(sequence)
        else:
            self._waiting.remove(sequence)

    def forget_prefixes(self) -> None:
        """Let sequences that are added from now on find nothing of what was computed so far; the others go on."""
        self._root = root_digest(self._root)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences past their deadline, running ones first; the caller removes them."""
        if now < self._next_deadline:
            return []
        late = [sequence for sequence in self if sequence.deadline is not None and now >= sequence.deadline]
        coming = [sequence.deadline for sequence in self if sequence.deadline is not None and now < sequence.deadline]
        self._next_deadline = min(coming, default=math.inf)
        return late

    # ------------------------------------------------------------------------------------------------------ a step

    def schedule(self) -> Plan:
        """The next step; empty only when there is nothing to do, or nothing before expected tokens are known."""
        decodes: list[Chunk] = []
        prompts: list[Chunk] = []
        encodes: list[Sequence] = []
        budget = self.max_batch_tokens
        settled = self._schedule_decodes(decodes)
        budget -= len(decodes)
        for sequence in self._running:
            if sequence.num_pending > 1 and budget:
                count = min(sequence.num_pending, budget)
                (decodes if count == 1 else prompts).append(Chunk(sequence, count))
                budget -= count
        position = 0
        while settled and budget and position < len(self._waiting) and self._free_rows:
            sequence = self._waiting[position]
            if len(sequence.source) > budget and (decodes or prompts or encodes):
                break
            matched = self._match(sequence)
            if self._worth_waiting(sequence, len(matched)):
                position += 1
            elif self._admit(sequence, matched):
                if sequence.source:
                    encodes.append(sequence)
                    budget = max(1, budget - len(sequence.source))
                count = min(sequence.num_pending, budget)
                (decodes if count == 1 else prompts).append(Chunk(sequence, count))
                budget -= count
            else:
                break
        return Plan((*decodes, *prompts), tuple(encodes))

    def advance(self, plan: Plan) -> list[Filled]:
        """The step is on its way: count its tokens. Returns what is to be published once it was computed."""
        self._note_promises()
        filled = []
        for sequence, count in plan.chunks:
            start = sequence.num_computed // self.block_size
            sequence.num_computed += count
            stop = sequence.num_computed // self.block_size
            if self._prefix_cache and start < stop:
                filled.append(Filled(sequence, sequence.blocks, start, stop))
        return filled

    def publish(self, filled: Iterable[Filled]) -> None:
        """Let others share blocks that were filled, if their sequence still holds them."""
        for sequence, blocks, start, stop in filled:
            if sequence.blocks is not blocks:  # it ended or yielded meanwhile; readmitted, it has another list
                continue
            digests = sequence.digests(stop, self.block_size)
            self._settle(sequence, stop)
            for index in range(start, stop):
                self.blocks.publish(blocks[index], digests[index])

    def _schedule_decodes(self, decodes: list[Chunk]) -> bool:
        """Give each sequence that needs one token its token; whether nobody had to wait or to yield."""
        preemptions, stalled = self.stats.preemptions, False
        for sequence in [one for one in self._running if one.num_pending == 1 and not one.is_full]:
            if len(decodes) == self.max_batch_tokens:
                break
            if sequence.row < 0:  # it yielded to an older one a moment ago
                continue
            if self._grow(sequence):
                decodes.append(Chunk(sequence, 1))
            else:
                stalled = True
        return not stalled and preemptions == self.stats.preemptions

    def _grow(self, sequence: Sequence) -> bool:
        """Get the blocks for all known tokens, from newer sequences if need be; the newest itself can only wait."""
        missing = self._num_blocks(sequence) - len(sequence.blocks)
        while missing > self.blocks.num_available:
            newest = self._running[-1]
            if newest is sequence:
                return False
            self._preempt(newest)
        if missing > 0:
            sequence.blocks += self.blocks.allocate(missing)
        return True

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-sequence.num_tokens // self.block_size)

    def _num_source_blocks(self, sequence: Sequence) -> int:
        return -(-len(sequence.source) // self.block_size)

    def _preempt(self, sequence: Sequence) -> None:
        self.stats.preemptions += 1
        self._stop(sequence)
        sequence.num_computed = 0
        insort(self._waiting, sequence, key=_arrival)

    def _stop(self, sequence: Sequence) -> None:
        """Running no more: blocks and row go back."""
        self._running.remove(sequence)
        self._settle(sequence, self._promised[sequence.row].stop)
        self.blocks.release(sequence.blocks)
        self.blocks.release(sequence.source_blocks)
        sequence.blocks, sequence.source_blocks = [], []
        self._free_rows.append(sequence.row)
        sequence.row = -1

    # --------------------------------------------------------------------------------------------------- admission

    def _num_lookups(self, sequence: Sequence) -> int:
        """Blocks that a cache may supply; the last token is always computed, for its logits."""
        return (sequence.num_tokens - 1) // self.block_size if self._prefix_cache else 0

    def _match(self, sequence: Sequence) -> list[int]:
        """Those that it does supply."""
        return self.blocks.match(sequence.each_digest(self._num_lookups(sequence), self.block_size))

    def _worth_waiting(self, sequence: Sequence, matched: int) -> bool:
        """Whether a running prompt is about to publish most of what this one would compute (n > 1, shared system
        prompts): computing it twice would take longer than the wait."""
        self._note_promises()
        digests = sequence.each_digest(self._num_lookups(sequence), self.block_size)
        coming = sum(1 for _ in takewhile(self._computing.__contains__, islice(digests, matched, None)))
        return 2 * coming * self.block_size >= sequence.num_tokens - matched * self.block_size

    def _admit(self, sequence: Sequence, matched: list[int]) -> bool:
        """Start a waiting sequence, which shares some blocks, if blocks for all its known tokens are there."""
        assert not sequence.num_expected, "what it is to compute must be known"
        missing = self._num_blocks(sequence) - len(matched)
        num_source_blocks = self._num_source_blocks(sequence)
        # One spare block for each running sequence: entering only to be preempted by the next block is work lost.
        if missing + num_source_blocks + len(self._running) > self.blocks.num_available - self.blocks.num_unheld(
            matched
        ):
            return False
        if matched:
            self.blocks.share(matched)
        sequence.blocks = matched + self.blocks.allocate(missing)
        sequence.source_blocks = self.blocks.allocate(num_source_blocks)
        sequence.num_computed = len(matched) * self.block_size
        self.stats.prefix_queries += sequence.num_tokens
        self.stats.prefix_hits += sequence.num_computed
        if sequence.num_cached < 0:
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
        sequence.row = self._free_rows.pop()
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_arrival)
        self._promised[sequence.row] = range(len(matched), self._num_lookups(sequence))
        self._unnoted.append(sequence)
        return True

    def _note_promises(self) -> None:
        """Remember what prompts that were let in will publish, for `_worth_waiting`. A prompt that nobody waits behind
        is launched first."""
        for sequence in self._unnoted:
            promised = self._promised[sequence.row]
            for digest in sequence.digests(promised.stop, self.block_size)[promised.start :]:
                self._computing[digest] = self._computing.get(digest, 0) + 1
        self._unnoted.clear()

    def _settle(self, sequence: Sequence, stop: int) -> None:
        """Promises of blocks before `stop` were kept, or will not be."""
        self._note_promises()
        promised = self._promised[sequence.row]
        stop = min(stop, promised.stop)
        if stop <= promised.start:
            return
        for digest in sequence.digests(stop, self.block_size)[promised.start :]:
            self._computing[digest] -= 1
            if not self._computing[digest]:
                del self._computing[digest]
        self._promised[sequence.row] = range(stop, promised.stop)

    # ------------------------------------------------------------------------------------------------------- checks

    def validate(self) -> None:
        """Assert the invariants; tests call it after every call."""
        self.blocks.validate(sequence.blocks + sequence.source_blocks for sequence in self._running)
        arrivals = [sequence.arrival for sequence in self._running]
        assert arrivals == sorted(arrivals), "running is not in order of arrival"
        arrivals = [sequence.arrival for sequence in self._waiting]
        assert arrivals == sorted(arrivals), "waiting is not in order of arrival"
        rows = [sequence.row for sequence in self._running]
        assert sorted(rows + self._free_rows) == list(range(self.max_num_seqs)), "rows leaked or shared"
        for sequence in self._waiting:
            assert (sequence.row, sequence.blocks, sequence.num_computed) == (-1, [], 0), f"{sequence} holds something"
            assert sequence.source_blocks == [], f"{sequence} holds its source"
        for sequence in self._running:
            assert 0 <= sequence.num_computed < sequence.num_tokens, f"{sequence} has nothing to compute"
            assert len(sequence.blocks) * self.block_size >= sequence.num_computed, f"{sequence} lacks blocks"
            assert len(sequence.source_blocks) == self._num_source_blocks(sequence), f"{sequence} lacks its source"
        noted = [sequence for sequence in self._running if sequence not in self._unnoted]
        promised = sum(len(self._promised[sequence.row]) for sequence in noted)
        assert promised == sum(self._computing.values()), "promised blocks leaked"


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival

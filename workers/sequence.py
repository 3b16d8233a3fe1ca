"""One stream inside the engine: its tokens, how far their KV is computed, and when it ends."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from headrace.messages import StreamId
from headrace.sampling import SamplingParams
from headrace.workers.prefix_cache import block_digest

__all__ = ["Sequence"]


class Sequence:
    """Tokens of a stream (prompt, then output) and its place in the engine.

    The stop token that ends a stream is not part of it: it is neither kept here nor sent, and not counted.

    Attributes:
        stream: names it on the wire.
        source: what an encoder reads; empty for decoders, whose prompt is in `tokens`.
        tokens: prompt, then output; `num_prompt` says where the output begins.
        num_expected: tokens at the end that were chosen, but whose value is still on its way from the device; 0 stands
            in their places.
        max_tokens: the output's length at most, with what earlier attempts generated.
        stop_ids: tokens that end it; held back until `sampling.min_tokens` were generated.
        deadline: time after which it is refused, or None.
        arrival: order of arrival; the older comes first everywhere.
        root: parent of its first block's digest, given by the scheduler.
        num_computed: tokens whose KV is in the cache.
        num_cached: prompt tokens found in the prefix cache when it was first admitted.
        blocks: its KV blocks, in order of position.
        source_blocks: likewise, of what the decoder sees of the source.
        row: its row in the runner's tables while it runs, else -1.
    """

    __slots__ = (
        "_digests",
        "arrival",
        "blocks",
        "deadline",
        "max_tokens",
        "num_cached",
        "num_computed",
        "num_expected",
        "num_prompt",
        "root",
        "row",
        "sampling",
        "seed",
        "source",
        "source_blocks",
        "stop_ids",
        "stream",
        "tokens",
    )

    def __init__(
        self,
        stream: StreamId,
        prompt: array[int],
        sampling: SamplingParams,
        *,
        max_tokens: int,
        output: array[int] | None = None,
        source: array[int] | None = None,
        stop_ids: tuple[int, ...] = (),
        seed: int = 0,
        deadline: float | None = None,
    ) -> None:
        self.stream = stream
        self.tokens = prompt + output if output else prompt[:]
        self.num_prompt = len(prompt)
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop_ids = stop_ids
        self.seed = seed
        self.deadline = deadline
        self.arrival = -1
        self.root = b""
        self.num_expected = 0
        self.num_computed = 0
        self.num_cached = -1
        self.source = source or array("I")
        self.source_blocks: list[int] = []
        self.blocks: list[int] = []
        self.row = -1
        self._digests: list[bytes] = []

    def __repr__(self) -> str:
        return (
            f"Sequence({self.stream.request.hex()[:8]}/{self.stream.choice}, prompt={self.num_prompt}, "
            f"output={self.num_output}/{self.max_tokens}, computed={self.num_computed}, blocks={len(self.blocks)})"
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and output together, expected tokens included."""
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """Tokens generated so far, earlier attempts included; expected ones are not."""
        return len(self.tokens) - self.num_expected - self.num_prompt

    @property
    def num_chosen(self) -> int:
        """Tokens generated so far and expected ones; also the absolute index of the next one to be chosen."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed before the next one can be sampled; 1 is a decode."""
        return len(self.tokens) - self.num_computed

    @property
    def is_full(self) -> bool:
        """Whether its last token was chosen, if only the length is looked at."""
        return self.num_chosen >= self.max_tokens

    def expect(self) -> None:
        """A token was chosen on the device; `append` will bring its value."""
        self.tokens.append(0)
        self.num_expected += 1

    def append(self, token: int) -> str | None:
        """Take the next token, or the first expected one; returns why the stream ends here ("stop", "length") or None.

        After an end, tokens that are still expected mean nothing.
        """
        if token in self.stop_ids and self.num_output >= self.sampling.min_tokens:
            return "stop"
        if self.num_expected:
            self.tokens[-self.num_expected] = token
            self.num_expected -= 1
        else:
            self.tokens.append(token)
        return "length" if self.num_output >= self.max_tokens else None

    def digests(self, count: int, block_size: int) -> list[bytes]:
        """Chained digests of the first `count` blocks; each is computed once."""
        known = len(self._digests)
        if known < count:
            assert count * block_size <= len(self.tokens), "only full blocks have a digest"
            tokens = self.tokens[known * block_size : count * block_size].tobytes()
            size = block_size * self.tokens.itemsize
            parent = self._digests[-1] if known else self.root
            for start in range(0, len(tokens), size):
                parent = block_digest(parent, tokens[start : start + size])
                self._digests.append(parent)
        return self._digests[:count]

    def each_digest(self, count: int, block_size: int) -> Iterator[bytes]:
        """The same one after the other: at most twice as many are computed as are asked for."""
        for index in range(count):
            if index == len(self._digests):
                self.digests(min(count, 2 * index or 1), block_size)
            yield self._digests[index]

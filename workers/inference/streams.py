"""Streams of one model in this process: many texts at once, each read like an iterator (continuous batching).

Whoever reads a stream drives all of them: a step computes the next token of every stream that is open, and what belongs
to others waits for them. Streams may be read from several threads.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from headrace.errors import HeadraceError, InvalidRequestError, from_wire
from headrace.messages import Assignment, StreamId, pack_tokens, unpack_tokens
from headrace.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from headrace.workers.engine import Engine, StepResult
    from headrace.workers.inference.road import Road
    from headrace.workers.inference.sources import Loaded

__all__ = ["Streams", "TextStream", "TokenStream", "make_engine"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to whose last bytes are still to come


class TokenStream:
    """The tokens of one text, as they are generated; `close` it to stop early."""

    def __init__(self, streams: Streams, stream: StreamId) -> None:
        self._streams: Streams | None = streams  # None once it was closed
        self._stream = stream
        self._tokens: deque[int] = deque()
        self._reason: str | None = None
        self._error: HeadraceError | None = None

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if self._streams is None or self._reason is not None:
                raise StopIteration
            self._streams.advance(self)
        return self._tokens.popleft()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def finish_reason(self) -> str | None:
        """ "stop" or "length" once all was read, None before, or if it was closed before its end."""
        return None if self._tokens else self._reason

    @property
    def waits(self) -> bool:
        """Whether only another step can bring what its reader waits for."""
        return not (self._tokens or self._streams is None or self._error or self._reason)

    def close(self) -> None:
        """Stop generating; reading it ends here."""
        if self._streams is not None:
            self._streams.forget(self._stream)
            self._streams = None

    def take(self, tokens: Iterable[int] = (), reason: str | None = None, error: HeadraceError | None = None) -> None:
        """What a step brought."""
        self._tokens.extend(tokens)
        self._reason = reason or self._reason
        self._error = error or self._error
        if self._reason or self._error:
            self._streams = None  # whose memory is not for those who keep what they have read


class TextStream:
    """The text of one stream, in whole characters."""

    def __init__(self, tokens: TokenStream, tokenizer: Any) -> None:
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # ids whose text was given out
        self._context = 0  # where decoding begins: a few ids before, which tell how the next ones are spaced
        self._pieces = self._generate()

    @property
    def finish_reason(self) -> str | None:
        """As in TokenStream."""
        return self._tokens.finish_reason

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating."""
        self._tokens.close()

    def _generate(self) -> Iterator[str]:
        for token in self._tokens:
            self._ids.append(token)
            if text := self._new_text():
                yield text
        if text := self._new_text(final=True):
            yield text

    def _new_text(self, *, final: bool = False) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(before) or (text.endswith(_UNFINISHED) and not final):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Streams:
    """An engine, and the readers of its streams.

    Args:
        engine: computes them.
        road: says whether it may use CUDA graphs.
    """

    def __init__(self, engine: Engine, road: Road) -> None:
        self._engine = engine
        self._road = road
        self._lock = threading.Lock()
        # Weak, so that a reader whom everybody dropped goes, and says so.
        self._open: weakref.WeakValueDictionary[StreamId, TokenStream] = weakref.WeakValueDictionary()
        self._forgotten: deque[StreamId] = deque()

    def open(self, prompt: Sequence[int], sampling: dict[str, Any]) -> TokenStream:
        """Start a stream; it takes part in every step from now on.

        Raises:
            RequestError: it cannot be served as asked.
        """
        settings = _sampling(sampling)
        stream = StreamId(secrets.token_bytes(16), 0, 0)
        assignment = Assignment(
            request=stream.request, choice=0, attempt=0, prompt=_packed(prompt), sampling=settings.to_wire()
        )
        with self._lock:
            if self._road.changed():
                self._engine.forget_prefixes()
            self._prepare_graphs()
            self._engine.add(assignment, 0.0)
            reader = self._open[stream] = TokenStream(self, stream)
        return reader

    def advance(self, reader: TokenStream) -> None:
        """Compute steps until there is something for this reader."""
        with self._lock:
            while reader.waits:
                # Readers may be given up anywhere, even in the middle of a step; this is the place to notice.
                while self._forgotten:
                    self._engine.revoke(self._forgotten.popleft())
                if not self._road.is_clear():
                    self._engine.drop_graphs()
                self._hand_out(self._engine.step(0.0))

    def forget(self, stream: StreamId) -> None:
        """Nobody reads this stream any more."""
        self._forgotten.append(stream)

    def close(self) -> None:
        """End all streams."""
        with self._lock:
            for reader in list(self._open.values()):
                reader.close()
            self._open.clear()
            self._engine.revoke_all()
            self._engine.drop_graphs()

    def gauges(self) -> dict[str, int | float]:
        """Figures of the engine."""
        return self._engine.load_gauges()

    def _prepare_graphs(self) -> None:
        """Have a graph for all open streams and one more: captured before its first token, and kept."""
        moved = self._road.moved()
        if not self._road.open() or moved:
            self._engine.drop_graphs()
        if self._road.why_not is None:
            self._road.try_to(lambda: self._engine.capture_decodes(len(self._engine.running()) + 1))

    def _hand_out(self, result: StepResult) -> None:
        for run in result.runs:
            if reader := self._open.get(StreamId(*run[:3])):
                reader.take(unpack_tokens(run.tokens))
        for finish in result.finishes:
            if reader := self._open.pop(StreamId(*finish[:3]), None):
                reader.take(reason=finish.reason)
        for refusal in result.refusals:
            if reader := self._open.pop(StreamId(*refusal[:3]), None):
                reader.take(error=from_wire(refusal.error))


def make_engine(
    loaded: Loaded, generation_config: GenerationConfig, max_tokens: int, *, start_token: int | None = None
) -> Engine:
    """A continuous-batching engine around a model that is loaded already.

    Args:
        loaded: the model.
        generation_config: names the tokens that end a text.
        max_tokens: most tokens of one text.
        start_token: with which an encoder-decoder's texts begin, if not as its config says.
    """
    from headrace.card import ModelCard
    from headrace.workers.config import EngineConfig
    from headrace.workers.engine import Engine

    ids = generation_config.eos_token_id
    card = ModelCard(
        name=loaded.architecture,
        architecture=loaded.architecture,
        family=loaded.policy.family,
        fingerprint=secrets.token_hex(16),
        vocab_size=loaded.model.spec.vocab_size,
        max_model_len=loaded.model.spec.max_positions,
        eos_token_ids=tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),),
    )
    return Engine(loaded.model, card, EngineConfig(max_model_len=max_tokens), start_token=start_token)


def _sampling(settings: dict[str, Any]) -> SamplingParams:
    """Checked settings; without a seed, torch's generator gives one, so that torch.manual_seed repeats a stream."""
    if settings.get("seed") is None:
        settings = settings | {"seed": int(torch.randint(2**63 - 1, ()))}
    try:
        sampling = SamplingParams(**settings)
    except TypeError as error:
        raise InvalidRequestError(
            f"{error}; settings are those of headrace.SamplingParams.", param="sampling"
        ) from None
    if sampling.stop:
        raise InvalidRequestError(
            "stop strings need text, which a stream of tokens has not; give stop_token_ids, or use "
            "generate(..., stop_strings=, tokenizer=, streamer=).",
            param="stop",
        )
    if sampling.n != 1:
        raise InvalidRequestError(f"n is {sampling.n}, but a stream is one text; open several.", param="n")
    return sampling


def _packed(prompt: Sequence[int]) -> bytes:
    try:
        return pack_tokens(int(token) for token in prompt)
    except (OverflowError, TypeError, ValueError):
        raise InvalidRequestError("The prompt holds no token ids; give a list of numbers.", param="prompt") from None

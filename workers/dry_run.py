"""The largest steps that the settings of an engine allow, to be computed for what they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from headrace.card import ModelCard
from headrace.messages import Assignment, pack_tokens
from headrace.workers.config import EngineConfig
from headrace.workers.engine import Engine
from headrace.workers.served import model_len
from headrace.workers.warmup import all_options, longest_text

__all__ = ["DryRun"]

_MORE = 2  # tokens that texts are continued by


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """Texts to be computed together, and the smallest cache that holds them.

    Attributes:
        blocks: of the cache.
        loads: for each step, how many texts of how many tokens.
        config: of an engine with such a cache.
    """

    blocks: int
    loads: tuple[tuple[int, int], ...]
    config: EngineConfig

    @classmethod
    def of(cls, card: ModelCard, config: EngineConfig, *, sources: bool) -> DryRun | None:
        """That of a model's engine; None if texts are too short to be continued.

        Args:
            card: of the model.
            config: of the engine.
            sources: whether an encoder reads the texts.
        """
        rows, size = config.max_num_seqs, config.block_size
        most = longest_text(model_len(card, config), _MORE, block_size=size, sources=sources)
        if most < 1:
            return None
        share = min(-(-config.max_batch_tokens // rows), most)
        longest = most if sources else min(config.max_batch_tokens, most)  # a source is read in one piece, however long
        loads = ((rows, share), (1, longest))
        # One more for where the next token goes, and all twice: sources have blocks of their own.
        blocks = 2 * max(count * (-(-(length + _MORE) // size) + 1) for count, length in loads)
        small = dataclasses.replace(config, kv_tokens=blocks * size, cuda_graphs=False, prefix_cache=False)
        return cls(blocks=blocks, loads=loads, config=small)

    def config_of(self, config: EngineConfig) -> EngineConfig:
        """Other settings, with as small a cache."""
        return dataclasses.replace(config, kv_tokens=self.config.kv_tokens)

    def compute(self, engine: Engine) -> None:
        """All loads, one after the other."""
        for load in self.loads:
            self.compute_one(engine, load)

    @staticmethod
    def compute_one(engine: Engine, load: tuple[int, int]) -> None:
        """So many texts of one length together."""
        for assignment in _prompts(*load, engine.card.vocab_size):
            engine.add(assignment, 0.0)
        while engine.has_work:
            engine.step(0.0)


def _prompts(count: int, length: int, vocab: int) -> Iterator[Assignment]:
    """Texts of one length that differ, to be continued with everything asked for."""
    for row in range(count):
        prompt = pack_tokens((row + place) % vocab for place in range(length))
        sampling = all_options() | {"max_tokens": _MORE, "ignore_eos": True, "seed": 1}
        yield Assignment(request=b"dry-%d" % row, choice=0, attempt=0, prompt=prompt, sampling=sampling)

"""A load of everything at once: prompts of many lengths, every setting of a sampler, answers that were begun elsewhere,
cancels, and too few blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from headrace.messages import Assignment, StreamId, pack_tokens
from headrace.workers.engine import Engine
from headrace.workers.warmup import _OPTIONS

__all__ = ["MIXED_LOAD_CONFIG", "MIXED_LOAD_FAMILIES", "run_mixed_load"]

MIXED_LOAD_FAMILIES = ["llama", "qwen2-tied", "gpt2", "gemma2", "bloom", "gptj", "mixtral", "t5"]

# So few blocks that streams give way to others.
MIXED_LOAD_CONFIG: dict[str, Any] = {"kv_tokens": 640, "max_num_seqs": 20, "max_batch_tokens": 300}
_BEGUN = 0.2  # of the answers
_LENGTHS = (1, 2, 3, 7, 16, 17, 31, 64, 65, 100, 129, 250, 300, 400)


def run_mixed_load(
    engine: Engine,
    *,
    requests: int = 150,
    longest: int = 400,
    seed: int = 7,
    watch: Callable[[Assignment], None] = lambda asked: None,
) -> None:
    """Feed an engine that has room for 512 tokens a text, and wait until all is done.

    Args:
        engine: that is fed.
        requests: how many.
        longest: most tokens of a prompt; answers are no longer than that either.
        seed: of all choices.
        watch: is called in between.
    """
    chance = random.Random(seed)
    lengths = [length for length in _LENGTHS if length <= longest]
    for number in range(requests):
        length = chance.choice(lengths)
        prompt = _tokens(engine, chance, length)
        most = chance.randint(2, min(512 - length, 110, longest))
        sampling = _options(chance) | {"max_tokens": most, "ignore_eos": True}
        begun = _tokens(engine, chance, chance.randrange(most) if chance.random() < _BEGUN else 0)
        asked = Assignment(request=b"%d" % number, choice=0, attempt=0, prompt=prompt, output=begun, sampling=sampling)
        engine.add(asked, 0.0)
        for _ in range(chance.choice((0, 0, 1, 3, 30))):
            engine.step(0.0)
        if chance.random() < 0.1:
            engine.revoke(StreamId(b"%d" % chance.randrange(number + 1), 0, 0))
        watch(asked)
    while engine.has_work:
        engine.step(0.0)
    engine.validate()


def _tokens(engine: Engine, chance: random.Random, count: int) -> bytes:
    return pack_tokens(chance.randrange(engine.card.vocab_size) for _ in range(count))


def _options(chance: random.Random) -> dict[str, Any]:
    """Settings of a sampler as a request may have them: of one kind, or of several at once."""
    options: dict[str, Any] = {"temperature": 0.7}
    for picked in chance.sample(_OPTIONS, chance.choice((0, 1, 1, 2, 4))):
        options |= picked
    if "min_tokens" not in options and chance.random() < 0.3:
        options["stop_token_ids"] = [chance.randrange(50)]
    return options | {"seed": chance.randrange(1 << 40)}

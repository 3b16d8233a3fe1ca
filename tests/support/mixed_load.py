"""A load of everything at once: prompts of many lengths, every setting of a sampler, cancels, and too few blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from headrace.messages import Assignment, StreamId, pack_tokens
from headrace.workers.engine import Engine
from headrace.workers.warmup import _OPTIONS

__all__ = ["MIXED_LOAD_CONFIG", "run_mixed_load"]

# So few blocks that streams give way to others.
MIXED_LOAD_CONFIG: dict[str, Any] = {"kv_tokens": 1600, "max_num_seqs": 20, "max_batch_tokens": 300}
_LENGTHS = (1, 2, 3, 7, 16, 17, 31, 64, 65, 100, 129, 250, 300, 400)


def run_mixed_load(
    engine: Engine, *, requests: int = 150, seed: int = 7, watch: Callable[[Assignment], None] = lambda asked: None
) -> None:
    """Feed an engine that has room for 512 tokens a text, and wait until all is done; `watch` is called in between."""
    chance = random.Random(seed)
    for number in range(requests):
        length = chance.choice(_LENGTHS)
        prompt = pack_tokens(chance.randrange(engine.card.vocab_size) for _ in range(length))
        sampling = _options(chance) | {"max_tokens": chance.randint(2, min(512 - length, 110)), "ignore_eos": True}
        asked = Assignment(request=b"%d" % number, choice=0, attempt=0, prompt=prompt, sampling=sampling)
        engine.add(asked, 0.0)
        for _ in range(chance.choice((0, 0, 1, 3, 30))):
            engine.step(0.0)
        if chance.random() < 0.1:
            engine.revoke(StreamId(b"%d" % chance.randrange(number + 1), 0, 0))
        watch(asked)
    while engine.has_work:
        engine.step(0.0)
    engine.validate()


def _options(chance: random.Random) -> dict[str, Any]:
    """Settings of a sampler as a request may have them: of one kind, or of several at once."""
    options: dict[str, Any] = {"temperature": 0.7}
    for picked in chance.sample(_OPTIONS, chance.choice((0, 1, 1, 2, 4))):
        options |= picked
    if "min_tokens" not in options and chance.random() < 0.3:
        options["stop_token_ids"] = [chance.randrange(50)]
    return options | {"seed": chance.randrange(1 << 40)}

"""What a model says to whole texts and to the same texts in steps, and how near it comes to another one.

`run` calls the model, or a method of it, where its kernels run; on a CPU that is a plain call.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from headrace.kernels.kv import KVCache
from headrace.kernels.model import Model
from tests.support.batches import make_batch

__all__ = [
    "MARGIN",
    "at_once",
    "at_random",
    "check",
    "encoder_states",
    "exactly",
    "in_steps",
    "logits_of",
    "narrowed",
    "root_mean_square",
    "sourced_logits_of",
    "their_answers",
    "their_logits",
    "their_states",
]

# Two ways of rounding the same sums err differently by chance, by a few percent; a product with one digit less errs
# twice as much.
MARGIN = 1.2

Run = Callable[..., Any]
Ask = Callable[[Any], list[torch.Tensor]]  # what a model of transformers says, text by text, in float32 on the CPU
Texts = Sequence[Sequence[int]]
Steps = Sequence[dict[int, tuple[int, int]]]  # of each step, by text: tokens of this step, tokens with them


def at_random(*lens: int, vocab: int, seed: int = 2) -> list[list[int]]:
    """Texts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in lens]


def at_once(lens: Sequence[int]) -> Steps:
    """All of every text in one step; the first text has one token."""
    return [{row: (length, length) for row, length in enumerate(lens)}]


def in_steps(lens: Sequence[int], decodes: int) -> Steps:
    """The same in two chunks and then `decodes` single tokens, but for the first text, which has one token in all."""
    read = [length - decodes for length in lens]
    halves = {row: (read[row] // 2, read[row] // 2) for row in range(1, len(lens))}
    rests = {row: (read[row] - half, read[row]) for row, (half, _) in halves.items()}
    single = [{row: (1, read[row] + index + 1) for row in range(1, len(lens))} for index in range(decodes)]
    return [{0: (1, 1), **halves}, rests, *single]


def logits_of(
    model: Model, run: Run, texts: Texts, steps: Steps, *, block_size: int = 8, num_blocks: int = 64
) -> list[torch.Tensor]:
    """All logits of every text [tokens, vocab] in float32, computed in steps over one cache."""
    parameter = next(model.parameters())
    cache = KVCache(model.spec, num_blocks, block_size, parameter.dtype, parameter.device)
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    for lens in steps:
        batch = _batch(texts, lens, block_size, num_blocks)
        found = run(model, batch, cache).split([count for count, _ in lens.values()])
        for row, part in zip(lens, found, strict=True):
            parts[row].append(part.float())
    return [torch.cat(part) for part in parts]


def sourced_logits_of(
    model: Model, run: Run, sources: Texts, texts: Texts, steps: Steps, *, block_size: int = 8, num_blocks: int = 64
) -> list[torch.Tensor]:
    """As `logits_of`, of at most four texts that answer sources, which an encoder reads first."""
    parameter = next(model.parameters())
    cache = KVCache(model.spec, num_blocks, block_size, parameter.dtype, parameter.device)
    shape = {"block_size": block_size, "num_blocks": num_blocks}
    # Of the blocks' eight rows the first four hold what the texts left, the others what the sources did.
    lens_of_sources = [(len(source), len(source)) for source in sources]
    flat = [token for source in sources for token in source]
    rows = [4 + row for row in range(len(sources))]
    run(model.encode, make_batch(lens_of_sources, rows=rows, token_ids=flat, **shape), cache)
    parts: list[list[torch.Tensor]] = [[] for _ in texts]
    for lens in steps:
        contexts = [(count, max(count, len(sources[row]))) for row, (count, _) in lens.items()]
        cross = make_batch(contexts, rows=[4 + row for row in lens], **shape)
        own = tuple(len(sources[row]) for row in lens)
        cross = dataclasses.replace(cross, context_lens=torch.tensor(own, dtype=torch.int32), context_lens_host=own)
        batch = dataclasses.replace(_batch(texts, lens, block_size, num_blocks), cross=cross)
        found = run(model, batch, cache).split([count for count, _ in lens.values()])
        for row, part in zip(lens, found, strict=True):
            parts[row].append(part.float())
    return [torch.cat(part) for part in parts]


def encoder_states(model: Model, run: Run, texts: Texts) -> list[torch.Tensor]:
    """The last hidden states of every text [tokens, hidden] in float32, read side by side by an encoder."""
    lens = [len(text) for text in texts]
    flat = [token for text in texts for token in text]
    batch = make_batch([(length, length) for length in lens], token_ids=flat, num_blocks=8 * -(-max(lens) // 4))
    states = run(model.hidden, batch, None)
    return [part.float() for part in states.split(lens)]


def their_logits(texts: Texts) -> Ask:
    """Asks a model of transformers for all logits of every text [tokens, vocab]."""
    return lambda model: [model(_ids(model, text)).logits[0].float().cpu() for text in texts]


def their_answers(sources: Texts, texts: Texts) -> Ask:
    """Asks an encoder-decoder of transformers for all logits of texts that answer sources."""
    return lambda model: [
        model(input_ids=_ids(model, source), decoder_input_ids=_ids(model, text)).logits[0].float().cpu()
        for source, text in zip(sources, texts, strict=True)
    ]


def their_states(texts: Texts) -> Ask:
    """Asks an encoder of transformers for the last hidden states of every text [tokens, hidden]."""
    return lambda model: [
        model(_ids(model, text), output_hidden_states=True).hidden_states[-1][0].float().cpu() for text in texts
    ]


def _ids(model: Any, text: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(text)], device=model.device)


def exactly(reference: Any, ask: Ask) -> list[torch.Tensor]:
    """What `ask` gets out of a model of transformers whose attention is not fused, but plain float32."""
    with sdpa_kernel(SDPBackend.MATH):
        return ask(reference)


def narrowed(reference: Any, dtype: torch.dtype) -> Any:
    """The same model of transformers with weights of another type; its tables of positions stay as wide as they are
    when it is loaded in that type."""
    narrow = copy.deepcopy(reference)
    for parameter in narrow.parameters():
        parameter.data = parameter.data.to(dtype)
    return narrow


def check(
    found: list[torch.Tensor], exact: list[torch.Tensor], theirs: list[torch.Tensor] | None, model: Model
) -> None:
    """Texts [tokens, values] against float32: near to it in float32 (`theirs` is None), else as near as others are."""
    if theirs is None:
        for ours, wanted in zip(found, exact, strict=True):
            scale = float(wanted.abs().max())
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4 * scale)
            if len(wanted) > 1:
                assert wanted.std(0).mean() > 0.1 * wanted.std(), "the model says the same whatever it is told"
        return
    truth = torch.cat(exact)
    allowed = MARGIN * root_mean_square(torch.cat(theirs) - truth, model)
    assert root_mean_square(torch.cat(found) - truth, model) < allowed


def root_mean_square(error: torch.Tensor, model: Model) -> float:
    """Of errors [tokens, values]. With experts that of the tenth of the tokens that err least: a last digit can send a
    token to other experts, and what it says then is read by all that come after it."""
    by_token = error.square().mean(-1)
    return float((by_token.quantile(0.1) if model.spec.layers[0].mlp.experts else by_token.mean()).sqrt())


def _batch(texts: Texts, lens: dict[int, tuple[int, int]], block_size: int, num_blocks: int) -> Any:
    tokens = [token for row, (count, total) in lens.items() for token in texts[row][total - count : total]]
    return make_batch(
        list(lens.values()),
        rows=list(lens),
        block_size=block_size,
        num_blocks=num_blocks,
        token_ids=tokens,
        all_logits=True,
    )

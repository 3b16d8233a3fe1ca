"""A byte-level BPE tokenizer of about 300 tokens, built in memory: what models have, small enough to reason about.

The first 256 ids are the bytes (id == byte value), then merged pieces, then the special tokens. Some pieces end or
begin inside a character on purpose, so that detokenizing token by token meets every cut a real vocabulary makes.
"""

from __future__ import annotations

import functools
import json

__all__ = [
    "CHAT_TEMPLATE",
    "CLS",
    "ENCODER_VOCAB_SIZE",
    "END_OF_TEXT",
    "IM_END",
    "IM_START",
    "MASK",
    "SEP",
    "SPECIAL_TOKENS",
    "VOCAB_SIZE",
    "encoder_tokenizer_json",
    "tiny_tokenizer_json",
]

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_ENCODER_TOKENS = ("[CLS]", "[SEP]", "[MASK]")

# Each byte string becomes a token, together with all its prefixes, so every one of them can be reached by merges.
_PIECES = (
    *(b" the", b" and", b"ing", b"er", b" is", b" of", b" to", b"hello", b" world", b"Paris", b"in", b"on", b"re"),
    *("é".encode(), "ü".encode(), "日本".encode(), "е".encode()),
    "😀".encode()[:3],  # a smile needs this and one more byte
    b" " + "日".encode()[:1],  # a piece that ends inside a character
    "👍".encode()[2:],  # a piece that begins inside one
    "e\u0301".encode(),  # a letter and its combining accent
)


def _byte_letters() -> list[str]:
    """The printable letter by which byte-level BPE writes each byte (the convention of GPT-2's vocabulary)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = _byte_letters()
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for piece in _PIECES:
        left = letters[piece[0]]
        for byte in piece[1:]:
            joined = left + letters[byte]
            if joined not in vocab:
                merges.append((left, letters[byte]))
                vocab[joined] = len(vocab)
            left = joined
    return vocab, merges


VOCAB_SIZE = len(_vocabulary()[0]) + len(SPECIAL_TOKENS)
END_OF_TEXT, IM_START, IM_END = range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE)
ENCODER_VOCAB_SIZE = VOCAB_SIZE + len(_ENCODER_TOKENS)
CLS, SEP, MASK = range(VOCAB_SIZE, ENCODER_VOCAB_SIZE)


@functools.cache
def tiny_tokenizer_json(*, bos: bool = False) -> bytes:
    """The content of a `tokenizer.json`; with `bos`, its post-processor puts `<|endoftext|>` first, as LLaMA's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab, merges = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END_OF_TEXT)]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False).encode()


@functools.cache
def encoder_tokenizer_json() -> bytes:
    """As `tiny_tokenizer_json`, with the special tokens of an encoder, two of which go around every text."""
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer = Tokenizer.from_str(tiny_tokenizer_json().decode())
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _ENCODER_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False).encode()

"""Tokenizers made in memory: the tiny byte-level one, and one in the manner of LLaMA 2.

The latter writes spaces as U+2581, puts one in front of every text, strips it again when decoding, and falls back to
byte tokens for characters it does not know: the other family of vocabularies that a detokenizer has to deal with.
"""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from tests.support.tiny_tokenizer import tiny_tokenizer_json

__all__ = ["byte_level", "sentencepiece_like"]

_SPACE = "\u2581"
_WORDS = ("the", "hello", "world", "in", "ing", "er", "the_end")


@functools.cache
def byte_level() -> Tokenizer:
    """The tiny tokenizer."""
    return Tokenizer.from_str(tiny_tokenizer_json().decode())


@functools.cache
def sentencepiece_like() -> Tokenizer:
    """About 350 tokens: specials, bytes, ASCII, an accented letter, and words with and without a space in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), _SPACE]
    pieces += [chr(code) for code in range(0x21, 0x7F)] + ["é"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in (*_WORDS, *(_SPACE + word for word in _WORDS)):
        left = word[0]
        for letter in word[1:]:
            if left + letter not in vocab:
                merges.append((left, letter))
                vocab[left + letter] = len(vocab)
            left += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer

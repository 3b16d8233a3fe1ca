"""The detokenizer gives out exactly the text of its tokens, in whole characters, and takes nothing back."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.client.detokenizer import Detokenizer
from tests.client.tokenizers_in_memory import byte_level, sentencepiece_like
from tests.support.tiny_tokenizer import IM_END, VOCAB_SIZE

HALF = "\N{REPLACEMENT CHARACTER}"
EITHER = pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
# Letters of one to four bytes, combining accents, joined emoji, and what the tiny vocabulary cuts in odd places.
TEXTS = (
    st.text(st.sampled_from("aet hling\n\u00e9\u00fc\u0435\u65e5\u672c\u0301\u200d😀👍🏽\U0010ffff\x00")) | st.text()
)


def whole(ids, tokenizer):
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def pieces(tokenizer, ids, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.step(token) for token in ids), detokenizer.flush()]


@EITHER
@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_text_comes_whole_and_in_whole_characters(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    out = pieces(tokenizer, ids)
    assert "".join(out) == whole(ids, tokenizer)
    if HALF not in text:
        assert HALF not in "".join(out[:-1])


@EITHER
@settings(deadline=None, max_examples=300)
@given(prompt=TEXTS, text=TEXTS)
def test_text_goes_on_where_the_prompt_ended(make, prompt, text):
    tokenizer = make()
    before = tokenizer.encode(prompt, add_special_tokens=False).ids
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if before:
        assert (
            "".join(pieces(tokenizer, ids, before)) == whole(before + ids, tokenizer)[len(whole(before, tokenizer)) :]
        )


def test_the_first_word_keeps_its_space_after_a_prompt():
    tokenizer = sentencepiece_like()
    hello, world = (tokenizer.encode(word, add_special_tokens=False).ids for word in ("hello", "world"))
    assert "".join(pieces(tokenizer, world)) == "world"
    assert "".join(pieces(tokenizer, world, hello)) == " world"


@settings(deadline=None, max_examples=500)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=150))
@example(ids=[0xFF] * 70)
@example(ids=[IM_END] * 100)
@example(ids=[*[0x80] * 33, 0xE6, 0x97, 0xA5])
@example(ids=[*[0x80] * 31, 0xE6, *[0x97] * 40])
def test_any_bytes_at_all(ids):
    """A sampler may draw any tokens; what comes out is what decoding all at once gives, never revised on the way."""
    tokenizer = byte_level()
    out = pieces(tokenizer, ids)
    assert "".join(out) == whole(ids, tokenizer)
    given_out = ""
    for count, piece in enumerate(out[:-1], start=1):
        given_out += piece
        assert whole(ids[:count], tokenizer).startswith(given_out)


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=60), prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12))
def test_a_prompt_may_end_anywhere(data, prompt):
    """One that ends inside a character leaves its rest to the answer, whose text is that of its own tokens."""
    tokenizer = byte_level()
    out = "".join(pieces(tokenizer, data, prompt))
    assert out == whole(data, tokenizer)


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, sentencepiece_like().get_vocab_size() - 1), max_size=120))
def test_byte_fallback_never_fails(ids):
    """Its decoder spoils earlier text when bytes that are no character follow; what was given out stays given out.

    So every character of the whole text comes, in order, and perhaps some that it has no more.
    """
    tokenizer = sentencepiece_like()
    out = iter("".join(pieces(tokenizer, ids)))
    assert all(letter in out for letter in whole(ids, tokenizer).replace(HALF, ""))


def test_endless_halves_are_given_out_in_the_end():
    """Bytes that never become a character must not be held back for ever, nor be decoded all again at each step."""
    detokenizer = Detokenizer(byte_level())
    out = "".join(detokenizer.step(0x80) for _ in range(1000))
    assert len(out) >= 1000 - 32
    assert set(out) == {HALF}


def test_half_a_character_at_the_end_shows_as_one():
    assert pieces(byte_level(), "日".encode()[:2]) == ["", "", HALF]

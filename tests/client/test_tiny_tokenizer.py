"""The tiny tokenizer keeps what its users rely on: ids are bytes, text survives a round trip, pieces cut characters."""

import pytest
from tokenizers import Tokenizer

from tests.support.tiny_tokenizer import END_OF_TEXT, IM_END, IM_START, SPECIAL_TOKENS, VOCAB_SIZE, tiny_tokenizer_json


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tiny_tokenizer_json().decode())


def test_ids(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(text) for text in SPECIAL_TOKENS] == [END_OF_TEXT, IM_START, IM_END]
    assert tokenizer.encode("zQ~").ids == [ord("z"), ord("Q"), ord("~")]


@pytest.mark.parametrize(
    "text", ["hello the world", "日本語 👍🏽 é e\u0301 😀", "  a\n\n\tb \x00\x7f", "", "<|im_start|>x"]
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_merges_and_cuts(tokenizer):
    assert len(tokenizer.encode("hello").ids) == 1
    assert 1 < len(tokenizer.encode("😀").ids) < 4
    assert tokenizer.decode([tokenizer.encode("😀").ids[0]]) == "\N{REPLACEMENT CHARACTER}"


def test_bos():
    with_bos = Tokenizer.from_str(tiny_tokenizer_json(bos=True).decode())
    assert with_bos.encode("x").ids == [END_OF_TEXT, ord("x")]
    assert with_bos.encode("x", add_special_tokens=False).ids == [ord("x")]

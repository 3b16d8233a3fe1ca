"""A model's text side: encoding, decoding, single tokens, chats, and what is said about files that cannot be used."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.card import CHAT_TEMPLATE, TOKENIZER
from headrace.client.text import Text
from headrace.errors import InvalidRequestError, ModelFilesError
from tests.client.tiny import FILES, tiny_card, tiny_text
from tests.client.tokenizers_in_memory import byte_level, sentencepiece_like
from tests.support.tiny_tokenizer import END_OF_TEXT, IM_END, IM_START, VOCAB_SIZE, tiny_tokenizer_json


def llama_text():
    return tiny_text(tokenizer=sentencepiece_like().to_str().encode(), template=None)


@settings(deadline=None)
@given(text=st.text())
def test_text_survives_a_round_trip(text):
    tiny = tiny_text()
    assert tiny.decode(tiny.encode(text), skip_special_tokens=False) == text


def test_special_tokens_of_a_prompt_are_the_callers_business():
    tiny = tiny_text()
    assert tiny.encode("<|im_start|>user") == [IM_START, *tiny.encode("user")]
    assert tiny.decode([IM_START, ord("a"), IM_END]) == "a"
    assert tiny.decode([IM_START, ord("a")], skip_special_tokens=False) == "<|im_start|>a"


def test_a_tokenizer_may_want_a_first_token():
    text = tiny_text(tokenizer=tiny_tokenizer_json(bos=True))
    assert text.encode("x") == [END_OF_TEXT, ord("x")]
    assert text.encode("x", add_special_tokens=False) == [ord("x")]
    # A chat template writes all special tokens itself.
    assert text.encode_chat([{"role": "user", "content": "x"}])[0] == IM_START


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 4)))
def test_bytes_of_tokens_make_up_the_text(ids):
    text = tiny_text()
    raw = b"".join(text.token(token)[1] for token in ids)
    assert raw.decode("utf-8", "replace") == text.decode(ids)
    for token in ids:
        shown, exact = text.token(token)
        assert shown == exact.decode("utf-8", "replace") == byte_level().decode([token])


def test_half_a_character_is_shown_as_such():
    assert tiny_text().token(0xE6) == ("\N{REPLACEMENT CHARACTER}", b"\xe6")


@pytest.mark.parametrize(
    ("token_id", "wanted"),
    [
        (IM_END, ("<|im_end|>", b"<|im_end|>")),
        (VOCAB_SIZE + 5, ("", b"")),  # vocabularies are padded; nobody writes such a token
        (ord(" "), (" ", b" ")),
    ],
)
def test_bytes_of_unusual_tokens(token_id, wanted):
    assert tiny_text().token(token_id) == wanted


@pytest.mark.parametrize(
    ("piece", "raw"), [("<0xE6>", b"\xe6"), ("\u2581the", b" the"), ("é", "é".encode()), ("</s>", b"</s>")]
)
def test_bytes_of_a_sentencepiece_vocabulary(piece, raw):
    text = llama_text()
    assert text.token(text.vocab[piece]) == (raw.decode("utf-8", "replace"), raw)


def test_content_may_come_in_parts():
    text = tiny_text()
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world"}]
    whole = text.encode_chat([{"role": "user", "content": "Hello, world"}])
    assert text.encode_chat([{"role": "user", "content": parts}]) == whole


def test_the_generation_prompt_can_be_left_out():
    text = tiny_text()
    chat = [{"role": "user", "content": "x"}]
    assert text.render(chat).removesuffix("<|im_start|>assistant\n") == text.render(chat, add_generation_prompt=False)


def test_variables_and_special_tokens_reach_the_template():
    text = tiny_text(template="{{ eos_token }}{{ enable_thinking }}{{ tools[0].name }}")
    chat = [{"role": "user", "content": "x"}]
    rendered = "<|im_end|>False" + "f"
    assert text.render(chat, [{"name": "f"}], enable_thinking=False) == rendered
    # The card's special tokens are the template's to write, so they are tokens.
    assert text.encode_chat(chat, [{"name": "f"}], enable_thinking=False)[0] == IM_END


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "not empty"),
        ("hello", "must be a list"),
        (b"hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (5, "must be a list"),
        ([5], r"messages\[0\] must be a map"),
        ([{"role": "user", "content": "a"}, "b"], r"messages\[1\] must be a map"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be a string"),
        ([{"role": "user", "content": {"text": "a"}}], r"messages\[0\].content must be a string"),
        ([{"role": "user", "content": object()}], r"messages\[0\].content is object"),
        ([{"content": "a"}], r"messages\[0\] has the role None"),
        ([{"role": "wizard", "content": "a"}], "unknown role wizard"),
    ],
)
def test_messages_that_are_none(messages, complaint):
    with pytest.raises(InvalidRequestError, match=complaint) as caught:
        tiny_text().encode_chat(messages)
    assert caught.value.param == "messages"


def test_a_model_without_a_template_takes_no_messages():
    text = tiny_text(template=None)
    assert not text.has_template
    with pytest.raises(InvalidRequestError, match="has no chat template; give a prompt"):
        text.encode_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 5}'])
def test_a_damaged_tokenizer(content):
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json cannot be read"):
        Text(tiny_card(), {TOKENIZER: content})


def test_a_damaged_template():
    with pytest.raises(ModelFilesError, match=r"chat_template\.jinja is not UTF-8"):
        Text(tiny_card(), {**FILES, CHAT_TEMPLATE: b"\xff"})


def test_settings_of_a_training_run_are_left_behind():
    """Files of fine-tuned models often say that prompts be cut and padded."""
    state = json.loads(tiny_tokenizer_json())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    text = tiny_text(tokenizer=json.dumps(state).encode())
    assert text.encode("zzzzzzz") == [ord("z")] * 7
    assert text.encode("z") == [ord("z")]


def test_repr():
    assert repr(tiny_text()) == f"<Text of tiny: {VOCAB_SIZE} tokens>"

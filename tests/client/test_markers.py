"""What users write never becomes a control token, whatever they write; ordinary text is tokenized as it always was."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers

from headrace.client.markers import Markers
from headrace.errors import InvalidRequestError
from tests.client.tiny import tiny_text
from tests.support.tiny_tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    SPECIAL_TOKENS,
    tiny_tokenizer_json,
)

CONTROL = {END_OF_TEXT, IM_START, IM_END}
# Whole control texts, parts of them that meet their rest in a neighbour, and what holds a text together.
HOSTILE = st.lists(
    st.sampled_from(
        [*SPECIAL_TOKENS, "<|im_", "end|>", "<|", "|>", "<", ">", "|", "im_start", "start|>", "a", " ", "\n", "日", ""]
    ),
    max_size=6,
).map("".join)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
CHATS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": HOSTILE}), min_size=1, max_size=4)

TEMPLATES = {
    "the tiny model's": CHAT_TEMPLATE,
    "trimming, and nothing between": "{% for m in messages %}{{ m.content | trim }}{{ m.content.strip() }}{% endfor %}"
    "<|im_start|>",
    "the template's own halves": "{% for m in messages %}<|im_{{ m.content }}|>{{ m.role }}<{% endfor %}<|im_end|>",
    "JSON": "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}{{ tools | tojson }}",
    "joined": "<|im_end|>{{ messages | map(attribute='content') | join }}{{ tools | string }}",
    "split": "{% for m in messages %}{{ m.content.split('\n')[-1] }}{{ m.content[:3] }}{% endfor %}<|endoftext|>",
}
HARMLESS = "xyzxyz"


def control_tokens(ids):
    return [token for token in ids if token in CONTROL]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(deadline=None, max_examples=200)
@given(chat=CHATS, name=HOSTILE, value=HOSTILE)
@example(chat=[{"role": "user", "content": "<|im_end|>"}], name="<|im_end|>", value="<|im_start|>")
@example(chat=[{"role": "user", "content": "<|im_"}, {"role": "user", "content": "end|>"}], name="", value="")
def test_control_tokens_are_the_templates_own(template, chat, name, value):
    text = tiny_text(template=TEMPLATES[template])
    tools = [{"type": "function", "function": {"name": "f", "parameters": {name: value}}}]
    ids = text.encode_chat(chat, tools=tools)
    harmless = [{"role": message["role"], "content": HARMLESS} for message in chat]
    wanted = text.encode_chat(harmless, tools=[])
    assert control_tokens(ids) == control_tokens(wanted)


@settings(deadline=None, max_examples=200)
@given(chat=CHATS)
def test_the_text_stays_what_it_was(chat):
    text = tiny_text()
    assert text.decode(text.encode_chat(chat), skip_special_tokens=False) == text.render(chat)


ORDINARY = st.text(st.characters(exclude_characters="<|>", exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None, max_examples=200)
@given(chat=st.lists(st.fixed_dictionaries({"role": ROLES, "content": ORDINARY}), min_size=1, max_size=4))
def test_ordinary_text_is_tokenized_in_one_go(chat):
    """As the model was trained: pieces of their own would give other tokens at their ends."""
    text = tiny_text()
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json().decode())
    assert text.encode_chat(chat) == tokenizer.encode(text.render(chat), add_special_tokens=False).ids


def with_tokens(*tokens, normalizer=None):
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json().decode())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = [token for token in tokens if token.special]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([token for token in tokens if not token.special])
    return json.dumps(json.loads(tokenizer.to_str())).encode(), tokenizer


def test_an_assistant_may_think_and_others_may_not():
    """A token that is not special but that the template knows, such as <think>, is part of what an assistant said."""
    content, tokenizer = with_tokens(AddedToken("<think>", special=False, normalized=False))
    think = tokenizer.token_to_id("<think>")
    template = CHAT_TEMPLATE + "{%- if false %}<think>{% endif %}"
    text = tiny_text(tokenizer=content, template=template)
    said = "<think>hm"
    assert think in text.encode_chat([{"role": "assistant", "content": said}])
    assert think not in text.encode_chat([{"role": "user", "content": said}])
    assert think not in text.encode_chat([{"role": "tool", "content": said}])
    # A template that does not know the token treats it as text like any other.
    assert think in tiny_text(tokenizer=content).encode_chat([{"role": "user", "content": said}])


def test_wide_letters_that_are_normalized_into_a_control_text():
    token = AddedToken("<|stop|>", special=True, normalized=True)
    content, tokenizer = with_tokens(token, normalizer=normalizers.NFKC())
    stop = tokenizer.token_to_id("<|stop|>")
    wide = "＜｜stop｜＞"
    assert stop in tokenizer.encode(wide).ids
    assert stop not in tiny_text(tokenizer=content).encode_chat([{"role": "user", "content": f"a{wide}b"}])


def test_a_mark_is_a_character_that_nobody_used():
    markers = Markers(["<|im_end|>"])
    first = chr(0xF0000)
    chat, rest, mark = markers.mark([{"role": "user", "content": f"<|im_end|>{first}"}], None)
    assert mark not in (first, "")
    assert chat[0]["content"].replace(mark, "") == f"<|im_end|>{first}"
    assert rest is None


def test_nothing_is_touched_without_need():
    chat = [{"role": "user", "content": "hello"}]
    assert Markers(["<|im_end|>"]).mark(chat, {"tools": None}) == (chat, {"tools": None}, "")


@pytest.mark.parametrize("role", ["", "a b", "<|im_start|>", "user\n", None, 5, "x" * 65])
def test_roles_are_plain_names(role):
    with pytest.raises(InvalidRequestError, match=r"messages\[0\] has the role") as caught:
        tiny_text().encode_chat([{"role": role, "content": "x"}])
    assert caught.value.param == "messages"


def test_nesting_has_a_limit():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequestError, match="too deeply"):
        tiny_text().encode_chat([{"role": "user", "content": "x", "deep": deep}])

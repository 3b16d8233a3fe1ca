"""Chat templates render as transformers renders them, and can do no harm."""

import enum
import json
import re

import pytest

from headrace.client.template import MAX_RENDERED, ChatTemplate, plain
from headrace.errors import InvalidRequestError, ModelFilesError
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer_json

CHAT = [
    {"role": "system", "content": "Be <kind> & 'brief'."},
    {"role": "user", "content": '日本 "quotes"\n\tand tabs'},
    {"role": "assistant", "content": "{'a': 1}"},
    {"role": "user", "content": "  end  "},
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "<b>é</b>", "parameters": {"x": [1, 2.5, None]}}}
]

FEATURES = {
    "the tiny model's": CHAT_TEMPLATE,
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ 'é<' | tojson(ensure_ascii=true) }}",
    "tojson with separators": "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "white space": "  {% for m in messages %}\n    {%- if true %}\n   {{ m.role }}\n  {% endif %}\n{% endfor %}\n\n",
    "namespaces": "{% set ns = namespace(n=0, last=none) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.n = ns.n + 1 %}{% set ns.last = m.content %}{% endfor %}{{ ns.n }}{{ ns.last | trim }}",
    "macros": "{% macro say(m, end='!') %}<{{ m.role }}{{ end }}>{% endmacro %}{% for m in messages %}{{ say(m) }}"
    "{{ say(m, end='?') }}{% endfor %}",
    "call blocks": "{% macro in_tags() %}[{{ caller() }}]{% endmacro %}{% call in_tags() %}x{% endcall %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "text": "{{ messages[0].content.split('<')[0].strip() }}{{ 'ab' * 3 }}{{ 2 ** 5 }}{{ 'a' ~ 1 }}{{ [1] + [2] }}",
    "special tokens": "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}",
    "what is missing": "{{ messages[0].nothing }}{% if tools is defined and tools %}T{% endif %}"
    "{{ documents }}{{ zzz }}",
    "dict": "{% set d = dict(a=1) %}{{ d.items() | list }}{{ dict([('x', 2)]) }}",
    "recursion": "{% for m in [[1, [2, 3]], [4]] recursive %}{% if m is iterable %}({{ loop(m) }}){% else %}{{ m }}"
    "{% endif %}{% endfor %}",
}


@pytest.fixture(scope="module")
def transformers_tokenizer():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer_json().decode()),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
def test_renders_what_transformers_renders(transformers_tokenizer, feature, prompted, tools):
    source = FEATURES[feature]
    theirs = transformers_tokenizer.apply_chat_template(
        CHAT, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=prompted
    )
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "documents": None}
    assert ChatTemplate(source).render(CHAT, tools, add_generation_prompt=prompted, **special) == theirs


def test_the_date_is_todays(transformers_tokenizer):
    source = "{{ strftime_now('%Y-%m-%d') }}"
    ours = ChatTemplate(source).render(CHAT, None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", ours)


def test_a_template_may_refuse():
    template = ChatTemplate("{{ raise_exception('roles must take turns') }}")
    with pytest.raises(InvalidRequestError, match="roles must take turns") as caught:
        template.render(CHAT, None)
    assert caught.value.param == "messages"


def test_what_a_template_cannot_deal_with():
    with pytest.raises(InvalidRequestError, match="cannot render"):
        ChatTemplate("{{ messages[0].content + 1 }}").render(CHAT, None)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% nonsense %}"])
def test_bad_jinja_is_a_bad_model_file(source):
    with pytest.raises(ModelFilesError, match="not valid Jinja"):
        ChatTemplate(source)


HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__.keys() }}",
    "globals by attr": "{{ (raise_exception | attr('__globals__')).keys() }}",
    "the environment": "{{ self.__init__.__globals__ }}",
    "format strings": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "writing to messages": "{{ messages.append(1) }}",
    "writing to a message": "{{ messages[0].update(role='system') }}",
    "a namespace's insides": "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}{{ os.listdir('/') }}",
    "our counter": "{{ self[' loops'] }}{% set loops = 1 %}{{ undefined.x }}",
    "much text": "{{ 'x' * 1000000000 }}",
    "a long list": "{{ [0] * 1000000000 }}",
    "a huge number": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "endless output": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxx"
    "{% endfor %}{% endfor %}",
    "endless silence": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless skipping": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "endless macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_hostile_template_gets_nowhere(trick):
    before = json.dumps(CHAT)
    with pytest.raises((InvalidRequestError, ModelFilesError)):
        ChatTemplate(HOSTILE[trick]).render(CHAT, None)
    assert json.dumps(CHAT) == before


def test_the_rendered_chat_is_bounded():
    chat = [{"role": "user", "content": "x" * (MAX_RENDERED // 2)}]
    assert len(ChatTemplate("{{ messages[0].content }}").render(chat, None)) == MAX_RENDERED // 2
    with pytest.raises(InvalidRequestError, match="8,388,608 characters"):
        ChatTemplate("{% for i in range(3) %}{{ messages[0].content }}{% endfor %}").render(chat, None)


class Role(str, enum.Enum):  # noqa: UP042  as people write it
    USER = "user"


class Model:
    def model_dump(self):
        return {"role": Role.USER, "content": ("a", 1)}


def test_a_template_sees_plain_values_only():
    seen = plain([Model(), {"n": 1.5, "t": True, "none": None}], "messages")
    assert seen == [{"role": "user", "content": ["a", 1]}, {"n": 1.5, "t": True, "none": None}]
    assert type(seen[0]["role"]) is str
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.x is object") as caught:
        plain([{"x": object()}], "messages")
    assert caught.value.param == "messages"

"""Text of a model on the page: hostile text does nothing, and text that grows ends as text that came at once."""

import json
import random
import re

import pytest
from playwright.sync_api import expect

HOSTILE = r"""
<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2">
<svg onload="window.hacked = 3"><script>window.hacked = 3</script></svg>
<iframe srcdoc="<script>parent.hacked = 4</script>"></iframe>
<a href="javascript:window.hacked = 5" onclick="window.hacked = 5">raw link</a>
<style>body { display: none }</style>
<form action="https://evil.example"><input name=q><button>go</button></form>
<div style="position:fixed;inset:0" id="prompt" class="banner">over all</div>
<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.hacked=6&gt;">
<object data="https://evil.example/x"></object><embed src="https://evil.example/y"><base href="https://evil.example/">
<meta http-equiv="refresh" content="0;url=https://evil.example"><link rel=stylesheet href="https://evil.example/s.css">

[script](javascript:window.hacked=7) [data](data:text/html,<script>window.hacked=8</script>) [vb](vbscript:x)
[relative](/v1/models) [hash](#prompt) [no scheme](//evil.example/) [tab](java&#9;script:window.hacked=9)
![picture](https://evil.example/pixel.png) ![quote](https://evil.example/"onerror="window.hacked=10)
[title](https://ok.example/ "x\" onmouseover=\"window.hacked=11") <https://auto.example/> <javascript:window.hacked=12>
[ref][evil] `<img src=x onerror=window.hacked=13>`

[evil]: javascript:window.hacked=14

| <img src=x onerror=window.hacked=15> | b |
|---|---|
| [x](javascript:window.hacked=16) | <script>window.hacked=17</script> |

```html"onmouseover="window.hacked=18
<script>window.hacked=19</script>
```

- [ ] <input type=text autofocus onfocus=window.hacked=20>
- [x] done

H<sub>2</sub>O and <kbd>Esc</kbd> and a break<br>here
"""


HARMLESS = set(
    re.findall("[a-z]+", "a br button code div em input kbd li p pre span strong sub table tbody td th thead tr ul")
)


def check_nothing_happened(page):
    text = page.text
    # Icons and copy buttons are the page's own.
    made = text.locator(":not(.icon, .icon *)").evaluate_all("all => [...new Set(all.map((each) => each.localName))]")
    assert set(made) <= HARMLESS
    assert page.page.evaluate("window.hacked") is None
    attributes = page.page.evaluate(
        """() => [...new Set([...document.querySelectorAll(".answer *:not(.icon, .icon *)")].flatMap(
             (element) => element.getAttributeNames()))].sort()"""
    )
    assert not [name for name in attributes if name.startswith("on") or name in ("style", "id", "name", "src")]
    for href in text.locator("a").evaluate_all("links => links.map((link) => link.getAttribute('href'))"):
        assert href.startswith(("https://evil.example/", "https://ok.example/", "https://auto.example/")), href
    assert page.page.locator("#prompt").count() == 1
    expect(page.prompt).to_be_visible()
    assert text.locator("input").evaluate_all("boxes => boxes.map((box) => [box.type, box.disabled])") == [
        ["checkbox", True],
        ["checkbox", True],
    ]


@pytest.mark.parametrize("size", [1_000_000, 3], ids=["at once", "bit by bit"])
def test_hostile_text_is_only_text(serve, visit, size):
    page = visit(serve(lambda call, choice: [HOSTILE[at : at + size] for at in range(0, len(HOSTILE), size)])).ready()
    page.ask(HOSTILE)
    check_nothing_happened(page)
    # HTML is shown as what it is, but for the few tags that only shape text.
    expect(page.text).to_contain_text("<script>window.hacked = 1</script>")
    expect(page.text).to_contain_text('<div style="position:fixed;inset:0"')
    expect(page.text.locator("sub")).to_have_text("2")
    expect(page.text.locator("kbd")).to_have_text("Esc")
    expect(page.question.locator(".body")).to_have_text(HOSTILE.strip())
    assert page.question.locator(".body > *").count() == 0
    page.reload()
    page.ready()
    check_nothing_happened(page)


def test_hostile_names_are_only_text(serve, visit):
    page = visit(serve(lambda call, choice: ["ok"])).ready()
    page.ask("<img src=x onerror=window.hacked=1>")
    expect(page.chats.locator(".open")).to_have_text("<img src=x onerror=window.hacked=1>")
    assert page.page.locator("#chats img").count() == 0
    assert page.page.evaluate("window.hacked") is None


PARTS = [
    "# Heading\n\n",
    "A *paragraph* with `code`,\nlines and [a link](https://example.org/a_b).\n\n",
    "Setext\n======\n\n",
    "- one\n- two\n\n  more of two\n- three\n  - deeper\n\n",
    "1. first\n2. second\n   ```js\n   let a = 1;\n   ```\n3. third\n\n",
    "> quoted\n> > twice\n\nafter\n",
    "```python\ndef f(x):\n    return '''a\n\nb'''  # c\n```\n",
    "~~~\nplain <b>\n~~~\n",
    "    indented code\n\n    more of it\n\n",
    "| a | b |\n|---|:-:|\n| 1 | `x|y` |\n\n",
    "---\n",
    "***\n\n",
    "[later] and [text][later]\n\n",
    "[later]: https://example.org/later\n\n",
    "- [x] done\n- [ ] open\n\n",
    "<div>\nraw\n</div>\n\n",
    "<!-- a comment\n\nthat goes on -->\n\n",
    "Line one  \nline two\\\nline three\r\nline four\n\n",
    "**bold *and* more** ~~gone~~ H<sub>2</sub>O &amp; &lt;\n\n",
    "```\nnever closed\n",
    "\n\n\n",
    "text right before\n- a list\ntext right after\n",
]

# Feeds a text to the page's renderer in pieces and at once; gives both results.
COMPARE = """async ([text, cuts]) => {
  const { Markdown } = await import("/static/js/markdown.js");
  const [grown, whole] = [new Markdown(document.createElement("div")), new Markdown(document.createElement("div"))];
  let settled = 0;
  for (const cut of cuts) {
    grown.update(text.slice(0, cut));
    if (grown.settled < settled) throw new Error("what was settled was made again");
    settled = grown.settled;
  }
  grown.update(text, true);
  whole.update(text, true);
  return [grown.root.innerHTML, whole.root.innerHTML];
}"""


def test_text_that_grows_ends_as_text_that_came_at_once(plain, visit):
    page = visit(plain)
    rng = random.Random(7)
    for _ in range(150):
        text = "".join(rng.choices(PARTS, k=rng.randint(1, 7)))
        if rng.random() < 0.3:
            text = text[: rng.randrange(len(text) + 1)]
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.choice([1, 3, 20, 200])))
        grown, whole = page.page.evaluate(COMPARE, [text, cuts])
        assert grown == whole, json.dumps(text)


def test_a_long_answer_costs_no_more_per_word_than_a_short_one(plain, visit):
    """What is settled is never parsed again: only the end of the text reaches the parser."""
    page = visit(plain)
    longest = page.page.evaluate(
        """async () => {
          const { Markdown } = await import("/static/js/markdown.js");
          const view = new Markdown(document.createElement("div"));
          let text = "", longest = 0;
          for (let part = 0; part < 300; part += 1) {
            text += `Paragraph ${part} with some words.\\n\\n`;
            view.update(text);
            longest = Math.max(longest, text.length - view.settled);
          }
          return longest;
        }"""
    )
    assert longest < 100


def test_the_page_is_not_drawn_for_every_token(serve, visit):
    page = visit(serve(lambda call, choice: [f"word{number} " for number in range(3000)])).ready()
    page.page.evaluate(
        """async () => {
          const { Message } = await import("/static/js/message.js");
          const draw = Message.prototype.drawText;
          window.drawn = 0;
          Message.prototype.drawText = function (...given) { window.drawn += 1; return draw.apply(this, given); };
          window.began = performance.now();
        }"""
    )
    page.ask("x")
    drawn, passed = page.page.evaluate("[window.drawn, performance.now() - window.began]")
    expect(page.text).to_contain_text("word2999")
    assert drawn <= passed / 40 + 10  # at most one per 40 ms, and those of the beginning and the end


def test_code_keeps_its_place_while_it_grows(plain, visit):
    page = visit(plain)
    same = page.page.evaluate(
        """async () => {
          const { Markdown } = await import("/static/js/markdown.js");
          const view = new Markdown(document.createElement("div"));
          view.update("Look:\\n\\n```python\\nprint(");
          const [before] = view.root.getElementsByTagName("pre");
          view.update("Look:\\n\\n```python\\nprint('a')\\nx = 1");
          const [after] = view.root.getElementsByTagName("pre");
          return before === after && after.textContent === "print('a')\\nx = 1\\n";
        }"""
    )
    assert same


@pytest.mark.parametrize(
    ("language", "code", "found"),
    [
        ("python", 'x = f(1)  # "no"', {"hl-name": ["f"], "hl-number": ["1"], "hl-comment": ['# "no"']}),
        ("python", "s = '''a\n# b'''", {"hl-string": ["'''a\n# b'''"]}),
        (
            "js",
            "const a = `x ${1}`; // c",
            {"hl-keyword": ["const"], "hl-string": ["`x ${1}`"], "hl-comment": ["// c"]},
        ),
        ("rust", "fn f<'a>(x: &'a str) {}", {"hl-keyword": ["fn"]}),
        ("sql", "SELECT 'it''s' -- x", {"hl-keyword": ["SELECT"], "hl-string": ["'it''s'"], "hl-comment": ["-- x"]}),
        ("html", '<a href="b">1</a>', {"hl-keyword": ["a", "a"], "hl-string": ['"b"']}),
        ("bash", 'echo "$#" ${#a} # c', {"hl-keyword": ["echo"], "hl-string": ['"$#"'], "hl-comment": ["# c"]}),
        ("json", '{"a": [1.5e3, true]}', {"hl-string": ['"a"'], "hl-number": ["1.5e3"], "hl-keyword": ["true"]}),
        ("constructor", "a = 1", {}),
        ("", "if x", {}),
    ],
)
def test_code_is_coloured(plain, visit, language, code, found):
    page = visit(plain)
    spans, text = page.page.evaluate(
        """async ([code, language]) => {
          const { highlight } = await import("/static/js/highlight.js");
          const box = document.createElement("div");
          box.append(...highlight(code, language));
          return [[...box.children].map((span) => [span.className, span.textContent]), box.textContent];
        }""",
        [code, language],
    )
    assert text == code
    for style, words in found.items():
        assert [word for name, word in spans if name == style] == words
    assert bool(spans) == bool(found)

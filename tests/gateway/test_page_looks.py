"""How the page behaves for the eye, the hand and the ear: phones, dark, scrolling, names, contrast."""

import threading

import pytest
from playwright.sync_api import expect

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
WIDE = "\n".join(
    [
        "A-very-long-word-" * 12,
        "",
        "```",
        "code " * 60,
        "```",
        "",
        "| " + " | ".join(f"column {n}" for n in range(14)) + " |",
        "|" + "---|" * 14,
        "| " + " | ".join("value" for _ in range(14)) + " |",
    ]
)


def overflow(page) -> int:
    """Pixels by which the page is wider than its window."""
    return page.page.evaluate(
        """() => Math.max(...[document.documentElement, document.body, document.getElementById("scroller")].map(
             (box) => box.scrollWidth - box.clientWidth))"""
    )


def test_a_phone_never_scrolls_sideways(serve, visit):
    page = visit(serve(lambda call, choice: [WIDE]), **PHONE).ready()
    assert overflow(page) == 0
    page.prompt.fill("wide " * 30 + "w" * 200)
    page.send_button.tap()
    page.finished()
    assert overflow(page) == 0
    assert page.page.evaluate("document.querySelector('.code pre').scrollWidth > 360")
    page.open_settings()
    assert overflow(page) == 0
    assert round(page.settings.bounding_box()["width"]) <= 360


def test_a_phone_has_the_chats_in_a_drawer(serve, visit):
    page = visit(serve(), **PHONE).ready()
    sidebar = page.page.get_by_role("navigation", name="Chats")
    expect(sidebar).to_be_hidden()
    page.prompt.fill("one")
    page.send_button.tap()
    page.finished()
    page.button("Show chats").tap()
    expect(sidebar).to_be_visible()
    assert page.page.evaluate("document.getElementById('main').inert")
    page.page.touchscreen.tap(350, 400)
    expect(sidebar).to_be_hidden()
    page.button("Show chats").tap()
    page.button("New chat", sidebar).tap()
    expect(sidebar).to_be_hidden()
    expect(page.page.locator("#welcome")).to_be_visible()
    page.button("Show chats").tap()
    page.chats.locator(".open").tap()
    expect(sidebar).to_be_hidden()
    expect(page.messages).to_have_count(2)


def test_on_a_phone_enter_is_a_new_line(serve, visit):
    running = serve()
    page = visit(running, **PHONE).ready()
    page.prompt.tap()
    page.page.keyboard.type("a")
    page.page.keyboard.press("Enter")
    page.page.keyboard.type("b")
    expect(page.prompt).to_have_value("a\nb")
    page.send_button.tap()
    page.finished()
    assert running.fake.calls[0].text == "a\nb"


def test_the_list_of_chats_can_be_put_away(serve, visit):
    page = visit(serve()).ready()
    page.button("Hide chats").click()
    expect(page.page.locator("#sidebar")).to_be_hidden()
    expect(page.button("Show chats")).to_be_focused()
    page.reload()
    page.ready()
    expect(page.page.locator("#sidebar")).to_be_hidden()
    page.button("Show chats").click()
    expect(page.page.locator("#sidebar")).to_be_visible()


LUMINANCE = """
  const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
"""


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_system_s_colours_are_followed(serve, visit, scheme, dark):
    page = visit(serve(), color_scheme=scheme).ready()
    background = page.page.evaluate(
        f"() => {{ {LUMINANCE} return luminance(getComputedStyle(document.documentElement).backgroundColor); }}"
    )
    assert (background < 0.05) == dark
    page.page.emulate_media(color_scheme="light" if dark else "dark")
    changed = page.page.evaluate(
        f"() => {{ {LUMINANCE} return luminance(getComputedStyle(document.documentElement).backgroundColor); }}"
    )
    assert (changed < 0.05) != dark


CONTRAST = f"""() => {{
  {LUMINANCE}
  const behind = (element) => {{
    for (let at = element; at; at = at.parentElement) {{
      const colour = getComputedStyle(at).backgroundColor;
      if (!colour.endsWith(", 0)") && colour !== "transparent") return colour;
    }}
    return getComputedStyle(document.documentElement).backgroundColor;
  }};
  const weak = [];
  for (const element of document.querySelectorAll("body *")) {{
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || element.disabled || !element.checkVisibility()) continue;
    const [light, low] = [getComputedStyle(element).color, behind(element)].map(luminance).sort((a, b) => b - a);
    const ratio = (light + 0.05) / (low + 0.05);
    if (ratio < 4.5) weak.push([element.outerHTML.slice(0, 80), ratio]);
  }}
  return weak;
}}"""

SAMPLE = """# Title

Text with `code`, a [link](https://example.org/) and

> a quotation

```python
def f(x):  # comment
    return "text", 1, g(x)
```

| a | b |
|---|---|
| 1 | 2 |
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out(serve, visit, scheme):
    page = visit(serve(lambda call, choice: [SAMPLE]), color_scheme=scheme).ready()
    assert page.page.evaluate(CONTRAST) == []
    page.ask("x")
    assert page.page.evaluate(CONTRAST) == []
    page.open_settings()
    assert page.page.evaluate(CONTRAST) == []


def test_everything_that_can_be_used_has_a_name(serve, visit):
    page = visit(serve(lambda call, choice: [SAMPLE])).ready()
    page.ask("x")
    page.open_settings()
    nameless = page.page.evaluate(
        """() => {
          const usable = "button, input, select, textarea, a, [tabindex='0']";
          return [...document.querySelectorAll(usable)].filter((element) => {
            const label = element.labels?.[0]?.textContent ?? "";
            return !(element.getAttribute("aria-label") || label || element.textContent).trim();
          }).map((element) => element.outerHTML.slice(0, 100));
        }"""
    )
    # A block of code is reached with the keyboard to be scrolled; its text is its name.
    assert nameless == []


def test_what_is_written_is_announced_when_it_is_complete(serve, visit):
    go = threading.Event()
    page = visit(serve(lambda call, choice: ["a", go, "b"])).ready()
    log = page.page.get_by_role("log", name="Conversation")
    expect(log).to_have_attribute("aria-live", "polite")
    page.say("x")
    expect(page.page.get_by_role("status")).to_have_text("The model is answering")
    expect(log).to_have_attribute("aria-busy", "true")
    go.set()
    expect(page.page.get_by_role("status")).to_have_text("The answer is complete")
    expect(log).to_have_attribute("aria-busy", "false")


def test_the_keyboard_alone_is_enough(serve, visit):
    page = visit(serve()).ready()
    page.page.keyboard.press("Shift+Tab")
    reached = set()
    for _ in range(12):
        page.page.keyboard.press("Shift+Tab")
        reached.add(page.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"open-settings", "model", "new-chat", "close-sidebar", "skip"} <= reached
    page.page.locator(".skip").focus()
    page.page.keyboard.press("Enter")
    expect(page.prompt).to_be_focused()
    page.page.locator("#open-settings").focus()
    page.page.keyboard.press("Enter")
    expect(page.settings).to_be_visible()
    page.page.keyboard.press("Escape")
    expect(page.page.locator("#open-settings")).to_be_focused()
    outline = page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


# ---------------------------------------------------------------------------------------------------------- scrolling

AWAY = """() => {
  const { scrollHeight, clientHeight, scrollTop } = document.getElementById("scroller");
  return Math.round(scrollHeight - clientHeight - scrollTop);
}"""


def test_the_view_follows_the_text_until_the_reader_scrolls_away(serve, visit):
    steps = [threading.Event() for _ in range(4)]
    lines = "".join(f"line {number}\n\n" for number in range(40))

    def script(call, choice):
        for step in steps:
            yield lines
            yield step
        yield "the end"

    page = visit(serve(script)).ready()
    jump = page.button("Go to the latest text")
    page.say("x")
    page.page.wait_for_function("() => document.querySelectorAll('.answer p').length === 40")
    page.page.wait_for_function(f"() => ({AWAY})() <= 1")
    expect(jump).to_be_hidden()
    page.page.locator("#scroller").hover()
    page.page.mouse.wheel(0, -600)
    expect(jump).to_be_visible()
    top = page.page.evaluate("document.getElementById('scroller').scrollTop")
    steps[0].set()
    page.page.wait_for_function("() => document.querySelectorAll('.answer p').length === 80")
    assert abs(page.page.evaluate("document.getElementById('scroller').scrollTop") - top) <= 1
    jump.click()
    page.page.wait_for_function(f"() => ({AWAY})() <= 1")
    expect(jump).to_be_hidden()
    steps[1].set()
    page.page.wait_for_function("() => document.querySelectorAll('.answer p').length === 120")
    page.page.wait_for_function(f"() => ({AWAY})() <= 1")
    page.page.mouse.move(700, 150)
    page.page.mouse.wheel(0, -600)
    expect(jump).to_be_visible()
    page.page.mouse.wheel(0, 5000)
    expect(jump).to_be_hidden()
    for step in steps:
        step.set()
    page.finished()
    page.page.wait_for_function(f"() => ({AWAY})() <= 1")

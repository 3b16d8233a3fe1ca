"""Talking to the page: streamed answers, stopping, answering again, editing, continuing."""

import re
import threading

from playwright.sync_api import expect

from tests.gateway.helpers import WAIT, until

MARKDOWN = """## Three things

1. **bold**, *slanted* and `code`
2. a [link](https://example.org/)

| name | size |
|---|--:|
| a | 1 |

```python
print("hello")
```
"""


def pieces(text: str, size: int = 4) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def test_a_prompt_is_answered_in_markdown_while_it_is_written(serve, visit):
    go = threading.Event()
    running = serve(lambda call, choice: [*pieces(MARKDOWN[:60]), go, *pieces(MARKDOWN[60:])])
    page = visit(running).ready()
    page.say("Tell me three things.")
    expect(page.question.locator(".body")).to_have_text("Tell me three things.")
    expect(page.text.locator("h2")).to_have_text("Three things")
    expect(page.text.locator("strong")).to_have_text("bold")
    expect(page.answer).to_have_attribute("aria-busy", "true")
    expect(page.text.locator("table")).to_have_count(0)
    expect(page.stop_button).to_be_visible()
    expect(page.send_button).to_be_hidden()
    go.set()
    page.finished()
    expect(page.text.locator("ol > li")).to_have_count(2)
    expect(page.text.locator("td").first).to_have_text("a")
    expect(page.text.locator("pre code")).to_have_text('print("hello")\n')
    expect(page.text.locator("pre .hl-name")).to_have_text("print")
    link = page.text.get_by_role("link", name="link")
    expect(link).to_have_attribute("href", "https://example.org/")
    expect(link).to_have_attribute("target", "_blank")
    expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
    (call,) = running.fake.calls
    assert call.messages == [{"role": "user", "content": "Tell me three things."}]
    expect(page.page).to_have_title("Tell me three things. · Headrace")


def test_each_answer_tells_how_it_was_made(serve, visit):
    page = visit(serve(lambda call, choice: ["a", 0.05, " b", 0.05, " c"])).ready()
    page.ask("x")
    expect(page.answer.locator(".stats")).to_have_text(
        re.compile(r"^3 tokens · [\d.,]+ tok/s · first in \d+\.\d\d s · prompt 7 \(3 cached\)$")
    )


def test_a_conversation_goes_on(serve, visit):
    running = serve(lambda call, choice: [f"You said {call.text}."])
    page = visit(running).ready()
    page.ask("one")
    page.ask("two")
    expect(page.messages).to_have_count(4)
    assert running.fake.calls[1].messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "You said one."},
        {"role": "user", "content": "two"},
    ]


def test_stop_cancels_on_the_server_and_keeps_what_came(serve, visit):
    running = serve(lambda call, choice: ["Once ", "upon", threading.Event(), " a time"])
    page = visit(running).ready()
    page.say("x")
    expect(page.text).to_have_text("Once upon")
    page.stop_button.click()
    assert running.fake.calls[0].closed.wait(WAIT)
    assert running.fake.calls[0].ended == "closed"
    page.finished()
    expect(page.text).to_have_text("Once upon")
    expect(page.answer.locator(".end")).to_have_text("Stopped")
    expect(page.answer.locator(".stats")).to_contain_text("2 tokens")
    expect(page.banner).to_be_hidden()
    expect(page.prompt).to_be_focused()


def test_escape_stops_wherever_the_focus_is(serve, visit):
    running = serve(lambda call, choice: ["a", threading.Event()])
    page = visit(running).ready()
    page.say("x")
    expect(page.text).to_have_text("a")
    page.page.locator("#new-chat").focus()
    page.page.keyboard.press("Escape")
    assert running.fake.calls[0].closed.wait(WAIT)
    page.finished()


def test_escape_closes_the_settings_and_not_the_answer(serve, visit):
    go = threading.Event()
    running = serve(lambda call, choice: ["a", go, "b"])
    page = visit(running).ready()
    page.say("x")
    expect(page.text).to_have_text("a")
    page.open_settings()
    page.page.keyboard.press("Escape")
    expect(page.settings).to_be_hidden()
    go.set()
    page.finished()
    expect(page.text).to_have_text("ab")


def test_stop_before_the_first_word_leaves_the_question_to_be_sent_again(serve, visit):
    first = []

    def script(call, choice):
        first.append(call)
        return [threading.Event()] if len(first) == 1 else ["Yes."]

    running = serve(script)
    page = visit(running).ready()
    page.say("x")
    expect(page.answer.locator(".waiting")).to_be_visible()
    until(lambda: running.fake.calls, "the request")
    page.stop_button.click()
    assert running.fake.calls[0].closed.wait(WAIT)
    expect(page.messages).to_have_count(1)
    page.button("Send again", page.question).click()
    page.finished()
    expect(page.text).to_have_text("Yes.")
    expect(page.messages).to_have_count(2)


def test_continue_goes_on_in_the_middle(serve, visit):
    first = []

    def script(call, choice):
        first.append(call)
        return ["The cap", "ital", threading.Event()] if len(first) == 1 else [" of **France**", "."]

    running = serve(script)
    page = visit(running).ready()
    page.say("x")
    expect(page.text).to_have_text("The capital")
    page.stop_button.click()
    page.finished()
    page.button("Continue", page.answer).click()
    page.finished()
    expect(page.text).to_have_text("The capital of France.")
    expect(page.text.locator("p")).to_have_count(1)
    assert "".join(map(chr, running.fake.calls[1].token_ids)) == "[user]x[assistant]The capital"
    expect(page.answer.locator(".stats")).to_contain_text("4 tokens")
    expect(page.button("Continue", page.answer)).to_have_count(0)


def test_an_answer_that_met_its_limit_can_be_continued(serve, visit):
    page = visit(serve(lambda call, choice: ["a", " b", " c", " d"])).ready()
    page.open_settings().get_by_label("Most tokens").fill("2")
    page.close_settings()
    page.ask("x")
    expect(page.answer.locator(".end")).to_have_text("Stopped at the token limit")
    page.button("Continue", page.answer).click()
    page.finished()
    expect(page.text).to_have_text("a ba b")


def test_answering_again_keeps_the_first_answer(serve, visit):
    count = iter(range(1, 10))
    running = serve(lambda call, choice: [f"Answer {next(count)}"])
    page = visit(running).ready()
    page.ask("x")
    page.button("Answer again", page.answer).click()
    page.finished()
    expect(page.text).to_have_text("Answer 2")
    expect(page.answer.locator(".versions")).to_have_text("2 / 2")
    assert running.fake.calls[0].messages == running.fake.calls[1].messages
    page.button("Earlier version", page.answer).click()
    expect(page.text).to_have_text("Answer 1")
    expect(page.button("Earlier version", page.answer)).to_be_disabled()
    page.ask("y")
    assert running.fake.calls[2].messages[1]["content"] == "Answer 1"


def test_editing_a_question_begins_a_branch(serve, visit):
    running = serve(lambda call, choice: [f"Re: {call.text}"])
    page = visit(running).ready()
    page.ask("frist")
    page.ask("second")
    first = page.messages.first
    first.hover()
    page.button("Edit and send again", first).click()
    box = first.get_by_role("textbox", name="Edit message")
    expect(box).to_be_focused()
    expect(box).to_have_value("frist")
    box.fill("first")
    box.press("Enter")
    page.finished()
    expect(page.messages).to_have_count(2)
    expect(page.text).to_have_text("Re: first")
    assert running.fake.calls[2].messages == [{"role": "user", "content": "first"}]
    expect(page.question.locator(".versions")).to_have_text("2 / 2")
    page.button("Earlier version", page.question).click()
    expect(page.messages).to_have_count(4)
    expect(page.text).to_have_text("Re: second")


def test_editing_can_be_given_up(serve, visit):
    page = visit(serve()).ready()
    page.ask("as it is")
    for give_up in ("Escape", "Cancel"):
        page.question.hover()
        page.button("Edit and send again", page.question).click()
        page.page.get_by_label("Edit message").fill("other")
        if give_up == "Escape":
            page.page.keyboard.press("Escape")
        else:
            page.button("Cancel", page.question).click()
        expect(page.question.locator(".body")).to_have_text("as it is")
    expect(page.messages).to_have_count(2)


def test_enter_sends_and_shift_enter_does_not(serve, visit):
    running = serve()
    page = visit(running).ready()
    expect(page.prompt).to_be_focused()
    expect(page.send_button).to_be_disabled()
    page.prompt.press("Enter")
    page.page.keyboard.type("   ")
    page.prompt.press("Enter")
    expect(page.messages).to_have_count(0)
    low = page.prompt.bounding_box()["height"]
    page.prompt.fill("one")
    page.prompt.press("Shift+Enter")
    page.page.keyboard.type("two")
    expect(page.send_button).to_be_enabled()
    assert page.prompt.bounding_box()["height"] > low
    page.prompt.press("Enter")
    page.finished()
    expect(page.prompt).to_have_value("")
    assert page.prompt.bounding_box()["height"] == low
    assert running.fake.calls[0].text == "one\ntwo"
    expect(page.question.locator(".body")).to_have_text("one\ntwo")


def test_a_suggestion_is_put_into_the_box(serve, visit):
    page = visit(serve()).ready()
    expect(page.page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    button = page.page.locator("#suggestions button").first
    text = button.text_content()
    button.click()
    expect(page.prompt).to_have_value(text)
    page.prompt.press("Enter")
    page.finished()
    expect(page.page.locator("#welcome")).to_be_hidden()


def test_copying(serve, visit):
    page = visit(serve(lambda call, choice: ["```py\n", "x = 1\n", "```"]), permissions=["clipboard-read"]).ready()
    page.ask("x")
    page.button("Copy code", page.text).click()
    expect(page.page.get_by_role("status")).to_have_text("Copied")
    assert page.page.evaluate("navigator.clipboard.readText()") == "x = 1\n"
    page.button("Copy answer", page.answer).click()
    page.page.wait_for_function("async () => (await navigator.clipboard.readText()).startsWith('```py')")


def test_thoughts_are_folded(serve, visit):
    page = visit(serve(lambda call, choice: ["<think>", "Let me *see*", "</think>\n\n", "It is **42**."])).ready()
    page.ask("x")
    expect(page.text).to_have_text("It is 42.")
    thoughts = page.answer.locator("details.thinking")
    expect(thoughts.locator("em")).to_be_hidden()
    thoughts.get_by_text("Thoughts").click()
    expect(thoughts.locator("em")).to_have_text("see")


def test_an_empty_answer_says_so(serve, visit):
    page = visit(serve(lambda call, choice: [])).ready()
    page.ask("x")
    expect(page.answer.locator(".end")).to_have_text("The model said nothing")


def test_two_chats_can_be_answered_at_once(serve, visit):
    go = threading.Event()
    running = serve(lambda call, choice: ["slow", go, " done"] if call.text == "slow" else ["fast"])
    page = visit(running).ready()
    page.say("slow")
    expect(page.text).to_have_text("slow")
    page.button("New chat").first.click()
    page.ask("quick")
    expect(page.text).to_have_text("fast")
    page.chats.get_by_text("slow").click()
    expect(page.stop_button).to_be_visible()
    go.set()
    page.finished()
    expect(page.text).to_have_text("slow done")

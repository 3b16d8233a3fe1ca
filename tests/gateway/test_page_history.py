"""Chats in the browser: they survive a reload, can be named, found, exported and deleted, and go nowhere else."""

import json
import threading
from pathlib import Path

from playwright.sync_api import expect

from tests.gateway.helpers import until
from tests.support.fake_client import words


def echo(call, choice):
    return words(f"You said {call.text}.")


def test_a_chat_survives_a_reload(serve, visit):
    page = visit(serve(echo)).ready()
    page.ask("remember **me**")
    stats = page.answer.locator(".stats").text_content()
    page.reload()
    page.ready()
    expect(page.question.locator(".body")).to_have_text("remember **me**")
    expect(page.text).to_have_text("You said remember me.")
    expect(page.text.locator("strong")).to_have_text("me")
    expect(page.answer.locator(".stats")).to_have_text(stats)
    expect(page.chats).to_have_count(1)
    page.ask("and go on")
    expect(page.messages).to_have_count(4)


def test_branches_survive_a_reload(serve, visit):
    count = iter(range(1, 10))
    page = visit(serve(lambda call, choice: [f"Answer {next(count)}"])).ready()
    page.ask("x")
    page.button("Answer again", page.answer).click()
    page.finished()
    page.button("Earlier version", page.answer).click()
    page.reload()
    page.ready()
    expect(page.text).to_have_text("Answer 1")
    page.button("Later version", page.answer).click()
    expect(page.text).to_have_text("Answer 2")


def test_a_page_closed_in_the_middle_keeps_what_came(serve, visit):
    never = threading.Event()
    first = []

    def script(call, choice):
        first.append(call)
        return ["Half ", "of", 1.1, " it", never] if len(first) == 1 else [", now all."]

    running = serve(script)
    page = visit(running).ready()
    page.say("x")
    expect(page.text).to_have_text("Half of it")
    # It is written to the database at most every second, with whatever comes next.
    stored = "async () => JSON.stringify(await (await import('/static/js/store.js')).load(location.hash.slice(1)))"
    until(lambda: "Half of" in page.page.evaluate(stored), "the saving")
    page.reload()
    page.ready()
    until(lambda: running.fake.calls[0].ended == "closed", "the cancelling")
    expect(page.text).to_contain_text("Half of")
    expect(page.answer.locator(".end")).to_have_text("Interrupted")
    page.button("Continue", page.answer).click()
    page.finished()
    expect(page.text).to_contain_text(", now all.")


def test_chats_are_listed_latest_first_and_have_addresses(serve, visit):
    page = visit(serve(echo)).ready()
    page.ask("first")
    address = page.page.url
    page.button("New chat").first.click()
    expect(page.messages).to_have_count(0)
    expect(page.prompt).to_be_focused()
    page.ask("second\nwith more lines")
    expect(page.chats.locator(".open")).to_have_text(["second", "first"])
    page.page.go_back()
    page.page.go_back()
    expect(page.text).to_have_text("You said first.")
    expect(page.chats.locator("[aria-current=true]")).to_have_text("first")
    page.page.goto(address)
    expect(page.text).to_have_text("You said first.")
    page.page.goto(page.url + "/#nothing-of-this-name")
    expect(page.page.locator("#welcome")).to_be_visible()


def test_a_chat_can_be_renamed(serve, visit):
    page = visit(serve(echo)).ready()
    page.ask("dull")
    for title, key, shown in (("Bright", "Enter", "Bright"), ("never", "Escape", "Bright"), ("   ", "Enter", "Bright")):
        page.chats.first.hover()
        page.button("Rename chat").click()
        box = page.page.get_by_role("textbox", name="Name of the chat")
        box.fill(title)
        box.press(key)
        expect(page.chats.locator(".open")).to_have_text(shown)
    expect(page.page).to_have_title("Bright · Headrace")
    page.ask("more")
    page.reload()
    expect(page.chats.locator(".open")).to_have_text("Bright")


def test_a_chat_is_deleted_after_a_question(serve, visit):
    page = visit(serve(echo)).ready()
    page.ask("keep")
    page.button("New chat").first.click()
    page.ask("delete")
    for answer, left in (("Cancel", 2), ("Delete", 1)):
        page.chats.first.hover()
        page.button("Delete chat", page.chats.first).click()
        dialog = page.page.get_by_role("dialog", name="Delete this chat?")
        expect(dialog).to_contain_text("“delete” will be gone for good")
        page.button(answer, dialog).click()
        expect(page.chats).to_have_count(left)
    expect(page.page.locator("#welcome")).to_be_visible()
    page.reload()
    page.ready()
    expect(page.chats.locator(".open")).to_have_text("keep")


def test_a_chat_deleted_while_it_is_answered_does_not_come_back(serve, visit):
    running = serve(lambda call, choice: ["a", threading.Event()])
    page = visit(running).ready()
    page.say("x")
    expect(page.text).to_have_text("a")
    page.chats.first.hover()
    page.button("Delete chat").click()
    page.button("Delete", page.page.get_by_role("dialog")).click()
    expect(page.chats).to_have_count(0)
    until(lambda: running.fake.calls[0].ended == "closed", "the cancelling")
    page.reload()
    page.ready()
    expect(page.chats).to_have_count(0)


def exported(page, press):
    with page.page.expect_download() as caught:
        press()
    download = caught.value
    return download.suggested_filename, json.loads(Path(download.path()).read_text())


def test_export(serve, visit):
    page = visit(serve(echo)).ready()
    page.ask("Grüße, 世界!")
    page.button("New chat").first.click()
    page.ask("two")
    page.chats.last.hover()
    name, content = exported(page, lambda: page.button("Export chat as JSON", page.chats.last).click())
    assert name == "headrace-chat-grüße-世界-.json"
    assert (content["format"], content["version"]) == ("headrace-chats", 1)
    (chat,) = content["chats"]
    assert chat["title"] == "Grüße, 世界!"
    assert [(node["role"], node["text"]) for node in chat["nodes"]] == [
        ("user", "Grüße, 世界!"),
        ("assistant", "You said Grüße, 世界!."),
    ]
    assert chat["nodes"][1]["stats"]["tokens"] == 4
    page.open_settings()
    name, content = exported(page, lambda: page.button("Export all as JSON").click())
    assert name == "headrace-chats.json"
    assert {chat["title"] for chat in content["chats"]} == {"Grüße, 世界!", "two"}


def test_delete_all(serve, visit):
    page = visit(serve(echo)).ready()
    for text in ("one", "two", "three"):
        page.button("New chat").first.click()
        page.ask(text)
    page.open_settings()
    page.button("Delete all").click()
    dialog = page.page.get_by_role("dialog", name="Delete all chats?")
    expect(dialog).to_contain_text("3 chats")
    page.button("Delete", dialog).click()
    page.close_settings()
    expect(page.chats).to_have_count(0)
    expect(page.page.locator("#no-chats")).to_have_text("Chats are kept in this browser only.")


def test_search(serve, visit):
    page = visit(serve(echo)).ready()
    search = page.page.get_by_role("searchbox", name="Search chats")
    expect(search).to_be_hidden()
    for text in ("Apples and pears", "Stones"):
        page.button("New chat").first.click()
        page.ask(text)
    search.fill("PEAR")
    expect(page.chats.locator(".open")).to_have_text("Apples and pears")
    search.fill("nothing")
    expect(page.chats).to_have_count(0)
    expect(page.page.locator("#no-chats")).to_have_text("No chat has this in its title.")
    search.fill("")
    expect(page.chats).to_have_count(2)


def test_without_a_database_it_works_until_the_tab_is_closed(serve, visit):
    page = visit(serve(echo))
    page.context.add_init_script("IDBFactory.prototype.open = () => { throw new Error('not allowed'); };")
    page.open().ready()
    page.ask("one")
    page.button("New chat").first.click()
    page.ask("two")
    page.chats.last.click()
    expect(page.text).to_have_text("You said one.")
    page.reload()
    page.ready()
    expect(page.chats).to_have_count(0)


def test_a_chat_that_cannot_be_kept_is_not_lost_in_silence(serve, visit):
    page = visit(serve(echo)).ready()
    page.page.evaluate("() => { IDBObjectStore.prototype.put = () => { throw new Error('the disk is full'); }; }")
    page.ask("x")
    expect(page.banner).to_contain_text("could not keep the chat (the disk is full)")
    _, content = exported(page, lambda: page.button("Export", page.banner).click())
    assert content["chats"][0]["nodes"][1]["text"] == "You said x."

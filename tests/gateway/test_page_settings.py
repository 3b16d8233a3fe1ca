"""The settings reach the requests; what fails says what to do; a key stays in memory."""

import threading

import pytest
from playwright.sync_api import expect

from headrace.errors import BrokerConnectionError, OverloadedError, WorkerCrashedError
from tests.support.fake_client import FakeClient, card


def test_empty_fields_show_what_the_server_does(serve, visit):
    running = serve()
    page = visit(running).ready()
    settings = page.open_settings()
    for label, value in (
        ("Temperature", "0.7"),
        ("Top p", "0.8"),
        ("Top k", "20"),
        ("Min p", "0"),
        ("Repetition penalty", "1.1"),
        ("Presence penalty", "0"),
        ("Frequency penalty", "0"),
        ("Most tokens", "as many as fit"),
        ("Seed", "random"),
    ):
        expect(settings.get_by_label(label)).to_have_attribute("placeholder", value)
    expect(settings.locator("#model-facts")).to_contain_text("tiny-chat")
    expect(settings.locator("#model-facts")).to_contain_text("512 tokens")
    page.close_settings()
    page.ask("x")
    sampling = running.fake.calls[0].sampling
    assert sampling == type(sampling)()


@pytest.mark.parametrize(
    ("changes", "shown"), [({}, "float32"), ({"quantization": "fp8", "dtype": "bfloat16"}, "fp8, else bfloat16")]
)
def test_the_page_tells_what_weights_are_kept_in(serve, visit, changes, shown):
    page = visit(serve(FakeClient(cards=[card(**changes)]))).ready()
    expect(page.open_settings().locator("#model-facts dd", has_text=shown)).to_have_text(shown)


def test_what_is_set_reaches_the_request_and_is_remembered(serve, visit):
    running = serve()
    page = visit(running).ready()
    settings = page.open_settings()
    settings.get_by_label("System prompt").fill("Be brief.")
    for label, value in (
        ("Temperature", "0.25"),
        ("Most tokens", "50"),
        ("Top p", "0.5"),
        ("Top k", "3"),
        ("Min p", "0.05"),
        ("Repetition penalty", "1.2"),
        ("Presence penalty", "-1"),
        ("Frequency penalty", "0.5"),
        ("Seed", "42"),
    ):
        settings.get_by_label(label).fill(value)
    settings.get_by_label("Stop at").fill("END\n\nSTOP ")
    page.close_settings()
    page.ask("x")
    call = running.fake.calls[0]
    assert call.messages[0] == {"role": "system", "content": "Be brief."}
    sampling = call.sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.top_p, sampling.top_k) == (0.25, 50, 0.5, 3)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.seed) == (-1, 0.5, 42)
    assert sampling.stop == ("END", "STOP ")
    page.reload()
    page.ready()
    expect(page.open_settings().get_by_label("Temperature")).to_have_value("0.25")
    page.close_settings()
    page.button("New chat").first.click()
    page.ask("y")
    assert running.fake.calls[1].sampling == sampling


def test_settings_belong_to_their_chat(serve, visit):
    running = serve()
    page = visit(running).ready()
    page.open_settings().get_by_label("System prompt").fill("One.")
    page.close_settings()
    page.ask("first")
    page.button("New chat").first.click()
    page.open_settings().get_by_label("System prompt").fill("Two.")
    page.close_settings()
    page.ask("second")
    page.chats.get_by_text("first").click()
    expect(page.settings.locator("#system-prompt")).to_have_value("One.")
    page.ask("again")
    assert running.fake.calls[2].messages[0]["content"] == "One."


def test_reset_goes_back_to_the_server_s(serve, visit):
    running = serve()
    page = visit(running).ready()
    marked = page.button("Settings")
    settings = page.open_settings()
    settings.get_by_label("Temperature").fill("0")
    settings.get_by_label("Stop at").fill("x")
    page.close_settings()
    expect(marked).to_have_class("icon-button changed")
    page.open_settings()
    page.button("Reset", settings).click()
    expect(settings.get_by_label("Temperature")).to_have_value("")
    page.close_settings()
    expect(marked).to_have_class("icon-button")
    page.ask("x")
    assert running.fake.calls[0].sampling.stop == ()


def test_a_value_out_of_range_is_marked_and_left_out(serve, visit):
    running = serve()
    page = visit(running).ready()
    field = page.open_settings().get_by_label("Top p")
    field.fill("1.5")
    expect(field).to_have_attribute("aria-invalid", "true")
    page.close_settings()
    page.ask("x")
    assert running.fake.calls[0].sampling.top_p == 1.0
    page.open_settings()
    field.fill("")
    field.press("ArrowDown")
    expect(field).to_have_value("0.75")
    expect(field).to_have_attribute("aria-invalid", "false")


def test_the_picker_chooses_the_model(serve, visit):
    running = serve(FakeClient(cards=[card("a"), card("b/c", sampling_defaults={"temperature": 0.1})]))
    page = visit(running).ready()
    expect(page.model.locator("option")).to_have_text(["a", "b/c"])
    page.model.select_option("b/c")
    expect(page.settings.locator("#s-temperature")).to_have_attribute("placeholder", "0.1")
    page.ask("x")
    assert running.fake.calls[0].model == "b/c"
    page.reload()
    page.ready()
    expect(page.model).to_have_value("b/c")


def test_a_chat_of_a_model_that_is_gone_takes_one_that_is_there(serve, visit):
    running = serve(FakeClient(cards=[card("old")]))
    page = visit(running).ready()
    page.ask("x")
    running.fake.cards = [card("new")]
    page.reload()
    page.ready()
    page.ask("y")
    assert [call.model for call in running.fake.calls] == ["old", "new"]


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_failure_is_told_and_can_be_tried_again(serve, visit):
    tries = []

    def script(call, choice):
        tries.append(call)
        return [OverloadedError("The queue is full; try again shortly.")] if len(tries) == 1 else ["Here."]

    page = visit(serve(script)).ready()
    page.expected_statuses = (429,)
    page.ask("x")
    expect(page.banner).to_contain_text("The queue is full")
    expect(page.messages).to_have_count(1)
    page.button("Try again", page.banner).click()
    page.finished()
    expect(page.text).to_have_text("Here.")
    expect(page.banner).to_be_hidden()


def test_a_failure_in_the_middle_keeps_what_came_and_can_be_continued(serve, visit):
    tries = []

    def script(call, choice):
        tries.append(call)
        return ["Half", WorkerCrashedError("The group died.")] if len(tries) == 1 else [" and half."]

    page = visit(serve(script)).ready()
    page.ask("x")
    expect(page.banner).to_contain_text("The group died.")
    expect(page.text).to_have_text("Half")
    expect(page.answer.locator(".end")).to_have_text("Interrupted")
    page.button("Continue", page.banner).click()
    page.finished()
    expect(page.text).to_have_text("Half and half.")


def test_a_banner_can_be_dismissed(serve, visit):
    page = visit(serve(lambda call, choice: ["a", WorkerCrashedError("No.")])).ready()
    page.ask("x")
    page.button("Dismiss", page.banner).click()
    expect(page.banner).to_be_hidden()


def test_a_server_that_ends_in_the_middle(serve, visit):
    running = serve(lambda call, choice: ["a", threading.Event()], drain_timeout=0.1)
    page = visit(running).ready()
    page.say("x")
    expect(page.text).to_have_text("a")
    running.stop()
    running.ended()
    page.finished()
    expect(page.banner).to_be_visible()
    expect(page.text).to_have_text("a")
    page.expected_statuses = ()
    page.button("Continue", page.banner).click()
    expect(page.banner).to_contain_text("The server cannot be reached")
    page.faults = [fault for fault in page.faults if "net::ERR_CONNECTION_REFUSED" not in fault]


def test_a_bad_value_leads_to_the_settings(serve, visit):
    page = visit(serve()).ready()
    page.expected_statuses = (400,)
    page.open_settings().get_by_label("Stop at").fill("\n".join("abcdefghijklmnopq"))
    page.close_settings()
    page.ask("x")
    expect(page.banner).to_contain_text("16 strings")
    page.button("Settings", page.banner).click()
    expect(page.settings).to_be_visible()


@pytest.mark.parametrize("failing", [False, True], ids=["no model", "no broker"])
def test_without_a_model_the_page_waits_for_one(serve, visit, failing):
    fake = FakeClient(cards=[])
    fake.models_error = BrokerConnectionError("No broker answers.") if failing else None
    page = visit(serve(fake))
    page.expected_statuses = (503,)
    expect(page.model).to_have_text("Waiting for a model …")
    expect(page.page.locator("#welcome-note")).to_contain_text("No model is ready yet")
    if failing:
        expect(page.banner).to_contain_text("No broker answers.")
    page.prompt.fill("can be written already")
    page.prompt.press("Enter")
    expect(page.send_button).to_be_disabled()
    fake.cards, fake.models_error = [card("tiny-chat")], None
    page.ready()
    expect(page.banner).to_be_hidden()
    page.prompt.press("Enter")
    page.finished()
    expect(page.text).to_have_text("Hello number 0 from tiny-chat.")


# ---------------------------------------------------------------------------------------------------------------- key


def test_a_key_is_asked_for_and_kept_in_memory_only(serve, visit):
    running = serve(api_keys=("sesame-sesame",))
    page = visit(running)
    page.expected_statuses = (401,)
    expect(page.banner).to_contain_text("A valid API key is needed")
    page.button("Enter key", page.banner).click()
    field = page.settings.get_by_label("API key")
    expect(field).to_be_focused()
    expect(field).to_have_attribute("type", "password")
    field.fill("sesame-sesame")
    page.close_settings()
    page.ready()
    page.ask("x")
    expect(page.text).to_have_text("Hello number 0 from tiny-chat.")
    kept = page.page.evaluate(
        """async () => {
          const store = await import("/static/js/store.js");
          const chats = await Promise.all((await store.list()).map(({ id }) => store.load(id)));
          const settings = await store.setting("defaults");
          return JSON.stringify([chats, settings, { ...localStorage }, { ...sessionStorage }, document.cookie]);
        }"""
    )
    assert "tiny-chat" in kept
    assert "sesame" not in kept
    page.reload()
    expect(page.banner).to_contain_text("A valid API key is needed")


def test_a_wrong_key_is_told(serve, visit):
    page = visit(serve(api_keys=("right",)))
    page.expected_statuses = (401,)
    page.button("Enter key", page.banner).click()
    page.settings.get_by_label("API key").fill("wrong")
    page.close_settings()
    expect(page.banner).to_contain_text("A valid API key is needed")
    expect(page.model).to_have_text("Locked")
    expect(page.model).to_be_disabled()

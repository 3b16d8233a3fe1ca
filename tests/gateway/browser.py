"""The chat page in a headless browser, as a person sees it: what can be typed, pressed and read."""

from __future__ import annotations

import shutil
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Locator, Page, Playwright, expect

__all__ = ["ChatPage", "find_chromium", "launch"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

expect.set_options(timeout=30_000)

# Violations of the page's policy are events of the document; a test looks at them at its end.
_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`);
});
"""


def find_chromium() -> str | None:
    """A browser of this machine."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def launch(playwright: Playwright) -> Browser:
    """Start it without a window."""
    return playwright.chromium.launch(executable_path=find_chromium(), headless=True, args=list(_ARGUMENTS))


class ChatPage:
    """One tab; remembers everything that should not have happened."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        context.add_init_script(_WATCH)
        self.context = context
        self.url = url
        self.faults: list[str] = []
        self.requested: list[str] = []
        self.page: Page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.expected_statuses: tuple[int, ...] = ()

    def _heard(self, message: Any) -> None:
        # The browser itself reports every response with an error status; some tests provoke them.
        provoked = any(f"status of {status} " in message.text for status in self.expected_statuses)
        if message.type in ("error", "warning") and not provoked:
            self.faults.append(f"{message.type}: {message.text}")

    def open(self, path: str = "") -> ChatPage:
        self.page.goto(self.url + "/" + path)
        return self

    def reload(self) -> ChatPage:
        """Load the page again, once what was written to its database is there: reading comes after writing."""
        self.page.evaluate("async () => { await (await import('/static/js/store.js')).list(); }")
        self.page.reload()
        return self

    def ready(self) -> ChatPage:
        """Wait until a message can be sent."""
        expect(self.model).to_be_enabled()
        return self

    def check(self) -> None:
        """Nothing went wrong, and nobody else was asked for anything."""
        if not self.page.is_closed():
            self.faults += [f"policy: {each}" for each in self.page.evaluate("window.violations")]
        assert self.faults == []
        strangers = [url for url in self.requested if not url.startswith((self.url + "/", "blob:", "data:"))]
        assert strangers == []

    # ---------------------------------------------------------------------------------------------- what there is

    @property
    def model(self) -> Locator:
        return self.page.locator("#model")

    @property
    def prompt(self) -> Locator:
        return self.page.locator("#prompt")

    @property
    def send_button(self) -> Locator:
        return self.page.locator("#send")

    @property
    def stop_button(self) -> Locator:
        return self.page.locator("#stop")

    @property
    def banner(self) -> Locator:
        return self.page.get_by_role("alert")

    @property
    def messages(self) -> Locator:
        return self.page.locator("#messages .message")

    @property
    def answer(self) -> Locator:
        """The last answer."""
        return self.page.locator("#messages .message.assistant").last

    @property
    def text(self) -> Locator:
        """The text of the last answer."""
        return self.answer.locator(".answer")

    @property
    def question(self) -> Locator:
        """The last message of the user."""
        return self.page.locator("#messages .message.user").last

    @property
    def chats(self) -> Locator:
        return self.page.locator("#chats li")

    @property
    def settings(self) -> Locator:
        return self.page.locator("#settings")

    def button(self, name: str, within: Locator | None = None) -> Locator:
        return (within or self.page).get_by_role("button", name=name, exact=True)

    # ------------------------------------------------------------------------------------------ what can be done

    def say(self, text: str) -> None:
        """Send a message, and do not wait for its answer."""
        self.prompt.fill(text)
        self.prompt.press("Enter")

    def ask(self, text: str) -> None:
        """Send a message and wait until it is answered."""
        self.say(text)
        self.finished()

    def finished(self) -> None:
        """Wait until nothing is being written."""
        expect(self.stop_button).to_be_hidden()
        expect(self.page.locator("#messages")).to_have_attribute("aria-busy", "false")

    def open_settings(self) -> Locator:
        self.button("Settings").click()
        expect(self.settings).to_be_visible()
        return self.settings

    def close_settings(self) -> None:
        self.button("Close settings").click()
        expect(self.settings).to_be_hidden()

"""A tiny model with its real engine, on every road to it: page, API, library, terminal, parts on their own."""

import json
import signal
import urllib.request

import pytest

from headrace.client import Client
from tests.scripts.commands import Pty, Run, call_as_curl
from tests.support.children import wait_until

pytestmark = pytest.mark.timeout(600)

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder as transformers writes it, but greedy."""
    from tests.support.tiny_models import make_greedy, save_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    save_model(folder)
    make_greedy(folder)
    return folder


@pytest.fixture
def up(run_dir, tiny):
    """A pool that serves it with two groups."""
    with Run(run_dir, "up", tiny, "--port", "0", "--groups", "2", "--threads", "1") as run:
        run.value("try")
        yield run


def test_all_roads_lead_to_the_same_model(up, run_dir):
    assert call_as_curl(up.value("try"))["choices"][0]["message"]["content"]  # as printed
    with urllib.request.urlopen(up.value("chat page"), timeout=60) as page:
        assert b"<html" in page.read()
    # The library.
    with Client(f"ipc://{run_dir}/clients.sock") as client:
        assert client.models()[0].name == "tiny"
        assert client.generate("Once upon a time", max_tokens=8, **GREEDY).usage.completion_tokens == 8
    # The terminal.
    with Pty(run_dir, "chat", "--max-tokens", "8", "--seed", "1") as chat:
        chat.wait_for(">>> ")
        chat.type("hello\n")
        assert "tokens" in chat.wait_for("first token")
        chat.wait_for(">>> ")
        chat.type("\x04")
        assert chat.ended() == 0
    with Run(run_dir, "status", "--json") as status:
        status.ends_with(0)
    assert json.loads(status.out[0])["counters"]["requests_total"] == 3


def test_parts_on_their_own_find_each_other_in_any_order(run_dir, tiny):
    with (
        Run(run_dir, "workers", tiny, "--threads", "1", "--name", "left") as workers,
        Run(run_dir, "gateway", "--port", "0") as gateway,
    ):
        workers.wait_for("waiting for a broker")
        gateway.wait_for("gateway ready")
        with Run(run_dir, "broker") as broker:
            workers.wait_for("workers ready: 1 group serves tiny")
            url = gateway.out[0].split()[-1]
            wait_until(lambda: _ready(url), "the gateway finds the model")
            for part in (gateway, workers, broker):
                part.send(signal.SIGINT)
                part.ends_with(0)


def _ready(url):
    try:
        with urllib.request.urlopen(f"{url}ready", timeout=30) as answer:
            return json.load(answer)["models"] == ["tiny"]
    except OSError:
        return False


def test_progress_on_a_terminal(run_dir, tiny):
    with Pty(run_dir, "up", tiny, "--port", "0", "--threads", "1", "--prompt", "hi", "--once", NO_COLOR="1") as run:
        text = run.wait_for("first token")
        assert run.ended() == 0

    for expected in ("starting workers", "loading", "warming up", "chat page", "> hi"):
        assert expected in text
    assert "\r\x1b[K" in text

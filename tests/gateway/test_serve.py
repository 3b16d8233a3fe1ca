"""The gateway as a process: where it listens, how it says so, how it ends."""

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest

from headrace.errors import AddressError
from headrace.gateway import serve as module
from headrace.gateway.serve import GatewayServer
from headrace.gateway.settings import GatewaySettings
from tests.gateway.helpers import WAIT, Raw, chat, error_of, events, until
from tests.support.fake_client import FakeClient

CHAT = "/v1/chat/completions"


# ------------------------------------------------------------------------------------------------------- before it runs


def test_a_port_in_use_is_named(serve):
    port = serve().port
    with pytest.raises(AddressError, match=f"Port {port} on 127.0.0.1 is in use.*--port") as caught:
        GatewayServer(settings=GatewaySettings(port=port), client=FakeClient)
    assert caught.value.param == "port"


@pytest.mark.parametrize("port", [-1, 65536, 10**6])
def test_a_port_that_does_not_exist(port):
    with pytest.raises(AddressError, match="does not exist"):
        GatewayServer(settings=GatewaySettings(port=port))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_beyond_this_machine_a_key_is_needed(host):
    with pytest.raises(AddressError, match="--api-key") as caught:
        GatewayServer(settings=GatewaySettings(host=host, port=0))
    assert caught.value.param == "host"


def test_an_address_of_another_machine_cannot_be_listened_on():
    with pytest.raises(AddressError, match=r"cannot listen on 192\.0\.2\.1"):
        GatewayServer(settings=GatewaySettings(host="192.0.2.1", port=0, api_keys=("k",)))


def test_a_name_that_nobody_knows():
    with pytest.raises(AddressError, match="cannot listen on"):
        GatewayServer(settings=GatewaySettings(host="no.such.host.invalid", port=0, api_keys=("k",)))


def test_serve_raises_the_same_errors(serve):
    with pytest.raises(AddressError):
        module.serve(settings=GatewaySettings(port=serve().port))


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("localhost", "localhost")])
def test_the_url_is_one_to_open(host, shown):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    server = GatewayServer(settings=GatewaySettings(host=host, port=0), client=FakeClient)
    assert server.url == f"http://{shown}:{server.port}/"
    server.stop()
    server.run()


def test_everywhere_is_shown_as_here():
    server = GatewayServer(settings=GatewaySettings(host="0.0.0.0", port=0, api_keys=("k",)), client=FakeClient)
    assert server.url == f"http://127.0.0.1:{server.port}/"
    server.stop()
    server.run()


def test_only_loopback_is_listened_on(serve):
    running = serve()
    listening = [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"]
    assert [address.ip for address in listening if address.port == running.port] == ["127.0.0.1"]


# ---------------------------------------------------------------------------------------------------------- how it ends


def test_stop_without_work_ends_at_once_and_closes_the_client(serve):
    running = serve()
    assert running.http.get("/health").status_code == 200
    running.stop()
    running.ended()
    assert running.fake.was_closed
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.port))


def test_a_running_stream_is_finished_while_new_work_is_refused(serve):
    go = threading.Event()
    running = serve(lambda call, choice: ["a", go, "b"], drain_timeout=WAIT)
    texts = []
    thread = threading.Thread(target=lambda: texts.append(running.post(CHAT, chat(stream=True)).text))
    thread.start()
    until(lambda: running.fake.calls, "the request")
    running.stop()
    until(lambda: httpx.get(running.url + "/ready").status_code == 503, "the refusal")
    assert httpx.get(running.url + "/ready").json()["reason"] == "draining"
    assert httpx.get(running.url + "/health").status_code == 200
    refused = httpx.post(running.url + CHAT, json=chat())
    error_of(refused, 503, "unavailable")
    assert refused.headers["x-should-retry"] == "true"
    go.set()
    thread.join(WAIT)
    running.ended()
    chunks = events(texts[0])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "ab"
    assert len(running.fake.calls) == 1


def test_what_outlasts_the_drain_ends_with_an_error_and_not_silently(serve):
    never = threading.Event()
    running = serve(lambda call, choice: ["a", never], drain_timeout=0.2)
    texts = []
    thread = threading.Thread(target=lambda: texts.append(running.post(CHAT, chat(stream=True)).text))
    thread.start()
    until(lambda: running.fake.calls, "the request")
    running.stop()
    running.ended()
    thread.join(WAIT)
    assert events(texts[0])[-1]["error"]["code"] == "cancelled"


def test_silent_connections_do_not_keep_it_from_ending(serve):
    running = serve()
    with Raw(running.port), Raw(running.port) as half:
        half.send("GET / HTTP/1.1\r\n")
        running.stop()
        running.ended()


def test_stop_before_it_runs():
    server = GatewayServer(settings=GatewaySettings(port=0), client=FakeClient)
    server.stop()
    server.run()


_PROGRAM = """
import sys, threading
from headrace.gateway.serve import GatewayServer
from headrace.gateway.settings import GatewaySettings
from tests.support.fake_client import FakeClient

fake = FakeClient(lambda call, choice: ["a", 0.5 if call.text == "short" else threading.Event(), "b"])
settings = GatewaySettings(port=0, drain_timeout=60.0)
GatewayServer(settings=settings, client=lambda: fake, on_ready=lambda url: print(url, flush=True)).run()
print("ended", fake.was_closed, flush=True)
"""


@pytest.fixture
def process():
    started = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    yield started
    started.kill()
    started.wait(WAIT)
    started.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs_and_ends_well(process, number):
    url = process.stdout.readline().strip()
    with httpx.stream("POST", url + CHAT.lstrip("/"), json=chat("short", stream=True), timeout=WAIT) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(number)
        rest = "\n".join(lines)
    assert '"content":"b"' in rest
    assert rest.rstrip().endswith("data: [DONE]")
    assert process.wait(WAIT) == 0
    assert process.stdout.read() == "ended True\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)])
def test_the_same_signal_again_ends_at_once_and_shows(process, number, code):
    url = process.stdout.readline().strip()
    with httpx.stream("POST", url + CHAT.lstrip("/"), json=chat("long", stream=True), timeout=WAIT) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(number)
        until(lambda: httpx.get(url + "ready").status_code == 503, "the drain")
        process.send_signal(number)
        returned = process.wait(WAIT)
    # A SIGINT becomes KeyboardInterrupt, of which the interpreter dies in its own way.
    assert returned in (code, -signal.SIGINT) if number == signal.SIGINT else returned == code


def test_two_different_signals_still_drain(process):
    """Ctrl-C reaches every process of a terminal; the parent's SIGTERM, which follows, must not cut what runs."""
    url = process.stdout.readline().strip()
    with httpx.stream("POST", url + CHAT.lstrip("/"), json=chat("short", stream=True), timeout=WAIT) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert '"content":"b"' in "\n".join(lines)
    assert process.wait(WAIT) == 0

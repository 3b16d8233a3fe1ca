"""The gateway's door: keys, names, sizes and paces, on real sockets where a client library would behave too well."""

import asyncio
import contextlib
import json
import threading

import httpx
import pytest

from headrace.gateway.limits import Limits
from headrace.gateway.settings import GatewaySettings
from headrace.gateway.state import Gateway
from tests.gateway.helpers import WAIT, Raw, chat, error_of, until

CHAT = "/v1/chat/completions"
OPEN = ["/", "/health", "/ready", "/health/decode", "/static/js/app.js", "/static/nothing"]
CLOSED = ["/v1/models", "/v1/models/tiny-chat", "/metrics", "/openapi.json", "/nowhere", "/static", "/ready/"]


# -------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("path", OPEN)
def test_open_paths_need_no_key(serve, path):
    assert httpx.get(serve(api_keys=("k",)).url + path).status_code in (200, 404)


@pytest.mark.parametrize("path", CLOSED)
def test_all_others_need_one(serve, path):
    running = serve(api_keys=("k1", "k2"))
    response = httpx.get(running.url + path)
    error = error_of(response, 401, "invalid_api_key")
    assert error["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"
    for key in ("k1", "k2"):
        assert httpx.get(running.url + path, headers={"authorization": f"Bearer {key}"}).status_code != 401


def test_a_key_is_needed_before_the_body_is_read(serve):
    running = serve(api_keys=("k",))
    error_of(httpx.post(running.url + CHAT, content=b"no json"), 401)
    assert running.fake.calls == []


@pytest.mark.parametrize(
    "header", ["k", "Bearer", "Bearer K", "Bearer k k", "Basic k", "Bearer kk", "bearer\tk", "Bearer ü"]
)
def test_what_is_no_key(serve, header):
    response = httpx.get(serve(api_keys=("k",)).url + "/v1/models", headers={"authorization": header.encode()})
    error_of(response, 401, "invalid_api_key")


def test_the_scheme_s_case_does_not_matter_and_keys_may_be_any_text(serve):
    running = serve(api_keys=("schlüssel",))
    headers = {"authorization": "bearer schlüssel".encode("latin-1")}
    assert httpx.get(running.url + "/v1/models", headers=headers).status_code == 401  # HTTP headers are not UTF-8
    headers = {"authorization": "bearer schlüssel".encode()}
    assert httpx.get(running.url + "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "target", ["/v1/models?/health", "//health/../v1/models", "/v1/models#/health", "/%76%31/models", "/v1/models/%2e"]
)
def test_a_key_is_needed_however_the_path_is_written(serve, target):
    running = serve(api_keys=("k",))
    with Raw(running.port) as raw:
        raw.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert raw.read().startswith(b"HTTP/1.1 401 ")


def test_a_forged_host_does_not_open_a_closed_path(serve):
    """Some frameworks build the path they check from the Host header."""
    running = serve(api_keys=("k",))
    for host in ("localhost/health?", "localhost#", "localhost/static/", "[::1]/health"):
        with Raw(running.port) as raw:
            raw.send(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
            assert raw.read().split(b" ")[1] in (b"400", b"401", b"403")


def test_keys_are_not_shown(serve):
    settings = serve(api_keys=("secret-key",)).server.settings
    assert "secret-key" not in repr(settings)


# ------------------------------------------------------------------------------------------------- who asks, from where


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "127.1.2.3:1", "[::1]", "[::1]:80"])
def test_loopback_names_are_answered(plain, host):
    assert plain.http.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "[", "127.0.0.1.nip.io", "0.0.0.0"])
def test_other_names_are_not(plain, host):
    """A page whose name was made to point here (DNS rebinding) sends its own name."""
    error_of(plain.http.get("/health", headers={"host": host}), 403, "forbidden")


def test_a_name_can_be_allowed(serve):
    http = serve(allowed_hosts=("Mill.example",)).http
    assert http.get("/health", headers={"host": "mill.EXAMPLE:80"}).status_code == 200
    assert http.get("/health", headers={"host": "other.example"}).status_code == 403


def test_a_page_of_its_own_may_call(serve):
    running = serve()
    for origin in (running.url, f"http://localhost:{running.port}"):
        headers = {"origin": origin, "host": origin.removeprefix("http://")}
        assert running.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "file://", "http://[", "", "http://localhost:1@x"]
)
def test_pages_of_others_may_not(plain, origin):
    """The bracket alone made the parser of URLs fail, which was answered with 500."""
    error_of(plain.http.post(CHAT, headers={"origin": origin}, json=chat()), 403, "forbidden")


def test_another_page_can_be_allowed_and_then_reads_the_answers(serve):
    site = "https://app.example"
    running = serve(allowed_origins=(site,), api_keys=("k",))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = httpx.options(running.url + CHAT, headers={"origin": site, **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == site
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    answer = running.post(CHAT, chat())
    assert "access-control-allow-origin" not in answer.headers
    answer = running.http.post(CHAT, headers={"origin": site}, json=chat())
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == site
    refused = httpx.post(running.url + CHAT, headers={"origin": site}, json=chat())
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == site
    other = running.http.post(CHAT, headers={"origin": "https://evil.example"}, json=chat())
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers


def test_every_answer_carries_the_same_headers(plain):
    http = plain.http
    for response in (http.get("/health"), http.get("/nowhere"), http.get("/v1/models", headers={"host": "evil"})):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "server" not in response.headers


def test_request_ids_are_echoed_if_they_are_harmless(plain):
    http = plain.http
    assert http.get("/health", headers={"x-request-id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"
    assert (
        http.get("/health", headers={"x-request-id": "a b;c" + "d" * 200}).headers["x-request-id"] == "abc" + "d" * 125
    )
    made = {http.get("/health", headers={"x-request-id": "?"}).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert all(len(each) == 32 for each in made)


# ------------------------------------------------------------------------------------------------------------- sizes


def test_headers_have_a_limit_and_the_answer_says_so(serve):
    running = serve(max_headers=4096)
    error_of(running.http.get("/health", headers={"x-big": "a" * 5000}), 431, "headers_too_large")
    assert running.http.get("/health", headers={"x-big": "a" * 3000}).status_code == 200


@pytest.mark.parametrize("header", ["X-Big: " + "a" * 10_000_000, "X: y\r\n" * 200_000], ids=["one", "many"])
def test_headers_far_beyond_it_are_not_even_read(plain, header):
    running = plain
    with Raw(running.port) as raw:
        with contextlib.suppress(OSError):  # it had enough before all was sent
            raw.send(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n")
        answer = raw.read()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert running.http.get("/health").status_code == 200


def test_a_body_has_a_limit_told_beforehand(serve):
    running = serve(max_body=1000)
    error = error_of(running.post(CHAT, chat("x" * 2000)), 413, "request_too_large")
    assert "1000" in error["message"]
    assert running.post(CHAT, chat("x" * 500)).status_code == 200


def test_a_body_without_a_length_is_cut_while_it_comes(serve):
    running = serve(max_body=100_000)

    def parts():
        for _ in range(1000):
            yield b" " * 10_000

    response = running.http.post(CHAT, content=parts(), headers={"content-type": "application/json"})
    error_of(response, 413, "request_too_large")
    assert response.headers["connection"] == "close"


def test_a_client_that_asks_first_sends_nothing(serve):
    with Raw(serve(max_body=1000).port) as raw:
        raw.send(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Content-Length: 5000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert raw.read().startswith(b"HTTP/1.1 413 ")


def test_a_body_may_come_in_pieces(serve):
    body = json.dumps(chat())
    with Raw(serve().port) as raw:
        raw.send(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n")
        raw.send(f"Content-Length: {len(body)}\r\n\r\n")
        for letter in body:
            raw.send(letter)
        assert raw.read().startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_bodies_of_forms_are_refused(serve, kind):
    """A form of any web page can send these without asking; JSON it cannot."""
    running = serve()
    response = running.http.post(CHAT, content=json.dumps(chat()), headers={"content-type": kind})
    error_of(response, 415, "unsupported_media_type")
    assert running.fake.calls == []


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_json_has_several_names(plain, kind):
    response = plain.http.post(CHAT, content=json.dumps(chat()), headers={"content-type": kind})
    assert response.status_code == 200


# ------------------------------------------------------------------------------------------------------------- paces


def test_a_body_that_does_not_come_is_not_waited_for(serve):
    running = serve(body_timeout=0.2)
    with Raw(running.port) as raw:
        raw.send(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{"
        )
        answer = raw.read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer


@pytest.mark.parametrize("start", ["", "GET /health HTT", "GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_headers_that_do_not_come_are_not_waited_for(serve, start):
    with Raw(serve(header_timeout=0.2).port) as raw:
        raw.send(start)
        assert raw.read() == b""


def test_the_limit_also_holds_for_later_requests_of_a_connection_and_not_for_slow_answers(serve):
    running = serve(lambda call, choice: [0.6, "a"], header_timeout=0.2)
    body = json.dumps(chat())
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with Raw(running.port) as raw:
        for _ in range(2):
            raw.send(f"{head}Content-Length: {len(body)}\r\n\r\n{body}")
            assert b"200 OK" in raw.read_until(b'"cached_tokens":3}}}')
        raw.send("GET /hea")
        assert raw.read() == b""


def test_only_so_many_requests_are_in_work(serve):
    go = threading.Event()
    running = serve(lambda call, choice: [go, "a"], max_requests=2)
    threads = [threading.Thread(target=running.post, args=(CHAT, chat())) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(running.fake.calls) == 2, "both requests")
    response = running.post(CHAT, chat())
    error_of(response, 429, "overloaded")
    assert response.headers["retry-after"] == "1"
    assert running.http.get("/ready").status_code == 200
    go.set()
    for thread in threads:
        thread.join(WAIT)
    assert running.post(CHAT, chat()).status_code == 200


def test_garbage_is_answered_and_forgotten(plain):
    running = plain
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HELLO\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        with Raw(running.port) as raw:
            raw.send(garbage)
            assert raw.read().startswith(b"HTTP/1.1 400 ")
    assert running.http.get("/health").status_code == 200


def test_upgrades_are_not_followed(serve):
    headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "x", "sec-websocket-version": "13"}
    assert serve().http.get("/health", headers=headers).status_code == 200


def test_other_protocols_of_asgi():
    """uvicorn is told not to take websockets; another server might."""
    sent, passed = [], []

    async def app(scope, receive, send):
        passed.append(scope["type"])

    async def send(message):
        sent.append(message)

    limits = Limits(app, Gateway(None, GatewaySettings()))
    asyncio.run(limits({"type": "websocket"}, None, send))
    asyncio.run(limits({"type": "lifespan"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert passed == ["lifespan"]

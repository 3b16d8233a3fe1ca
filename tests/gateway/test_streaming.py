"""Streams over HTTP: what happens when they fail, fall silent, or lose their reader."""

import contextlib
import threading
import time

import httpx
import pytest

from headrace.errors import WorkerCrashedError
from tests.gateway.helpers import WAIT, Raw, chat, error_of, events, until

PATHS = {"/v1/chat/completions": chat(), "/v1/completions": {"prompt": "x"}, "/generate": {"prompt": "x"}}
CHAT = "/v1/chat/completions"


def test_an_error_after_the_first_token_is_an_event_before_the_end(serve):
    running = serve(lambda call, choice: ["a", "b", WorkerCrashedError("The group died.")])
    response = running.post(CHAT, chat(stream=True))
    assert response.status_code == 200
    *chunks, error = events(response.text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "ab"
    assert error == {
        "error": {"message": "The group died.", "type": "server_error", "param": None, "code": "worker_crashed"}
    }


def test_an_unforeseen_error_in_a_stream_tells_nothing(serve, caplog):
    response = serve(lambda call, choice: ["a", KeyError("/secret")]).post(CHAT, chat(stream=True))
    assert events(response.text)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text


def test_one_prompt_that_fails_ends_the_others(serve):
    never = threading.Event()

    def script(call, choice):
        return ["a", WorkerCrashedError("No.")] if call.prompt == "bad" else ["b", never]

    running = serve(script)
    error_of(running.post("/v1/completions", {"prompt": ["good", "bad"]}), 500, "worker_crashed")
    assert all(call.closed.wait(WAIT) for call in running.fake.calls)
    assert sorted(call.ended for call in running.fake.calls) == ["closed", "failed"]


def test_a_silent_stream_sends_comments(serve):
    go = threading.Event()
    running = serve(lambda call, choice: ["a", go, "b"], ping_interval=0.05)
    with Raw(running.port) as raw:
        raw.send(_request(CHAT, '{"messages":[{"role":"user","content":"x"}],"stream":true}'))
        raw.read_until(b": ping\n\n")
        go.set()
        assert b'"b"' in raw.read_until(b"[DONE]")


def _request(path: str, body: str) -> str:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )


def test_a_reader_that_leaves_in_the_middle_cancels(serve):
    never = threading.Event()
    running = serve(lambda call, choice: ["a", never])
    with running.http.stream("POST", CHAT, json=chat(stream=True)) as response:
        until_text = next(line for line in response.iter_lines() if '"a"' in line)
        assert until_text
    assert running.fake.calls[0].closed.wait(WAIT)
    assert running.fake.calls[0].ended == "closed"
    until(lambda: _cancelled(running) == 1.0, "the count of cancelled requests")


def _cancelled(running) -> float:
    found = [line for line in running.http.get("/metrics").text.splitlines() if "gateway_cancelled_total{" in line]
    return float(found[0].split()[-1]) if found else 0.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", list(PATHS))
def test_a_reader_that_leaves_before_the_first_token_cancels(serve, path, stream):
    if path == "/generate" and stream:
        return  # it has no streams
    never = threading.Event()
    running = serve(lambda call, choice: [never])
    impatient = httpx.Timeout(WAIT, read=0.1)
    with contextlib.suppress(httpx.ReadTimeout), httpx.Client(base_url=running.url, timeout=impatient) as http:
        http.post(path, json=PATHS[path] | ({"stream": True} if stream else {}))
    until(lambda: running.fake.calls, "the request")
    assert running.fake.calls[0].closed.wait(WAIT)
    assert running.fake.calls[0].ended == "closed"
    assert running.http.get("/health").status_code == 200


def test_a_reader_that_leaves_does_not_disturb_another(serve):
    go = threading.Event()
    running = serve(lambda call, choice: ["a", go, "b"])
    answers = []
    thread = threading.Thread(target=lambda: answers.append(running.post(CHAT, chat(stream=True)).text))
    thread.start()
    with running.http.stream("POST", CHAT, json=chat(stream=True)) as response:
        next(response.iter_lines())
    until(lambda: any(call.ended == "closed" for call in running.fake.calls), "the cancelling")
    go.set()
    thread.join(WAIT)
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(answers[0])]
    assert "".join(texts) == "ab"


def test_a_slow_reader_holds_the_stream_and_not_the_memory(serve):
    """Nothing is read, so no more is asked of the client library than fits the buffers on the way."""
    given = 0

    def script(call, choice):
        nonlocal given
        for given in range(100_000):  # noqa: B007  it is looked at from outside
            yield "x" * 1000

    running = serve(script)
    with Raw(running.port) as raw:
        raw.send(_request(CHAT, '{"messages":[{"role":"user","content":"x"}],"stream":true}'))
        raw.read_until(b"xxx")
        seen = -1
        while seen != given:
            seen = given
            time.sleep(0.3)
        assert 0 < given < 50_000
    assert running.fake.calls[0].closed.wait(WAIT)
    assert running.fake.calls[0].ended == "closed"


def test_a_time_limit_is_passed_on(serve):
    running = serve(request_timeout=12.5)
    running.post(CHAT, chat())
    assert running.fake.calls[0].timeout == 12.5

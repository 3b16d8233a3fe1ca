"""Errors: one shape for every status, the right status for every type, and words that name the field."""

import inspect
import json

import pytest

from headrace import errors
from headrace.errors import HeadraceError
from headrace.gateway.errors import ApiError, error_body, json_bytes, status_of
from tests.gateway.helpers import chat, error_of

CHAT = "/v1/chat/completions"

STATUS = {
    "ContextLengthError": 400,
    "InvalidRequestError": 400,
    "ConflictError": 409,
    "UnknownModelError": 404,
    "UnknownRequestError": 404,
    "OverloadedError": 429,
    "UnavailableError": 503,
    "WorkerCrashedError": 500,
    "SlowConsumerError": 500,
    "ModelChangedError": 500,
    "InternalError": 500,
    "DeadlineExceededError": 504,
    "RequestCancelledError": 499,
    "BrokerConnectionError": 503,
    "RequestTimeoutError": 504,
    "ProtocolError": 500,
    "UnsupportedVersionError": 500,
}


@pytest.mark.parametrize(("name", "status"), STATUS.items())
def test_every_error_of_a_request_has_its_status_before_the_first_token(serve, name, status):
    error = getattr(errors, name)("What happened.", param="messages")
    for stream in (False, True):
        response = serve(lambda call, choice: [error]).post(CHAT, chat(stream=stream))
        told = error_of(response, status, error.code)
        assert told["message"] == "What happened."
        assert told["param"] == "messages"
        assert response.headers["x-should-retry"] == str(error.retryable).lower()
        assert ("retry-after" in response.headers) == error.retryable


def test_every_class_of_the_tree_has_a_status_that_is_an_error():
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, HeadraceError)]
    assert len(classes) > 20
    assert all(400 <= status_of(cls("x")) < 600 for cls in classes)


def test_retry_after_is_whole_seconds_from_one(serve):
    for given, told in ((None, "1"), (0.1, "1"), (2.5, "3")):
        error = errors.OverloadedError("full", retry_after=given)
        response = serve(lambda call, choice, error=error: [error]).post(CHAT, chat())
        assert response.headers["retry-after"] == told


def test_what_nobody_foresaw_is_logged_and_tells_nothing(serve, caplog):
    response = serve(lambda call, choice: [ValueError("/secret/path")]).post(CHAT, chat())
    error = error_of(response, 500, "internal_error")
    assert error["type"] == "server_error"
    assert "secret" not in response.text
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({}, "messages", "missing"),
        (chat(temperature=-1), "temperature", "temperature"),
        (chat(temperature="hot"), "temperature", "valid number"),
        (chat(temperature=True), "temperature", "valid number"),
        (chat(top_p=0), "top_p", "top_p"),
        (chat(n=0), "n", "n is 0"),
        (chat(n=17), "n", "16"),
        (chat(n=1.5), "n", "integer"),
        (chat(max_tokens=0), "max_tokens", "max_tokens is 0"),
        (chat(max_completion_tokens=0), "max_completion_tokens", "max_completion_tokens is 0"),
        (chat(min_tokens=5, max_tokens=2), "min_tokens", "max_tokens"),
        (chat(stop=["x"] * 17), "stop", "16"),
        (chat(stop=[""]), "stop", "1 to"),
        (chat(logit_bias={"a": 1}), "logit_bias", "token ids"),
        (chat(logit_bias={"1": 101}), "logit_bias", "100"),
        (chat(top_logprobs=3), "top_logprobs", "logprobs: true"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs", "20"),
        (chat(stream_options={"include_usage": True}), "stream_options", "stream: true"),
        (chat(temperatur=1), "temperatur", "did you mean 'temperature'?"),
        (chat(zzz=1), "zzz", "leave it out"),
        (chat(tools=[{"type": "function"}]), "tools", "not supported"),
        (chat(response_format={"type": "json_object"}), "response_format", "not supported"),
        (chat(best_of=2), "best_of", "not supported"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tools"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "'text'"),
        ({"messages": [{"role": "user", "content": "x", "contend": "y"}]}, "contend", "'content'"),
        ({"messages": "hi"}, "messages", "list"),
        ([], None, "JSON object"),
        ("hi", None, "JSON object"),
        (None, None, "JSON object"),
    ],
)
def test_bad_values_are_named(plain, body, param, words):
    error = error_of(plain.post(CHAT, body), 400, "invalid_request")
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"messages": NaN',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
    ids=["nothing", "half", "no utf-8", "broken", "a number without end", "deep", "half a character"],
)
def test_bodies_that_cannot_be_read(plain, content):
    response = plain.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    error_of(response, 400)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(plain, value):
    content = json.dumps(chat(temperature=0.5)).replace("0.5", value)
    response = plain.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert error_of(response, 400, "invalid_request")["param"] == "temperature"


def test_paths_and_methods(plain):
    http = plain.http
    error = error_of(http.get("/nowhere"), 404, "not_found")
    assert error["type"] == "not_found_error"
    assert "/nowhere" in error["message"]
    response = http.get(CHAT)
    assert "POST" in error_of(response, 405, "method_not_allowed")["message"]
    assert response.headers["allow"] == "POST"
    error_of(http.delete("/v1/models"), 405, "method_not_allowed")
    error_of(http.post("/v1/images/generations", json={}), 404, "not_found")
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404
    assert http.get("/openapi.json").json()["info"]["title"] == "Headrace"


def test_an_error_of_http_itself_has_a_code():
    body = error_body(ApiError(418, "A teapot."))
    assert body == {"error": {"message": "A teapot.", "type": "invalid_request_error", "param": None, "code": "error"}}


def test_json_holds_what_utf_8_cannot():
    assert json_bytes({"text": "a\ud800b"}) == b'{"text":"a?b"}'

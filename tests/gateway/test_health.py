"""The probes: the process lives, a model can answer, a model does answer."""

import asyncio

import pytest

from headrace._version import __version__
from headrace.errors import BrokerConnectionError, WorkerCrashedError
from headrace.gateway import health
from tests.support.fake_client import FakeClient


@pytest.mark.parametrize("path", ["/health", "/ready", "/health/decode"])
def test_probes_answer_to_head_as_to_get(plain, path):
    http = plain.http
    assert http.get(path).status_code == 200
    head = http.head(path)
    assert head.status_code == 200
    assert head.content == b""


def test_health_asks_nobody(serve):
    fake = FakeClient()
    fake.models_error = BrokerConnectionError("none")
    assert serve(fake).http.get("/health").json() == {"status": "ok", "version": __version__}


def test_ready_names_the_models(plain):
    assert plain.http.get("/ready").json() == {"status": "ready", "models": ["tiny-chat"]}


def test_ready_says_why_not(serve):
    response = serve(FakeClient(cards=[])).http.get("/ready")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.json()["reason"] == "no_model"
    assert response.json()["error"]["code"] == "no_model"


def test_ready_passes_the_broker_s_error_on(serve):
    fake = FakeClient()
    fake.models_error = BrokerConnectionError("No broker answers.")
    response = serve(fake).http.get("/ready")
    assert response.status_code == 503
    assert response.json()["reason"] == "no_broker"
    assert response.json()["error"]["message"] == "No broker answers."


def test_ready_does_not_wait_for_a_broker_that_hangs(serve, monkeypatch):
    monkeypatch.setattr(health, "_PROBE_TIMEOUT", 0.05)
    fake = FakeClient()
    fake.models = lambda: asyncio.sleep(3600)
    response = serve(fake).http.get("/ready")
    assert response.status_code == 503
    assert response.json()["reason"] == "no_broker"


def test_decode_asks_for_one_token_and_remembers_the_answer(serve):
    running = serve()
    for _ in range(3):
        assert running.http.get("/health/decode").json()["status"] == "ok"
    (call,) = running.fake.calls
    assert call.sampling.max_tokens == 1


def test_decode_fails_when_a_model_does(serve):
    running = serve(lambda call, choice: [WorkerCrashedError("The group died.")])
    response = running.http.get("/health/decode")
    assert response.status_code == 503
    assert response.json()["status"] == "failed"
    assert response.json()["error"]["code"] == "worker_crashed"


def test_decode_fails_when_there_is_no_model_at_all(serve):
    """It said ok, for all of no models had answered."""
    response = serve(FakeClient(cards=[])).http.get("/health/decode")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "unavailable"


def test_decode_gives_up_on_a_model_that_hangs(serve, monkeypatch):
    monkeypatch.setattr(health, "_DECODE_TIMEOUT", 0.05)
    response = serve(lambda call, choice: [3600.0]).http.get("/health/decode")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "timeout"

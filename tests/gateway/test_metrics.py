"""Metrics: Prometheus can read them, they count what happened, and nothing a sender wrote becomes a label."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.errors import BrokerConnectionError, WorkerCrashedError
from headrace.gateway import app
from tests.gateway.helpers import Raw, chat, until
from tests.support.fake_client import FakeClient

CHAT = "/v1/chat/completions"

REPORT = {
    "broker": "x",
    "version": "0",
    "models": [{"name": "tiny-chat", "ready_groups": 1, "queue_depth": 2, "queue_tokens": 30, "running": 4}],
    "groups": [
        {
            "name": "g0",
            "model": "tiny-chat",
            "state": "ready",
            "running": 4,
            "max_num_seqs": 8,
            "kv_tokens": 4096,
            "load": {"kv_blocks_free": 64, "kv_blocks_total": 256, "prefix_queries": 10, "prefix_hits": 6},
            "heartbeat_age_seconds": 0.5,
            "step": 7,
            "step_age_seconds": 0.25,
        },
        {"name": "g1", "model": "tiny-chat", "state": "loading", "load": {}},
    ],
    "counters": {"requests_total": 9, "resumed_tokens_total": 5, "rejected_total": {"overloaded": 2}},
}


def samples(running):
    """Every sample by name and labels."""
    response = running.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(running, name, **labels):
    return samples(running).get((name, *sorted(labels.items())), 0.0)


def test_a_finished_request_is_counted(serve):
    running = serve()
    running.post(CHAT, chat())
    running.post(CHAT, chat(stream=True, max_tokens=2))
    model = {"model_name": "tiny-chat"}
    until(lambda: value(running, "headrace_e2e_request_latency_seconds_count", **model) == 2.0, "both ends")
    assert value(running, "headrace_prompt_tokens_total", **model) == 14.0
    assert value(running, "headrace_generation_tokens_total", **model) == 7.0
    assert value(running, "headrace_time_to_first_token_seconds_count", **model) == 2.0
    assert value(running, "headrace_inter_token_latency_seconds_count", **model) == 5.0
    assert value(running, "headrace_request_success_total", finished_reason="stop", **model) == 1.0
    assert value(running, "headrace_request_success_total", finished_reason="length", **model) == 1.0
    assert value(running, "headrace_gateway_requests_active", **model) == 0.0
    labels = {"method": "POST", "handler": CHAT, "status": "200"}
    assert value(running, "headrace_http_requests_total", **labels) == 2.0


def test_a_failed_request_is_counted_by_its_code(serve):
    running = serve(lambda call, choice: ["a", WorkerCrashedError("No.")])
    running.post(CHAT, chat())
    running.post(CHAT, chat(stream=True))
    until(lambda: value(running, "headrace_gateway_rejected_total", code="worker_crashed") == 2.0, "both counts")
    assert value(running, "headrace_gateway_requests_active", model_name="tiny-chat") == 0.0
    assert value(running, "headrace_gateway_cancelled_total", by="client") == 0.0


def test_labels_are_never_a_sender_s_words(serve):
    """The method was one: any word may stand there, and each made a new series for ever."""
    running = serve()
    running.http.get("/nowhere/else")
    running.post(CHAT, chat(model="made-up"))
    for number in range(3):
        with Raw(running.port) as raw:
            raw.send(f"BREW{number} /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b" 405 " in raw.read()
    text = running.http.get("/metrics").text
    for word in ("nowhere", "made-up", "BREW"):
        assert word not in text
    assert value(running, "headrace_http_requests_total", method="other", handler="/health", status="405") == 3.0


def test_the_broker_s_report_becomes_metrics(serve):
    running = serve(FakeClient(report=REPORT))
    group = {"model_name": "tiny-chat", "group": "g0"}
    assert value(running, "headrace_broker_up") == 1.0
    assert value(running, "headrace_num_requests_running", model_name="tiny-chat") == 4.0
    assert value(running, "headrace_num_requests_waiting", model_name="tiny-chat") == 2.0
    assert value(running, "headrace_queue_tokens", model_name="tiny-chat") == 30.0
    assert value(running, "headrace_worker_state", state="ready", **group) == 1.0
    assert value(running, "headrace_kv_cache_usage_perc", **group) == 0.75
    assert value(running, "headrace_kv_blocks_free", **group) == 64.0
    assert value(running, "headrace_prefix_cache_hits_total", **group) == 6.0
    assert value(running, "headrace_step_age_seconds", **group) == 0.25
    assert value(running, "headrace_broker_requests_total") == 9.0
    assert value(running, "headrace_resumed_tokens_total") == 5.0
    assert value(running, "headrace_rejected_total", kind="overloaded") == 2.0


def test_without_the_broker_the_rest_is_still_told(serve):
    fake = FakeClient()
    fake.models_error = BrokerConnectionError("gone")
    running = serve(fake)
    found = samples(running)
    assert found["headrace_broker_up",] == 0.0
    assert any(name == "headrace_build_info" for name, *_ in found)


def test_a_broker_that_hangs_does_not_hold_the_scrape(serve, monkeypatch):
    monkeypatch.setattr(app, "_SCRAPE_TIMEOUT", 0.05)
    fake = FakeClient()
    fake.status = lambda: asyncio.sleep(3600)
    assert value(serve(fake), "headrace_broker_up") == 0.0


def test_head_and_keys(serve):
    running = serve(api_keys=("k",))
    head = running.http.head("/metrics")
    assert head.status_code == 200
    assert head.content == b""


@pytest.mark.parametrize("asked", ["application/openmetrics-text", "text/plain", "*/*"])
def test_one_format_whatever_is_asked_for(plain, asked):
    response = plain.http.get("/metrics", headers={"accept": asked})
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert list(text_string_to_metric_families(response.text))

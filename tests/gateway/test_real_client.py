"""The gateway with the real client library, a real broker and a group that emits what the test says."""

from __future__ import annotations

import json
import threading
import time

import openai
import pytest

from headrace.client import AsyncClient
from headrace.messages import unpack_tokens
from tests.client.pool import Pool, speaking
from tests.client.tiny import tiny_card, tiny_text
from tests.gateway.helpers import WAIT, chat, error_of, events, until

CHAT = "/v1/chat/completions"


@pytest.fixture
def pool(run_dir):
    pool = Pool(run_dir)
    pool.start_broker()
    yield pool
    pool.close()


@pytest.fixture
def connect(serve, pool):
    """Starts a gateway of the pool."""
    return lambda **settings: serve(client=lambda: AsyncClient(pool.endpoint, retries=0), **settings)


def text_of(chunks) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def test_a_chat_streamed_and_whole(pool, connect):
    group = pool.start_group(speaking("Grüße, 世界! 👍"))
    running = connect()
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(running.post(CHAT, chat("hello", stream=True, stream_options=options)).text)
    assert text_of(chunks) == "Grüße, 世界! 👍"
    prompt = unpack_tokens(group.assigned[0].prompt)
    assert list(prompt) == tiny_text().encode_chat(chat("hello")["messages"])
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {len(prompt)}
    whole = running.post(CHAT, chat("hello")).json()
    assert whole["choices"][0]["message"]["content"] == "Grüße, 世界! 👍"
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"]


def test_a_message_is_continued_where_it_ends(pool, connect):
    group = pool.start_group(speaking("ish"))
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Engl"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    body = connect().post(CHAT, {"messages": messages, **more}).json()
    assert body["choices"][0]["message"]["content"] == "ish"
    text = tiny_text()
    rendered = text.render(messages[:1]) + "Engl"
    assert text.decode(list(unpack_tokens(group.assigned[0].prompt)), skip_special_tokens=False) == rendered


def test_stop_strings_and_token_ids(pool, connect):
    pool.start_group(speaking("one two three"))
    running = connect()
    body = {"prompt": list(b"count"), "stop": ["thr"], "max_tokens": 50}
    choice = running.post("/v1/completions", body | {"echo": True}).json()["choices"][0]
    assert choice["text"] == "countone two "
    assert choice["finish_reason"] == "stop"


def test_a_reader_that_leaves_is_felt_by_the_group(pool, connect):
    group = pool.start_group(speaking("x" * 4000))
    running = connect()
    with running.http.stream("POST", CHAT, json=chat(stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        until(lambda: pool.running, "the stream")
    until(lambda: group.revoked, "the cancelling")
    until(lambda: not pool.running, "the end of the stream")


def test_refusals_of_the_library_have_their_status(pool, connect):
    pool.start_group(card=tiny_card(max_model_len=64))
    running = connect()
    error_of(running.post(CHAT, chat("x" * 1000)), 400, "context_length_exceeded")
    error = error_of(running.post(CHAT, chat(model="tinny")), 404, "model_not_found")
    assert "did you mean 'tiny'?" in error["message"]
    error = error_of(running.post("/v1/completions", {"prompt": [100_000]}), 400, "invalid_request")
    assert error["param"] == "token_ids"
    error = error_of(running.post(CHAT, chat(temperature=-1)), 400, "invalid_request")
    assert error["param"] == "temperature"


def test_without_a_group_and_without_a_broker(pool, connect):
    running = connect()
    assert running.http.get("/v1/models").json()["data"] == []
    error_of(running.post(CHAT, chat()), 503, "unavailable")
    assert running.http.get("/ready").json()["reason"] == "no_model"
    pool.start_group(speaking("here"))
    until(lambda: running.http.get("/ready").status_code == 200, "the model")
    assert running.post(CHAT, chat()).json()["choices"][0]["message"]["content"] == "here"


def test_many_requests_without_a_broker_fail_together(serve, run_dir):
    """They failed six at a time, five seconds apart: as many as there were threads to wait in."""
    running = serve(client=lambda: AsyncClient(f"ipc://{run_dir}/none.sock", retries=0))
    codes = []

    def ask():
        codes.append(running.post(CHAT, chat()).json()["error"]["code"])

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    waiting = set()
    while any(thread.is_alive() for thread in threads):
        waiting.add(sum(thread.name.startswith("gateway_") for thread in threading.enumerate()))
        time.sleep(0.01)
    assert codes == ["no_broker"] * 40
    assert max(waiting) > 32  # the most that asyncio would start by itself


def test_a_worker_that_dies_does_not_show(pool, connect):
    """Tokens come from the seed, so a stream that went on elsewhere reads as one that never stopped."""
    first = pool.start_group(step_delay=0.01)
    running = connect()
    body = chat(seed=11, max_tokens=120, stream=True)
    reference = text_of(events(running.post(CHAT, body).text))
    lines = []
    with running.http.stream("POST", CHAT, json=body) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 20:
                pool.start_group(step_delay=0.01)
                pool.kill(first)
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert text_of(chunks) == reference
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_the_openai_sdk_all_the_way(pool, connect):
    pool.start_group(speaking("The end."))
    with openai.OpenAI(base_url=connect().url + "/v1", api_key="k", max_retries=0, timeout=WAIT) as sdk:
        stream = sdk.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True, n=2
        )
        texts = {0: "", 1: ""}
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "The end.", 1: "The end."}


def test_metrics_of_a_real_broker(pool, connect):
    pool.start_group(speaking("x"))
    running = connect()
    running.post(CHAT, chat())
    text = running.http.get("/metrics").text
    assert "headrace_broker_up 1.0" in text
    assert 'headrace_worker_state{group="group 0",model_name="tiny",state="ready"} 1.0' in text
    assert "headrace_broker_requests_total 1.0" in text

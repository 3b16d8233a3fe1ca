"""`/v1/embeddings` with the real client, a broker and a group: as OpenAI's SDK asks, and what else may be asked."""

from __future__ import annotations

import base64
import json
import struct

import openai
import pytest
from hypothesis import given, settings
from playwright.sync_api import expect

from headrace.client import AsyncClient
from tests.client.pool import Pool, speaking
from tests.client.tiny import encoder_card
from tests.gateway.bodies import bodies
from tests.gateway.helpers import WAIT, error_of
from tests.gateway.test_fuzz import JSON, fuzzed

PATH = "/v1/embeddings"


def answer(assignment, index):
    """A number that depends on every token of the text."""
    prompt = memoryview(assignment.prompt).cast("I")
    value = sum((place + 1) * token for place, token in enumerate(prompt)) / 7 + index
    return struct.unpack("<I", struct.pack("<f", value))[0]


def vector(text: str, size: int = 6) -> list[float]:
    from tests.support.tiny_tokenizer import CLS, SEP

    ids = [CLS, *text.encode(), SEP]
    value = sum((place + 1) * token for place, token in enumerate(ids)) / 7
    return [struct.unpack("<f", struct.pack("<f", value + index))[0] for index in range(size)]


@pytest.fixture
def pool(run_dir):
    pool = Pool(run_dir)
    pool.start_broker()
    pool.start_group(answer, card=encoder_card())
    yield pool
    pool.close()


@pytest.fixture
def running(pool, serve):
    return serve(client=lambda: AsyncClient(pool.endpoint, retries=0))


def test_one_text(running):
    body = running.post(PATH, {"input": "abc", "model": "reader"}).json()
    assert body == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector("abc")}],
        "model": "reader",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }


@pytest.mark.parametrize("given", [["a", "b"], [[1, 2], [3]], [7, 8]], ids=["texts", "lists of ids", "ids"])
def test_all_kinds_of_input(running, pool, given):
    body = running.post(PATH, {"input": given, "user": "somebody"}).json()
    count = 1 if isinstance(given[0], int) else len(given)
    assert [each["index"] for each in body["data"]] == list(range(count))
    asked = [list(memoryview(assignment.prompt).cast("I")) for assignment in pool.groups[0].assigned]
    if isinstance(given[0], str):
        assert [ids[1] for ids in asked] == [ord(text) for text in given]
    else:
        assert asked == ([given] if count == 1 else given)


def test_settings_beyond_openai(running, pool):
    body = {"input": "x" * 60, "pooling": "mean", "normalize": True, "dimensions": 3, "truncate": True}
    found = running.post(PATH, body).json()
    assert len(found["data"][0]["embedding"]) == 3
    assert found["usage"]["prompt_tokens"] == 32
    assert pool.groups[0].assigned[-1].pooling == {"dimensions": 3}


def test_base64_is_little_endian_float32(running):
    (data,) = running.post(PATH, {"input": "abc", "encoding_format": "base64"}).json()["data"]
    assert list(struct.unpack("<6f", base64.b64decode(data["embedding"]))) == vector("abc")


def test_the_openai_sdk(running):
    with openai.OpenAI(base_url=running.url + "/v1", api_key="k", max_retries=0, timeout=WAIT) as client:
        found = client.embeddings.create(model="reader", input=["abc", "de"])
        short = client.embeddings.create(model="reader", input="abc", dimensions=2, encoding_format="float")
    assert [data.embedding for data in found.data] == [vector("abc"), vector("de")]
    assert found.usage.total_tokens == 9
    assert short.data[0].embedding == vector("abc", 2)


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"input": []}, 400, "input", "holds 0 texts"),
        ({"input": ["a", ""]}, 400, "input", "empty"),
        ({"input": [[]]}, 400, "input", "empty"),
        ({"input": ["a"] * 2049}, 400, "input", "1 to 2,048"),
        ({"input": "a", "model": "gone"}, 404, "model", "no model named"),
        ({"input": "a", "dimensions": 7}, 400, "dimensions", "6 numbers"),
        ({"input": "a", "pooling": "max"}, 400, "pooling", "mean or cls"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "base64"),
        ({"input": "a", "dimension": 3}, 400, "dimension", "did you mean 'dimensions'"),
        ({"input": ["a", "x" * 60]}, 400, "input", "62 tokens"),
        ({}, 400, "input", ""),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_said(running, body, status, param, says):
    error = error_of(running.post(PATH, body), status)
    assert error["param"] == param
    assert says in error["message"]


def test_a_model_for_texts_neither_chats_nor_completes(running):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        error = error_of(running.post(path, body), 400)
        assert error["param"] == "model"
        assert "encoder" in error["message"]


def test_a_model_that_chats_makes_no_vectors(run_dir, serve):
    pool = Pool(run_dir)
    pool.start_broker()
    pool.start_group(speaking("abc"))
    running = serve(client=lambda: AsyncClient(pool.endpoint, retries=0))
    assert error_of(running.post(PATH, {"input": "a"}), 400)["param"] == "model"
    running.stop()
    running.ended()
    pool.close()


def test_probes_metrics_and_the_list_of_models(running):
    assert running.http.get("/health/decode").json()["status"] == "ok"
    assert running.http.get("/v1/models").json()["data"][0]["tasks"] == ["embed", "fill_mask"]
    running.post(PATH, {"input": ["abc", "de"]})
    running.post(PATH, {"input": "a", "dimensions": 99})
    text = running.http.get("/metrics").text
    assert 'headrace_prompt_tokens_total{model_name="reader"} 9.0' in text
    assert 'headrace_request_success_total{finished_reason="embedded",model_name="reader"} 1.0' in text
    assert 'headrace_gateway_rejected_total{code="invalid_request"} 1.0' in text
    assert 'headrace_gateway_requests_active{model_name="reader"} 0.0' in text


def test_any_body(running):
    seen = set()

    @settings(fuzzed, max_examples=60)
    @given(bodies(PATH))
    def send(body):
        response = running.http.post(PATH, content=json.dumps(body), headers=JSON)
        seen.add(response.status_code)
        assert response.status_code in (200, 400, 404), (body, response.text)

    send()
    assert {200, 400} <= seen


def test_the_page_says_that_nobody_chats(running, visit):
    page = visit(running)
    expect(page.page.locator("#welcome-note")).to_contain_text("reads texts and does not write any")
    expect(page.page.locator("#model")).to_be_disabled()

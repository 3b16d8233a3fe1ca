"""The default model, a real one, through everything: a terminal, the Python client, the OpenAI SDK and a browser."""

from __future__ import annotations

import openai
import pytest
from playwright.sync_api import expect

from headrace.client import Client
from headrace.errors import ModelNotFoundError
from tests.gateway.browser import ChatPage, find_chromium, launch
from tests.support.up import Up

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def fetched():
    from headrace.workers.models import resolve

    try:
        resolve(None)
    except ModelNotFoundError as error:
        pytest.skip(f"no source of the default model can be reached: {error.message}")


@pytest.fixture(scope="module")
def pool(fetched):
    with Up("--max-model-len", "2048", "--kv-tokens", "8192", "--max-num-seqs", "8") as up:
        yield up.wait_ready(limit=240)


@pytest.fixture
def client(pool):
    with Client(pool.endpoint) as client:
        yield client


def test_it_knows_the_capital_of_france(client):
    completion = client.generate(messages=QUESTION, temperature=0.0, max_tokens=64)
    assert "Paris" in completion.text
    assert "<|im_end|>" not in completion.text
    assert completion.choices[0].finish_reason == "stop"


def test_it_streams_the_same_answer(client):
    whole = client.generate(messages=QUESTION, temperature=0.0, max_tokens=64).text
    with client.stream(messages=QUESTION, temperature=0.0, max_tokens=64) as stream:
        pieces = list(stream.text_iter())
    assert "".join(pieces) == whole
    assert len(pieces) > 3


def test_it_remembers_the_conversation(client):
    chat = [
        {"role": "user", "content": "My name is Ada. Say hello."},
        {"role": "assistant", "content": "Hello, Ada!"},
        {"role": "user", "content": "What is my name? Answer with the name only."},
    ]
    assert "Ada" in client.generate(messages=chat, temperature=0.0, max_tokens=16).text


def test_the_openai_sdk_gets_it_too(pool, client):
    name = client.models()[0].name
    with openai.OpenAI(base_url=f"{pool.page}v1", api_key="none") as sdk:
        chunks = sdk.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=64, stream=True)
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in answer


def test_several_questions_at_once(client):
    countries = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid"}
    chats = [[{"role": "user", "content": f"What is the capital of {country}?"}] for country in countries]
    for item, city in zip(client.map(chats, temperature=0.0, max_tokens=32), countries.values(), strict=True):
        assert item.error is None
        assert city in item.completion.text


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    if find_chromium() is None:
        pytest.skip("no chromium is installed")
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


def test_a_person_reads_the_answer_in_a_browser(pool, browser):
    context = browser.new_context()
    page = ChatPage(context, pool.page.rstrip("/")).open().ready()
    page.ask("What is the capital of France?")
    expect(page.answer).to_contain_text("Paris")
    expect(page.page.locator(".message.assistant .stats")).to_contain_text("tok/s")
    page.page.wait_for_selector("#send:visible")
    page.check()
    context.close()

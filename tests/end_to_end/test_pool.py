"""The whole pool as `headrace up` starts it, with a tiny model: what is asked comes out, whatever dies meanwhile."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import openai
import pytest
import torch

from headrace.client import Client
from headrace.errors import BrokerConnectionError, ContextLengthError, InvalidRequestError, UnknownModelError
from tests.support.children import wait_until
from tests.support.tiny_models import save_model
from tests.support.up import Up

LONG = 1500  # tokens of a stream that is still under way when something dies


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool") / "tiny"
    # Deep enough that LONG tokens take a second or two.
    return save_model(folder, max_position_embeddings=4096, num_hidden_layers=6), folder


@pytest.fixture(scope="module")
def pool(model):
    with Up(str(model[1]), "--groups", "2", "--served-model-name", "tiny") as up:
        yield up.wait_ready()


@pytest.fixture
def client(pool):
    with Client(pool.endpoint) as client:
        yield client


@pytest.fixture
def sdk(pool):
    with openai.OpenAI(base_url=f"{pool.page}v1", api_key="none", max_retries=0) as sdk:
        yield sdk


def idle(client: Client) -> bool:
    """Whether no stream runs or waits, in the broker or in an engine."""
    report = client.status()
    loads = [group["load"] for group in report["groups"]]
    engines = sum(load.get("running", 1) + load.get("waiting", 1) for load in loads)
    return len(loads) == 2 and report["requests"]["live"] == 0 and engines == 0


def test_an_answer_is_the_one_of_transformers(model, client):
    prompt = "hello world"
    ids = torch.tensor([client.text().encode(prompt)])
    expected = model[0].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    tokens = [token for token in expected[0, ids.shape[1] :].tolist() if token not in client.models()[0].eos_token_ids]
    completion = client.generate(prompt, temperature=0.0, max_tokens=40)
    assert list(completion.choices[0].token_ids) == tokens
    assert completion.text == client.text().decode(tokens)


def test_many_at_once_are_each_right(client):
    prompts = [f"number {n} of the world" for n in range(40)]
    items = list(client.map(prompts, concurrency=16, temperature=0.0, max_tokens=24))
    again = [client.generate(prompt, temperature=0.0, max_tokens=24).text for prompt in prompts[::13]]
    assert [item.completion.text for item in items[::13]] == again
    assert all(item.error is None for item in items)


def test_openai_sdk_streams_and_completes(sdk):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.0, "max_tokens": 30}
    whole = sdk.chat.completions.create(**chat)
    chunks = list(sdk.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens > 30
    assert [card.id for card in sdk.models.list()] == ["tiny"]
    two = sdk.completions.create(model="tiny", prompt="hello", n=2, seed=3, max_tokens=8, logprobs=1)
    assert len(two.choices) == 2
    assert two.choices[0].text != two.choices[1].text


def test_bad_requests_say_what_is_wrong(client, sdk):
    with pytest.raises(UnknownModelError, match="nonesuch"):
        client.generate("hi", model="nonesuch")
    with pytest.raises(openai.NotFoundError, match="nonesuch"):
        sdk.completions.create(model="nonesuch", prompt="hi")
    with pytest.raises(ContextLengthError, match="max_tokens"):
        client.generate("hi", max_tokens=100_000)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        sdk.completions.create(model="tiny", prompt="hi", max_tokens=100_000)
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("hi", temperature=-1.0)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.completions.create(model="tiny", prompt="hi", top_p=7)
    assert refused.value.param == "top_p"


# ---------------------------------------------------------------------------------------------- what dies meanwhile


def long_stream(client: Client, on_first, **settings) -> list[int]:
    """The tokens of a long stream; `on_first` is called when the first hundred are there."""
    tokens: list[int] = []
    with client.stream("hello world", max_tokens=LONG, ignore_eos=True, **settings) as stream:
        for delta in stream:
            tokens += delta.token_ids
            if on_first is not None and len(tokens) >= 100:
                on_first()
                on_first = None
    assert on_first is None
    return tokens


def busy_group(client: Client) -> str:
    """The group that runs something."""
    return next(group["name"] for group in client.status()["groups"] if group["running"])


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}])
def test_a_killed_worker_costs_a_pause_and_no_token(pool, client, settings):
    expected = long_stream(client, lambda: None, **settings)
    before = client.status()["counters"]["resumed_tokens_total"]
    assert long_stream(client, lambda: pool.kill(f"{busy_group(client)}/0"), **settings) == expected
    assert client.status()["counters"]["resumed_tokens_total"] >= before + 100
    wait_until(lambda: idle(client), "both groups are back")


def test_a_killed_broker_costs_a_pause_and_no_token(pool, client):
    expected = long_stream(client, lambda: None, temperature=0.0)
    name = client.status()["broker"]
    assert long_stream(client, lambda: pool.kill("headrace-broker"), temperature=0.0) == expected
    assert client.status()["broker"] != name
    wait_until(lambda: idle(client), "both groups are back")


def test_a_stopped_worker_is_replaced_and_its_late_tokens_are_dropped(pool, client):
    expected = long_stream(client, lambda: None, temperature=0.0)
    stopped = []

    def stop() -> None:
        (victim,) = pool.find(f"{busy_group(client)}/0")
        victim.send_signal(signal.SIGSTOP)
        stopped.append(victim)

    assert long_stream(client, stop, temperature=0.0) == expected
    if stopped[0].is_running():
        stopped[0].send_signal(signal.SIGCONT)
    wait_until(lambda: idle(client), "both groups are back")
    assert long_stream(client, lambda: None, temperature=0.0) == expected


def test_a_killed_gateway_comes_back_at_the_same_address(pool, client, sdk):
    pool.kill("headrace-gatewa")

    def answers() -> bool:
        try:
            return bool(sdk.completions.create(model="tiny", prompt="hi", max_tokens=2).choices)
        except openai.APIConnectionError:
            return False

    wait_until(answers, "the gateway is back")


# ------------------------------------------------------------------------------------------------- who leaves early


def test_a_client_that_vanishes_frees_what_it_used(pool, client):
    code = (
        "import sys, headrace\n"
        "stream = headrace.Client(sys.argv[1]).stream('hello', max_tokens=4000, ignore_eos=True)\n"
        "next(stream); print('streaming', flush=True)\n"
        "for _ in stream: pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, pool.endpoint], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"streaming\n"
    assert not idle(client)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: idle(client), "its stream ends")


@pytest.mark.parametrize("stream", [True, False])
def test_a_browser_that_leaves_frees_what_it_used(pool, client, stream):
    connection = http.client.HTTPConnection(urlsplit(pool.page).netloc)
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    if stream:
        response = connection.getresponse()
        assert response.read(6) == b"data: "
        response.close()
    else:
        wait_until(lambda: not idle(client), "it began")
    connection.close()
    wait_until(lambda: idle(client), "its stream ends")
    assert client.status()["counters"]["cancelled_total"].get("client", 0) > 0


def test_closing_a_stream_cancels_it(client):
    with client.stream("hello", max_tokens=4000, ignore_eos=True) as stream:
        next(stream)
    wait_until(lambda: idle(client), "it ends")


def test_without_a_broker_the_client_says_so(tmp_path):
    with (
        Client(f"ipc://{tmp_path}/nobody.sock") as client,
        pytest.raises(BrokerConnectionError, match=r"no broker at .*headrace up"),
    ):
        client.generate("hi")

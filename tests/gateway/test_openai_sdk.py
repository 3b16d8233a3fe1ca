"""The real `openai` SDK, sync and async, against a real gateway: what most programs will speak to it with."""

import asyncio
import threading

import openai
import pytest

from headrace import errors
from tests.gateway.helpers import WAIT
from tests.support.fake_client import FakeClient, card

MESSAGES = [{"role": "user", "content": "hi"}]
TEXT = "Hello number 0 from tiny-chat."


@pytest.fixture
def connect():
    made = []

    def connect(running, **options):
        options = {"api_key": "k", "max_retries": 0, "timeout": WAIT} | options
        made.append(openai.OpenAI(base_url=running.url + "/v1", **options))
        return made[-1]

    yield connect
    for client in made:
        client.close()


def test_models(serve, connect):
    client = connect(serve(FakeClient(cards=[card("a"), card("b/c")])))
    assert [model.id for model in client.models.list()] == ["a", "b/c"]
    assert client.models.retrieve("b/c").owned_by == "headrace"


def test_chat(serve, connect):
    answer = connect(serve()).chat.completions.create(model="tiny-chat", messages=MESSAGES, max_completion_tokens=100)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == 12
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_chat_as_a_stream(serve, connect):
    with connect(serve()).chat.completions.create(
        model="tiny-chat", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 5


def test_the_stream_helper_with_its_events(serve, connect):
    with connect(serve()).chat.completions.stream(model="tiny-chat", messages=MESSAGES) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content == TEXT


def test_several_choices_with_logprobs(serve, connect):
    running = serve(lambda call, choice: ["a", f" {choice}"])
    answer = connect(running).chat.completions.create(
        model="tiny-chat", messages=MESSAGES, n=2, logprobs=True, top_logprobs=3, seed=7
    )
    assert [choice.message.content for choice in answer.choices] == ["a 0", "a 1"]
    for choice in answer.choices:
        assert [entry.token for entry in choice.logprobs.content] == ["a", f" {choice.index}"]
        assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
        assert bytes(choice.logprobs.content[0].bytes) == b"a"
    assert running.fake.calls[0].sampling.seed == 7


def test_completions(serve, connect):
    client = connect(serve(lambda call, choice: ["x", "y"]))
    answer = client.completions.create(model="tiny-chat", prompt=["a", "b"], logprobs=1)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "xy"), (1, "xy")]
    assert answer.choices[0].logprobs.tokens == ["x", "y"]
    stream = client.completions.create(model="tiny-chat", prompt=[[1, 2]], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "xy"


def test_extras_go_in_the_body(serve, connect):
    running = serve()
    connect(running).chat.completions.create(
        model="tiny-chat", messages=MESSAGES, extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}
    )
    sampling = running.fake.calls[0].sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.3)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.ContextLengthError("long", param="messages"), openai.BadRequestError),
        (errors.UnknownModelError("what"), openai.NotFoundError),
        (errors.ConflictError("twice"), openai.ConflictError),
        (errors.OverloadedError("full"), openai.RateLimitError),
        (errors.UnavailableError("later"), openai.InternalServerError),
        (errors.WorkerCrashedError("bang"), openai.InternalServerError),
    ],
)
def test_errors_become_the_sdk_s_classes(serve, connect, error, kind):
    with pytest.raises(kind) as caught:
        connect(serve(lambda call, choice: [error])).chat.completions.create(model="tiny-chat", messages=MESSAGES)
    assert caught.value.code == error.code
    assert caught.value.param == error.param
    assert error.message in str(caught.value)
    assert caught.value.request_id


def test_a_key_that_is_wrong(serve, connect):
    running = serve(api_keys=("right",))
    assert connect(running, api_key="right").models.list().data
    with pytest.raises(openai.AuthenticationError, match="valid API key"):
        connect(running, api_key="wrong").models.list()


def test_an_error_inside_a_stream_is_raised(serve, connect):
    client = connect(serve(lambda call, choice: ["a", errors.WorkerCrashedError("The group died.")]))
    pieces = []
    with pytest.raises(openai.APIError, match=r"The group died\."):  # noqa: PT012  the error comes after a piece
        for chunk in client.chat.completions.create(model="tiny-chat", messages=MESSAGES, stream=True):
            pieces.append(chunk.choices[0].delta.content)
    assert "".join(pieces) == "a"


def test_the_sdk_retries_what_may_pass_and_nothing_else(serve, connect):
    tries = []

    def script(call, choice):
        tries.append(call)
        return [errors.OverloadedError("full", retry_after=0.01)] if len(tries) < 2 else ["ok"]

    client = connect(serve(script), max_retries=2)
    assert client.chat.completions.create(model="tiny-chat", messages=MESSAGES).choices[0].message.content == "ok"
    crashes = serve(lambda call, choice: [errors.WorkerCrashedError("bang")])
    with pytest.raises(openai.InternalServerError):
        connect(crashes, max_retries=2).chat.completions.create(model="tiny-chat", messages=MESSAGES)
    assert len(crashes.fake.calls) == 1


def test_closing_a_stream_cancels_it(serve, connect):
    running = serve(lambda call, choice: ["a", threading.Event()])
    stream = connect(running).chat.completions.create(model="tiny-chat", messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    assert running.fake.calls[0].closed.wait(WAIT)
    assert running.fake.calls[0].ended == "closed"


def test_the_async_client(serve):
    running = serve()

    async def talk():
        async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="k", max_retries=0) as client:
            models = [model.id async for model in client.models.list()]
            whole = client.chat.completions.create(model="tiny-chat", messages=MESSAGES)
            stream = await client.chat.completions.create(model="tiny-chat", messages=MESSAGES, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            many = await asyncio.gather(
                *(client.completions.create(model="tiny-chat", prompt=str(number)) for number in range(20))
            )
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="other", messages=MESSAGES)
            return models, (await whole).choices[0].message.content, text, {each.choices[0].text for each in many}

    assert asyncio.run(talk()) == (["tiny-chat"], TEXT, TEXT, {TEXT})

"""`AsyncClient` against a broker and a group: like `Client`, and it never makes an event loop stand still."""

import asyncio
import contextlib
import gc
import os
import threading

import pytest

from headrace.client import AsyncClient, Delta, Timeouts
from headrace.errors import (
    BrokerConnectionError,
    ConfigError,
    InvalidRequestError,
    RequestCancelledError,
    UnknownModelError,
)
from tests.client.pool import seeded, speaking, wait_until
from tests.support.tiny_tokenizer import END_OF_TEXT, VOCAB_SIZE

CHAT = [{"role": "user", "content": "Say something."}]
SAID = "Grüße, 日本!"
FOR_EVER = {"max_tokens": 4000, "ignore_eos": True}


@pytest.fixture
def group(pool):
    return pool.start_group(speaking(SAID))


def run(pool, function, **options):
    """Run a coroutine function with a client, in a loop of its own."""

    async def main():
        async with AsyncClient(pool.endpoint, **options) as client:
            return await function(client)

    return asyncio.run(main())


async def until(condition):
    """Wait for a condition without stopping the loop."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("prompt", [{"prompt": "abc"}, {"messages": CHAT}, {"token_ids": [97, 98, 99]}])
def test_generate(pool, group, prompt):
    async def use(client):
        completion = await client.generate(**prompt)
        assert completion.text == SAID
        assert completion.choices[0].token_ids == (*SAID.encode(), END_OF_TEXT)
        assert completion.usage.prompt_tokens == len(group.assigned[0].prompt) // 4

    run(pool, use)


def test_a_stream(pool, group):
    async def use(client):
        stream = client.stream("abc")
        assert stream.prompt_tokens is None
        async with stream:
            assert stream.prompt_tokens == 3
            deltas = [delta async for delta in stream]
            assert "".join(delta.text for delta in deltas) == SAID
            assert deltas[-1] == Delta(0, "", (), None, "stop")
        assert (await stream.result()).text == SAID
        assert [delta async for delta in stream] == []

    run(pool, use)


def test_a_stream_without_a_block(pool, group):
    async def use(client):
        assert "".join([text async for text in client.stream("abc").text_iter()]) == SAID
        assert (await client.stream("abc").result()).text == SAID

    run(pool, use)


def test_choices_stop_strings_and_log_probabilities(pool):
    group = pool.start_group()

    async def use(client):
        completion = await client.generate("abc", n=2, seed=5, max_tokens=20, logprobs=1)
        assert [choice.token_ids for choice in completion.choices] == [seeded(5, 20, choice) for choice in range(2)]
        assert [one.token_id for one in completion.choices[1].logprobs] == list(seeded(5, 20, 1))
        group.emit = speaking("one two three " * 300)
        assert (await client.generate("abc", stop="o th")).text == "one tw"
        await until(lambda: group.revoked)

    run(pool, use)


def test_many_at_once(pool):
    pool.start_group(max_num_seqs=16)

    async def use(client):
        calls = [client.generate("abc", seed=seed, max_tokens=20) for seed in range(100)]
        completions = await asyncio.gather(*calls)
        assert [c.choices[0].token_ids for c in completions] == [seeded(seed, 20) for seed in range(100)]

    run(pool, use)


def test_models_status_and_text(pool, group):
    async def use(client):
        assert [card.name for card in await client.models()] == ["tiny"]
        assert (await client.status())["groups"][0]["name"] == "group 0"
        assert (await client.text()).encode("a") == [97]
        assert await client.text("tiny") is await client.text()

    run(pool, use)


@pytest.mark.parametrize("ordered", [True, False])
def test_map(pool, group, ordered):
    async def use(client):
        prompts = ["a", [], "b", 5, [1, 2], [VOCAB_SIZE], CHAT, "long " * 3000]
        items = [item async for item in client.map(prompts, concurrency=3, ordered=ordered)]
        if ordered:
            assert [item.index for item in items] == list(range(8))
        for item in items:
            assert item.prompt == prompts[item.index]
            assert (item.completion.text == SAID) if item.index in (0, 2, 4, 6) else item.error
        errors = {item.index: type(item.error).__name__ for item in items if item.error}
        wanted = ["InvalidRequestError"] * 3
        assert errors == dict(zip((1, 3, 5, 7), [*wanted, "ContextLengthError"], strict=True))
        with pytest.raises(UnknownModelError):
            await anext(client.map(["a"], model="other"))

    run(pool, use)


def test_map_that_is_left_early_cancels(pool, group):
    group.emit = lambda assignment, index: END_OF_TEXT if assignment.prompt[0] == ord("q") else ord("z")

    async def use(client):
        prompts = ["slow", "quick", *["slow"] * 6]
        async with contextlib.aclosing(client.map(prompts, ordered=False, max_tokens=4000)) as results:
            async for item in results:
                assert item.prompt == "quick"
                break
        await until(lambda: len(group.revoked) == 7 and not group.running)

    run(pool, use)


def test_nonsense_is_found_out_at_the_call(pool):
    client = AsyncClient(pool.endpoint)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        client.stream("x", temperatur=1)
    with pytest.raises(TypeError, match="did you mean 'top_k'"):
        client.map(["x"], topk=1)
    with pytest.raises(InvalidRequestError, match="concurrency"):
        client.map(["x"], concurrency=0)
    assert client._core.transport._thread is None


def test_what_is_wrong_with_a_request_is_said_on_entering(pool, group):
    async def use(client):
        for wrong in ({"prompt": ""}, {"messages": 5}, {"token_ids": 5}, {"prompt": "x", "temperature": -1}):
            stream = client.stream(**wrong)
            with pytest.raises(InvalidRequestError):
                async with stream:
                    pass
            with pytest.raises(RequestCancelledError, match="closed before its request was sent"):
                await stream.result()

    run(pool, use)


# --------------------------------------------------------------------------------------------------------------- cancel


async def started(client, **more):
    """A stream that would go on for long, with its first token read."""
    stream = client.stream("abc", **FOR_EVER, **more)
    await anext(stream)
    return stream


def test_leaving_the_block_cancels(pool, group):
    async def use(client):
        async with await started(client) as stream:
            assert len(group.running) == 1
        await until(lambda: group.revoked and not group.running)
        assert len(group.assigned) == 1  # reading opened the stream, so entering it must not
        assert (await stream.result()).choices[0].finish_reason == "cancelled"

    run(pool, use)


def test_closing_wakes_a_reader(pool, group):
    async def use(client):
        stream = await started(client)
        group.hang()
        reader = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
        await stream.close()
        await stream.close()
        completion = await reader
        assert completion.choices[0].finish_reason == "cancelled"
        group.resume()
        await until(lambda: not group.running)

    run(pool, use)


@pytest.mark.parametrize("how", ["generate", "stream", "map"])
def test_cancelling_a_task_cancels_on_the_server(pool, group, how):
    async def work(client):
        match how:
            case "generate":
                await client.generate("abc", **FOR_EVER)
            case "stream":
                async for _ in client.stream("abc", **FOR_EVER):
                    pass
            case "map":
                async for _ in client.map(["abc"], **FOR_EVER):
                    pass

    async def use(client):
        task = asyncio.create_task(work(client))
        await until(lambda: group.running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: group.revoked and not group.running)

    run(pool, use)


def test_a_time_limit_of_the_callers_cancels(pool, group):
    async def use(client):
        stream = await started(client)
        group.hang()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.result()
        assert [delta async for delta in stream] == []  # and does not wait for what will never come
        group.resume()
        await until(lambda: group.revoked and not group.running)

    run(pool, use)


def test_a_forgotten_stream_is_cancelled(pool, group):
    async def use(client):
        stream = await started(client)
        del stream
        gc.collect()
        await until(lambda: group.revoked and not group.running)

    run(pool, use)


def test_closing_the_client_ends_its_streams(pool, group):
    async def use(client):
        stream = await started(client)
        await client.close()
        with pytest.raises(RequestCancelledError, match="client was closed"):
            await stream.result()
        with pytest.raises(ConfigError, match="This client is closed"):
            client.stream("x")
        await until(lambda: group.revoked and not group.running)

    run(pool, use)


def test_a_client_may_be_closed_twice_or_never_have_connected(pool):
    async def use():
        client = AsyncClient(pool.endpoint)
        await client.close()
        await client.close()

    asyncio.run(use())


# ---------------------------------------------------------------------------------------------------------- event loops


def test_loops_may_take_turns(pool, group):
    client = AsyncClient(pool.endpoint)
    for _ in range(3):
        assert asyncio.run(client.generate("abc")).text == SAID
    asyncio.run(client.close())


def test_loops_may_share_a_client(pool):
    pool.start_group(max_num_seqs=16)
    client = AsyncClient(pool.endpoint)
    results = {}

    def work(number):
        async def main():
            for seed in range(number * 10, number * 10 + 5):
                results[seed] = (await client.generate("abc", seed=seed, max_tokens=20)).choices[0].token_ids

        asyncio.run(main())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(client.close())
    assert results == {seed: seeded(seed, 20) for number in range(6) for seed in range(number * 10, number * 10 + 5)}


def test_a_loop_that_ends_with_streams_open(pool, group):
    """Nobody can read them any more, so they are cancelled when news of them finds no loop."""
    client = AsyncClient(pool.endpoint)
    kept = []

    async def leave_open():
        kept.append(await started(client))

    asyncio.run(leave_open())
    wait_until(lambda: group.revoked and not group.running)
    assert asyncio.run(client.generate("abc")).text == SAID
    asyncio.run(client.close())


class Heart:
    """Beats as long as its loop runs; `longest` is the longest time that it stood still, counted in other's steps."""

    def __init__(self):
        self.beats = 0

    async def __aenter__(self):
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_):
        self._task.cancel()

    async def _beat(self):
        while True:
            self.beats += 1
            await asyncio.sleep(0.001)


def test_questions_do_not_stop_the_loop(pool):
    """There is no group yet, so the client waits for one; the loop goes on meanwhile."""

    async def use(client):
        async with Heart() as heart:
            call = asyncio.create_task(client.generate("abc"))
            await until(lambda: heart.beats > 50)
            assert not call.done()
            await asyncio.to_thread(pool.start_group, speaking(SAID))
            assert (await call).text == SAID

    run(pool, use, retries=6)


@pytest.mark.parametrize(
    ("prompt", "aside"),
    [
        ({"prompt": "short"}, False),
        ({"prompt": "x" * 100_000}, True),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, True),
        ({"token_ids": [1] * 100_000}, True),
    ],
)
def test_long_prompts_are_tokenized_aside(pool, group, monkeypatch, prompt, aside):
    async def use(client):
        await client.text()
        threads = []
        prepare = client._core.prepare

        def noted(*arguments):
            threads.append(threading.current_thread())
            return prepare(*arguments)

        monkeypatch.setattr(client._core, "prepare", noted)
        with contextlib.suppress(Exception):
            await client.generate(**prompt)
        async for _ in client.map(prompt.values()):
            pass
        assert [thread is not threading.main_thread() for thread in threads] == [aside, aside]

    run(pool, use)


def test_closing_does_not_wait_in_line_behind_unanswered_questions(run_dir):
    """The loop's pool of threads is full of them; with the close queued behind, this would take an hour."""

    async def main():
        client = AsyncClient(f"ipc://{run_dir}/nobody.sock", timeouts=Timeouts(connect=3600))
        calls = [asyncio.create_task(client.generate("x")) for _ in range(40)]
        await asyncio.sleep(0.1)
        await client.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} <= {RequestCancelledError, ConfigError}

    asyncio.run(main())


def test_no_broker(run_dir):
    async def main():
        async with AsyncClient(f"ipc://{run_dir}/nobody.sock", timeouts=Timeouts(connect=0.3)) as client:
            for call in (
                client.generate("x"),
                client.models(),
                client.status(),
                client.text(),
                anext(client.map(["x"])),
            ):
                with pytest.raises(BrokerConnectionError, match="There is no broker"):
                    await call

    asyncio.run(main())


def test_nothing_is_left_open(pool, group):
    async def use(client):
        await client.generate("abc")
        await started(client)

    run(pool, use)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  no paths are wanted
    for _ in range(5):
        run(pool, use)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)  # noqa: PTH208

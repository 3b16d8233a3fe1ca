"""`Client` against a broker and a group: what it gives, what it cancels, what it leaves behind."""

import gc
import itertools
import os
import threading

import pytest

from headrace.client import Client, Delta, MapItem, Timeouts
from headrace.client.inbox import Inbox
from headrace.errors import (
    ConfigError,
    ContextLengthError,
    InternalError,
    InvalidRequestError,
    RequestCancelledError,
    UnknownModelError,
)
from headrace.sampling import SamplingParams
from tests.client.pool import seeded, speaking, wait_until
from tests.support.tiny_tokenizer import END_OF_TEXT, VOCAB_SIZE

CHAT = [{"role": "user", "content": "Say something."}]
SAID = "Grüße, 日本!"
FOR_EVER = {"max_tokens": 4000, "ignore_eos": True}


@pytest.fixture
def group(pool):
    return pool.start_group(speaking(SAID))


@pytest.fixture
def client(pool, group):
    with Client(pool.endpoint) as client:
        yield client


# ------------------------------------------------------------------------------------------------------------- answers


def test_generate(client):
    completion = client.generate("abc")
    assert completion.text == SAID
    assert completion.model == "tiny"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].token_ids == (*SAID.encode(), END_OF_TEXT)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, len(SAID.encode()) + 1)
    assert len(completion.id) == 32


@pytest.mark.parametrize("prompt", [{"prompt": "abc"}, {"messages": CHAT}, {"token_ids": [97, 98, 99]}])
def test_prompts_of_all_kinds_arrive_in_tokens(client, group, prompt):
    assert client.generate(**prompt).text == SAID
    text = client.text()
    wanted = text.encode_chat(CHAT) if "messages" in prompt else text.encode("abc")
    (assignment,) = group.assigned
    assert list(memoryview(assignment.prompt).cast("I")) == wanted


def test_settings_reach_the_group(client, group):
    sampling = SamplingParams(temperature=0.5, seed=7)
    client.generate("abc", sampling=sampling, max_tokens=3, timeout=60)
    assert group.assigned[0].sampling == {"temperature": 0.5, "seed": 7, "max_tokens": 3}
    assert 0 < group.assigned[0].budget_ms <= 60_000


def test_a_stream_brings_whole_characters(client):
    with client.stream("abc") as stream:
        deltas = list(stream)
    assert "".join(delta.text for delta in deltas) == SAID
    assert all("\N{REPLACEMENT CHARACTER}" not in delta.text for delta in deltas)
    assert deltas[-1] == Delta(0, "", (), None, "stop")
    assert stream.result().text == SAID
    assert list(stream) == []


def test_text_iter(client):
    with client.stream("abc") as stream:
        assert "".join(stream.text_iter()) == SAID


def test_choices(pool, client):
    pool.kill(pool.groups[0])
    pool.start_group()
    completion = client.generate("abc", n=3, seed=5, max_tokens=20)
    assert [choice.token_ids for choice in completion.choices] == [seeded(5, 20, choice) for choice in range(3)]
    assert completion.usage.completion_tokens == 60


def test_a_stop_string_ends_the_work_as_well(client, group):
    group.emit = speaking("one two three " * 300)
    completion = client.generate("abc", stop=["o th", "zzz"])
    assert completion.text == "one tw"
    assert completion.choices[0].finish_reason == "stop"
    wait_until(lambda: group.revoked)


def test_log_probabilities(client):
    completion = client.generate("abc", logprobs=2, max_tokens=3)
    first, *_ = completion.choices[0].logprobs
    assert (first.token, first.token_id, first.bytes, first.logprob) == ("G", ord("G"), b"G", -0.5)
    assert [top.logprob for top in first.top] == [-0.5, -1.5]
    assert completion.choices[0].logprobs[2].bytes == "ü".encode()[:1]


def test_models_status_and_text(client):
    assert [card.name for card in client.models()] == ["tiny"]
    assert client.status()["groups"][0]["name"] == "group 0"
    assert client.text("tiny").encode("a") == [97]


def test_errors_of_the_broker_have_their_types(client):
    with pytest.raises(UnknownModelError, match="did you mean 'tiny'"):
        client.generate("abc", model="tinny")
    with pytest.raises(ContextLengthError) as caught:
        client.generate("abc", max_tokens=4095)
    assert caught.value.param == "max_tokens"
    assert caught.value.request_id


# ----------------------------------------------------------------------------------------------------------------- map


def test_map_in_order_with_failures_in_their_places(client):
    prompts = ["a", [], "b", 5, [1, 2], [VOCAB_SIZE], CHAT, "x" * 5000]
    items = list(client.map(prompts, concurrency=3))
    assert [item.index for item in items] == list(range(8))
    assert [item.prompt for item in items] == prompts
    assert [item.completion.text if item.completion else None for item in items] == [
        *(SAID, None, SAID, None, SAID, None, SAID, None)
    ]
    assert isinstance(items[3].error, InvalidRequestError)
    assert isinstance(items[7].error, ContextLengthError)


def test_map_as_completed(client, group):
    """The slow first item comes last; in order it would hold up all."""
    group.emit = lambda assignment, index: END_OF_TEXT if assignment.prompt[0] == ord("q") else ord("z")
    prompts = ["slow", *["quick"] * 20]
    items = list(client.map(prompts, concurrency=4, ordered=False, max_tokens=300))
    assert sorted(item.index for item in items) == list(range(21))
    assert [item.index for item in items][-1] == 0


def test_map_reads_an_endless_source_only_as_far_as_it_must(client, group):
    read = []

    def prompts():
        for number in itertools.count():
            read.append(number)
            yield str(number)

    results = client.map(prompts(), concurrency=4)
    assert [next(results).index for _ in range(10)] == list(range(10))
    assert len(read) <= 10 + 4 * 4
    results.close()
    wait_until(lambda: not group.running)


def test_map_hands_out_what_is_ready_while_its_source_is_slow(client):
    """A source may wait for the results: with all of the window read first, neither would ever go on."""
    seen = threading.Event()

    def prompts():
        yield "one"
        assert seen.wait(60)
        yield "two"

    results = client.map(prompts(), concurrency=64)
    threading.Timer(0.05, seen.set).start()
    assert [item.index for item in results] == [0, 1]


def test_map_that_is_left_early_cancels(client, group):
    group.emit = lambda assignment, index: END_OF_TEXT if assignment.prompt[0] == ord("q") else ord("z")
    for item in client.map(["slow", "quick", *["slow"] * 6], ordered=False, max_tokens=4000):
        assert item.prompt == "quick"
        break
    wait_until(lambda: len(group.revoked) == 7 and not group.running)


def test_map_says_at_the_call_what_is_wrong_with_all_items(client):
    with pytest.raises(InvalidRequestError, match="timeout"):
        client.map(["a"], timeout=-1)
    with pytest.raises(UnknownModelError):
        next(client.map(["a"], model="other"))


def test_an_error_of_the_source_is_the_callers(client):
    def prompts():
        yield "a"
        raise LookupError("no more")

    with pytest.raises(LookupError):
        list(client.map(prompts()))


# --------------------------------------------------------------------------------------------------------------- cancel


def started(client, **more):
    """A stream that would go on for long, with its first token read."""
    stream = client.stream("abc", **FOR_EVER, **more)
    next(stream)
    return stream


def test_leaving_the_block_cancels(client, group):
    with started(client) as stream:
        assert len(group.running) == 1
    wait_until(lambda: group.revoked and not group.running)
    assert stream.result().choices[0].finish_reason == "cancelled"
    assert stream.result().choices[0].token_ids


def test_closing_cancels_once(client, group):
    stream = started(client)
    stream.close()
    stream.close()
    wait_until(lambda: not group.running)
    assert list(stream) == []


def test_an_error_in_the_block_cancels(client, group):
    with pytest.raises(ZeroDivisionError), started(client):
        raise ZeroDivisionError
    wait_until(lambda: not group.running)


def test_a_forgotten_stream_is_cancelled(client, group):
    stream = started(client)
    del stream
    gc.collect()
    wait_until(lambda: group.revoked and not group.running)


def test_ctrl_c_cancels(client, group, monkeypatch):
    stream = started(client)

    def interrupted(inbox):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Inbox, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    wait_until(lambda: group.revoked and not group.running)
    assert list(stream) == []  # and does not wait for what will never come


def test_closing_a_stream_from_another_thread_wakes_its_reader(pool, client, group):
    stream = started(client)
    group.hang()
    read = []
    reader = threading.Thread(target=lambda: read.extend(stream))
    reader.start()
    stream.close()
    reader.join(60)
    assert not reader.is_alive()
    group.resume()
    wait_until(lambda: not group.running)


def test_closing_the_client_ends_its_streams(pool, group):
    client = Client(pool.endpoint)
    stream = started(client)
    client.close()
    with pytest.raises(RequestCancelledError, match="client was closed"):
        list(stream)
    wait_until(lambda: group.revoked and not group.running)


def test_a_forgotten_client_ends(pool, group):
    client = Client(pool.endpoint)
    client.generate("a")
    del client
    gc.collect()  # the fixture looks for its thread


def test_a_client_lives_as_long_as_its_streams(pool, group):
    stream = Client(pool.endpoint).stream("abc")
    gc.collect()
    assert stream.result().text == SAID


def test_a_bug_in_the_clients_thread_is_told_to_everybody(client, monkeypatch):
    stream = started(client)

    def broken(event, now):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(client._core.transport._session, "handle", broken)
    with pytest.raises(InternalError, match="The client's thread failed: ZeroDivisionError: a bug") as caught:
        list(stream)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ConfigError, match="This client is closed"):
        client.generate("abc")


# -------------------------------------------------------------------------------------------------------------- sharing


def test_threads_share_a_client(pool):
    pool.start_group(max_num_seqs=16)
    results = {}

    def work(number, client):
        for seed in range(number * 10, number * 10 + 5):
            results[seed] = client.generate("abc", seed=seed, max_tokens=30).choices[0].token_ids

    with Client(pool.endpoint) as client:
        threads = [threading.Thread(target=work, args=(number, client)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {seed: seeded(seed, 30) for number in range(12) for seed in range(number * 10, number * 10 + 5)}


def descriptors():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  no paths are wanted


def test_nothing_is_left_open(pool, group):
    with Client(pool.endpoint) as client:
        client.generate("warm up")
    before = descriptors()
    for _ in range(5):
        with Client(pool.endpoint, timeouts=Timeouts(connect=60)) as client:
            client.generate("abc")
            started(client)
    wait_until(lambda: descriptors() <= before)


def test_map_items_are_values():
    assert MapItem(1, "a") == MapItem(1, "a", None, None)

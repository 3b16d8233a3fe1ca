"""What a client lives through with real sockets: groups that die, brokers that go and come back, and nobody at all.

The tokens are a function of the seed, so a repeated, missing or altered one is seen at once. How long things may take
is for the simulation to say; here every wait is for a condition.
"""

import asyncio
import threading

import pytest
import zmq

from headrace.client import AsyncClient, Client, Timeouts
from headrace.errors import (
    AddressError,
    BrokerConnectionError,
    DeadlineExceededError,
    ProtocolError,
    RequestTimeoutError,
    UnavailableError,
)
from tests.client.pool import seeded, speaking, wait_until
from tests.client.tiny import tiny_card

COUNT = 400
SEED = 11


@pytest.fixture
def pool(pool):
    """A broker that misses its groups after two seconds already."""
    pool.stop_broker()
    pool.start_broker(heartbeat=0.5)
    return pool


def read_some(stream, count=20):
    """Read until so many tokens came."""
    tokens = []
    while len(tokens) < count:
        tokens += next(stream).token_ids
    return tokens


def host_of(pool):
    """The group that runs something."""
    return wait_until(lambda: next((group for group in pool.groups if group.running), None))


def test_a_group_dies_mid_stream(pool):
    pool.start_group(step_delay=0.005)
    pool.start_group(step_delay=0.005)
    with Client(pool.endpoint) as client:
        stream = client.stream("abc", seed=SEED, max_tokens=COUNT)
        before = read_some(stream)
        pool.kill(host_of(pool))
        completion = stream.result()
    assert completion.choices[0].token_ids == seeded(SEED, COUNT)
    assert tuple(before) == seeded(SEED, COUNT)[: len(before)]
    (assignment,) = [a for a in pool.groups[0].assigned if a.output]
    assert list(memoryview(assignment.output).cast("I")) == list(seeded(SEED, len(assignment.output) // 4))


def test_the_only_group_dies_and_another_comes(pool):
    pool.start_group(step_delay=0.005)
    with Client(pool.endpoint) as client:
        stream = client.stream("abc", seed=SEED, max_tokens=COUNT, n=2)
        read_some(stream)
        pool.kill(pool.groups[0])
        pool.start_group(name="another")
        choices = stream.result().choices
    assert [choice.token_ids for choice in choices] == [seeded(SEED, COUNT, 0), seeded(SEED, COUNT, 1)]


def test_a_broker_is_stopped_and_another_started(pool):
    pool.start_group(step_delay=0.005)
    with Client(pool.endpoint) as client:
        stream = client.stream("abc", seed=SEED, max_tokens=COUNT, logprobs=1)
        read_some(stream)
        pool.stop_broker()
        pool.start_broker(heartbeat=0.5)
        choice = stream.result().choices[0]
    assert choice.token_ids == seeded(SEED, COUNT)
    assert tuple(entry.token_id for entry in choice.logprobs) == choice.token_ids


def test_brokers_come_and_go_under_many_streams(pool):
    pool.start_group(step_delay=0.005)
    with Client(pool.endpoint) as client:
        results = {}

        def work():
            items = client.map([[seed + 1] for seed in range(30)], seed=SEED, max_tokens=200)
            results.update({item.index: item.completion or item.error for item in items})

        worker = threading.Thread(target=work)
        worker.start()
        for _ in range(3):
            wait_until(lambda: pool.running)
            pool.stop_broker()
            pool.start_broker()
        worker.join()
    assert {index: result.choices[0].token_ids for index, result in results.items()} == dict.fromkeys(
        range(30), seeded(SEED, 200)
    )


def test_an_asynchronous_stream_lives_through_both(pool):
    pool.start_group(step_delay=0.005)

    async def use():
        async with AsyncClient(pool.endpoint) as client, client.stream("abc", seed=SEED, max_tokens=COUNT) as stream:
            await anext(stream)
            await asyncio.to_thread(pool.stop_broker)
            await asyncio.to_thread(pool.start_broker, heartbeat=0.5)
            await anext(stream)
            await asyncio.to_thread(pool.start_group, name="another")
            await asyncio.to_thread(pool.kill, pool.groups[0])
            return await stream.result()

    assert asyncio.run(use()).choices[0].token_ids == seeded(SEED, COUNT)


def test_a_client_that_rested_finds_a_new_broker(pool):
    group = pool.start_group(speaking("hello"))
    with Client(pool.endpoint) as client:
        assert client.generate("abc").text == "hello"
        welcomes = group.welcomes
        pool.stop_broker()
        pool.start_broker()
        wait_until(lambda: group.welcomes > welcomes)
        assert client.generate("abc").text == "hello"


def test_other_weights_never_continue_a_stream(pool):
    pool.start_group(step_delay=0.005)
    with Client(pool.endpoint) as client:
        stream = client.stream("abc", seed=SEED, max_tokens=COUNT)
        read_some(stream)
        pool.kill(pool.groups[0])
        pool.start_group(name="another", card=tiny_card(fingerprint="f1"))
        with pytest.raises(Exception, match="was replaced while this stream was under way") as caught:
            stream.result()
        assert type(caught.value).__name__ == "ModelChangedError"
        assert len(client.generate("abc", max_tokens=5).choices[0].token_ids) == 5


def test_no_broker(run_dir):
    with Client(f"ipc://{run_dir}/nobody.sock", timeouts=Timeouts(connect=0.3)) as client:
        for call in (
            lambda: client.generate("x"),
            lambda: client.stream("x"),
            lambda: list(client.map(["x"])),
            client.models,
            client.status,
            client.text,
        ):
            with pytest.raises(
                BrokerConnectionError, match=r"There is no broker at ipc://.*within 0\.3 s.*headrace up"
            ):
                call()


def test_a_broker_that_comes_late_is_found(pool):
    pool.stop_broker()
    with Client(pool.endpoint, timeouts=Timeouts(connect=60), retries=6) as client:
        texts = []
        worker = threading.Thread(target=lambda: texts.append(client.generate("abc").text))
        worker.start()
        wait_until(lambda: client._core.transport._session.link.value == "greeting")
        pool.start_broker()
        pool.start_group(speaking("hello"))
        worker.join()
    assert texts == ["hello"]


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://", "http://127.0.0.1:80", "tcp://127.0.0.1:notaport"])
def test_an_endpoint_that_is_none(endpoint):
    with Client(endpoint) as client, pytest.raises(AddressError, match="is not an endpoint to connect to"):
        client.generate("x")


def test_no_group(pool):
    with Client(pool.endpoint, retries=0) as client, pytest.raises(UnavailableError, match="No worker group is ready"):
        client.generate("x")


def test_a_first_token_that_does_not_come(pool):
    group = pool.start_group()
    with Client(pool.endpoint, timeouts=Timeouts(first_token=0.3)) as client:
        client.text()
        group.hang()
        with pytest.raises(RequestTimeoutError, match=r"no first token within 0\.3 s") as caught:
            client.generate("x")
        assert caught.value.request_id
        group.resume()
        wait_until(lambda: group.revoked and not group.running)


def test_a_further_token_that_does_not_come(pool):
    group = pool.start_group()
    with Client(pool.endpoint, timeouts=Timeouts(between_tokens=0.3)) as client:
        stream = client.stream("abc", max_tokens=4000)
        next(stream)
        group.hang()
        with pytest.raises(RequestTimeoutError, match=r"no further token within 0\.3 s"):
            stream.result()
        group.resume()
        wait_until(lambda: group.revoked and not group.running)


@pytest.mark.parametrize("where", ["call", "client"])
def test_a_time_limit_for_all_of_it(pool, where):
    group = pool.start_group(step_delay=0.01)
    total = 0.3 if where == "client" else None
    with Client(pool.endpoint, timeouts=Timeouts(total=total)) as client:
        with pytest.raises(DeadlineExceededError):
            client.generate("abc", max_tokens=4000, timeout=0.3 if where == "call" else None)
        wait_until(lambda: not group.running)


def test_somebody_who_is_no_broker(run_dir):
    """Whoever listens there answers every message with garbage."""
    endpoint = f"ipc://{run_dir}/garbage.sock"
    context = zmq.Context()
    listener = context.socket(zmq.ROUTER)
    listener.bind(endpoint)
    stop = threading.Event()

    def answer():
        while not stop.is_set():
            if listener.poll(20):
                peer, *_ = listener.recv_multipart()
                listener.send_multipart([peer, b"garbage", b"\xff"])

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with Client(endpoint) as client, pytest.raises(ProtocolError, match="Unknown message kind b'garbage'"):
            client.generate("x")
    finally:
        stop.set()
        thread.join()
        context.destroy(linger=0)

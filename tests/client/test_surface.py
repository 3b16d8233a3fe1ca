"""The library's surface: public names, equal twins, cheap imports, and what a client says of itself."""

import inspect
import os
import subprocess
import sys
import warnings

import pytest

import headrace
import headrace.client
from headrace.client import AsyncClient, AsyncStream, Client, Stream, Timeouts
from headrace.errors import ConfigError, InvalidRequestError
from tests.client.pool import speaking

NAMES = [
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "Completion",
    "Delta",
    "Embeddings",
    "MapItem",
    "MaskFill",
    "Stream",
    "Text",
    "Timeouts",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
]


def test_exported_names():
    assert headrace.client.__all__ == dir(headrace.client) == NAMES
    for name in NAMES:
        assert getattr(headrace.client, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Cleint'"):
        headrace.client.Cleint  # noqa: B018
    assert headrace.Client is Client
    assert headrace.AsyncClient is AsyncClient


def public(cls):
    return sorted(name for name in dir(cls) if not name.startswith("_"))


def test_public_methods():
    assert public(Client) == ["close", "embed", "fill_mask", "generate", "map", "models", "status", "stream", "text"]
    assert public(Stream) == ["close", "id", "prompt_tokens", "result", "text_iter"]


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Stream, AsyncStream)])
def test_twins_have_the_same_names_and_arguments(one, other):
    assert public(one) == public(other)
    for name in public(one):
        ours, theirs = inspect.getattr_static(one, name), inspect.getattr_static(other, name)
        if not isinstance(ours, property):
            assert str(inspect.signature(ours).parameters) == str(inspect.signature(theirs).parameters)
    assert inspect.signature(one.__init__) == inspect.signature(other.__init__) or one is Stream


HEAVY = ("torch", "transformers", "numpy", "triton", "fastapi")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import headrace",
            (*HEAVY, "zmq", "tokenizers", "jinja2", "msgpack", "asyncio", "headrace.client", "dataclasses"),
        ),
        ("import headrace.client", (*HEAVY, "zmq", "tokenizers", "jinja2", "msgpack", "asyncio")),
        ("from headrace import Client; Client('ipc:///x').close()", (*HEAVY, "tokenizers", "jinja2", "asyncio")),
        ("from headrace import AsyncClient; AsyncClient('ipc:///x')", (*HEAVY, "tokenizers", "jinja2")),
        ("import headrace.client.text, headrace.client.session, headrace.client.transport", HEAVY),
    ],
)
def test_imports_are_cheap(statement, absent):
    """What a module brings along is what its import costs; in a fresh interpreter, for this one has it all."""
    script = f"import sys; {statement}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("make", [Client, AsyncClient])
def test_a_client_says_what_it_is(make):
    client = make("ipc:///tmp/nowhere.sock")
    assert repr(client) == f"<{make.__name__} of ipc:///tmp/nowhere.sock>"
    client._core.close()
    assert repr(client) == f"<{make.__name__} of ipc:///tmp/nowhere.sock, closed>"


def test_where_a_client_looks_for_its_broker(monkeypatch):
    monkeypatch.setenv("HEADRACE_ENDPOINT", "tcp://127.0.0.1:7")
    assert repr(Client()) == "<Client of tcp://127.0.0.1:7>"


@pytest.mark.parametrize("retries", [-1, 1.5, "2", None, True])
def test_retries_are_a_count(retries):
    with pytest.raises(InvalidRequestError, match="retries is") as caught:
        Client(retries=retries)
    assert caught.value.param == "retries"


def test_a_closed_client_says_so():
    client = Client("ipc:///tmp/nowhere.sock")
    client.close()
    client.close()
    for call in (
        lambda: client.generate("x"),
        lambda: client.stream("x"),
        lambda: client.map(["x"]),
        client.models,
        client.status,
        client.text,
    ):
        with pytest.raises(ConfigError, match="This client is closed; make a new one"):
            call()


def test_nonsense_is_found_out_before_a_broker_is_asked():
    client = Client("ipc:///tmp/nowhere.sock", timeouts=Timeouts(connect=3600))
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        client.generate("x", temperatur=1)
    with pytest.raises(TypeError, match="exactly one of"):
        client.stream()
    with pytest.raises(TypeError, match="did you mean 'top_k'"):
        client.map(["x"], topk=1)
    with pytest.raises(InvalidRequestError, match="concurrency"):
        client.map(["x"], concurrency=0)
    assert client._core.transport._thread is None


def in_a_fork(function):
    """Run it in a forked child; returns what it printed as its result."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what this is about
        child = os.fork()
    if child == 0:
        try:
            os.write(write, function().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return result


def test_a_client_does_not_survive_a_fork(pool):
    pool.start_group(speaking("hello"))

    def use():
        try:
            client.generate("x")
        except ConfigError as error:
            client.close()  # neither waits for a thread that is not there, nor disturbs the parent
            return error.message
        return "it worked"

    with Client(pool.endpoint) as client:
        assert client.generate("x").text == "hello"
        said = in_a_fork(use)
        assert "Make a client in each process, after the fork" in said
        assert str(os.getpid()) in said
        assert client.generate("x").text == "hello"


def test_a_stream_says_what_it_is(pool):
    pool.start_group(speaking("hello"))
    with Client(pool.endpoint) as client:
        stream = client.stream("abc")
        assert repr(stream).startswith("<Stream ")
        assert stream.prompt_tokens == 3
        stream.result()
        assert repr(stream) == f"<Stream {stream.id}: done>"
        with client.stream("abc", ignore_eos=True) as stream:
            next(stream)
            assert repr(stream) == f"<Stream {stream.id}: open>"
        assert repr(stream) == f"<Stream {stream.id}: closed>"
    assert repr(AsyncClient(pool.endpoint).stream("x")) == "<AsyncStream: not started>"

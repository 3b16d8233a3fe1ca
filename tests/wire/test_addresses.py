"""Addresses: what a process may listen on, and where the sockets are by default."""

from __future__ import annotations

import stat

import pytest

from headrace import addresses
from headrace.addresses import check_bind, client_endpoint, is_loopback, models_dir, runtime_dir, worker_endpoint
from headrace.errors import AddressError

GOOD = [
    "ipc:///tmp/x.sock",
    "ipc://relative/x.sock",
    "ipc:///" + "x" * 99,
    "tcp://127.0.0.1:0",
    "tcp://127.0.0.1:65535",
    "tcp://127.8.8.8:5555",
    "tcp://localhost:5555",
    "tcp://[::1]:5555",
]
BEYOND = [
    "tcp://0.0.0.0:5555",
    "tcp://*:5555",
    "tcp://10.0.0.1:1",
    "tcp://[::]:5555",
    "tcp://example.com:80",
    "tcp://eth0:1",
]
MALFORMED = [
    "",
    "x",
    "127.0.0.1:5555",
    "tcp://",
    "tcp://127.0.0.1",
    "tcp://127.0.0.1:",
    "tcp://127.0.0.1:port",
    "tcp://127.0.0.1:99999",
    "tcp://127.0.0.1:-1",
    "tcp://:5555",
    "tcp://[::1:5555",
    "http://127.0.0.1:80",
    "inproc://x",
    "udp://127.0.0.1:80",
    "/tmp/x.sock",
]


@pytest.mark.parametrize("endpoint", GOOD)
def test_good_addresses_are_returned(endpoint):
    assert check_bind(endpoint) == endpoint


@pytest.mark.parametrize("endpoint", BEYOND)
def test_beyond_loopback_is_refused(endpoint):
    with pytest.raises(AddressError, match=r"beyond this machine.*127\.0\.0\.1"):
        check_bind(endpoint)


@pytest.mark.parametrize("endpoint", MALFORMED)
def test_malformed_addresses_are_refused_with_an_example(endpoint):
    with pytest.raises(AddressError, match=r"ipc:///path/to\.sock or tcp://127\.0\.0\.1:PORT"):
        check_bind(endpoint)


@pytest.mark.parametrize("path", ["", "/" + "x" * 100, "/" + "é" * 50])
def test_socket_paths_end_where_the_kernel_ends_them(path):
    with pytest.raises(AddressError, match="HEADRACE_RUNTIME_DIR"):
        check_bind(f"ipc://{path}")


@pytest.mark.parametrize("endpoint", ["ipc://@abstract", "ipc://*"])
def test_sockets_without_a_file_have_no_owner_and_are_refused(endpoint):
    with pytest.raises(AddressError, match="everybody on this machine"):
        check_bind(endpoint)


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("1.1.1.1", "::", "localhost.example.com", "")))


def test_the_runtime_folder_is_private(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_RUNTIME_DIR", str(tmp_path / "a" / "run"))
    folder = runtime_dir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert client_endpoint() == f"ipc://{folder}/clients.sock"
    assert worker_endpoint() == f"ipc://{folder}/workers.sock"


def test_places_follow_the_environment(monkeypatch, tmp_path):
    for name in ("HEADRACE_RUNTIME_DIR", "HEADRACE_CACHE", "HEADRACE_MODELS", "HEADRACE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    assert runtime_dir() == tmp_path / "xdg" / "headrace"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_dir() == tmp_path / "cache" / "headrace" / "run"
    assert models_dir() == tmp_path / "cache" / "headrace" / "models"
    monkeypatch.setenv("HEADRACE_MODELS", str(tmp_path / "m"))
    assert models_dir() == tmp_path / "m"
    monkeypatch.setenv("HEADRACE_ENDPOINT", "tcp://127.0.0.1:1")
    monkeypatch.setenv("HEADRACE_WORKER_ENDPOINT", "tcp://127.0.0.1:2")
    assert (client_endpoint(), worker_endpoint()) == ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")


def test_exports_are_pinned():
    assert addresses.__all__ == sorted(addresses.__all__)
    assert set(addresses.__all__) == {
        "cache_dir",
        "check_bind",
        "client_endpoint",
        "is_loopback",
        "models_dir",
        "runtime_dir",
        "worker_endpoint",
    }

"""What begins before the imports: files come into memory, and nothing goes wrong where that cannot be."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from headrace.workers import early
from headrace.workers.early import begin_early, read_ahead, wake_gpu
from headrace.workers.samples import sample_places


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Five pieces and a bit."""
    monkeypatch.setattr(early, "_PIECE", 1 << 16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(5 * (1 << 16) + 100))
    return path


def cold(monkeypatch, *pieces):
    """Let these pieces pass for ones that are not in memory."""
    read = os.preadv

    def preadv(descriptor, buffers, start, *flags):
        if flags and start // early._PIECE in pieces:
            raise BlockingIOError
        return read(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", preadv)


def test_what_is_missing_is_read_and_nothing_else(file, monkeypatch):
    cold(monkeypatch)
    assert read_ahead([file]) == 0
    cold(monkeypatch, 1, 3)
    assert read_ahead([file]) == 2 << 16
    cold(monkeypatch, 5)
    assert read_ahead([file]) == 100


def test_what_a_start_looks_at_first_is_read_first(file, monkeypatch):
    """The fingerprint's samples waited for gigabytes, each for its turn."""
    monkeypatch.setattr(early, "_THREADS", 1)
    cold(monkeypatch, 1, 3)
    read, places = os.preadv, []

    def noted(descriptor, buffers, start, *flags):
        if not flags:
            places.append(start)
        return read(descriptor, buffers, start, *flags)

    monkeypatch.setattr(os, "preadv", noted)
    read_ahead([file])
    assert places == [0, *sample_places(file.stat().st_size), 1 << 16, 3 << 16]


def test_memory_is_made_once_for_each_thread(file, monkeypatch):
    cold(monkeypatch, *range(5))
    made = []
    monkeypatch.setattr(early, "bytearray", lambda size: made.append(size) or bytearray(size), raising=False)
    assert read_ahead([file]) == 5 << 16
    assert made.count(early._PIECE) <= early._THREADS


def test_nothing_is_read_where_there_is_no_room(file, monkeypatch):
    cold(monkeypatch, 0, 1)
    monkeypatch.setattr(early, "available_bytes", lambda: 4 << 16)
    assert read_ahead([file]) == 0
    monkeypatch.setattr(early, "available_bytes", lambda: 5 << 16)
    assert read_ahead([file]) == 2 << 16


def test_files_that_cannot_be_read_are_left_to_who_needs_them(tmp_path, monkeypatch):
    assert read_ahead([tmp_path / "none.safetensors"]) == 0
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    (tmp_path / "some.safetensors").write_bytes(b"x")
    assert read_ahead([tmp_path / "some.safetensors"]) == 0


class Driver:
    """A driver with two GPUs."""

    def __init__(self, init=0):
        self.calls = []
        self._init = init

    def cuInit(self, flags):  # noqa: N802
        self.calls.append("init")
        return self._init

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = 7 + index
        return 0 if index < 2 else 101

    def cuDevicePrimaryCtxRetain(self, context, device):  # noqa: N802
        self.calls.append(device.value)
        return 0


def test_the_gpu_of_the_setting_is_woken(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert wake_gpu(1)
    assert driver.calls == ["init", 8]
    assert not wake_gpu(2)  # there is none; whoever wants it will be told
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(init=100))
    assert not wake_gpu(0)


def test_without_a_driver_nothing_happens(monkeypatch):
    def missing(name):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not wake_gpu(0)


@pytest.mark.parametrize(("device", "woken"), [("cpu", []), ("auto", [0]), ("cuda", [0]), ("cuda:3", [3])])
def test_the_setting_says_which(tmp_path, monkeypatch, device, woken):
    seen = []
    monkeypatch.setattr(early, "wake_gpu", seen.append)
    monkeypatch.setattr(early, "read_ahead", lambda files: None)
    monkeypatch.setattr(early.Thread, "start", lambda thread: thread.run())
    begin_early(tmp_path, device)
    assert seen == woken


def test_it_imports_nothing_heavy():
    code = "import sys, headrace.workers.early; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

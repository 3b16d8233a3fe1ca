"""What a run notes of itself, and who is in it if nobody says."""

from __future__ import annotations

import importlib.util
import subprocess
from types import SimpleNamespace

import pytest
import torch

from headrace.benchmarks import surveyor
from headrace.benchmarks.measure import Timeline
from headrace.benchmarks.session import _peers
from headrace.benchmarks.subject import _Orders
from headrace.benchmarks.traces import attributed, traced


def git(folder, *words: str) -> str:
    command = ["git", "-c", "user.name=T", "-c", "user.email=t@localhost", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path, monkeypatch):
    part = tmp_path / "benchmarks"
    part.mkdir()
    monkeypatch.setattr(surveyor, "__file__", str(part / "surveyor.py"))
    assert surveyor._commit() == {}, "it is no checkout"
    (part / "surveyor.py").write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "One")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert surveyor._commit() == {"commit": commit}
    (part / "results.json").write_text("{}")
    assert surveyor._commit() == {"commit": commit}, "results change nothing"
    (part / "surveyor.py").write_text("2")
    assert surveyor._commit() == {"commit": f"{commit}+changes"}


@pytest.mark.parametrize(
    ("installed", "values", "peers"),
    [
        ({"transformers"}, {"peers": ()}, ("transformers",)),
        ({"transformers", "deepspeed", "vllm"}, {"peers": ()}, ("transformers", "deepspeed", "vllm")),
        ({"transformers", "vllm"}, {"peers": ("deepspeed",)}, ("deepspeed",)),
        ({"transformers", "vllm"}, {"peers": (), "no_peers": True}, ()),
        ({"transformers", "vllm"}, {}, ()),  # commands that know no peers
    ],
)
def test_peers_are_those_that_are_installed_unless_some_are_named(monkeypatch, installed, values, peers):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert _peers(values) == peers


def test_a_profile_on_a_cpu_is_of_the_cpu_even_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def encode(texts: list[list[int]]) -> Timeline:
        torch.ones(3, 3) @ torch.ones(3, 3)
        return Timeline(total=0.0)

    orders = _Orders(SimpleNamespace(encode=encode), gpu=False)
    prompts = {"count": 1, "length": 1, "vocab_size": 5, "seed": 0}
    load = {"prompts": prompts, "output_tokens": 0, "sampling": {}}
    found = orders.profile("encode", load, decoding=False, trace=None)
    assert any("mm" in kernel["name"] and kernel["ms"] > 0 for kernel in found["kernels"])


def test_a_kernel_that_waits_for_another_counts_from_its_end():
    """Launched early, `_norm` seemed to take nine microseconds, eight of which it waited."""
    spans = [("_skinny", 0.0, 10.0), ("_norm", 2.0, 11.0), ("_skinny", 15.0, 20.0), ("copy", 16.0, 18.0)]
    found = {kernel["name"]: (kernel["calls"], kernel["ms"]) for kernel in attributed(spans)}
    assert found == {"_skinny": (2, pytest.approx(0.012)), "_norm": (1, pytest.approx(0.001)), "copy": (1, 0.002)}
    assert sum(ms for _, ms in found.values()) == pytest.approx(0.015), "as long as anything ran"


def test_a_profile_on_a_gpu_is_of_what_the_gpu_did(monkeypatch):
    def event(name: str, device: str, start: float, end: float) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), time_range=span)

    happened = [
        event("_attend", "CUDA", 0.0, 4.0),
        event("cudaLaunch", "CPU", 0.0, 9.0),
        event("_out", "CUDA", 1.0, 7.0),
    ]
    profiler = SimpleNamespace(start=lambda: None, stop=lambda: None, events=lambda: happened)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = traced(lambda begin: begin() or 3, None, gpu=True)
    names = [(kernel["name"], kernel["calls"], kernel["ms"]) for kernel in found["kernels"]]
    assert (found["steps"], names) == (3, [("_attend", 1, 0.004), ("_out", 1, 0.003)])

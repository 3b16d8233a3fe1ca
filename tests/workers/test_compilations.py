"""The count of compilations: what Triton tells its hook, whoever else listens."""

from __future__ import annotations

import pytest

from headrace.workers import compilations as module
from headrace.workers.compilations import compilations

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _untouched(monkeypatch):
    monkeypatch.setattr(module, "_watched", None)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", None)


def compile_one():
    """What Triton does when it compiled or loaded a kernel."""
    info = {"key": "k", "repr": "kernel[...]", "fn": None, "compile": {}, "is_manual_warmup": False}
    return triton.knobs.runtime.jit_post_compile_hook(**info, already_compiled=False)


def test_each_kernel_counts_once_however_often_one_asks():
    before = compilations()
    assert compilations() == before
    compile_one()
    compile_one()
    assert compilations() == before + 2


def test_who_listened_before_still_hears(monkeypatch):
    heard = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **info: heard.append(info["repr"]))
    compilations()
    compile_one()
    assert heard == ["kernel[...]"]


def test_where_triton_was_never_imported_it_stays_so(monkeypatch):
    monkeypatch.setattr(module, "sys", type("sys", (), {"modules": {}}))
    assert compilations() == module._count
    assert triton.knobs.runtime.jit_post_compile_hook is None

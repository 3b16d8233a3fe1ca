"""Compiling ahead, by Triton itself for a GPU that is not there: the same kernels, found by their launches.

Where this process interprets kernels, Triton cannot compile: another process runs these tests then.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from headrace.workers import parallel_compile
from headrace.workers.compilations import compilations
from headrace.workers.parallel_compile import Ahead, compile_ahead, compiled_ahead

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from tests.support.driverless import driverless  # noqa: E402

INTERPRETED = triton.knobs.runtime.interpret
compiled = pytest.mark.skipif(INTERPRETED, reason="this process interprets kernels")

CPU = torch.device("cpu")
OPTIONS = {"enable_fp_fusion": True, "launch_pdl": True}


def _scale(x, out, factor, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(out + place, tl.load(x + place) * factor)


def _copy(x, out, box: tl.constexpr):
    tile = x.load([0, 0])
    tl.store(out + tl.arange(0, box)[:, None] * 64 + tl.arange(0, 16)[None, :], tile)


def _broken(x, size: tl.constexpr):
    tl.static_assert(size == 0, "there is no such size")
    tl.store(x, 1.0)


@pytest.fixture
def gpu(tmp_path):
    with driverless(str(tmp_path)) as gpu:
        yield gpu


@pytest.fixture(autouse=True)
def _nothing_so_far(monkeypatch):
    monkeypatch.setattr(parallel_compile, "_total", Ahead())
    monkeypatch.setattr(parallel_compile, "cores", lambda: 2)


def launches(kernel):
    """Steps of four kernels: of two sizes and types, with numbers that are multiples of 16 or not."""

    def steps():
        for _ in range(3):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.zeros(128, dtype=dtype)
                for width, factor in ((64, 3), (64, 5), (128, 32)):
                    kernel[(1,)](x, torch.empty_like(x), factor, size=width, num_warps=2, **OPTIONS)

    return steps


def hashes(folder):
    return sorted(path.parent.name for path in Path(folder).glob("*/*.cubin"))


@pytest.mark.skipif(not INTERPRETED, reason="this process compiles kernels itself")
def test_all_of_this_in_a_process_that_compiles():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "16 passed, 1 skipped" in ran.stdout


@compiled
def test_launches_find_what_was_compiled_ahead(gpu):
    steps = launches(JITFunction(_scale))
    before = compilations()
    assert compile_ahead(steps, CPU) == 4
    assert gpu.launched == []
    assert compilations() == before + 4
    assert [thread.split("_")[0] for _, thread in gpu.loaded] == ["compile"] * 4
    steps()
    assert gpu.launched == ["_scale"] * 18
    assert compilations() == before + 4
    total = compiled_ahead()
    assert (total.kernels, total.threads) == (4, 2)
    assert total.seconds > 0


@compiled
def test_descriptors_are_alike_if_what_they_copy_at_once_is(gpu):
    kernel, x = JITFunction(_copy), torch.zeros(64, 64)

    def steps():
        for height, box in ((64, 16), (32, 16), (64, 32)):
            kernel[(1,)](TensorDescriptor.from_tensor(x[:height], [box, 16]), x, box, **OPTIONS)

    assert compile_ahead(steps, CPU) == 2
    before = compilations()
    steps()
    assert compilations() == before
    assert gpu.launched == ["_copy"] * 3


@compiled
def test_other_threads_launch_meanwhile(gpu):
    """A model is filled by one."""
    kernel, x = JITFunction(_scale), torch.zeros(64)

    def launch():
        kernel[(1,)](x, x, 3, size=64, **OPTIONS)

    def steps():
        other = threading.Thread(target=launch)
        other.start()
        other.join()
        launch()

    compile_ahead(steps, CPU)
    assert gpu.launched == ["_scale"]


@compiled
def test_what_every_key_needs_is_made_ready_in_the_background(gpu, monkeypatch):
    """And waited for, or it would be made twice: it takes a third of a second."""
    from triton.runtime import cache

    made, gate = [], threading.Event()

    def key():
        gate.wait(10)
        made.append(threading.current_thread().name)
        return "key"

    monkeypatch.setattr(cache, "triton_key", key)
    monkeypatch.setattr(parallel_compile, "_preparing", None)
    parallel_compile.prepare()
    parallel_compile.prepare()
    threading.Timer(0.1, gate.set).start()
    compile_ahead(lambda: made.append("rehearsed"), CPU)
    assert made == ["compile-keys", "rehearsed"]


@compiled
def test_kernels_are_those_that_launches_compile(tmp_path):
    with driverless(str(tmp_path / "one")):
        launches(JITFunction(_scale))()
    with driverless(str(tmp_path / "other")):
        compile_ahead(launches(JITFunction(_scale)), CPU)
    assert len(hashes(tmp_path / "one")) == 4
    assert hashes(tmp_path / "one") == hashes(tmp_path / "other")


@compiled
def test_what_an_earlier_start_kept_is_loaded_and_not_counted(gpu):
    compile_ahead(launches(JITFunction(_scale)), CPU)
    again = JITFunction(_scale)
    assert compile_ahead(launches(again), CPU) == 0
    assert len(gpu.loaded) == 8
    assert compiled_ahead().kernels == 4
    before = compilations()
    launches(again)()
    assert compilations() == before


@compiled
def test_what_cannot_be_compiled_fails_where_it_is_launched(gpu):
    kernel, broken = JITFunction(_scale), JITFunction(_broken)
    x = torch.zeros(64)

    def steps():
        broken[(1,)](x, size=64, **OPTIONS)
        kernel[(1,)](x, x, 3, size=64, **OPTIONS)

    with pytest.raises(triton.CompilationError) as expected:
        JITFunction(_broken)[(1,)](x, size=64, **OPTIONS)
    assert compile_ahead(steps, CPU) == 1
    with pytest.raises(triton.CompilationError) as error:
        steps()
    assert str(error.value) == str(expected.value)
    kernel[(1,)](x, x, 3, size=64, **OPTIONS)
    assert gpu.launched == ["_scale"]


@compiled
def test_what_cannot_be_loaded_fails_where_it_is_launched(gpu):
    gpu.most_threads = 32
    kernel = JITFunction(_scale)
    x = torch.zeros(64)
    compile_ahead(lambda: kernel[(1,)](x, x, 3, size=64, num_warps=2, **OPTIONS), CPU)
    with pytest.raises(triton.OutOfResources, match="threads"):
        kernel[(1,)](x, x, 3, size=64, num_warps=2, **OPTIONS)


@compiled
def test_a_rehearsal_that_fails_leaves_nothing_behind(gpu):
    steps, launch = launches(JITFunction(_scale)), JITFunction.run

    def rehearse():
        steps()
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        compile_ahead(rehearse, CPU)
    assert JITFunction.run is launch
    assert triton.knobs.compilation.listener is None
    steps()
    assert len(gpu.launched) == 18


@compiled
def test_what_was_rehearsed_is_free_at_once(gpu):
    """A rehearsal before the cache is sized has a cache, which would be counted if it waited for the collector."""
    kernel, x = JITFunction(_scale), torch.zeros(64)
    held = weakref.ref(x)
    gc.disable()
    try:
        compile_ahead(partial(kernel[(1,)], x, x, 3, size=64, **OPTIONS), CPU)
        del x
        assert held() is None
    finally:
        gc.enable()


@compiled
def test_threads_are_gone_and_warnings_as_they_were(gpu):
    threads, filters = set(threading.enumerate()), list(warnings.filters)
    compile_ahead(launches(JITFunction(_scale)), CPU)
    assert set(threading.enumerate()) == threads
    assert warnings.filters == filters


@compiled
def test_an_interrupted_compilation_ends(gpu, monkeypatch):
    """What had not begun fails at once: nobody waits for it, and its launch compiles."""
    steps = launches(JITFunction(_scale))

    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel_compile, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_ahead(steps, CPU)
    steps()
    assert len(gpu.launched) == 18


@compiled
def test_who_listened_before_still_hears(gpu, monkeypatch):
    heard = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **told: heard.append(told["cache_hit"]))
    compile_ahead(launches(JITFunction(_scale)), CPU)
    assert heard == [False] * 4


@compiled
def test_without_launches_there_is_nothing_to_do(gpu):
    assert compile_ahead(lambda: None, CPU) == 0
    assert compiled_ahead().threads == 0


@compiled
def test_a_triton_that_cannot_compiles_at_each_launch(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime._async_compile", None)
    assert compile_ahead(lambda: pytest.fail("nobody needs a rehearsal"), CPU) == 0


@compiled
def test_what_is_interpreted_is_not_compiled(gpu):
    triton.knobs.runtime.interpret = True
    assert compile_ahead(lambda: pytest.fail("nobody needs a rehearsal"), CPU) == 0

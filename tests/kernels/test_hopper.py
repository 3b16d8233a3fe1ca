"""The attention kernel for Hopper GPUs: what it is asked to compute, that the installed Triton can compile it, and, on
such a GPU, that it computes what its reference does. Slots that belong to nobody hold NaN.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from itertools import product

import pytest
import torch

from headrace.kernels.ops import hopper_launch as hopper
from headrace.kernels.ops.attention import paged_attention
from tests.kernels.test_pairs_attention import EXTRAS, LENS, check, make_cache, make_spec
from tests.support.batches import make_batch
from tests.support.kernels import Kernels, to_device

LLAMA = (32, 8, 128)
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture
def any_number(monkeypatch):
    """However few queries there are."""
    monkeypatch.setattr(hopper, "_fewest_rows", lambda _device: 0)


def can_attend(spec, dtype=torch.float16, block_size=16, tokens=600, width=None):
    batch = make_batch([(tokens, tokens)], block_size=block_size, num_blocks=8 * tokens)
    q_thd = torch.empty(tokens, width or spec.num_heads, spec.head_dim, dtype=dtype)[:, : spec.num_heads]
    keys, values = torch.empty(2, 64 * block_size, spec.num_kv_heads, spec.head_dim, dtype=dtype)
    return hopper.hopper_can_attend(q_thd, keys, values, batch, spec, first_sequence=0)


@pytest.mark.usefixtures("any_number")
def test_what_it_can():
    for heads in (LLAMA, (32, 32, 128), (64, 1, 128)):
        assert can_attend(make_spec(heads, "plain"))
        assert can_attend(make_spec(heads, "plain"), torch.bfloat16, 64, width=heads[0] + 8)


@pytest.mark.usefixtures("any_number")
def test_what_it_cannot():
    assert not any(can_attend(make_spec(LLAMA, extra)) for extra in EXTRAS if extra != "plain")
    assert not any(can_attend(make_spec(heads, "plain")) for heads in ((71, 1, 128), (16, 16, 256), (32, 32, 80)))
    assert not can_attend(make_spec(LLAMA, "plain"), torch.float32)
    assert not any(can_attend(make_spec(LLAMA, "plain"), block_size=size) for size in (1, 4, 12, 128))


@pytest.mark.usefixtures("any_number")
def test_what_is_no_multiple_of_16_bytes_cannot_be_copied():
    spec = make_spec(LLAMA, "plain")
    batch = make_batch([(300, 300)], block_size=16, num_blocks=256)
    q_thd = torch.empty(300 * 32 * 128 + 1, dtype=torch.float16)
    keys, values = torch.empty(2, 1024, 8, 128, dtype=torch.float16)
    assert hopper.hopper_can_attend(q_thd[:-1].view(300, 32, 128), keys, values, batch, spec, first_sequence=0)
    assert not hopper.hopper_can_attend(q_thd[1:].view(300, 32, 128), keys, values, batch, spec, first_sequence=0)


def test_it_is_for_hopper_gpus_with_enough_to_do(monkeypatch):
    assert not can_attend(make_spec(LLAMA, "plain"))
    hopper._fewest_rows.cache_clear()
    monkeypatch.setattr(hopper, "_processors", lambda _device: 132)
    for capability, fewest in (((9, 0), 132 * 192), ((8, 0), math.inf), ((10, 0), math.inf)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, found=capability: found)
        assert hopper._fewest_rows(torch.device("cuda", capability[0])) == fewest
    hopper._fewest_rows.cache_clear()


_COMPILE = """
import sys
import torch
from headrace.kernels.ops import hopper_launch as hopper
from headrace.workers.parallel_compile import compile_ahead
from tests.kernels.test_pairs_attention import make_spec
from tests.support.batches import make_batch
from tests.support.driverless import driverless

hopper._processors = lambda _device: 132

def attend():
    for heads, length in (((32, 8, 128), 300), ((32, 8, 128), 400), ((16, 16, 128), 300)):
        q_thd = torch.empty(length, heads[0], heads[2], dtype=torch.bfloat16)
        keys, values = torch.empty(2, 4096, *heads[1:], dtype=torch.bfloat16)
        batch = make_batch([(length, length)], block_size=16, num_blocks=256)
        hopper.attend_as_hopper(q_thd, keys, values, q_thd, batch, make_spec(heads, "plain"), first_sequence=0)

with driverless(sys.argv[1]) as gpu:
    print(compile_ahead(attend, torch.device("cpu")), len(gpu.launched), end=" ")
    attend()
    print(len(gpu.launched))
"""


def test_triton_compiles_it_without_such_a_gpu(tmp_path):
    """In a process of its own, where nothing is interpreted: once for each number of heads, whatever the lengths."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", _COMPILE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["2", "0", "3"]


# -------------------------------------------------------------------------------------------------- only on such a GPU


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


MORE_LENS = {
    # Contexts that end in, before and behind a block, chunks of long ones, tiles that are not full.
    "ragged": [(1, 1), (17, 22), (128, 228), (300, 300), (1000, 1777), (33, 48), (48, 129), (5, 16), (64, 128)],
    "many": [(2 + i * 7 % 23, 2 + i * 7 % 23 + i * 5 % 40) for i in range(150)],
    "after decodes": [(1, 90), (1, 700), (1, 3), (700, 900), (1500, 1500)],
}


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")
@pytest.mark.usefixtures("any_number")
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("heads", "lens", "block_size", "dtype"),
    [
        *product([LLAMA, (16, 16, 128)], [*MORE_LENS, "prompts"], [16], NARROW),
        *product([(64, 8, 128), (32, 2, 128), (64, 1, 128)], ["ragged"], [16], NARROW),
        *product([LLAMA, (16, 16, 128)], ["ragged"], [8, 32, 64], NARROW),
    ],
)
def test_as_its_reference(kernels: Kernels, monkeypatch, heads, lens, block_size, dtype):
    asked = []
    computed = hopper.attend_on_hopper
    monkeypatch.setattr(
        hopper, "attend_on_hopper", type("", (), {"__getitem__": lambda _, n: asked.append(n) or computed[n]})()
    )
    spec, lens = make_spec(heads, "plain"), (LENS | MORE_LENS)[lens]
    num_blocks = max(8, len(lens)) * max(-(-context // block_size) for _, context in lens) + 9
    batch = make_batch(lens, block_size=block_size, num_blocks=num_blocks)
    keys, values = make_cache(batch, spec, dtype, num_blocks)
    qkv = torch.randn(len(batch.positions), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim).to(dtype)
    expected = paged_attention(qkv[:, : spec.num_heads].float(), keys.float(), values.float(), batch, spec)
    queries = to_device(qkv, kernels.device)[:, : spec.num_heads]
    check(kernels(paged_attention, queries, keys, values, batch, spec), expected, dtype)
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")
@pytest.mark.usefixtures("any_number")
@pytest.mark.parametrize("kernels", ["cuda"], indirect=True)
def test_other_lengths_compile_nothing(kernels: Kernels, compiled):
    spec = make_spec((16, 4, 128), "plain")
    for index, lens in enumerate([[(40, 40)], [(17, 30)], [(1, 9), (16, 16), (3, 700)], [(2, 2)] * 9, [(2000, 2000)]]):
        batch = make_batch(lens, block_size=16, num_blocks=1024)
        keys, values = make_cache(batch, spec, torch.float16, 1024)
        batch = dataclasses.replace(batch, num_decodes=0)
        kernels(paged_attention, torch.randn(len(batch.positions), 16, 128).half(), keys, values, batch, spec)
        assert len(compiled) == 1, (index, compiled)

"""The arithmetic of a GPU's memory: counted by hand for known models, and its properties for all others."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ConfigError, ModelError
from headrace.workers.fits import as_argument, check_fits
from headrace.workers.memory import GpuMemory, Needs, graph_bytes, kv_blocks, step_bytes

GIB = 1 << 30
MIB = 1 << 20

# Llama-3.1-8B in bfloat16: 8,030,261,248 parameters; per token 2 * 32 layers * 8 heads * 128 values * 2 bytes.
WEIGHTS_8B = 16_060_522_496
BLOCK_8B = 16 * 131_072


def of_8b(**changes):
    return Needs(
        **{"weights": WEIGHTS_8B, "workspace": GIB, "graphs": GIB, "block": BLOCK_8B, "block_size": 16} | changes
    )


SAVING = of_8b(saved_by={"int8": 7 * GIB, "fp8": 6 * GIB})


def gpu(total=141 * GIB, held=0, utilization=0.9):
    return GpuMemory(total=total, held=held, utilization=utilization)


# ------------------------------------------------------------------------------------------------------ hand-counted


def test_an_engine_may_hold_its_share_of_the_total_and_no_more_than_others_leave():
    assert gpu(100 * GIB).allowed == 90 * GIB
    assert gpu(100 * GIB, held=2 * GIB).allowed == 90 * GIB
    assert gpu(100 * GIB, held=50 * GIB, utilization=0.45).allowed == 45 * GIB  # two engines share a GPU
    assert gpu(100 * GIB, held=60 * GIB).allowed == 38 * GIB
    assert gpu(100 * GIB, held=100 * GIB).allowed == 0


def test_the_cache_gets_what_is_left():
    # 126.9 GiB - 14.957 - 1 - 1 = 109.94 GiB = 56,290 blocks of 2 MiB, two of which are nobody's
    blocks = kv_blocks(gpu(), of_8b(), max_model_len=131_072, max_num_seqs=64)
    assert blocks == (int(141 * GIB * 0.9) - WEIGHTS_8B - 2 * GIB) // (2 * MIB) - 2
    assert 56_250 < blocks < 56_300


def test_the_cache_is_no_larger_than_all_sequences_can_use():
    assert kv_blocks(gpu(), of_8b(), max_model_len=1000, max_num_seqs=4) == 4 * 63


def test_where_nothing_is_left_there_are_no_blocks():
    assert kv_blocks(gpu(17 * GIB), of_8b(), max_model_len=4096, max_num_seqs=64) == 0


def test_the_workspace_of_a_step():
    # 2,048 tokens of 3 * 4,096 + 3 * 14,336 values, and 64 rows of logits as bfloat16 and twice as float32
    assert step_bytes(tokens=2048, rows=64, hidden=4096, widest=43_008, vocab=128_256, value=2) == (
        2048 * 55_296 * 2 + 64 * 128_256 * 10
    )


def test_graphs_share_a_workspace_and_keep_their_results():
    assert graph_bytes([], step=5) == 0
    assert graph_bytes([1000, 2000, 0], step=5) == 5 + 3000 + 3 * 16 * MIB


def test_a_program_may_hold_all_that_is_free():
    assert gpu(100 * GIB, held=60 * GIB, utilization=None).allowed == 40 * GIB
    assert gpu(100 * GIB, held=100 * GIB, utilization=None).allowed == 0


# ---------------------------------------------------------------------------------------------------------- refusals


def refusal(memory, needs, **settings):
    settings = {"name": "big", "tokens": 2048, "dtype": "bfloat16"} | settings
    with pytest.raises(ConfigError) as caught:
        check_fits(memory, needs, **settings)
    return caught.value


def test_what_fits_is_not_refused():
    check_fits(gpu(24 * GIB), of_8b(), name="big", tokens=2048, dtype="bfloat16")


def test_the_refusal_is_the_whole_sum():
    error = refusal(gpu(16 * GIB, held=GIB), of_8b())
    assert isinstance(error, ModelError)
    assert error.param == "model"
    assert (
        "big does not fit on the GPU: weights 14.96 GiB + a KV cache of 2,048 tokens 0.25 GiB + the largest step "
        "1.00 GiB + CUDA graphs 1.00 GiB = 17.21 GiB, but 14.25 GiB of its 16.00 GiB are allowed "
        "(--gpu-memory-utilization 0.9, of which others hold 1.00 GiB). What helps: "
    ) in error.message
    assert error.message.endswith("a GPU with 19.12 GiB; --device cpu.")


@pytest.mark.parametrize(
    ("memory", "needs", "settings", "remedy"),
    [
        (gpu(20 * GIB), of_8b(weights=30 * GIB), {"dtype": "float32"}, "--dtype bfloat16"),
        (gpu(16 * GIB), SAVING, {}, r"--quantize int8, with which the weights take 7\.96 GiB; "),
        (gpu(16 * GIB), SAVING, {}, r"; --quantize fp8, with which the weights take 8\.96 GiB; "),
        (gpu(20 * GIB), of_8b(), {"tokens": 100_000, "asked": "max_model_len"}, r"--max-model-len \d+ or less"),
        (gpu(20 * GIB), of_8b(), {"tokens": 100_000, "asked": "kv_tokens"}, r"--kv-tokens \d+ or less"),
        (gpu(20 * GIB), of_8b(workspace=3 * GIB, saved_by_quarter=2 * GIB), {}, "--max-num-batched-tokens"),
        (gpu(20 * GIB), of_8b(graphs=3 * GIB), {}, "--enforce-eager"),
        (gpu(18 * GIB + 500 * MIB), of_8b(), {}, r"--gpu-memory-utilization 0\.94"),
        (gpu(24 * GIB, held=10 * GIB), of_8b(), {}, "ending what else runs"),
    ],
)
def test_it_says_what_would_fit(memory, needs, settings, remedy):
    assert re.search(f"What helps: .*{remedy}", refusal(memory, needs, **settings).message)


def test_a_dtype_that_would_not_fit_either_is_not_advised():
    assert "--quantize" not in refusal(gpu(10 * GIB), SAVING).message
    only = refusal(gpu(12 * GIB), SAVING).message  # 10.80 GiB, of which 10.21 or 11.21 would be used
    assert "--quantize int8" in only
    assert "fp8" not in only
    assert "--quantize" not in refusal(gpu(16 * GIB), of_8b()).message
    assert "bfloat16" not in refusal(gpu(10 * GIB), of_8b(weights=30 * GIB), dtype="float32").message
    assert "--max-num-batched-tokens" not in refusal(gpu(10 * GIB), of_8b(saved_by_quarter=GIB)).message
    assert "--enforce-eager" not in refusal(gpu(16 * GIB), of_8b()).message
    assert "--enforce-eager" not in refusal(gpu(16 * GIB), of_8b(graphs=0)).message
    assert "--max-model-len" not in refusal(gpu(10 * GIB), of_8b(), tokens=9000, asked="max_model_len").message


def test_a_setting_that_asks_too_much_is_named():
    error = refusal(gpu(20 * GIB), of_8b(), tokens=100_000, asked="kv_tokens")
    assert not isinstance(error, ModelError)
    assert error.param == "kv_tokens"
    (advised,) = re.findall(r"--kv-tokens (\d+)", error.message)
    check_fits(gpu(20 * GIB), of_8b(), name="big", tokens=int(advised), dtype="bfloat16", asked="kv_tokens")
    refusal(gpu(20 * GIB), of_8b(), tokens=int(advised) + 16, asked="kv_tokens")


def test_a_program_is_told_of_arguments():
    needs = of_8b(workspace=MIB, graphs=0, saved_by={"int8": 7 * GIB, "fp8": 7 * GIB})
    error = refusal(gpu(40 * GIB, held=30 * GIB, utilization=None), needs, tokens=1, spelled=as_argument, least=1)
    assert isinstance(error, ModelError)
    assert error.message == (
        "big does not fit on the GPU: weights 14.96 GiB + a KV cache of 1 token 0.01 GiB + the largest step 0.00 GiB "
        "= 14.96 GiB, but 10.00 GiB of its 40.00 GiB are free. What helps: quantize='int8', with which the weights "
        "take 7.96 GiB; quantize='fp8', with which the weights take 7.96 GiB; freeing what else is on the GPU; a GPU "
        "with 14.96 GiB; device='cpu'."
    )
    assert "dtype='bfloat16', which needs half" in (
        refusal(gpu(10 * GIB, utilization=None), needs, dtype="float32", spelled=as_argument).message
    )
    assert "freeing" not in refusal(gpu(10 * GIB, utilization=None), needs, spelled=as_argument).message


def test_a_program_that_asks_for_too_much_is_told_how_much_there_is():
    settings = {"asked": "min_tokens", "least": 1, "spelled": as_argument}
    memory, needs = gpu(15 * GIB, utilization=None), of_8b(workspace=MIB, graphs=0)
    error = refusal(memory, needs, tokens=2000, **settings)
    assert not isinstance(error, ModelError)
    assert error.param == "min_tokens"
    (advised,) = re.findall(r"min_tokens=(\d+) or less", error.message)
    assert 0 < int(advised) < 2000
    check_fits(memory, needs, name="big", tokens=int(advised), dtype="bfloat16", **settings)


# --------------------------------------------------------------------------------------------------------- properties

sizes = st.integers(0, 200 * GIB)
memories = st.builds(
    lambda total, share, utilization: gpu(total, int(total * share), utilization),
    st.integers(GIB, 200 * GIB),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
all_needs = st.builds(
    lambda weights, workspace, graphs, block: of_8b(weights=weights, workspace=workspace, graphs=graphs, block=block),
    sizes,
    st.integers(0, 4 * GIB),
    st.integers(0, 4 * GIB),
    st.integers(1, 64 * MIB),
)


@given(memories, all_needs, st.integers(1, 200_000), st.integers(1, 512))
def test_what_an_engine_is_given_never_exceeds_what_is_allowed(memory, needs, max_model_len, max_num_seqs):
    blocks = kv_blocks(memory, needs, max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    assert blocks >= 0
    if blocks:
        assert needs.fixed + needs.cache(blocks * needs.block_size) <= memory.allowed
        assert memory.allowed + memory.held <= memory.total
    # One more does not fit, or is of no use.
    more = needs.fixed + needs.cache((blocks + 1) * needs.block_size)
    assert more > memory.allowed or blocks == max_num_seqs * -(-max_model_len // needs.block_size)


@given(memories, all_needs, st.integers(1, 200_000))
def test_what_is_not_refused_gets_the_cache_that_it_needs(memory, needs, tokens):
    try:
        check_fits(memory, needs, name="any", tokens=tokens, dtype="float16")
    except ModelError:
        assert needs.fixed + needs.cache(tokens) > memory.allowed
    else:
        assert kv_blocks(memory, needs, max_model_len=tokens, max_num_seqs=1) * needs.block_size >= tokens

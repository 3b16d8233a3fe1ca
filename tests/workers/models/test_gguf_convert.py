"""GGUF to safetensors: the values that come out are those that were put in, in the places where they belong."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.errors import ModelFilesError, UnsupportedModelError
from headrace.workers.models import gguf_weights
from headrace.workers.models.check import check_folder
from headrace.workers.models.gguf_convert import _prepare, _write_weights, convert, converted_size
from headrace.workers.models.gguf_file import GGUFFile
from headrace.workers.models.gguf_weights import _to_bfloat16
from headrace.workers.models.progress import silent
from tests.support.tiny_tokenizer import END_OF_TEXT, IM_END
from tests.workers.models.tiny_gguf import (
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    TinyGGUF,
    byte_level_tokenizer,
    interleaved,
    write_gguf,
)


def converted(tiny: TinyGGUF, folder: Path, **options) -> Path:
    convert(tiny.path, made(folder), **options)
    return folder


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def load(folder: Path, **options) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("head", ["tied", "twice", "own"])
def test_weights_are_those_of_the_file(tmp_path: Path, architecture: str, head: str) -> None:
    tiny = write_gguf(tmp_path / "tiny.gguf", architecture, head=head)
    folder = converted(tiny, tmp_path / "out")
    check_folder(folder)
    found = tensors(folder)
    assert set(found) == set(tiny.values)
    for name, values in tiny.values.items():
        # torch rounds to bfloat16 by itself: equal to the last bit.
        assert torch.equal(found[name], torch.from_numpy(values.copy()).to(torch.bfloat16)), name
    config = json.loads((folder / "config.json").read_bytes())
    assert config["tie_word_embeddings"] is (head != "own")


@pytest.mark.parametrize(("architecture", "head"), [("qwen2", "twice"), ("qwen2", "own"), ("llama", "tied")])
def test_logits_are_those_of_the_weights_put_in(tmp_path: Path, architecture: str, head: str) -> None:
    tiny = write_gguf(tmp_path / "tiny.gguf", architecture, head=head)
    model = load(converted(tiny, tmp_path / "out"), dtype=torch.float32)
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_config(model.config).float().eval()
    state = {name: torch.from_numpy(values.copy()).to(torch.bfloat16).float() for name, values in tiny.values.items()}
    missing = expected.load_state_dict(state, strict=False).missing_keys
    assert missing == ([] if head == "own" else ["lm_head.weight"])
    expected.tie_weights()
    ids = torch.arange(40).reshape(2, 20) * 7 % VOCAB
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_weights_are_those_that_transformers_reads(tmp_path: Path, architecture: str) -> None:
    # A second opinion on names, layout and rounding: transformers has its own reader of GGUF files.
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tiny = write_gguf(tmp_path / "tiny.gguf", architecture, head="own")
    folder = converted(tiny, tmp_path / "out")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    theirs = load_gguf_checkpoint(str(tiny.path), return_tensors=True, model_to_load=model)
    found = tensors(folder)
    assert set(theirs["tensors"]) == set(found)
    for name, tensor in theirs["tensors"].items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    config = json.loads((folder / "config.json").read_bytes())
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert config[name] == theirs["config"][name], name


def test_biases_of_permuted_heads_are_put_back_too(tmp_path: Path) -> None:
    biases, expected = {}, {}
    for layer in range(LAYERS):
        for letter, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            bias = np.arange(heads * HEAD, dtype=np.float32) / 128
            expected[f"model.layers.{layer}.self_attn.{letter}_proj.bias"] = bias
            biases[f"blk.{layer}.attn_{letter}.bias"] = bias if letter == "v" else interleaved(bias, heads)
        biases[f"blk.{layer}.attn_output.bias"] = np.zeros(HIDDEN, dtype=np.float32)
    tiny = write_gguf(tmp_path / "tiny.gguf", "llama", extra=biases)
    folder = converted(tiny, tmp_path / "out")
    assert json.loads((folder / "config.json").read_bytes())["attention_bias"] is True
    found = tensors(folder)
    for name, values in expected.items():
        assert torch.equal(found[name].float(), torch.from_numpy(values)), name


def test_same_file_gives_same_bytes(tmp_path: Path) -> None:
    tiny = write_gguf(tmp_path / "tiny.gguf", head="twice")
    first = convert(tiny.path, made(tmp_path / "a"))
    second = convert(tiny.path, made(tmp_path / "b"))
    assert first == second
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in first)


def test_memory_stays_below_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With pieces of 16k elements nothing may be as large as a tensor: one of these matrices is 512 kB in float32.
    tiny = write_gguf(tmp_path / "tiny.gguf", "llama", kinds={"attn_q.weight": "F32", "ffn_up.weight": "F32"})
    monkeypatch.setattr(gguf_weights, "PIECE_ELEMENTS", 16 << 10)
    convert(tiny.path, made(tmp_path / "warm"))  # imports and caches are not what is measured
    with GGUFFile(tiny.path) as file:
        _, weights, _ = _prepare(file)
        largest = max(4 * int(np.prod(weight.source.shape)) for weight in weights)
        tracemalloc.start()
        try:
            _write_weights(file, weights, made(tmp_path / "out") / "model.safetensors", silent)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert largest == 512 << 10
    assert peak < largest


def test_pieces_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write_gguf(tmp_path / "tiny.gguf", "llama")
    whole = convert(tiny.path, made(tmp_path / "whole"))
    for elements in (1, 5000, 100_000):
        monkeypatch.setattr(gguf_weights, "PIECE_ELEMENTS", elements)
        assert convert(tiny.path, made(tmp_path / str(elements))) == whole


def test_rounding_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, size=200_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    for values in (bits.view(np.float32), ties.view(np.float32), np.array([0.0, -0.0, 1e-45, 3.3e38], np.float32)):
        finite = values[np.isfinite(values)]
        expected = torch.from_numpy(finite.copy()).to(torch.bfloat16).view(torch.uint16).numpy().astype("<u2")
        assert bytes(_to_bfloat16(finite, "x")) == expected.tobytes()


def test_progress_ends_at_the_size_that_was_announced(tmp_path: Path) -> None:
    tiny = write_gguf(tmp_path / "tiny.gguf")
    calls = []
    converted(tiny, tmp_path / "out", progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1][1:] == (converted_size(tiny.path),) * 2


def test_end_ids_stop_a_chat(tmp_path: Path) -> None:
    tiny = write_gguf(tmp_path / "tiny.gguf")
    folder = converted(tiny, tmp_path / "out", generation={"temperature": 0.7})
    generation = json.loads((folder / "generation_config.json").read_bytes())
    assert generation["eos_token_id"] == [IM_END, END_OF_TEXT]
    assert generation["temperature"] == 0.7
    assert json.loads((folder / "config.json").read_bytes())["eos_token_id"] == [IM_END, END_OF_TEXT]


def test_llama3_frequencies_become_settings(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    plain, scaled = (
        LlamaRotaryEmbedding(
            LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=512, rope_parameters=parameters)
        ).inv_freq
        for parameters in (
            {"rope_type": "default", "rope_theta": 500000.0},
            {"rope_type": "llama3", "rope_theta": 500000.0, **scaling},
        )
    )
    factors = (plain / scaled).numpy()
    keys = {"llama.rope.freq_base": 500000.0}
    tiny = write_gguf(tmp_path / "tiny.gguf", "llama", metadata=keys, extra={"rope_freqs.weight": factors})
    folder = converted(tiny, tmp_path / "out")
    config = json.loads((folder / "config.json").read_bytes())
    assert config["rope_scaling"] == {"rope_type": "llama3", **scaling}
    torch.testing.assert_close(load(folder).model.rotary_emb.inv_freq, scaled)

    odd = write_gguf(tmp_path / "odd.gguf", "llama", metadata=keys, extra={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(UnsupportedModelError, match="rotary"):
        convert(odd.path, made(tmp_path / "odd"))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        ({"rope.scaling.type": "none"}, None),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict, expected: dict | None) -> None:
    keys = {f"qwen2.{name}": value for name, value in metadata.items()}
    folder = converted(write_gguf(tmp_path / "tiny.gguf", metadata=keys), tmp_path / "out")
    assert json.loads((folder / "config.json").read_bytes()).get("rope_scaling") == expected


# ------------------------------------------------------------------------------------------------------------ refusals


def test_unsupported_architecture_names_the_nearest(tmp_path: Path) -> None:
    tiny = write_gguf(tmp_path / "tiny.gguf", "qwen3")
    with pytest.raises(UnsupportedModelError, match=r"'qwen3'.*nearest supported one is 'qwen2'"):
        converted_size(tiny.path)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"metadata": {"qwen2.expert_count": 8}}, UnsupportedModelError, "8 experts"),
        ({"metadata": {"qwen2.rope.dimension_count": 32}}, UnsupportedModelError, "a part of each head"),
        ({"metadata": {"qwen2.rope.scaling.type": "longrope"}}, UnsupportedModelError, "longrope"),
        ({"metadata": {"qwen2.attention.head_count_kv": [1, 2]}}, UnsupportedModelError, "in each layer"),
        ({"metadata": {"qwen2.embedding_length": None}}, ModelFilesError, "qwen2.embedding_length"),
        ({"metadata": {"qwen2.feed_forward_length": 511}}, ModelFilesError, r"\[512, 256\].*\[511, 256\]"),
        ({"without": ["blk.1.attn_k.bias"]}, ModelFilesError, "blk.1.attn_k.bias"),
        ({"without": ["blk.0.ffn_up.weight"]}, ModelFilesError, "blk.0.ffn_up.weight"),
        ({"extra": {"blk.0.attn_q_norm.weight": np.ones(64, np.float32)}}, UnsupportedModelError, "attn_q_norm"),
        ({"tokenizer": lambda writer: byte_level_tokenizer(writer, pre="qwen9")}, UnsupportedModelError, "'qwen9'"),
        ({"tokenizer": lambda writer: writer.add_tokenizer_model("bert")}, UnsupportedModelError, "'bert'"),
        ({"tokenizer": lambda writer: None}, UnsupportedModelError, "None"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path, options: dict, error: type, words: str) -> None:
    tiny = write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(error, match=words):
        converted_size(tiny.path)


def test_values_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    tiny = write_gguf(tmp_path / "tiny.gguf")
    raw = bytearray(tiny.path.read_bytes())
    spot = raw.rindex(tiny.values["model.norm.weight"].tobytes())
    raw[spot : spot + 4] = np.array([np.nan], np.float32).tobytes()
    tiny.path.write_bytes(raw)
    with pytest.raises(ModelFilesError, match=r"output_norm\.weight holds values that are not numbers"):
        convert(tiny.path, made(tmp_path / "out"))

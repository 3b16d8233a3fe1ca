"""What a person reads when `headrace up` cannot start: one message with the cause and what to do, and exit code 2."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from transformers import AutoModelForCausalLM

from headrace.client import Client
from tests.support.quantized import rounded
from tests.support.tiny_models import make_greedy, save_model, save_t5
from tests.support.up import Up


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def refusal(*arguments: str, **options) -> str:
    """What is printed by a start that fails."""
    with Up(*arguments, "--once", "--prompt", "hi", **options) as up:
        assert up.wait() == 2, up.output
        assert "Traceback" not in up.output
        return up.output


def test_once_ends_with_the_answer(folder):
    make_greedy(folder)
    with Up(str(folder), "--once", "--prompt", "hello") as up:
        assert up.wait() == 0, up.output
        assert "tok/s" in up.output


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_group_with_weights_in_8_bits(folder, scheme):
    """What it says is what transformers says with the numbers for which the 8 bits stand."""
    reference = rounded(AutoModelForCausalLM.from_pretrained(folder), scheme)
    with Up(str(folder), "--quantize", scheme) as up:
        up.wait_ready()
        assert f"parameters, {scheme} weights, float32)" in up.output
        with Client(up.endpoint) as client:
            (card,) = client.models()
            assert (card.quantization, card.dtype) == (scheme, "float32")
            ids = torch.tensor([client.text().encode("hello world")])
            expected = reference.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
            tokens = client.generate("hello world", temperature=0.0, max_tokens=30).choices[0].token_ids
    assert list(tokens) == [token for token in expected if token not in card.eos_token_ids]


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(str(folder))


def test_a_damaged_shard(tmp_path):
    save_model(tmp_path, shards=True)
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-7])
    assert victim.name in refusal(str(tmp_path))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_are_only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    output = refusal(str(folder))
    assert "pytorch_model.bin" in output
    assert "save_pretrained" in output


def test_a_quantized_checkpoint(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized (gptq)" in refusal(str(folder))


def test_an_encoder_decoder_that_does_not_say_what_it_begins_with(tmp_path):
    save_t5(tmp_path)
    change_config(tmp_path, decoder_start_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    output = refusal(str(tmp_path))
    assert "has no decoder_start_token_id" in output
    assert '"decoder_start_token_id": 0' in output


def test_an_unsupported_architecture(folder):
    change_config(folder, architectures=["Qwen9ForCausalLM"])
    output = refusal(str(folder))
    assert "Qwen9ForCausalLM" in output
    assert "Qwen2ForCausalLM" in output


def test_more_context_than_the_model_has(folder):
    assert "was made for 512 tokens" in refusal(str(folder), "--max-model-len", "513")


def test_a_port_in_use(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Port {port}" in refusal(str(folder), port=port)

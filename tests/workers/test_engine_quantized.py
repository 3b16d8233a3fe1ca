"""The engine on models whose layers are in 8 bits: the tokens that transformers writes with the numbers for which those
stand, whatever the layout in which a family keeps its weights, in chunks and batches."""

from __future__ import annotations

import pytest
import torch

from headrace.errors import ConfigError
from headrace.kernels.quantize import SCHEMES
from headrace.workers.config import EngineConfig
from headrace.workers.encoder_engine import EncoderEngine
from headrace.workers.engines import load_engine
from tests.support.engines import generate
from tests.support.quantized import rounded
from tests.support.tiny_encoders import save_encoder
from tests.support.tiny_models import FAMILIES, T5_VARIANTS, save_model, save_t5
from tests.workers.test_engine import PROMPTS, STEPS, answer, greedy, load

ALL = [("int8", name) for name in FAMILIES]
SOME = [("fp8", name) for name in ("llama", "gpt2", "falcon-40b", "gemma2", "mixtral")]


@pytest.mark.parametrize(("scheme", "name"), [*ALL, *SOME])
def test_greedy_tokens_are_those_of_the_rounded_model(tmp_path, scheme, name):
    reference = rounded(save_model(tmp_path, name), scheme)
    expected = [greedy(reference, text) for text in PROMPTS]
    engine = load(tmp_path, quantize=scheme, max_batch_tokens=13)
    assert generate(engine, PROMPTS, max_tokens=STEPS) == expected
    assert len({token for tokens in expected for token in tokens}) >= 5, "the model hardly says anything"


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("name", list(T5_VARIANTS))
def test_answers_are_those_of_the_rounded_model(tmp_path, scheme, name):
    reference = rounded(save_t5(tmp_path, name), scheme)
    expected = [answer(reference, text) for text in PROMPTS]
    assert generate(load(tmp_path, quantize=scheme, max_batch_tokens=150), PROMPTS, max_tokens=STEPS) == expected


def test_an_encoder(tmp_path):
    save_encoder(tmp_path, "bert")
    engine = load_engine(tmp_path, EngineConfig(quantize="int8"))
    assert isinstance(engine, EncoderEngine)
    assert engine.card.quantization == "int8"


def test_what_cannot_be_quantized_is_said_before_it_is_read(tmp_path, monkeypatch):
    save_model(tmp_path, "llama")
    monkeypatch.setattr("headrace.workers.engines.loading", lambda *args, **kwargs: pytest.fail("it was read"))
    monkeypatch.setattr("headrace.workers.engines.pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(ConfigError, match=r"compute capability 8\.9; Some GPU has 8\.0"):
        load(tmp_path, quantize="fp8")


@pytest.mark.parametrize("given", ["int4", "", "INT8", torch.int8, True])
def test_other_names_are_refused(given):
    with pytest.raises(ConfigError, match="give int8 or fp8, or None") as caught:
        EngineConfig(quantize=given)
    assert caught.value.param == "quantize"

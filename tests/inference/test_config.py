"""Settings: ours, DeepSpeed's names for them, and what is said of those that cannot be honoured."""

from __future__ import annotations

import dataclasses
import json
import warnings
from enum import Enum

import pytest
import torch

from headrace.errors import ConfigError
from headrace.workers.inference import InferenceConfig


class QuantType(Enum):
    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"


def quiet(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return InferenceConfig(**settings)


def test_defaults():
    config = InferenceConfig()
    assert (config.dtype, config.device, config.max_tokens, config.min_tokens) == ("auto", None, None, 1)
    assert config == InferenceConfig.of(None) == InferenceConfig.of({}) == InferenceConfig.of(config)


def test_a_config_is_a_frozen_value():
    config = InferenceConfig(max_tokens=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_tokens = 6
    assert dataclasses.replace(config, max_tokens=6) == InferenceConfig(max_tokens=6)
    assert "max_tokens=5" in repr(config)
    with pytest.raises(TypeError, match="positional"):
        InferenceConfig("float16")


@pytest.mark.parametrize(
    "spelled", [torch.float16, "torch.float16", "float16", "fp16", "half"], ids=lambda spelled: str(spelled)
)
def test_types_have_many_names(spelled):
    assert InferenceConfig(dtype=spelled).dtype == "float16"


# ------------------------------------------------------------------------------------------------- DeepSpeed's names


@pytest.mark.parametrize(
    ("old", "value", "new", "meant"),
    [
        ("mp_size", 1, "tensor_parallel", 1),
        ("tp", {"tp_size": 1}, "tensor_parallel", 1),
        ("max_out_tokens", 512, "max_tokens", 512),
        ("min_out_tokens", 7, "min_tokens", 7),
        ("enable_cuda_graph", False, "cuda_graphs", False),
        ("enable_cuda_graph", True, "cuda_graphs", True),
        ("quantization_setting", None, "quantize", None),
        ("quant", {"enabled": False}, "quantize", None),
        ("quant", {}, "quantize", None),
        ("quant", {"enabled": True}, "quantize", "int8"),
        ("quant", {"weight": {"num_bits": 8, "q_type": "symmetric", "q_groups": 1}}, "quantize", "int8"),
        ("quant", {"weight": {"enabled": False}}, "quantize", None),
        ("quant", {"qkv": {"enabled": True}, "activation": {"enabled": False}}, "quantize", "int8"),
        ("quantization_setting", 1, "quantize", "int8"),
        ("quantization_setting", (False, 1), "quantize", "int8"),
        ("quantization_setting", {"q_bits": 8, "q_type": QuantType.SYMMETRIC, "q_groups": 1}, "quantize", "int8"),
        ("zero", {}, "offload", None),
        ("zero_optimization", {"stage": 0}, "offload", None),
    ],
)
def test_old_names_are_translated_with_a_warning(old, value, new, meant):
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated; write {new}") as caught:
        config = InferenceConfig(**{old: value})
    assert caught[0].filename == __file__
    assert config == InferenceConfig(**{new: meant})


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        *[("int8", "int8"), (torch.int8, "int8"), ("torch.int8", "int8")],
        *[("fp8", "fp8"), (torch.float8_e4m3fn, "fp8"), (None, None), (False, None)],
    ],
    ids=str,
)
def test_schemes_have_names_and_types(spelled, meant):
    assert InferenceConfig(quantize=spelled).quantize == meant
    assert InferenceConfig.of({"quantize": spelled}) == InferenceConfig.of(None, quantize=spelled)


@pytest.mark.parametrize(("dtype", "scheme"), [(torch.int8, "int8"), ("int8", "int8"), (torch.float8_e4m3fn, "fp8")])
def test_a_dtype_of_8_bits_is_one_of_weights(dtype, scheme):
    """So it was in DeepSpeed; activations and cache keep the model's own."""
    with pytest.warns(DeprecationWarning, match=f"is deprecated; write quantize='{scheme}', and dtype for activations"):
        config = InferenceConfig(dtype=dtype)
    assert config == InferenceConfig(quantize=scheme)
    assert config.dtype == "auto"
    assert quiet(dtype=dtype, fp16={"enabled": True}) == InferenceConfig(quantize=scheme, dtype="float16")


def test_a_dtype_and_a_setting_may_say_the_same():
    assert quiet(dtype=torch.int8, quantization_setting=1) == InferenceConfig(quantize="int8")


def test_what_does_nothing_is_deprecated():
    with pytest.warns(DeprecationWarning, match="replace_method does nothing"):
        assert InferenceConfig(replace_method="auto") == InferenceConfig()


@pytest.mark.parametrize(
    "settings",
    [
        {"replace_with_kernel_inject": True},
        {"kernel_inject": True},
        {"tensor_parallel": {"tp_size": 1}},
        {"tensor_parallel": {"enabled": True, "tp_size": 1, "tp_grain_size": 64, "mpu": None}},
        {"tensor_parallel": {"enabled": False, "tp_size": 4}},
        {"use_triton": False, "triangular_masking": True, "return_tuple": True, "moe": {}, "checkpoint": None},
        {"injection_policy": None, "fp16": {"enabled": False}},
    ],
)
def test_what_is_the_case_anyway_may_be_said(settings):
    assert InferenceConfig(**settings) == InferenceConfig()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_types_as_training_configs_give_them(name, dtype):
    assert InferenceConfig(**{name: {"enabled": True}}).dtype == dtype
    assert InferenceConfig(**{name: True}, dtype=dtype).dtype == dtype


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mp_size": 4}, r"tensor_parallel is 4, but this release computes on one GPU\. Leave it out"),
        ({"tensor_parallel": {"tp_size": 2}}, "tensor_parallel is 2"),
        ({"tensor_parallel": {"tp_size": 1, "tp_group": object()}}, "has tp_group, which cannot be honoured"),
        ({"tensor_parallel": {"tp_size": 1, "tp_grain_size": 32}}, "has tp_grain_size, which cannot be honoured"),
        ({"quantization_setting": object()}, "quantize is of type object; give 'int8', 'fp8', or None"),
        ({"quantize": "int4"}, "quantize is 'int4'; give 'int8', 'fp8', or None"),
        ({"quantize": True}, "quantize is True; give 'int8'"),
        ({"quantization_setting": 64}, "asks for 64 groups, but each row of a weight is one here"),
        ({"quantization_setting": (True, 1)}, "asks for extra groups of the MLP's weights"),
        ({"quant": {"weight": {"num_bits": 4}}}, r"has num_bits=4; that cannot be honoured.*give 8; ours is quantize="),
        (
            {"quant": {"weight": {"q_type": "asymmetric"}}},
            "has q_type='asymmetric', but zero is always zero.*symmetric",
        ),
        ({"quantization_setting": {"q_type": QuantType.ASYMMETRIC}}, "has q_type='asymmetric'"),
        ({"quant": {"weight": {"q_groups": 64}}}, "asks for 64 groups.*give 1"),
        ({"quant": {"weight": {"mystery": 5}}}, "has mystery=5.*leave it out"),
        ({"quant": {"weight": True}}, "has weight=True, which is no map"),
        ({"quant": {"activation": {"num_bits": 8}}}, "asks for quantized activations.*leave 'activation' out"),
        ({"quant": {"qkv": {"enabled": False}}}, "leaves queries, keys and values out.*leave 'qkv' out"),
        (
            {"dtype": torch.int8, "quantize": "fp8"},
            "dtype and quantize mean the same setting, but say 'int8' and 'fp8'",
        ),
        ({"dtype": torch.uint8}, "dtype is uint8; give float32.*for weights in 8 bits, give quantize='int8'"),
        ({"dtype": "float12"}, "dtype is float12; give float32"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "keeps all weights on the device"),
        ({"cuda_graphs": "yes"}, "cuda_graphs is 'yes'; give True, False, or None for where there is a GPU"),
        ({"replace_with_kernel_inject": False}, "replace_with_kernel_inject is False, which cannot be honoured"),
        ({"replace_method": "manual"}, "replace_method is 'manual', which cannot be honoured"),
        ({"checkpoint": "shards.json"}, "checkpoint is 'shards.json'.*the model's path as the first argument"),
        ({"injection_policy": {object: ("o_proj",)}}, "give policy="),
        ({"training_mp_size": 2}, "training_mp_size is 2"),
        ({"fp16": {"enabled": True, "loss_scale": 0}}, 'give {"enabled": true}'),
        ({"fp16": {"enabled": True}, "dtype": "bfloat16"}, "fp16 and dtype mean the same.*'float16' and 'bfloat16'"),
        (
            {"max_tokens": 5, "max_out_tokens": 6},
            "max_tokens and max_out_tokens mean the same setting, but say 5 and 6",
        ),
        ({"max_tokns": 5}, "no setting 'max_tokns'; the nearest is 'max_tokens'. Settings are"),
        ({"enable_cuda_grph": True}, "the nearest is 'cuda_graphs'"),
        ({"max_tokens": 0}, "max_tokens is 0; give a whole number of at least 1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"min_tokens": None}, "min_tokens is None"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens is 6, more than max_tokens .5."),
        ({"tensor_parallel": "2"}, "tensor_parallel is '2'"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0; give a number above 0"),
        ({"policy": "llama"}, "policy is str; give a headrace.kernels.policies.base.Policy"),
        ({"device": "gpu"}, "device is 'gpu'; give for example 'cpu'"),
        ({"device": "mps"}, "device is 'mps'; supported are cpu and cuda"),
        ({"device": "cuda:97"}, "device is 'cuda:97', but PyTorch finds"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says) as caught:
        quiet(**settings)
    assert caught.value.param


# ------------------------------------------------------------------------------------------------- where it comes from


def test_a_json_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"dtype": "fp16", "tensor_parallel": {"tp_size": 1}, "max_tokens": 9}))
    expected = InferenceConfig(dtype="float16", max_tokens=9)
    assert InferenceConfig.of(path) == InferenceConfig.of(str(path)) == expected


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_a_file_that_is_no_config(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        InferenceConfig.of(path)
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        InferenceConfig.of(tmp_path / "nowhere.json")


def test_no_config_at_all():
    with pytest.raises(ConfigError, match="config is list; give an InferenceConfig, a dict, or the path"):
        InferenceConfig.of([1])


def test_single_settings_add_to_a_config():
    assert InferenceConfig.of({"max_tokens": 9}, dtype="fp16") == InferenceConfig(max_tokens=9, dtype="float16")
    assert InferenceConfig.of(InferenceConfig(max_tokens=9), max_tokens=9) == InferenceConfig(max_tokens=9)
    with pytest.raises(ConfigError, match="max_tokens is 9 in config, but 8 beside it"):
        InferenceConfig.of({"max_tokens": 9}, max_tokens=8)

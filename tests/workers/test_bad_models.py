"""Models and policies that are not what they should be, served and in the library: one typed error that helps.

Each says what is wrong, by name, why that cannot be, and what to do; nothing is loaded in spite of it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.errors import HeadraceError, ModelFilesError, UnsupportedModelError
from headrace.kernels.policies import find_policy
from headrace.kernels.policies.base import Policy, stack
from headrace.workers.config import EngineConfig
from headrace.workers.engines import load_engine
from headrace.workers.inference import init_inference
from tests.support.tiny_models import make_model, save_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_model(folder, "llama")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def serve(folder: Path) -> None:
    load_engine(folder, EngineConfig(kv_tokens=256, device="cpu"))


def infer(source: object, policy: Policy | None = None) -> None:
    init_inference(source, device="cpu", policy=policy)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------- checkpoints


def without_a_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(Q_PROJ))


def with_a_short_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:-1]}))


def of_another_size(folder: Path) -> None:
    change_config(folder, hidden_size=96)


def of_an_unknown_family(folder: Path) -> None:
    change_config(folder, architectures=["Llama9ForCausalLM"])


def with_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_pickled_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')


def with_a_lightning_checkpoint(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "last.ckpt")


def quantized_by(**config: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, quantization_config=config)


def quantized_without_a_word(dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))


def packed(folder: Path) -> None:
    """As GPTQ's first tools left it: the settings in a file of their own."""

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        rows, columns = tensors.pop(Q_PROJ).shape
        stem = Q_PROJ.removesuffix("weight")
        tensors[f"{stem}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors[f"{stem}scales"] = torch.ones(1, rows, dtype=torch.float16)

    change_tensors(folder, pack)
    (folder / "quantize_config.json").write_text('{"bits": 4}')


def with_no_heads(folder: Path) -> None:
    change_config(folder, num_attention_heads=0, head_dim=None)


DAMAGES = [
    (without_a_tensor, ModelFilesError, rf"lacks the tensor '{Q_PROJ}' of a LlamaFor.*do not belong together.*Fetch"),
    (
        with_a_short_tensor,
        ModelFilesError,
        rf"{Q_PROJ} .*\[71, 72\] \+ \[24, 72\] .*does not fit the \[120, 72\].*Fetch",
    ),
    (
        of_another_size,
        ModelFilesError,
        r"embed_tokens.weight .*\[302, 72\].*does not fit the \[302, 96\].*config.*Fetch",
    ),
    (of_an_unknown_family, UnsupportedModelError, r"Llama9ForCausalLM.*nearest supported one is LlamaForCausalLM"),
    (with_pickled_weights, ModelFilesError, r"no weights.*pytorch_model\.bin.*can run code.*convert them"),
    (with_pickled_shards, ModelFilesError, r"no weights.*pytorch_model-00001-of-00001\.bin.*can run code.*convert"),
    (with_a_lightning_checkpoint, ModelFilesError, r"no weights.*last\.ckpt.*can run code.*convert"),
    (quantized_by(quant_method="gptq", bits=4), UnsupportedModelError, r"quantized \(gptq\).*not supported.*Choose"),
    (quantized_by(quant_method="fp8"), UnsupportedModelError, r"quantized \(fp8\).*not supported.*Choose"),
    (quantized_by(load_in_4bit=True), UnsupportedModelError, r"quantized .*not supported.*Choose"),
    (quantized_without_a_word(torch.int8), UnsupportedModelError, rf"is quantized.*{Q_PROJ} holds int8.*choose"),
    (quantized_without_a_word(torch.float8_e4m3fn), UnsupportedModelError, rf"{Q_PROJ} holds float8_e4m3fn.*choose"),
    (packed, UnsupportedModelError, r"is quantized.*q_proj\.qweight where .*q_proj\.weight should be.*choose"),
    (with_no_heads, ModelFilesError, r"config.*(Correct|cannot be used)"),
]


@pytest.mark.parametrize("use", [serve, infer])
@pytest.mark.parametrize(("damage", "error", "says"), DAMAGES)
def test_a_checkpoint_that_is_not_what_it_should_be(folder, use, damage, error, says):
    damage(folder)
    with pytest.raises(error, match=says) as caught:
        use(folder)
    assert caught.value.param == "model"


# ---------------------------------------------------------------------------------------------------------- policies

OUT = "model.layers.{layer}.self_attn.o_proj.weight"


def with_source(source: Any) -> Callable[[Policy], Policy]:
    return lambda policy: dataclasses.replace(policy, weights={**policy.weights, "blocks.{layer}.out.weight": source})


def with_spec(spec: Callable[[Any], Any]) -> Callable[[Policy], Policy]:
    return lambda policy: dataclasses.replace(policy, spec=spec)


def upside_down(tensor, spec):
    return tensor[:, :-1].T


MISTAKES = [
    (with_source(stack("layers.{layer}.wo")), r"lacks the tensor 'layers\.0\.wo' of a LlamaFor.*orrect the policy"),
    (with_source(stack("layers.{layer}.wo?")), r"lacks the tensor 'layers\.0\.wo\?' of a LlamaFor.*orrect the policy"),
    (with_source(stack("model.norm.weight")), r"model\.norm\.weight .*\[72\].*does not fit the \[72, 72\].*orrect the"),
    (with_source(stack(OUT, OUT)), r"o_proj\.weight.*does not fit the \[72, 72\].*orrect the policy"),
    (
        with_source(stack(OUT, layout=upside_down)),
        r"o_proj.*layout upside_down makes 71 rows of it.*orrect the policy",
    ),
    (
        with_source(stack(OUT, layout=lambda tensor, spec: tensor.sum())),
        r"layout <lambda> makes \[\] of it.*orrect the",
    ),
    (with_source(stack(OUT, layout=lambda tensor, spec: None)), r"layout <lambda> makes a NoneType of it.*orrect the"),
    (with_source(stack(OUT, layout=lambda tensor, spec: tensor[99])), r"makes a IndexError \(.*\) of it.*orrect the"),
    (with_source(stack(OUT, layout=lambda tensor: tensor)), r"makes a TypeError \(.*positional.*\) of it.*orrect the"),
    (with_source(OUT), r"policy of 'llama' has a str for 'blocks\.\{layer\}\.out\.weight'; write stack"),
    (
        with_source(stack("layers.{number}.wo")),
        r"names 'layers\.\{number\}\.wo', but only \{layer\} and \{expert\} stand",
    ),
    (with_source(stack("layers.{layer.wo")), r"names 'layers\.\{layer\.wo', but only \{layer\}.*Correct it"),
    (
        with_spec(lambda config: config.hidden),
        r"policy of 'llama'.*config \(LlamaConfig\): AttributeError: .*hidden.*own",
    ),
    (with_spec(lambda config: {"layers": 3}), r"policy of 'llama' makes a dict of the config, not a ModelSpec"),
]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(("mistake", "says"), MISTAKES)
def test_a_policy_with_a_mistake(saved, live, mistake, says):
    policy = mistake(find_policy("LlamaForCausalLM"))
    with pytest.raises(ModelFilesError, match=says) as caught:
        infer(make_model("llama") if live else saved, policy)
    assert caught.value.param in ("model", "policy")


def test_a_module_that_is_quantized_without_a_word():
    module = make_model("llama")
    module.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(
        torch.zeros(72, 72, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM is quantized.*q_proj\.weight holds int8.*choose"
    ):
        infer(module)


def test_own_errors_of_a_policy_stay_as_they_are():
    class OwnError(HeadraceError):
        pass

    def spec(config: Any) -> Any:
        raise OwnError("as it was")

    with pytest.raises(OwnError, match="as it was"):
        with_spec(spec)(find_policy("LlamaForCausalLM")).spec(make_model("llama").config)

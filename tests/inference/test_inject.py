"""Weights out of a live module: all of them, each once, without both being in memory, or none at all."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from headrace.errors import ModelFilesError, UnsupportedModelError
from headrace.kernels.inject import inject
from headrace.kernels.policies import find_policy
from headrace.kernels.policies.base import stack
from headrace.workers.inference import init_inference
from tests.support.tiny_encoders import ENCODERS, make_any
from tests.support.tiny_models import FAMILIES, T5_VARIANTS, make_model

IDS = torch.tensor([[5, 60, 7, 200]])


def policy_of(module, **changes):
    """The policy of a module; `changes` are of single weights, None takes one out."""
    policy = find_policy(type(module).__name__)
    weights = {name: source for name, source in (policy.weights | changes).items() if source is not None}
    return dataclasses.replace(policy, weights=weights)


def injected(module, policy=None, **options):
    return inject(module, policy or policy_of(module), **{"dtype": torch.float32, "device": "cpu"} | options)


@pytest.mark.parametrize("name", [*FAMILIES, *T5_VARIANTS, *ENCODERS])
def test_no_weight_is_left_behind(name):
    module = make_any(name)
    sizes = {parameter.numel() for parameter in module.parameters()}
    result = injected(module)
    # BERT's second bias is one with the first, unless the head is untied: then nobody reads it, there neither.
    assert result.unused == (("cls.predictions.bias",) if name == "bert-relu-untied" else ())
    assert all(parameter.is_meta for parameter in module.parameters())
    assert {parameter.numel() for parameter in module.parameters()} == sizes


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "mixtral", "gpt2", "t5", "bert"])
def test_module_and_model_are_never_both_in_memory(name):
    sizes = {"num_layers": 6, "d_model": 96} if name == "t5" else {"num_hidden_layers": 12, "hidden_size": 96}
    module = make_any(name, **sizes, **({"n_layer": 12, "n_embd": 96} if name == "gpt2" else {}))
    whole = sum(parameter.nbytes for parameter in module.parameters())
    layer = sum(parameter.nbytes for parameter in module.base_model.parameters()) // 12
    most = 0

    def watch(done, total):
        nonlocal most
        left = {parameter.data_ptr(): parameter.nbytes for parameter in module.parameters() if not parameter.is_meta}
        most = max(most, done + sum(left.values()))

    injected(module, progress=watch)
    assert whole <= most <= whole + 2 * layer


def test_progress_counts_every_byte_once():
    seen = []
    model = injected(make_model("llama"), progress=lambda done, total: seen.append((done, total))).model
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (size, size)


def test_a_tied_head_stays_tied():
    module = make_model("qwen2-tied")
    model = inject(module, policy_of(module), dtype=torch.float16, device="meta").model
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("says", [True, False])
def test_a_head_is_tied_as_the_module_has_it(says):
    """resize_token_embeddings and fine-tuning change what the config says."""
    module = make_model("qwen2-tied", tie_word_embeddings=says)
    if says:
        module.lm_head.weight = nn.Parameter(torch.randn_like(module.lm_head.weight))
    else:
        module.lm_head.weight = module.get_input_embeddings().weight
    reference = copy.deepcopy(module)
    engine = init_inference(module, device="cpu")
    assert engine.module.spec.head.tied is not says
    torch.testing.assert_close(engine(IDS).logits, reference(IDS).logits, rtol=0, atol=1e-4)


def test_the_dtype_is_the_one_asked_for():
    model = injected(make_model("llama").half(), dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_nobody_needs_is_told(caplog):
    module = make_model("llama")
    module.value_head = nn.Linear(3, 1, bias=False)
    assert injected(module).unused == ("value_head.weight",)


@pytest.mark.filterwarnings("ignore:You are calling .generate")  # as older transformers say first
def test_a_module_whose_weights_were_moved_says_so():
    module = make_model("llama")
    init_inference(module, device="cpu")
    with pytest.raises(UnsupportedModelError, match="moved into an engine by init_inference"):
        module(IDS)
    with pytest.raises(UnsupportedModelError, match="moved into an engine by init_inference"):
        module.generate(IDS, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ModelFilesError, match=r"has no weights: .* is on the meta device.*Load the model anew"):
        init_inference(module, device="cpu")


# ------------------------------------------------------------------------------------------ what cannot be injected


def fails(module, policy, error, says):
    """The injection fails, and the module is as it was."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(error, match=says):
        injected(module, policy)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    module(IDS)


def test_a_policy_that_names_a_missing_weight():
    module = make_model("llama")
    policy = policy_of(module, **{"blocks.{layer}.out.weight": stack("model.layers.{layer}.self_attn.wo.weight")})
    fails(
        module, policy, ModelFilesError, r"LlamaForCausalLM lacks the tensor 'model\.layers\.0\.self_attn\.wo\.weight'"
    )


def test_a_policy_that_forgets_a_parameter():
    module = make_model("llama")
    policy = policy_of(module, **{"blocks.{layer}.mlp.down.weight": None})
    fails(module, policy, ModelFilesError, r"policy of 'llama' does not say where 'blocks\.0\.mlp\.down\.weight' is")


@pytest.mark.parametrize(
    "source",
    [
        stack("model.layers.{layer}.mlp.up_proj.weight"),
        stack("model.layers.{layer}.mlp.down_proj.weight", "model.layers.{layer}.mlp.down_proj.weight"),
        stack("model.layers.{layer}.mlp.down_proj.weight", layout=lambda tensor, spec: tensor.T),
        stack("model.layers.{layer}.mlp.down_proj.weight", layout=lambda tensor, spec: tensor.view(7, -1)),
        stack("model.norm.weight"),
    ],
)
def test_a_policy_whose_weights_do_not_fit(source):
    module = make_model("llama")
    policy = policy_of(module, **{"blocks.{layer}.mlp.down.weight": source})
    fails(module, policy, ModelFilesError, r"has shape .*, which does not fit")


def test_a_module_that_is_not_what_its_config_says():
    module = make_model("llama")
    module.config.intermediate_size = 101
    fails(module, policy_of(module), ModelFilesError, r"mlp\.gate_proj.*does not fit the \[202, 72\]")


def test_quantized_modules_are_refused():
    module = make_model("llama")
    module.config.quantization_config = {"quant_method": "gptq"}
    fails(module, policy_of(module), UnsupportedModelError, r"LlamaForCausalLM is quantized \(gptq\)")
    del module.config.quantization_config


def test_modules_of_unknown_families_name_the_nearest():
    class Qwen9ForCausalLM(type(make_model("qwen2"))):
        pass

    module = Qwen9ForCausalLM(make_model("qwen2").config)
    with pytest.raises(UnsupportedModelError, match=r"Qwen9ForCausalLM.*nearest supported one is Qwen[23]ForCausalLM"):
        init_inference(module)


def test_modules_without_a_config():
    with pytest.raises(UnsupportedModelError, match="The Linear has no config"):
        init_inference(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match=r"The DataParallel has no config.*without its wrapper"):
        init_inference(nn.DataParallel(make_model("gpt2")))

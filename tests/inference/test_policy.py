"""A family that we do not ship: the policy that docs/library.md shows, as it is printed there."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from headrace.errors import ModelFilesError, UnsupportedModelError
from headrace.kernels.policies.base import stack
from headrace.workers.inference import init_inference
from tests.inference.batches import padded, positions_of

DOC = (Path(__file__).parents[2] / "docs/library.md").read_text()


@pytest.fixture(scope="module")
def policy():
    [code] = [block for block in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL) if "STABLELM = Policy(" in block]
    names: dict[str, object] = {}
    exec(code, names)
    return names["STABLELM"]


def make(**changes):
    from transformers import StableLmConfig, StableLmForCausalLM

    settings = {
        "vocab_size": 302,
        "hidden_size": 96,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "eos_token_id": 301,
        "pad_token_id": 300,
    }
    torch.manual_seed(0)
    model = StableLmForCausalLM(StableLmConfig(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=float("norm.weight" in name), std=0.2)
    return model


VARIANTS = [
    {},
    {"use_parallel_residual": True},
    {"use_qkv_bias": True, "tie_word_embeddings": True},
    {"num_key_value_heads": 6, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("route", ["module", "folder"])
def test_it_computes_what_transformers_computes(policy, changes, route, tmp_path):
    reference = make(**changes)
    if route == "folder":
        reference.save_pretrained(tmp_path)
    source = tmp_path if route == "folder" else copy.deepcopy(reference)
    engine = init_inference(source, policy=policy, device="cpu")
    ids, mask = padded([20, 1, 7])
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, position_ids=positions_of(mask)).logits[mask == 1]
    atol = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(engine(ids, mask).logits[mask == 1], expected, rtol=0, atol=atol)
    wanted = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    assert torch.equal(engine.generate(ids, **wanted), reference.generate(ids, **wanted))
    assert engine.report().family == "stablelm"


def test_without_the_policy_the_family_is_unknown():
    with pytest.raises(UnsupportedModelError, match=r"StableLmForCausalLM.*is not supported; the nearest"):
        init_inference(make(), device="cpu")


def test_what_the_policy_does_not_cover(policy):
    with pytest.raises(UnsupportedModelError, match="qk_layernorm"):
        init_inference(make(qk_layernorm=True), policy=policy, device="cpu")


def test_a_policy_with_a_mistake_names_it(policy, tmp_path):
    make().save_pretrained(tmp_path)
    for name, source, says in (
        ("final_norm.bias", stack("model.norm.bais"), r"lacks the tensor 'model\.norm\.bais' of a StableLmForCausalLM"),
        ("final_norm.bias", stack("model.embed_tokens.weight"), r"embed_tokens.weight .* has shape \[302, 96\]"),
        ("final_norm.bias", None, r"does not say where 'final_norm\.bias' is"),
    ):
        weights = {key: value for key, value in (policy.weights | {name: source}).items() if value is not None}
        wrong = dataclasses.replace(policy, weights=weights)
        for place in (tmp_path, make()):
            with pytest.raises(ModelFilesError, match=says):
                init_inference(place, policy=wrong, device="cpu")


def test_the_page_names_every_setting():
    from headrace.workers.inference import InferenceConfig

    for field in dataclasses.fields(InferenceConfig):
        assert f"`{field.name}`" in DOC


def test_the_pages_first_example_runs(monkeypatch):
    """With a tiny model in place of the one of the hub."""
    import transformers

    from tests.support.tiny_models import make_model

    [code] = [block for block in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL) if "Hello, world!" in block]

    class Tokenizer:
        def __call__(self, text, return_tensors):
            ids = torch.tensor([list(text.encode())])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def decode(self, ids):
            return str(ids.tolist())

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: make_model(name))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    names: dict[str, object] = {}
    exec(code, names)
    assert names["output"].shape == (1, 50)

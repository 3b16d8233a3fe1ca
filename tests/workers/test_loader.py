"""Model folders, good and bad: what is loaded, what is said of a damaged one, and what the card tells clients."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.card import CHAT_TEMPLATE, TOKENIZER
from headrace.errors import ConfigError, ModelFilesError, ModelNotFoundError, UnsupportedModelError
from headrace.kernels.inject import inject
from headrace.kernels.model import Model
from headrace.kernels.policies import find_policy
from headrace.kernels.quantize import SCHEMES
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.describe import describe
from headrace.workers.loader import load_model, loading
from tests.support.quantized import same_bytes
from tests.support.tiny_models import save_model
from tests.support.tiny_tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE, tiny_tokenizer_json


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return save_model(folder), folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved[1], tmp_path / "model")


def change_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# ----------------------------------------------------------------------------------------------------------- loading


def test_weights_are_stacked_in_order(saved):
    reference, folder = saved
    model = load_model(folder)
    state = reference.state_dict()
    stacked = model.blocks[1].qkv
    attention = "model.layers.1.self_attn"
    assert torch.equal(stacked.bias, torch.cat([state[f"{attention}.{part}_proj.bias"] for part in "qkv"]))
    # A packed weight can only be multiplied with.
    weight = torch.cat([state[f"{attention}.{part}_proj.weight"] for part in "qkv"])
    torch.testing.assert_close(stacked(torch.eye(weight.shape[1])), weight.T + stacked.bias)
    assert model.embedding.weight.dtype is torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_shards_hold_the_same_model(saved, tmp_path):
    reference, _ = saved
    save_model(tmp_path, shards=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load_model(tmp_path).embedding.weight, reference.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("wanted", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_dtype_is_the_one_asked_for(saved, wanted, dtype):
    assert {parameter.dtype for parameter in load_model(saved[1], dtype=wanted).parameters()} == {dtype}


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(ConfigError, match=r"int3.*float32") as caught:
        load_model(saved[1], dtype="int3")
    assert caught.value.param == "dtype"


def test_progress_counts_every_byte_once(saved):
    seen: list[tuple[int, int]] = []
    model = load_model(saved[1], progress=lambda done, total: seen.append((done, total)))
    size = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name != "head.weight")
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (size, size)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_progress_counts_bytes_as_they_are_kept(saved, name):
    seen: list[tuple[int, int]] = []
    load_model(saved[1], scheme=SCHEMES[name], progress=lambda done, total: seen.append((done, total)))
    plain = load_model(saved[1])
    layers = sum(part.weight.numel() for part in plain.projections().values())
    rest = sum(p.numel() for key, p in plain.named_parameters() if key != "head.weight") - layers
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (layers + 4 * rest,) * 2


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_files_and_modules_are_quantized_to_the_same_bytes(tmp_path, monkeypatch, name, dtype, read_ahead):
    """Also where a layout transposes what files hold, as of GPT-2."""
    monkeypatch.setattr(Model, "pack", lambda model: None)
    module = save_model(tmp_path, "gpt2")
    options = {"device": "cpu", "scheme": SCHEMES[name]}
    with loading(Checkpoint(tmp_path), dtype=dtype, read_ahead=read_ahead, **options) as under_way:
        loaded = under_way.finished().model
    seen = []
    policy = find_policy("GPT2LMHeadModel")
    dtype = getattr(torch, dtype)
    injected = inject(module, policy, dtype=dtype, progress=lambda *how: seen.append(how), **options).model
    assert same_bytes(loaded, injected)
    assert seen[-1][0] == seen[-1][1] == sum(parameter.nbytes for parameter in injected.parameters())
    assert all(parameter.is_meta for parameter in module.parameters())


def test_tensors_that_nobody_needs_are_told(folder, caplog):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.extra.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    load_model(folder)
    assert "model.layers.0.extra.weight" in caplog.text


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_as_the_files_have_it(folder, tied):
    """T5 1.1 and Flan have a head of their own, and a config that says it is the embedding."""
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head if tied else head.flip(0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_model(folder)
    assert model.spec.head.tied is tied
    states = torch.randn(3, head.shape[1])
    torch.testing.assert_close(model.logits(states), states @ tensors["lm_head.weight"].T)


# ------------------------------------------------------------------------------------------------------- bad folders


def test_no_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelFilesError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_config_that_is_no_json(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFilesError, match=r"config\.json"):
        load_model(folder)


def test_a_config_without_an_architecture(folder):
    change_json(folder / "config.json", architectures=None)
    with pytest.raises(ModelFilesError, match="names no architecture"):
        load_model(folder)


def test_an_unsupported_architecture_names_the_nearest(folder):
    change_json(folder / "config.json", architectures=["Qwen9ForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"Qwen9ForCausalLM.*nearest supported one is Qwen[23]ForCausalLM"):
        load_model(folder)


def test_code_in_a_model_folder_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('this ran')")
    change_json(
        folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    )
    with pytest.raises(ModelFilesError, match=r"config\.json"):
        load_model(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFilesError, match=r"no weights \(model\.safetensors"):
        load_model(folder)


def test_weights_that_could_run_code_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFilesError, match=r"pytorch_model\.bin.*can run code"):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -10])
def test_weights_that_were_cut_off(folder, size):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(ModelFilesError, match=r"model\.safetensors.*damaged.*fetch it again"):
        load_model(folder)


def test_a_missing_shard(tmp_path):
    save_model(tmp_path, shards=True)
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ModelFilesError, match=victim.name):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": [1]}'])
def test_a_bad_index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelFilesError, match=r"index\.json.*lists no weights"):
        load_model(folder)


def test_a_missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFilesError, match=r"lacks the tensor 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.norm.weight", lambda t: t[:-1]),
        ("model.layers.0.self_attn.k_proj.weight", lambda t: t[:, :-1]),
        ("model.layers.0.self_attn.v_proj.weight", lambda t: t[:-1]),
        ("model.layers.0.self_attn.v_proj.bias", lambda t: t.repeat(2)),
        ("model.layers.0.mlp.gate_proj.weight", lambda t: t[0]),
    ],
)
def test_a_tensor_of_the_wrong_shape(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFilesError, match=r"has shape .* does not fit"):
        load_model(folder)


# ---------------------------------------------------------------------------------------------------------- the card


def test_the_card_tells_what_clients_need(saved):
    reference, folder = saved
    card, blobs = describe(folder, name="tiny", dtype="bfloat16")
    assert (card.name, card.architecture, card.family) == ("tiny", "Qwen2ForCausalLM", "qwen2")
    assert (card.vocab_size, card.max_model_len, card.dtype) == (VOCAB_SIZE, 512, "bfloat16")
    assert card.num_parameters == reference.num_parameters()
    assert card.eos_token_ids == (IM_END, END_OF_TEXT)
    assert blobs[TOKENIZER] == tiny_tokenizer_json()
    assert blobs[CHAT_TEMPLATE].startswith(b"{%- if tools %}")
    assert card.blobs.keys() == blobs.keys()
    assert card.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert describe(folder)[0].name == folder.name


@pytest.mark.parametrize(
    ("settings", "defaults"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.8}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}),
        ({"repetition_penalty": 1.1, "min_p": None, "max_length": 9}, {"repetition_penalty": 1.1}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": -3}, {}),
    ],
)
def test_sampling_defaults_are_the_models_own(folder, settings, defaults):
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert describe(folder)[0].sampling_defaults == defaults


@pytest.mark.parametrize(("ids", "expected"), [(5, (5,)), ([7, 5, 7], (7, 5)), (None, ())])
def test_end_tokens_of_the_generation_config_come_first(folder, ids, expected):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert describe(folder)[0].eos_token_ids == expected


@pytest.mark.parametrize(
    "inline", ["hello", [{"name": "tool", "template": "no"}, {"name": "default", "template": "hello"}]]
)
def test_a_template_in_the_tokenizer_config_serves_too(folder, inline):
    (folder / CHAT_TEMPLATE).unlink()
    change_json(folder / "tokenizer_config.json", chat_template=inline)
    assert describe(folder)[1][CHAT_TEMPLATE] == b"hello"


def test_a_base_model_has_no_template(folder):
    (folder / CHAT_TEMPLATE).unlink()
    assert CHAT_TEMPLATE not in describe(folder)[1]


def test_special_tokens_may_be_objects(folder):
    change_json(folder / "tokenizer_config.json", bos_token={"content": "<s>", "special": True}, eos_token=None)
    assert describe(folder)[0].special_tokens == {"bos_token": "<s>", "pad_token": "<|endoftext|>"}


def test_a_folder_without_any_tokenizer_is_refused(folder):
    (folder / TOKENIZER).unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelFilesError, match="tokenizer"):
        describe(folder)


def test_older_tokenizer_files_are_converted(folder):
    model = json.loads((folder / TOKENIZER).read_text())["model"]
    (folder / TOKENIZER).unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges)))
    converted = json.loads(describe(folder)[1][TOKENIZER])["model"]
    assert converted["vocab"].items() >= model["vocab"].items()
    assert len(converted["merges"]) == len(model["merges"])


def test_the_fingerprint_is_that_of_the_content(saved, folder):
    original = describe(saved[1])[0].fingerprint
    assert describe(folder, name="other name")[0].fingerprint == original
    assert describe(folder, dtype="bfloat16")[0].fingerprint != original
    # What a model says depends on it, so a stream is not continued by a group that quantizes otherwise.
    others = [describe(folder, quantize=scheme)[0] for scheme in SCHEMES]
    assert [card.quantization for card in others] == list(SCHEMES)
    assert len({original, *(card.fingerprint for card in others)}) == 1 + len(SCHEMES)
    assert describe(folder, quantize=None)[0].fingerprint == original
    assert describe(folder)[0].quantization == ""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert describe(folder)[0].fingerprint != original


def test_the_fingerprint_depends_on_the_tokenizer(saved, folder):
    content = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).write_text(json.dumps(content, indent=1))
    assert describe(folder)[0].fingerprint != describe(saved[1])[0].fingerprint


def test_the_fingerprint_depends_on_the_start_token(saved, folder):
    """A stream that was begun with another one cannot go on here."""
    change_json(folder / "generation_config.json", temperature=0.5)
    assert describe(folder)[0].fingerprint == describe(saved[1])[0].fingerprint
    change_json(folder / "generation_config.json", decoder_start_token_id=7)
    assert describe(folder)[0].fingerprint != describe(saved[1])[0].fingerprint


def test_a_checkpoint_is_opened_once(saved):
    checkpoint = Checkpoint(saved[1])
    card, _ = describe(checkpoint)
    assert card.vocab_size == load_model(checkpoint).spec.vocab_size

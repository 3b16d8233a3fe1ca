"""The engine itself: where models come from, streams, its report, its end, and what it says to mistakes."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

import headrace
from headrace.errors import (
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    ModelFilesError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from headrace.kernels.policies import POLICIES, find_policy
from headrace.workers.inference import InferenceEngine, init_inference, supported_models
from tests.support.tiny_models import make_model, save_model
from tests.support.tiny_tokenizer import END_OF_TEXT, IM_END

PROMPTS = [[5, 60, 7], [200], list(range(40, 70))]


@pytest.fixture
def engine(folder):
    return init_inference(folder, device="cpu")


def expected_texts(reference, count, **arguments):
    """What transformers goes on with, one prompt at a time."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = reference.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=END_OF_TEXT, **arguments)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


# ------------------------------------------------------------------------------------------------- where it comes from


def test_public_names():
    assert headrace.init_inference is init_inference
    assert headrace.InferenceEngine is InferenceEngine


def test_without_torch_one_is_told_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"init_inference needs torch.*pip install 'headrace\[serve\]'"):
        headrace.__getattr__("init_inference")


def test_a_path_may_be_text(folder):
    assert init_inference(str(folder), device="cpu").module.spec == init_inference(folder, device="cpu").module.spec


def test_positions_are_reserved_for_as_many_tokens_as_were_asked_for():
    engine = init_inference(make_model("llama"), device="cpu", max_tokens=50)
    assert [len(table) for table in engine.module._tables.values()] == [50]
    ids = torch.arange(40)[None]
    engine.generate(ids, torch.ones_like(ids), max_new_tokens=10, eos_token_id=[], pad_token_id=0)
    assert [len(table) for table in engine.module._tables.values()] == [50]


def test_the_defaults_of_a_folder_are_those_of_transformers(tmp_path):
    reference = make_model("gpt2")
    reference.generation_config.max_new_tokens = 7
    reference.generation_config.repetition_penalty = 1.5
    folder = tmp_path / "model"
    save_model(folder)
    reference.save_pretrained(folder)
    engine = init_inference(folder, device="cpu")
    ids = torch.tensor([PROMPTS[2]])
    assert torch.equal(engine.generate(ids, pad_token_id=0), reference.generate(ids, pad_token_id=0))
    (folder / "generation_config.json").unlink()
    assert init_inference(folder, device="cpu").generation_config.eos_token_id == [IM_END, END_OF_TEXT]


def test_it_is_used_like_the_model(folder):
    reference = make_model("qwen2-tied")
    engine = init_inference(folder, dtype=torch.float16, device="cpu", max_tokens=100)
    assert engine.config.hidden_size == reference.config.hidden_size
    assert engine.generation_config.eos_token_id == reference.generation_config.eos_token_id
    assert engine.dtype is next(engine.parameters()).dtype is torch.float16
    assert engine.device == torch.device("cpu")
    assert engine.max_tokens == 100
    assert engine.eval() is engine
    assert engine.settings.dtype == "float16"
    shown = repr(engine)
    assert shown.startswith("InferenceEngine(Qwen2ForCausalLM, torch.float16, cpu)")
    assert "3 x Block(" in shown
    assert "(qkv): Linear(60, 100, bias=True)" in shown


def test_what_is_supported():
    found = supported_models()
    assert InferenceEngine.supported_models == headrace.supported_models() == found
    assert found["llama"] == ("LlamaForCausalLM",)
    assert found["t5"] == ("T5ForConditionalGeneration",)
    assert {"BertModel", "BertForMaskedLM", "BertForSequenceClassification"} <= set(found["bert"])
    assert set(found) == {policy.family for policy in POLICIES}


@pytest.mark.parametrize("source", [None, 5, ["gpt2"]])
def test_neither_a_model_nor_a_path(source):
    with pytest.raises(ConfigError, match=r"The model is \w+; give a Hugging Face module, a folder"):
        init_inference(source)


def test_places_without_a_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        init_inference(tmp_path / "nowhere")
    with pytest.raises(ModelFilesError, match=r"config\.json"):
        init_inference(tmp_path)


def test_quantized_folders_are_refused(tmp_path):
    model = save_model(tmp_path)
    model.config.quantization_config = {"quant_method": "fp8"}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"are quantized \(fp8\)"):
        init_inference(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, but the LlamaForCausalLM has 72"),
        ({"heads": 12}, "heads is 12, but the LlamaForCausalLM has 6"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, but the LlamaForCausalLM has 1e-06"),
        ({"max_tokens": 513}, "max_tokens is 513, but the LlamaForCausalLM was made for 512"),
        ({"min_tokens": 513}, "min_tokens is 513, but the model was made for 512"),
        ({"policy": find_policy("GPT2LMHeadModel")}, "covers GPT2LMHeadModel, but the model is a LlamaForCausalLM"),
    ],
)
def test_a_setting_that_contradicts_the_model(settings, says):
    with pytest.raises(ConfigError, match=says):
        init_inference(make_model("llama"), device="cpu", **settings)


def test_what_one_believes_of_a_model_may_be_true():
    init_inference(make_model("llama"), device="cpu", hidden_size=72, heads=6, layer_norm_eps=1e-6, min_tokens=512)


def test_max_tokens_bounds_a_text(folder):
    engine = init_inference(folder, device="cpu", max_tokens=20)
    ids = torch.tensor([PROMPTS[0]])
    assert engine.generate(ids, max_length=20, eos_token_id=[], pad_token_id=0).shape == (1, 20)
    with pytest.raises(ContextLengthError, match=r"21 tokens, but the engine holds 20"):
        engine.generate(ids, max_length=21)
    with pytest.raises(ContextLengthError, match="but the engine holds 20"):
        engine(torch.ones(1, 21, dtype=torch.long))
    with pytest.raises(ContextLengthError, match="holds 20"):
        engine.stream(PROMPTS[0], max_tokens=18)


# -------------------------------------------------------------------------------------------------------------- streams


def test_streams_are_the_tokens_of_transformers(pair):
    reference, engine = pair("llama")
    expected = expected_texts(reference, 12, eos_token_id=[])
    streams = [engine.stream(prompt, max_tokens=12, temperature=0, ignore_eos=True) for prompt in PROMPTS]
    got = [[next(stream)] for stream in streams]  # all of them are under way at once
    for stream, tokens in zip(streams, got, strict=True):
        assert stream.finish_reason is None
        tokens += stream
        assert stream.finish_reason == "length"
        assert list(stream) == []
    assert got == expected
    assert engine.generate_many(PROMPTS, max_tokens=12, temperature=0, ignore_eos=True) == expected


def test_streams_know_nothing_of_weights_that_were_changed(folder):
    """They were answered from keys and values that the old weights had left in the prefix cache."""
    engine, fresh = (init_inference(folder, device="cpu") for _ in range(2))
    settings = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    before = engine.generate_many(PROMPTS, **settings)
    for one in (engine, fresh):
        with torch.no_grad():
            one.module.embedding.weight.copy_(one.module.embedding.weight.roll(1, dims=0))
    after = engine.generate_many(PROMPTS, **settings)
    assert after == fresh.generate_many(PROMPTS, **settings)
    assert after != before


def test_a_prompt_may_be_a_tensor(pair):
    _, engine = pair("llama")
    expected = list(engine.stream(PROMPTS[0], max_tokens=5, temperature=0))
    assert list(engine.stream(torch.tensor(PROMPTS[0]), max_tokens=5, temperature=0)) == expected
    assert list(engine.stream(torch.tensor([PROMPTS[0]]), max_tokens=5, temperature=0)) == expected


def test_an_end_token_ends_a_stream(pair):
    _, engine = pair("llama")
    tokens = list(engine.stream(PROMPTS[0], max_tokens=9, temperature=0, ignore_eos=True))
    stream = engine.stream(PROMPTS[0], max_tokens=9, temperature=0, stop_token_ids=(tokens[4],))
    assert list(stream) == tokens[: tokens.index(tokens[4])]
    assert stream.finish_reason == "stop"


def test_streams_repeat_with_the_seed(pair):
    _, engine = pair("llama")

    def draw(**settings):
        return list(engine.stream(PROMPTS[0], max_tokens=20, ignore_eos=True, **settings))

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    torch.manual_seed(3)
    first = draw()
    second = draw()
    torch.manual_seed(3)
    assert [draw(), draw()] == [first, second]
    assert first != second


def test_text_in_text_out(engine, tokenizer):
    ids = tokenizer("hello world").input_ids
    tokens = list(engine.stream(ids, max_tokens=40, temperature=0, ignore_eos=True))
    stream = engine.stream("hello world", max_tokens=40, temperature=0, ignore_eos=True)
    pieces = list(stream)
    assert stream.finish_reason == "length"
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(pieces) > 5
    assert engine.generate_many(["hello world"], max_tokens=40, temperature=0, ignore_eos=True) == ["".join(pieces)]


class Spelled:
    """A tokenizer whose ids are bytes."""

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": list(text.encode())})

    def decode(self, ids, **options):
        return bytes(ids).decode(errors="replace")


def test_characters_are_whole():
    from headrace.workers.inference.streams import TextStream

    text = "né 日本 😀"
    pieces = list(TextStream(iter(text.encode()), Spelled()))
    assert pieces == list(text)
    assert "".join(TextStream(iter(text.encode()[:-1]), Spelled())) == text[:-1] + "\N{REPLACEMENT CHARACTER}"


def test_pipelines_of_transformers(folder):
    from transformers import pipeline

    pipe = pipeline("text-generation", str(folder), device="cpu")
    expected = pipe("hello world", max_new_tokens=10, do_sample=False)
    pipe.model = init_inference(pipe.model, device="cpu")
    assert pipe("hello world", max_new_tokens=10, do_sample=False) == expected
    again = pipeline("text-generation", model=pipe.model, tokenizer=pipe.tokenizer)
    assert again("hello world", max_new_tokens=10, do_sample=False) == expected


def test_text_needs_a_tokenizer(pair):
    engine = init_inference(make_model("llama"), device="cpu")
    with pytest.raises(ConfigError, match=r"no tokenizer; set engine\.tokenizer, or give token ids"):
        engine.stream("hello")
    engine.tokenizer = Spelled()
    assert isinstance(engine.generate_many(["hello"], max_tokens=3)[0], str)


def test_a_folder_may_hold_a_model_alone(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    engine = init_inference(tmp_path, device="cpu")
    assert len(list(engine.stream([5], max_tokens=3, ignore_eos=True))) == 3
    with pytest.raises(ConfigError, match=r"No tokenizer can be made of .*; set engine\.tokenizer, or give token ids"):
        engine.stream("hello")


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        ([], {}, "prompt is empty"),
        ([9999], {}, "token id 9999"),
        ([-1], {}, "no token ids"),
        (["hello"], {}, "no token ids"),
        (torch.ones(2, 3, dtype=torch.long), {}, r"shape \[2, 3\]; a stream is one text"),
        ([5], {"temperature": -1}, "temperature"),
        ([5], {"max_new_tokens": 5}, "max_new_tokens"),
        ([5], {"n": 2}, "n is 2, but a stream is one text"),
        ([5], {"stop": ["x"]}, "give stop_token_ids, or use generate"),
    ],
)
def test_streams_that_cannot_be(pair, prompt, settings, says):
    with pytest.raises(InvalidRequestError, match=says):
        pair("llama")[1].stream(prompt, **settings)


def gauges(engine):
    return engine._streams._engine.load_gauges()


def test_a_stream_may_be_left(pair):
    _, engine = pair("llama")
    long = {"max_tokens": 400, "ignore_eos": True}
    with engine.stream(PROMPTS[0], **long) as closed:
        next(closed)
    dropped = engine.stream(PROMPTS[1], **long)
    next(dropped)
    del dropped
    gc.collect()
    assert list(closed) == []
    assert list(engine.stream(PROMPTS[2], max_tokens=3, temperature=0, ignore_eos=True))
    assert gauges(engine)["running"] == gauges(engine)["waiting"] == 0


def test_a_stream_whose_logits_are_no_numbers(pair):
    module = make_model("llama")
    with torch.no_grad():
        module.lm_head.weight[7] = torch.nan
    engine = init_inference(module, device="cpu")
    with pytest.raises(headrace.errors.InternalError, match="NaN"):
        list(engine.stream(PROMPTS[0], max_tokens=3))


def test_several_threads_read_at_once(pair):
    reference, engine = pair("llama")
    expected = expected_texts(reference, 10, eos_token_id=[])
    got = [None] * 12

    def read(index):
        if index % 2:
            got[index] = list(engine.stream(PROMPTS[index % 3], max_tokens=10, temperature=0, ignore_eos=True))
        else:
            ids = torch.tensor([PROMPTS[index % 3]])
            out = engine.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=[], pad_token_id=0)
            got[index] = out[0, ids.shape[1] :].tolist()

    threads = [threading.Thread(target=read, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [expected[index % 3] for index in range(12)]


# ------------------------------------------------------------------------------------------------- report and end of it


def test_the_report(pair):
    module = make_model("falcon-rw", num_hidden_layers=2)
    module.extra = torch.nn.Linear(2, 2, bias=False)
    engine = init_inference(module, device="cpu", dtype="bfloat16", max_tokens=99)
    report = engine.report()
    assert (report.architecture, report.family) == ("FalconForCausalLM", "falcon")
    assert (report.layers_replaced, report.layers_total) == (2, 2)
    assert (report.dtype, report.device, report.kernels, report.max_tokens) == ("bfloat16", "cpu", "torch", 99)
    assert report.weight_bytes == sum(weight.numel() * 2 for weight in engine.parameters())
    assert report.kv_bytes_per_token == 2 * 2 * 72 * 2
    assert set(report.slots) == {"qkv", "rotary", "attention", "out", "norm", "mlp", "head"}
    assert "ALiBi" in report.slots["attention"]
    assert set(report.left_alone) == {"embedding", "extra.weight"}
    text = str(report)
    assert "2 of 2 replaced" in text
    assert "extra.weight: not part of a model" in text
    assert len({line[:12].rstrip() for line in text.splitlines()}) == len(text.splitlines()) - 1


@pytest.mark.parametrize(
    ("name", "slot", "says"),
    [
        ("gemma2", "attention", "window 17, soft cap 50 / paged_attention"),
        ("gptj", "rotary", "4 values of a head, pairs are neighbours"),
        ("gpt2", "rotary", "only fills the cache"),
        ("mixtral", "mlp", "silu, gate stacked on up, 2 of 5 experts a token"),
        ("qwen3", "attention", "6 heads over 2 of 20, norms of q and k"),
        ("opt-350m", "norm", "norm, LayerNorm, placement post"),
    ],
)
def test_the_report_tells_families_apart(pair, name, slot, says):
    assert says in pair(name)[1].report().slots[slot]


def test_tensors_that_a_folder_holds_beyond_the_model_are_reported(tmp_path, caplog):
    model = save_model(tmp_path)
    model.extra = torch.nn.Linear(2, 2, bias=False)
    model.save_pretrained(tmp_path)
    assert "extra.weight" in init_inference(tmp_path, device="cpu").report().left_alone


def test_destroy_frees_the_weights(folder):
    engine = init_inference(folder, device="cpu")
    stream = engine.stream(PROMPTS[0], max_tokens=400, ignore_eos=True)
    next(stream)
    model = weakref.ref(engine.module)
    engine.destroy()
    gc.collect()
    assert model() is None
    assert list(stream) == []
    assert repr(engine) == "InferenceEngine(destroyed)"
    for use in (lambda: engine.generate(torch.tensor([[5]])), lambda: engine(torch.tensor([[5]])), engine.report):
        with pytest.raises(ConfigError, match="was destroyed; make another one"):
            use()
    with pytest.raises(ConfigError, match="was destroyed"):
        engine.stream([5])
    engine.destroy()


def test_a_dropped_engine_frees_its_weights(folder):
    engine = init_inference(folder, device="cpu")
    copy.copy(engine.generate(torch.tensor([[5]]), max_new_tokens=2, pad_token_id=0))
    list(engine.stream([5], max_tokens=2))
    model = weakref.ref(engine.module)
    del engine
    gc.collect()
    assert model() is None

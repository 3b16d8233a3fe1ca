"""The tutorial's own examples (tutorial.md) on tiny models that stand where it says "gpt2".

What needs a GPU is replaced: `.cuda()` and `.cuda.synchronize()` do nothing. Where an example asks for several GPUs or
for an asymmetric quantization, the error is what it gets, and with what this release does, it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headrace
from headrace.errors import ConfigError
from tests.support.quantized import rounded
from tests.support.tiny_models import make_model, save_model

PAGE = (Path(__file__).parent / "tutorial.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n+```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))

pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")


class QuantizationType:
    """As the page has it; no release of DeepSpeed does."""

    ASYMMETRIC = "asymmetric"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder in which "gpt2" and "EleutherAI/gpt-j-6B" are models."""
    place = tmp_path_factory.mktemp("hub")
    for path, name in (("gpt2", "gpt2"), ("EleutherAI/gpt-j-6B", "gptj")):
        (place / path).mkdir(parents=True)
        save_model(place / path, name)
    return place


@pytest.fixture(autouse=True)
def _no_gpu(hub, monkeypatch):
    monkeypatch.chdir(hub)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.fixture
def names():
    """What the examples take as given."""
    return {
        "torch": torch,
        "deepspeed": headrace,
        "Config": headrace.InferenceConfig,
        "QuantizationConfig": dict,
        "model": AutoModelForCausalLM.from_pretrained("gpt2"),
        "tokenizer": AutoTokenizer.from_pretrained("gpt2"),
    }


def run(name, names, **edits):
    """Run an example; `edits` are settings that it gives with another value."""
    code = EXAMPLES[name]
    for setting, value in edits.items():
        code, count = re.subn(rf"\b{setting}=\w+", f"{setting}={value}", code)
        assert count == 1
    exec(code, names)
    return names


def reference(dtype=torch.float16):
    return AutoModelForCausalLM.from_pretrained("gpt2", dtype=dtype)


def test_basic(capsys, names):
    run("basic", names)
    expected = reference().generate(names["input_ids"], max_length=50)
    assert torch.equal(names["output"], expected)
    assert capsys.readouterr().out == names["tokenizer"].decode(expected[0]) + "\n"


def test_fp16(names):
    assert run("fp16", names)["model"].dtype is torch.float16


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int8", "has q_type='asymmetric', but zero is always zero here.*give 'symmetric'"),
        ("quantized configuration", "has q_type='asymmetric'"),
        ("tensor parallelism", "tensor_parallel is 4, but this release computes on one GPU"),
        ("optimized configuration", "tensor_parallel is 4"),
        ("production configuration", "tensor_parallel is 8"),
        ("zero", "tensor_parallel is 8|keeps all weights on the device"),
        ("cuda graphs", "goes to 'cpu', which has none"),
        ("complete example", "tensor_parallel is 2"),
    ],
)
def test_what_this_release_has_not_is_said(names, name, says):
    names |= {"QuantizationType": QuantizationType, "__name__": "__main__"}
    model = names["model"]
    with pytest.raises(ConfigError, match=says):
        run(name, names)
    assert not next(model.parameters()).is_meta


@pytest.mark.parametrize(("name", "edits"), [("int8", {}), ("quantized configuration", {"mp_size": 1})])
def test_int8_symmetric(names, name, edits, monkeypatch):
    """Weights in 8 bits, and the rest as the model has it: what the page calls mixed precision."""
    plain = reference(torch.float32)
    monkeypatch.setattr(QuantizationType, "ASYMMETRIC", "symmetric")
    engine = run(name, names | {"QuantizationType": QuantizationType}, **edits)["model"]
    assert (engine.dtype, engine.report().quantized) == (torch.float32, "int8")
    ids = torch.tensor([[5, 60, 7, 100]])
    expected = rounded(plain, "int8").generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(engine.generate(ids, max_new_tokens=20, do_sample=False), expected)


def test_int8_without_settings(names):
    """As the page's advice for too little memory has it."""
    assert run("memory", names)["model"].report().quantized == "int8"


@pytest.mark.parametrize("name", ["tensor parallelism", "optimized configuration"])
def test_configurations_on_one_gpu(names, name):
    engine = run(name, names, mp_size=1)["model"]
    assert (engine.dtype, engine.max_tokens) == (torch.float16, 512)


def test_production_configuration_on_one_gpu(names):
    names["model"] = make_model("gpt2", n_positions=1024)
    assert run("production configuration", names, mp_size=1)["model"].max_tokens == 1024


def test_batches_and_generation_parameters(names):
    names["model"] = headrace.init_inference(names["model"], dtype=torch.float16)
    names["tokenizer"].pad_token = names["tokenizer"].eos_token
    run("larger batches", names)
    assert torch.equal(names["outputs"], reference().generate(names["input_ids"], max_length=50))
    run("generation parameters", names)
    wanted = {"max_length": 50, "do_sample": False, "pad_token_id": names["tokenizer"].eos_token_id}
    assert torch.equal(names["output"], reference().generate(names["input_ids"], **wanted))


def test_manual_injection(names):
    names["model"] = make_model("gpt2", n_embd=768, n_head=12, n_layer=1)
    assert run("manual injection", names)["model"].max_tokens == 512
    names["model"] = make_model("gpt2")
    with pytest.raises(ConfigError, match="hidden_size is 768, but the GPT2LMHeadModel has 72"):
        run("manual injection", names)


def test_what_is_supported(capsys):
    print(headrace.InferenceEngine.supported_models)
    shown = capsys.readouterr().out
    for family in ("gpt2", "gptj", "gpt_neox", "opt", "bloom", "llama", "falcon", "bert", "t5"):
        assert f"'{family}'" in shown


def test_diagnosis(capsys, names):
    names["model"] = headrace.init_inference(names["model"], dtype=torch.float16)
    names["input_ids"] = names["tokenizer"]("hello", return_tensors="pt").input_ids
    run("diagnosis", names)
    shown = capsys.readouterr().out
    assert "Average latency:" in shown
    assert "x Block(" in shown
    assert "torch.float16" in shown
    assert "Self CPU time total" in shown


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_the_complete_example(capsys, names):
    run("complete example", names | {"__name__": "__main__"}, mp_size=1)
    shown = capsys.readouterr().out
    assert "Model optimized!" in shown
    assert re.search(r"Throughput: [\d.]+ generations/sec", shown)
    assert shown.count("Generated: ") == 2
    assert "Generated: The future of artificial intelligence is" in shown


def test_fastapi(names):
    from fastapi.testclient import TestClient

    app = run("fastapi", names)["app"]
    with TestClient(app) as client:
        torch.manual_seed(3)
        answer = client.post("/generate", json={"prompt": "hello", "max_length": 20})
        assert client.post("/generate", json={"prompt": 5}).status_code == 422
    assert answer.status_code == 200
    ids = names["tokenizer"]("hello", return_tensors="pt").input_ids
    torch.manual_seed(3)
    expected = reference().generate(ids, max_length=20, do_sample=True, top_p=0.95, temperature=0.8)
    assert answer.json() == {"generated_text": names["tokenizer"].decode(expected[0], skip_special_tokens=True)}


def test_batching_requests(names):
    engine = headrace.init_inference(names["model"], dtype=torch.float16)
    tokenizer = names["tokenizer"]
    prompts = ["hello", "the world is in", "Paris"]
    batching = run("batching requests", names)["BatchingEngine"](engine, tokenizer)

    async def use():
        task = asyncio.create_task(batching.process_batch())
        texts = await asyncio.wait_for(asyncio.gather(*(batching.generate(prompt, 30) for prompt in prompts)), 60)
        task.cancel()
        return texts

    ids = tokenizer(prompts, return_tensors="pt", padding=True).input_ids
    expected = reference().generate(ids, max_length=30)
    assert asyncio.run(use()) == [tokenizer.decode(row, skip_special_tokens=True) for row in expected]


BEFORE = """\
import torch
import headrace as deepspeed
from headrace import init_inference  # before the workers are forked, so that they share what it imports
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

torch.multiprocessing.set_start_method("fork")
torch.cuda.is_available = lambda: False
torch.Tensor.cuda = lambda tensor: tensor
torch.cuda.set_device = lambda rank: None
tokenizer = AutoTokenizer.from_pretrained("gpt2")
prompts = ["hello", " the world", "Paris is", " in", "on", " and"]
"""


def test_load_balancing(hub, names, tmp_path):
    script = tmp_path / "balance.py"
    script.write_text(BEFORE + EXAMPLES["load balancing"].replace("num_gpus = 4", "num_gpus = 2"))
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, str(script)],
        cwd=hub,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            shown, _ = process.communicate(timeout=200)
        finally:  # its workers wait for ever if it dies
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, shown
    model, tokenizer = reference(), names["tokenizer"]
    for prompt in ("hello", " the world", "Paris is", " in", "on", " and"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert tokenizer.decode(model.generate(ids, max_length=50)[0]) in shown

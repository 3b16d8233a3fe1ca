"""What is kept of a config between starts: it is the same, found only where it belongs, and saves an import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headrace.addresses import cache_dir
from headrace.kernels.policies import LLAMA
from headrace.workers import facts as module
from headrace.workers.checkpoint import Checkpoint
from tests.support.tiny_models import FAMILIES, T5_VARIANTS, save_model, save_t5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", "llama")
    return tmp_path / "model"


def never():
    raise AssertionError("it was made again")


@pytest.mark.parametrize("family", [*sorted(FAMILIES), *sorted(T5_VARIANTS)])
def test_every_family_is_kept_as_it_is(tmp_path, family, monkeypatch):
    (save_t5 if family in T5_VARIANTS else save_model)(tmp_path, family)
    made = Checkpoint(tmp_path).facts
    monkeypatch.setattr(Checkpoint, "_make_facts", lambda checkpoint: never())
    kept = Checkpoint(tmp_path).facts
    assert kept == made
    assert hash(kept.spec) == hash(made.spec)
    rotaries = [layer.rotary for layer in kept.spec.layers if layer.rotary is not None]
    assert len({id(rotary) for rotary in rotaries}) == len(set(rotaries))  # as a policy shares them


def test_a_second_start_imports_neither_transformers_nor_what_compilers_need(folder):
    """Each takes seconds. Sympy came with the first tensor that left the meta device."""
    code = (
        "import sys; from pathlib import Path\n"
        "from headrace.workers.config import EngineConfig\n"
        "from headrace.workers.engines import load_engine\n"
        f"engine = load_engine(Path({str(folder)!r}), EngineConfig(kv_tokens=256))\n"
        "engine.warm_up()\n"
        "print([name for name in ('transformers', 'sympy', 'torch._dynamo') if name in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(2)]
    assert "transformers" in runs[0].stdout
    assert runs[1].stdout.strip() == "[]"


@pytest.mark.parametrize("change", ["config", "source", "transformers", "ours"])
def test_what_they_were_made_of_must_be_the_same(folder, monkeypatch, change):
    made = Checkpoint(folder).facts
    config = (folder / "config.json").read_bytes()
    assert module.kept_facts(config, LLAMA, never) == made
    match change:
        case "config":
            config += b" "
        case "source":
            monkeypatch.setattr(module, "_own_source", lambda: "another")
        case "transformers":
            monkeypatch.setattr(module, "version", lambda name: "99")
        case "ours":
            monkeypatch.setattr(module, "__version__", "99")
    with pytest.raises(AssertionError, match="made again"):
        module.kept_facts(config, LLAMA, never)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"spec": {}}', '{"spec": 3, "dtype": "x"}', "\0"])
def test_a_damaged_file_is_made_anew(folder, content):
    made = Checkpoint(folder).facts
    [file] = (cache_dir() / "specs").iterdir()
    file.write_text(content)
    assert Checkpoint(folder).facts == made
    config = (folder / "config.json").read_bytes()
    assert module.kept_facts(config, LLAMA, never) == made


def test_types_of_fields_are_checked(folder):
    made = Checkpoint(folder).facts
    [file] = (cache_dir() / "specs").iterdir()
    file.write_text(file.read_text().replace('"vocab_size": ', '"vocab_size": "no number", "other": '))
    assert Checkpoint(folder).facts == made


def test_a_cache_that_cannot_be_written_is_done_without(folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file"))
    assert Checkpoint(folder).facts.spec.vocab_size


def test_a_policy_of_ones_own_is_not_kept(folder):
    import dataclasses

    own = dataclasses.replace(LLAMA)
    assert Checkpoint(folder, policy=own).spec
    assert not (cache_dir() / "specs").exists()

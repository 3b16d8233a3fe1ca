"""A model that is filled by a thread while somebody looks at it: what is there in the end, and what goes wrong."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.errors import ModelFilesError
from headrace.kernels.inject import Filler
from headrace.kernels.model import Model
from headrace.kernels.quantize import SCHEMES
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.loader import load_model, loading
from tests.support.quantized import same_bytes
from tests.support.tiny_models import save_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "pack", lambda model: None)  # matrices as a GPU has them
    save_model(tmp_path, "gpt2")
    return tmp_path


@pytest.fixture
def held(monkeypatch):
    """Lets no weight be filled in before `set` is called."""
    gate, fill = threading.Event(), Filler.fill

    def wait(*args):
        assert gate.wait(10)
        fill(*args)

    monkeypatch.setattr(Filler, "fill", wait)
    yield gate
    gate.set()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "loading"]


def test_weights_are_numbers_before_they_are_there_and_right_afterwards(folder, held):
    with loading(Checkpoint(folder), dtype="auto", device="cpu", read_ahead=True) as under_way:
        under_way.begin()
        assert not any(parameter.any() for parameter in under_way.model.parameters())
        held.set()
        found = under_way.finished().model
    assert found is under_way.model
    expected = dict(load_model(folder).named_parameters())
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert not threads()


@pytest.mark.parametrize("name", list(SCHEMES))
def test_8_bits_and_their_factors_are_zero_before_they_are_there(folder, held, name):
    options = {"dtype": "bfloat16", "device": "cpu", "scheme": SCHEMES[name]}
    with loading(Checkpoint(folder), read_ahead=True, **options) as under_way:
        under_way.begin()
        weights = [*under_way.model.parameters(), *under_way.model.scales().values()]
        assert SCHEMES[name].dtype in {weight.dtype for weight in weights}
        assert not any(weight.float().any() for weight in weights)
        held.set()
        found = under_way.finished().model
    assert same_bytes(found, load_model(folder, **options))
    assert all(scale.all() for scale in found.scales().values())


def test_the_first_and_the_last_word_are_said_by_who_asks(folder):
    said = []
    with loading(
        Checkpoint(folder), dtype="auto", device="cpu", progress=lambda *how: said.append((how, threading.get_ident()))
    ) as under_way:
        under_way.begin()
        under_way.finished()
    dones = [done for (done, _), _ in said]
    total = said[0][0][1]
    assert dones == sorted(set(dones))
    assert (dones[0], dones[-1]) == (0, total)
    here = threading.get_ident()
    assert [thread == here for _, thread in said] == [done in (0, total) for done in dones]


def test_what_goes_wrong_meanwhile_is_said_in_the_end(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("ln_f.weight"))
    save_file(weights | {name: weights[name][:-1].clone()}, path)
    with loading(Checkpoint(folder), dtype="auto", device="cpu", read_ahead=True) as under_way:
        under_way.begin()
        with pytest.raises(ModelFilesError, match=name):
            under_way.finished()
    assert not threads()


def test_whoever_leaves_early_ends_it(folder, held, monkeypatch):
    filled = []
    fill = Filler.fill
    monkeypatch.setattr(Filler, "fill", lambda *args: (filled.append(args[1]), fill(*args)))
    with loading(Checkpoint(folder), dtype="auto", device="cpu", read_ahead=True) as under_way:
        under_way.begin()
        threading.Timer(0.1, held.set).start()
    assert len(filled) == 1
    assert not threads()

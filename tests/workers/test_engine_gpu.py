"""The tests of the engine once more, with the model on a GPU: the same tokens come out."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from headrace.workers import loader
from tests.workers.test_engine import *  # noqa: F403  # the tests and their fixtures

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    monkeypatch.setattr(loader, "load_model", partial(loader.load_model, device="cuda"))

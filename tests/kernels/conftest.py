"""The same random numbers in every run, and the place where kernels run."""

import pytest
import torch

from tests.support.kernels import Kernels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def kernels(request):
    """Runs the kernels of ops; the parameter is `interpreted` or `cuda`."""
    return Kernels(request.param)


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels that are compiled, or loaded, from now on."""
    triton = pytest.importorskip("triton")
    names = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **told: names.append(told["repr"]))
    return names

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

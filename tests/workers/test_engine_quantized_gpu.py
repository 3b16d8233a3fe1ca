"""The tests of engines with weights in 8 bits once more, on a GPU, step by step and with graphs: the same tokens."""

from __future__ import annotations

import pytest

from tests.workers.test_engine_gpu import _on_the_gpu  # noqa: F401  # a fixture for all of them
from tests.workers.test_engine_quantized import *  # noqa: F403  # the tests

pytestmark = pytest.mark.gpu

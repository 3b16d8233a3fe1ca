"""The tests of generation once more, with steps as CUDA graphs compute them: texts are the same, whatever is asked
for. That steps can be captured is for a GPU to show (test_gpu)."""

from __future__ import annotations

import pytest

from tests.inference.test_generate import *  # noqa: F403  # the tests


@pytest.fixture
def pair(pair_with_graphs):
    return pair_with_graphs

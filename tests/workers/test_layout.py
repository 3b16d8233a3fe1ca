"""Arrays in one piece of memory: each in its own place, which begins where kernels are compiled for."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.layout import Layout

PARTS = st.tuples(
    st.sampled_from([np.int32, np.int64]),
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
)


@given(st.lists(PARTS, min_size=1, max_size=6))
def test_tensors_are_the_arrays_that_were_written(parts):
    layout = Layout(*parts)
    memory = torch.full((layout.size + 3,), -1)
    arrays = layout.arrays(memory.numpy())
    for index, array in enumerate(arrays):
        array[...] = index
    for index, (tensor, (kind, shape)) in enumerate(zip(layout.tensors(memory), parts, strict=True)):
        assert tensor.shape == arrays[index].shape == shape
        assert tensor.numpy().dtype == arrays[index].dtype == kind
        assert (tensor == index).all(), "another part lies over this one"
        assert (tensor.data_ptr() - memory.data_ptr()) % 16 == 0
        assert tensor.is_contiguous()
    assert (memory[layout.size :] == -1).all()

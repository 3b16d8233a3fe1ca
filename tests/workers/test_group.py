"""Specs of groups: checked at the edge, plain on the pipe."""

from pathlib import Path

import msgpack
import pytest

from headrace.errors import ConfigError
from headrace.workers.config import EngineConfig
from headrace.workers.group import GroupSpec


def spec(**changes):
    fields = {"name": "g", "folder": Path("/models/tiny"), "model_name": "tiny", "config": EngineConfig()}
    return GroupSpec(**fields | changes)


def test_a_spec_survives_the_pipe():
    original = spec(threads=3, config=EngineConfig(max_num_seqs=5, kv_tokens=640, prefix_cache=False))
    assert GroupSpec.from_wire(msgpack.unpackb(msgpack.packb(original.to_wire()))) == original


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a\nb"),
        ("name", "x" * 201),
        ("model_name", ""),
        ("tensor_parallel", 0),
        ("tensor_parallel", True),
        ("tensor_parallel", 1.0),
        ("threads", 0),
        ("threads", "2"),
        ("tensor_parallel", None),
    ],
)
def test_a_bad_value_names_its_field(field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        spec(**{field: value}, engine="fake:load")
    assert caught.value.param == field


def test_a_model_over_several_processes_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="start more groups") as caught:
        spec(tensor_parallel=2)
    assert caught.value.param == "tensor_parallel"
    assert spec(tensor_parallel=2, engine="fake:load").tensor_parallel == 2

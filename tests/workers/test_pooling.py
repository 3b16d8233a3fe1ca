"""How a model wants its vectors made, read from the files that sentence-transformers writes."""

import json

import pytest

from headrace.errors import ModelFilesError, UnsupportedModelError
from headrace.tasks import PoolingParams
from headrace.workers.checkpoint import Checkpoint
from headrace.workers.pooling import pooling_defaults
from tests.support.tiny_encoders import save_encoder

_TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
_POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
_NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
_DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    save_encoder(folder)
    (folder / "1_Pooling").mkdir()
    return folder


def write(folder, modules, **modes):
    text = modules if isinstance(modules, str) else json.dumps(modules)
    (folder / "modules.json").write_text(text)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 72, **modes}))
    return Checkpoint(folder)


def test_without_such_files_nothing_is_said(folder):
    (folder / "modules.json").unlink(missing_ok=True)
    assert pooling_defaults(Checkpoint(folder)) == {}


@pytest.mark.parametrize("mode", ["cls", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_mode_that_is_on_and_whether_vectors_are_scaled(folder, mode, normalize):
    name = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}[mode]
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}
    checkpoint = write(folder, [_TRANSFORMER, _POOLING, *([_NORMALIZE] if normalize else [])], **modes | {name: True})
    assert pooling_defaults(checkpoint) == {"pooling": mode, "normalize": normalize}
    PoolingParams(**pooling_defaults(checkpoint))


@pytest.mark.parametrize(
    ("modules", "modes", "says"),
    [
        ([_TRANSFORMER, _POOLING], {"pooling_mode_max_tokens": True}, "max_tokens"),
        ([_TRANSFORMER, _POOLING], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_token and"),
        ([_TRANSFORMER, _POOLING], {}, "no mode"),
        ([_TRANSFORMER, _POOLING, _DENSE], {"pooling_mode_cls_token": True}, "names a Dense"),
    ],
)
def test_vectors_made_otherwise_are_refused(folder, modules, modes, says):
    with pytest.raises(UnsupportedModelError, match=says):
        pooling_defaults(write(folder, modules, **modes))


@pytest.mark.parametrize("text", ["{", "[1]", "[{}]", "7"])
def test_damaged_files_are_said(folder, text):
    with pytest.raises(ModelFilesError, match=r"modules\.json"):
        pooling_defaults(write(folder, text))

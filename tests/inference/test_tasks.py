"""Classes of transformers with a head of their own: our layers below, their head above, their output."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.errors import InvalidRequestError, ModelFilesError, UnsupportedModelError
from headrace.kernels.policies import find_policy
from headrace.workers.inference import init_inference
from tests.inference.batches import padded
from tests.support.tiny_encoders import TASKS, make_encoder

IDS, MASK = padded([11, 3, 1, 38], side="right", vocab=99)
IDS = (IDS + 2).masked_fill(MASK == 0, 1)

# What a head is trained with, and its loss comes out of.
LABELS = {
    "MultipleChoice": {"labels": torch.tensor([0, 1, 1, 0])},
    "NextSentencePrediction": {"labels": torch.tensor([0, 1, 1, 0])},
    "QuestionAnswering": {"start_positions": torch.tensor([0, 1, 0, 5]), "end_positions": torch.tensor([2, 2, 0, 9])},
    "SequenceClassification": {"labels": torch.tensor([0, 4, 2, 1])},
    "TokenClassification": {"labels": (IDS % 5).masked_fill(MASK == 0, -100)},
}


def arguments_of(name, **more):
    arguments = {"input_ids": IDS, "attention_mask": MASK, **more}
    if "MultipleChoice" in name:  # two texts to choose from
        arguments = {key: torch.stack((tensor, tensor.flip(0)), 1) for key, tensor in arguments.items()}
    return arguments


def assert_same(got, expected):
    """The same output, but for what stands for padding."""
    assert type(got) is type(expected)
    assert list(got.keys()) == list(expected.keys())
    for one, other in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        kept = MASK == 1 if one.shape[:2] == MASK.shape else ...
        torch.testing.assert_close(one[kept], other[kept], rtol=0, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("name", TASKS)
@torch.no_grad()
def test_the_output_is_that_of_transformers(pair, name):
    reference, engine = pair(name)
    assert_same(engine(**arguments_of(name)), reference(**arguments_of(name)))
    assert len(engine(**arguments_of(name), return_dict=False)) == len(reference(**arguments_of(name)).to_tuple())
    kinds = reference.config.type_vocab_size
    given = arguments_of(name, token_type_ids=(torch.arange(38) % kinds).repeat(4, 1))
    assert_same(engine(**given), reference(**given))


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("bert")])
@torch.no_grad()
def test_a_loss_comes_with_it(pair, name):
    reference, engine = pair(name)
    labels = LABELS[name.partition("-")[2]]
    # The loss of a span of the text is over all columns, padding included.
    rows = slice(3, 4) if "QuestionAnswering" in name else slice(None)
    given = {key: tensor[rows] for key, tensor in arguments_of(name).items()}
    given |= {key: tensor[rows] for key, tensor in labels.items()}
    torch.testing.assert_close(engine(**given).loss, reference(**given).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
@torch.no_grad()
def test_a_folder_gives_what_the_module_gives(pair, name, tmp_path):
    reference, engine = pair(name)
    reference.save_pretrained(tmp_path)
    again = init_inference(tmp_path, device="cpu")
    for one, other in zip(again(**arguments_of(name)).to_tuple(), engine(**arguments_of(name)).to_tuple(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", TASKS)
def test_no_weight_is_left_behind(name):
    module = make_encoder(name)
    count = sum(parameter.numel() for parameter in module.parameters())
    engine = init_inference(module, device="cpu", dtype="bfloat16")
    assert all(parameter.is_meta for parameter in module.parameters())
    with pytest.raises(UnsupportedModelError, match="moved into an engine by init_inference"):
        module(**arguments_of(name))
    assert {parameter.dtype for parameter in engine.parameters()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in engine.parameters()) == count
    assert engine.report().weight_bytes == 2 * count
    assert engine(**arguments_of(name))[0].dtype is torch.bfloat16


def test_what_is_left_alone_is_told(pair):
    engine = pair("roberta-SequenceClassification")[1]
    report = engine.report()
    assert report.layers_replaced == 3
    assert set(report.left_alone) == {"embedding", "classifier"}
    assert (
        "classifier: the head of RobertaForSequenceClassification runs as transformers wrote it, on the states of our "
        "layers"
    ) in str(report)
    shown = repr(engine)
    assert "RobertaForSequenceClassification(" in shown
    assert "3 x Block(" in shown
    assert "(classifier): RobertaClassificationHead(" in shown


def test_the_random_numbers_of_others_stay_theirs():
    module = make_encoder("bert-TokenClassification")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    init_inference(module, device="cpu")
    assert torch.equal(torch.rand(3), expected)


def test_the_config_of_the_module_stays_as_it_is():
    module = make_encoder("bert-SequenceClassification")
    before = module.config.to_dict()
    engine = init_inference(module, device="cpu")
    engine(IDS, MASK, labels=torch.tensor([0, 4, 2, 1]))
    assert module.config.to_dict() == before


# ---------------------------------------------------------------------------------------------- what cannot be honoured


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attention_mask": MASK * 2}, "other values than 0 and 1"),
        ({"token_type_ids": IDS}, r"token_type_ids holds \d+, but the model has segments 0 to 1"),
        ({"inputs_embeds": torch.zeros(4, 38, 72)}, "inputs_embeds cannot be given"),
        ({"output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_what_cannot_be_honoured_is_refused(pair, arguments, says):
    with pytest.raises(InvalidRequestError, match=says):
        pair("bert-TokenClassification")[1](IDS, **arguments)


def test_tasks_write_nothing(pair):
    with pytest.raises(UnsupportedModelError, match="BertForQuestionAnswering is an encoder"):
        pair("bert-QuestionAnswering")[1].generate(IDS)


def test_a_class_that_transformers_does_not_have(tmp_path):
    make_encoder("bert-TokenClassification").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("BertForTokenClassification", "BertForTokenGuessing"))
    policy = dataclasses.replace(find_policy("BertModel"), tasks=("BertForTokenGuessing",))
    with pytest.raises(UnsupportedModelError, match=r"transformers \S+ has no class BertForTokenGuessing"):
        init_inference(tmp_path, device="cpu", policy=policy)


def test_a_folder_without_the_head(tmp_path):
    make_encoder("bert-SequenceClassification").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "classifier" not in k}, file, {"format": "pt"})
    with pytest.raises(ModelFilesError, match=r"lacks the tensor 'classifier\.weight' of a BertForSequenceClassif"):
        init_inference(tmp_path, device="cpu")


def test_a_folder_without_the_pooler_that_the_head_reads(tmp_path):
    make_encoder("bert-SequenceClassification").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "pooler" not in k}, file, {"format": "pt"})
    with pytest.raises(ModelFilesError, match=r"lacks the tensor 'bert\.pooler\.dense\.weight'"):
        init_inference(tmp_path, device="cpu")


@pytest.mark.parametrize("head", [torch.nn.Linear(71, 5), torch.nn.Sequential(torch.nn.Linear(72, 5))])
def test_a_head_of_ones_own_is_refused_and_left_as_it_was(head):
    module = make_encoder("bert-TokenClassification")
    module.classifier = head
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ModelFilesError, match="classifier"):
        init_inference(module, device="cpu")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


# -------------------------------------------------------------------------------------------- pipelines of transformers


def test_pipelines(tokenizer):
    from transformers import pipeline

    texts = ["hello world", "the"]
    for task, name in (
        ("text-classification", "bert-SequenceClassification"),
        ("token-classification", "bert-TokenClassification"),
        ("feature-extraction", "bert-pooled"),
    ):
        module = make_encoder(name, vocab_size=302)
        pipe = pipeline(task, model=module, tokenizer=tokenizer, device="cpu")
        expected = pipe(texts)
        pipe.model = init_inference(pipe.model, device="cpu")
        assert_near(pipe(texts), expected)
        assert_near(pipeline(task, model=pipe.model, tokenizer=tokenizer, device="cpu")(texts), expected)


def assert_near(got, expected):
    """The same nested lists and dicts, with numbers that may differ a little."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_near(one, other)
    else:
        assert got == (expected if isinstance(expected, str | None) else pytest.approx(expected, rel=1e-3, abs=1e-3))

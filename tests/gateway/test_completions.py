"""`/v1/completions` and `/generate`: texts and token ids continued as they are."""

import pytest

from tests.gateway.helpers import error_of, events

PATH = "/v1/completions"


def test_a_whole_text(plain):
    body = plain.post(PATH, {"prompt": "once"}).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "Hello number 0 from tiny-chat.", "logprobs": None, "finish_reason": "stop"}
    ]


def test_sixteen_tokens_where_nothing_is_said(serve):
    running = serve()
    running.post(PATH, {"prompt": "once"})
    assert running.fake.calls[0].sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, [1, 2])]),
        ([[1], [2, 3]], [(None, [1]), (None, [2, 3])]),
    ],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_all_kinds_of_prompts(serve, prompt, asked):
    running = serve()
    body = running.post(PATH, {"prompt": prompt}).json()
    calls = running.fake.calls
    assert sorted((call.prompt, call.token_ids) for call in calls) == asked
    assert [choice["index"] for choice in body["choices"]] == list(range(len(asked)))
    assert body["usage"]["prompt_tokens"] == 7 * len(asked)


def test_several_prompts_with_several_choices_keep_their_places(serve):
    def script(call, choice):
        return [f"{call.prompt}{choice}"]

    body = {"prompt": ["a", "b"], "n": 2}
    whole = serve(script).post(PATH, body).json()
    assert [choice["text"] for choice in whole["choices"]] == ["a0", "a1", "b0", "b1"]
    texts = [""] * 4
    for chunk in events(serve(script).post(PATH, body | {"stream": True}).text):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["a0", "a1", "b0", "b1"]


def test_a_stream_ends_with_one_reason(serve):
    options = {"include_usage": True}
    chunks = events(serve().post(PATH, {"prompt": "x", "stream": True, "stream_options": options}).text)
    *texts, usage = chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in texts) == "Hello number 0 from tiny-chat."
    assert [chunk["choices"][0]["finish_reason"] for chunk in texts] == [None] * (len(texts) - 1) + ["stop"]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 12


@pytest.mark.parametrize(("prompt", "text"), [("say ", "say "), ([72, 105], "Hi")], ids=["text", "ids"])
def test_echo_repeats_the_prompt(serve, prompt, text):
    running = serve(lambda call, choice: ["it"])
    assert running.post(PATH, {"prompt": prompt, "echo": True}).json()["choices"][0]["text"] == text + "it"
    chunks = events(running.post(PATH, {"prompt": prompt, "echo": True, "stream": True}).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [text, "it", ""]


def test_logprobs_are_parallel_lists(serve):
    running = serve(lambda call, choice: ["Ab", " never", "c"])
    told = running.post(PATH, {"prompt": "x", "logprobs": 1}).json()["choices"][0]["logprobs"]
    assert told == {
        "tokens": ["Ab", " never", "c"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"Ab0": -1.0}, {" never0": -1.0}, {"c0": -1.0}],
        "text_offset": [0, 2, 8],
    }
    chunks = events(running.post(PATH, {"prompt": "x", "logprobs": 1, "stream": True}).text)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    for name, whole in told.items():
        assert [entry for part in parts for entry in part[name]] == whole


def test_logprobs_of_the_prompt_are_refused_and_not_invented(plain):
    error = error_of(plain.post(PATH, {"prompt": "x", "logprobs": 1, "echo": True}), 400, "invalid_request")
    assert error["param"] == "logprobs"


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", ""], [[1], []], [-1], [2**31], ["x"] * 257])
def test_prompts_that_are_none(plain, prompt):
    error = error_of(plain.post(PATH, {"prompt": prompt}), 400, "invalid_request")
    assert error["param"] == "prompt"


@pytest.mark.parametrize("prompt", [None, 5, {"a": 1}, [1, "a"], [1.5], [[1], "a"], [[["a"]]], [True]])
def test_prompts_of_a_wrong_type_are_named(plain, prompt):
    error = error_of(plain.post(PATH, {"prompt": prompt}), 400, "invalid_request")
    assert error["param"].startswith("prompt")


def test_generate_is_the_smallest_api(serve):
    running = serve()
    body = running.post("/generate", {"prompt": "once", "max_length": 3}).json()
    assert body == {
        "generated_text": "Hello number 0",
        "finish_reason": "length",
        "prompt_tokens": 7,
        "generated_tokens": 3,
        "model": "tiny-chat",
    }
    full = running.post("/generate", {"prompt": "once ", "max_new_tokens": 1, "return_full_text": True}).json()
    assert full["generated_text"] == "once Hello"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "max_length": 0}, "max_length"),
        ({"prompt": "x", "max_length": 2, "max_tokens": 2}, "max_length"),
        ({"prompt": "x", "stream": True}, "stream"),
        ({"prompt": "x", "n": 2}, "n"),
    ],
)
def test_generate_says_what_it_does_not_do(plain, body, param):
    assert error_of(plain.post("/generate", body), 400, "invalid_request")["param"] == param

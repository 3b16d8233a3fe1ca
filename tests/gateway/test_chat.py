"""`/v1/chat/completions`: OpenAI's shapes, whole and as events."""

import pytest

from tests.gateway.helpers import chat, error_of, events

PATH = "/v1/chat/completions"


def test_a_whole_answer(plain):
    body = plain.post(PATH, chat(model="tiny-chat")).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny-chat"
    assert body["system_fingerprint"] == "fp_0123456789ab"
    (choice,) = body["choices"]
    assert choice["index"] == 0
    assert choice["message"] == {"role": "assistant", "content": "Hello number 0 from tiny-chat.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_a_stream_has_role_then_text_then_reason(plain):
    response = plain.post(PATH, chat(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    chunks = events(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "Hello number 0 from tiny-chat."
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_last_and_alone(plain):
    chunks = events(plain.post(PATH, chat(stream=True, stream_options={"include_usage": True})).text)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5


def test_usage_so_far_in_every_chunk(plain):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(plain.post(PATH, chat(stream=True, stream_options=options)).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {7}


def test_choices_interleave_by_index(serve):
    chunks = events(serve().post(PATH, chat(stream=True, n=3)).text)
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {index: f"Hello number {index} from tiny-chat." for index in range(3)}
    assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in chunks) == 3
    whole = serve().post(PATH, chat(n=3)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert whole["usage"]["completion_tokens"] == 15


def test_settings_reach_the_model_and_its_own_fill_the_rest(serve):
    running = serve()
    settings = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "seed": -1,
        "stop": "END",
        "stop_token_ids": [5],
        "ignore_eos": True,
        "min_tokens": 2,
        "max_completion_tokens": 9,
        "logit_bias": {"11": -100},
    }
    assert running.post(PATH, chat(**settings)).status_code == 200
    sampling = running.fake.calls[0].sampling
    assert sampling.greedy
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 7, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.2, 0.3, -0.4)
    assert sampling.seed == 2**64 - 1
    assert sampling.stop == ("END",)
    assert sampling.stop_token_ids == (5,)
    assert sampling.ignore_eos
    assert (sampling.min_tokens, sampling.max_tokens) == (2, 9)
    assert sampling.logit_bias == {11: -100}


def test_all_is_spelt_minus_one_by_some(serve):
    running = serve()
    running.post(PATH, chat(top_k=-1))
    assert running.fake.calls[0].sampling.top_k == 0


def test_max_tokens_ends_with_length(serve):
    running = serve()
    body = running.post(PATH, chat(max_tokens=2)).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"] == "Hello number"
    same = running.post(PATH, chat(max_tokens=2, max_completion_tokens=2)).json()
    assert same["choices"][0]["finish_reason"] == "length"
    error_of(running.post(PATH, chat(max_tokens=2, max_completion_tokens=3)), 400, "invalid_request")


def test_messages_may_be_typed_parts_and_developers_are_the_system(serve):
    running = serve()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "name": "Ann", "content": parts}]
    assert running.post(PATH, {"messages": messages}).status_code == 200
    assert running.fake.calls[0].messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo"},
    ]


def test_logprobs_carry_bytes_and_have_a_floor(serve):
    running = serve(lambda call, choice: ["é", "never"])
    body = running.post(PATH, chat(logprobs=True, top_logprobs=2)).json()
    first, second = body["choices"][0]["logprobs"]["content"]
    assert first["token"] == "é"
    assert first["bytes"] == [0xC3, 0xA9]
    assert first["logprob"] == -0.5
    assert [top["token"] for top in first["top_logprobs"]] == ["é0", "é1"]
    assert second["logprob"] == -9999.0
    chunks = events(running.post(PATH, chat(logprobs=True, stream=True)).text)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [entry["token"] for each in told for entry in each["content"]] == ["é", "never"]
    assert all(entry["top_logprobs"] == [] for each in told for entry in each["content"])


def test_token_ids_on_request(serve):
    running = serve()
    whole = running.post(PATH, chat(return_token_ids=True)).json()["choices"][0]["token_ids"]
    chunks = events(running.post(PATH, chat(return_token_ids=True, stream=True)).text)
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == whole


def test_the_last_message_can_be_continued(serve):
    running = serve()
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "half an"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    assert running.post(PATH, {"messages": messages, **more}).status_code == 200
    call = running.fake.calls[0]
    assert call.messages is None
    assert "".join(map(chr, call.token_ids)) == "[user]q[assistant]half an"


@pytest.mark.parametrize(
    ("messages", "more", "param"),
    [
        ([{"role": "user", "content": "q"}], {"continue_final_message": True}, "messages"),
        ([{"role": "assistant", "content": "a"}], {"continue_final_message": True}, "messages"),
        ([{"role": "user", "content": "q"}], {"add_generation_prompt": False}, "add_generation_prompt"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
    ],
)
def test_continuing_needs_something_to_continue(plain, messages, more, param):
    error = error_of(plain.post(PATH, {"messages": messages, **more}), 400, "invalid_request")
    assert error["param"] == param


def test_text_is_held_back_until_it_is_certain(serve):
    """A delta without text, as when half a character is held back, makes no chunk."""
    chunks = events(serve(lambda call, choice: ["", "a", ""]).post(PATH, chat(stream=True)).text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {},
    ]


def test_what_asks_for_nothing_is_accepted(plain):
    extras = {"user": "x", "metadata": {}, "store": False, "tools": [], "tool_choice": "none", "logit_bias": None}
    extras |= {"response_format": {"type": "text"}, "parallel_tool_calls": True, "service_tier": "auto"}
    assert plain.post(PATH, chat(**extras)).status_code == 200

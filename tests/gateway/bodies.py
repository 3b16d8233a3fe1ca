"""Request bodies for fuzzing: mostly right, with fields that hold anything, and some that are anything."""

from hypothesis import strategies as st

from headrace.gateway.embeddings import EmbeddingRequest
from headrace.gateway.generate import GenerateRequest
from headrace.gateway.openai import ChatRequest, CompletionRequest

MODELS = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/generate": GenerateRequest}
_ALL = {**MODELS, "/v1/embeddings": EmbeddingRequest}

numbers = st.one_of(
    st.integers(-5, 20),
    st.integers(),
    st.floats(-3, 3),
    st.floats(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**64), 10**30]),
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(["user", "assistant", "text", "tiny-chat", "auto", "\ud800"]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=5)},
    optional={"name": values, "tool_calls": values, "extra": values},
)
GOOD = {
    "/v1/chat/completions": {"messages": st.lists(message, min_size=1, max_size=3)},
    "/v1/completions": {
        "prompt": st.one_of(st.text(min_size=1, max_size=5), st.lists(st.integers(0, 200), max_size=3))
    },
    "/generate": {"prompt": st.text(min_size=1, max_size=5)},
    "/v1/embeddings": {
        "input": st.one_of(st.text(min_size=1, max_size=5), st.lists(st.lists(st.integers(0, 200), max_size=3)))
    },
}


def bodies(path):
    """Bodies for one endpoint."""
    fields = [name for name in _ALL[path].model_fields if name not in GOOD[path]]
    odd = st.dictionaries(st.one_of(st.sampled_from(fields), st.sampled_from(fields), texts), values, max_size=4)
    base = st.fixed_dictionaries(GOOD[path])
    anything = st.dictionaries(st.sampled_from([*fields, *GOOD[path]]), values)
    return st.one_of(st.tuples(base, odd).map(lambda pair: pair[0] | pair[1]), anything, values)

"""Figures that others were measured with, and our goals: on one NVIDIA H200, but not in the run they are printed with.

All were taken with random weights of the real shapes on one NVIDIA H200 (141 GB): torch 2.11.0+cu130, transformers
5.17.0, DeepSpeed 0.19.8, vLLM 0.26 with its graphs. A range stands where runs differed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DATE", "DEVICE", "PUBLISHED", "Published", "find"]

DATE = "2026-11-24"
DEVICE = "NVIDIA H200"

Value = float | tuple[float, float]

_EAGER, _COMPILED, _DEEPSPEED, _VLLM = (
    "transformers eager",
    "transformers static + compile",
    "DeepSpeed 0.19.8",
    "vLLM 0.26",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What was measured for one case, and what is wanted.

    Attributes:
        measure: as in `headrace bench`.
        shape: of the model.
        dtype: of its weights.
        quantize: int8 or fp8, in which those of its layers are kept instead; None if they are not.
        batch: sequences at once.
        prompt_tokens: of each; None where it does not matter.
        output_tokens: of each, likewise.
        goal: of ours; None if there is none.
        peers: by name.
    """

    measure: str
    shape: str
    dtype: str
    batch: int = 1
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    quantize: str | None = None
    goal: float | None = None
    peers: dict[str, Value] = field(default_factory=dict)


def _decode(
    shape: str, dtype: str, goal: float | None, peers: dict[str, Value], quantize: str | None = None, **case: int
) -> Published:
    load = {"batch": 1, "prompt_tokens": 128} | case
    return Published(measure="decode", shape=shape, dtype=dtype, quantize=quantize, goal=goal, peers=peers, **load)


def _batches(shape: str, dtype: str, prompt: int, figures: dict[int, tuple[float, float | None]]) -> list[Published]:
    return [
        _decode(shape, dtype, goal, {_VLLM: ms}, batch=batch, prompt_tokens=prompt)
        for batch, (ms, goal) in figures.items()
    ]


def _throughput(shape: str, dtype: str, goal: float | None, vllm: float, quantize: str | None = None) -> Published:
    return Published(
        measure="throughput",
        shape=shape,
        dtype=dtype,
        quantize=quantize,
        batch=256,
        prompt_tokens=512,
        output_tokens=256,
        goal=goal,
        peers={_VLLM: vllm},
    )


PUBLISHED: list[Published] = [
    _decode(
        "llama-8b",
        "bfloat16",
        3.75,
        {_EAGER: 28.1, _COMPILED: 6.82, _DEEPSPEED: 6.13, _VLLM: 4.93},
    ),
    _decode("llama-1b", "bfloat16", 0.75, {_EAGER: (13.7, 22.6), _VLLM: 1.47}),
    _decode("gpt2-xl", "float16", 1.1, {_EAGER: 19.7, _DEEPSPEED: 8.27, _VLLM: 2.76}),
    _decode("opt-6.7b", "float16", 3.4, {_EAGER: 9.3, _DEEPSPEED: 5.67, _VLLM: 4.72}),
    _decode("gptj-6b", "float16", 3.0, {_EAGER: 24.4, _DEEPSPEED: 4.23}),
    _decode("pythia-6.9b", "float16", 3.4, {_EAGER: 15.8}),
    _decode("bloom-7b1", "float16", 3.6, {_EAGER: 16.0}),
    _decode("falcon-7b", "float16", 3.5, {_EAGER: 22.2}),
    _decode("t5-3b", "float16", 1.0, {_EAGER: 30.8}),
    Published(
        measure="encode",
        shape="bert-large",
        dtype="float16",
        prompt_tokens=128,
        goal=0.45,
        peers={_EAGER: 7.9, _DEEPSPEED: 4.28},
    ),
    _decode("llama-8b", "bfloat16", 2.3, {_VLLM: 3.47}, "fp8"),
    _decode("llama-8b", "bfloat16", 2.3, {}, "int8"),  # DeepSpeed has such a mode, but none that runs
    # At a context of about 1,088 tokens: the middle of an output of 128 behind a prompt of 1,024.
    *_batches("llama-8b", "bfloat16", 1024, {16: (5.63, 4.5), 64: (7.63, 6.5)}),
    *_batches("llama-1b", "bfloat16", 1024, {16: (1.8, None), 64: (2.7, None)}),
    *_batches("opt-6.7b", "float16", 1024, {16: (7.1, None), 64: (14.1, None)}),
    # At about 960: GPT-2's positions end at 1,024.
    *_batches("gpt2-xl", "float16", 896, {16: (4.3, None), 64: (8.5, None)}),
    Published(
        measure="prefill",
        shape="llama-8b",
        dtype="bfloat16",
        prompt_tokens=8192,
        goal=42_000,
        peers={_VLLM: 39_000},
    ),
    _throughput("llama-8b", "bfloat16", 11_000, 9_950),
    _throughput("llama-8b", "bfloat16", 14_500, 13_200, "fp8"),
    _throughput("llama-1b", "bfloat16", None, 38_400),
    Published(measure="startup cold", shape="llama-8b", dtype="bfloat16", goal=30, peers={}),
    Published(measure="startup warm", shape="llama-8b", dtype="bfloat16", goal=10, peers={_VLLM: 115}),
    Published(measure="startup cold", shape="llama-1b", dtype="bfloat16", goal=30, peers={}),
    Published(measure="startup warm", shape="llama-1b", dtype="bfloat16", goal=10, peers={_VLLM: 74}),
]


def find(
    measure: str,
    shape: str,
    dtype: str,
    quantize: str | None = None,
    *,
    batch: int = 1,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
) -> Published | None:
    """What is known of a case."""
    asked = (measure, shape, dtype, quantize, batch)
    for entry in PUBLISHED:
        if (entry.measure, entry.shape, entry.dtype, entry.quantize, entry.batch) != asked:
            continue
        wanted = (entry.prompt_tokens, entry.output_tokens)
        lengths = (prompt_tokens, output_tokens)
        if all(known in (None, length) for known, length in zip(wanted, lengths, strict=True)):
            return entry
    return None

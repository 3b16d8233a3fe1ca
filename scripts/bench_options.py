"""Options that the commands of `headrace bench` share. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from headrace.scripts.options import option
from headrace.workers.config import QUANTIZATIONS

__all__ = [
    "case_options",
    "common_options",
    "peer_options",
    "profile_option",
    "requests_options",
    "rounds_option",
]

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_COUNT = click.IntRange(min=1)
_RATE = click.FloatRange(min=0, min_open=True)
_FOLDER = click.Path(file_okay=False, path_type=Path)

PEERS = ("transformers", "transformers-compile", "deepspeed", "vllm", "headrace-eager", "headrace-library")

_MODEL = (
    option(
        "--layers",
        heading="Model",
        metavar="N",
        type=_COUNT,
        help="Cut shapes down to so many layers: a quick look. Default: all of them.",
    ),
    option(
        "--dtype",
        heading="Model",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="Of weights and KV cache; auto takes what the shape is mostly used in, or the checkpoint's.",
    ),
    option(
        "--quantize",
        heading="Model",
        type=click.Choice(QUANTIZATIONS),
        help="Keep the weights of layers in 8 bits, quantized while they are loaded. Default: as they are.",
    ),
    option(
        "--seed", heading="Model", type=click.IntRange(0, 2**31), default=0, help="Of weights, prompts and arrivals."
    ),
)
_MACHINE = (
    option(
        "--device", heading="Machine", default="auto", help="cpu, cuda or cuda:N; auto takes a GPU if there is one."
    ),
    option(
        "--threads",
        heading="Machine",
        metavar="N",
        type=click.IntRange(1, 1024),
        help="CPU threads of each process. Default: the cores.",
    ),
    option("--enforce-eager", heading="Machine", is_flag=True, help="Capture no CUDA graphs for ours."),
    option(
        "--max-num-batched-tokens",
        heading="Machine",
        metavar="TOKENS",
        type=_COUNT,
        default=8192,
        help="Token budget of one step of ours, and of peers that have one.",
    ),
    option(
        "--read-gb-s",
        heading="Machine",
        metavar="GB/S",
        type=_RATE,
        help="How fast the device reads memory, for the floors. Default: measured first.",
    ),
    option(
        "--matmul-tflop-s",
        heading="Machine",
        metavar="TFLOP/S",
        type=_RATE,
        help="How fast it multiplies matrices, likewise. Default: measured first.",
    ),
)
_OUTPUT = (
    option(
        "--json",
        "json_path",
        heading="Output",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write the rows there, each as soon as it is measured. Default: nowhere.",
    ),
    option(
        "--plots",
        heading="Output",
        metavar="FOLDER",
        type=_FOLDER,
        help="Make pictures there; needs matplotlib. Default: none.",
    ),
)


def _all(*options: _Decorator) -> _Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(options):
            function = decorator(function)
        return function

    return decorate


def common_options(*shapes: str) -> _Decorator:
    """Of all measurements; `shapes` are measured if none are named."""
    shape = option(
        "--shape",
        "shapes",
        heading="Model",
        metavar="NAME",
        multiple=True,
        default=shapes or ("qwen-0.5b",),
        help="Shape with random weights: qwen-0.5b, llama-1b, llama-8b, gpt2-xl, opt-6.7b, gptj-6b, pythia-6.9b, "
        "bloom-7b1, falcon-7b, t5-3b, bert-large; or a model as `headrace up` takes it, with its own. May be repeated.",
    )
    return _all(shape, *_MODEL, *_MACHINE, *_OUTPUT)


peer_options = _all(
    option(
        "--peer",
        "peers",
        heading="Peers",
        multiple=True,
        type=click.Choice(PEERS),
        help="Who is measured beside ours, with the same shapes and seed; may be repeated. Default: transformers, and "
        "deepspeed and vllm where they are installed.",
    ),
    option("--no-peers", heading="Peers", is_flag=True, help="Nobody."),
)

profile_option = option(
    "--profile",
    heading="Output",
    metavar="FOLDER",
    type=_FOLDER,
    help="Write traces of torch's profiler there, and show the longest kernels of ours. Default: no profile.",
)


def rounds_option(default: int) -> _Decorator:
    """How often each is measured."""
    return option(
        "--rounds",
        heading="Load",
        metavar="N",
        type=_COUNT,
        default=default,
        help="Timed rounds, after one that is not.",
    )


def _lengths(prompt: int, output: int | None) -> list[_Decorator]:
    lengths = [
        option(
            "--prompt-tokens",
            heading="Load",
            metavar="TOKENS",
            type=_COUNT,
            default=prompt,
            help="Of each prompt; random ones.",
        )
    ]
    if output is not None:
        lengths.append(
            option(
                "--output-tokens",
                heading="Load",
                metavar="TOKENS",
                type=_COUNT,
                default=output,
                help="Of each answer; end tokens are ignored.",
            )
        )
    return lengths


_SAMPLING = (
    option(
        "--temperature",
        heading="Load",
        metavar="VALUE",
        type=click.FloatRange(0, 100),
        default=0.0,
        help="Draw tokens so, ours and the peers'; 0 takes the likeliest.",
    ),
    option(
        "--top-p",
        heading="Load",
        metavar="SHARE",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        help="Draw them from the likeliest that have this share of the probability together.",
    ),
)


def case_options(*, batch: int, prompt: int, output: int | None, sampling: bool = False) -> _Decorator:
    """Batches, and lengths; how tokens are drawn, if that can be said."""
    batches = option(
        "--batch",
        "batches",
        heading="Load",
        metavar="N",
        type=_COUNT,
        multiple=True,
        default=(batch,),
        help="Sequences at once; may be repeated.",
    )
    return _all(batches, *_lengths(prompt, output), *(_SAMPLING if sampling else ()))


def requests_options(*, requests: int, prompt: int, output: int) -> _Decorator:
    """How many requests, and lengths."""
    count = option("--requests", heading="Load", metavar="N", type=_COUNT, default=requests, help="Requests in all.")
    return _all(count, *_lengths(prompt, output))

"""Milliseconds per decode step, in process, for models of well-known shapes with random weights.

    python -m benchmarks.decode                        all shapes on the GPU
    python -m benchmarks.decode --shape llama-1b --batch 1 --batch 64

Three engines take the same weights in turn: transformers as it is (`generate`, eager), ours without and with CUDA
graphs. A figure is the median step, all sequences decoding, greedy, from a prompt of `--prompt-tokens` each. The floor
is the bytes that a step must read (weights, head, keys and values) at the speed at which this device reads memory; what
is written and computed comes on top of it.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}

# name -> class of transformers, dtype, and the sizes of the checkpoint of that name
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny": ("Llama", "float32", _TINY | {"num_key_value_heads": 2, "vocab_size": 300}),
    "qwen-0.5b": (
        "Qwen2",
        "bfloat16",
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    ),
    "llama-1b": (
        "Llama",
        "bfloat16",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    ),
    "llama-8b": (
        "Llama",
        "bfloat16",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "gpt2-xl": ("GPT2", "float16", {"n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 4096}),
}


@dataclass(frozen=True)
class Row:
    """One shape at one size of batch, in milliseconds per step; None where it was not measured."""

    shape: str
    batch: int
    floor_ms: float
    graphs_ms: float | None
    eager_ms: float
    transformers_ms: float | None


@click.command(context_settings={"show_default": True})
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Repeatable; all but tiny.")
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 16, 64), help="Sequences; repeatable.")
@click.option("--prompt-tokens", default=512)
@click.option("--steps", default=48)
@click.option("--device", default="cuda")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results there.")
def main(
    shapes: tuple[str, ...],
    batches: tuple[int, ...],
    prompt_tokens: int,
    steps: int,
    device: str,
    json_path: Path | None,
) -> None:
    """Measure decode steps beside transformers."""
    import torch
    import transformers

    torch.set_grad_enabled(False)
    bandwidth = _read_bandwidth(device)
    facts = {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "read_gb_s": round(bandwidth / 1e9),
        "prompt_tokens": prompt_tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    click.echo(f"{'shape':<10} {'batch':>5} {'floor':>8} {'graphs':>8} {'eager':>8} {'transformers':>13}  ms per step")
    rows = []
    for shape in shapes or [name for name in SHAPES if name != "tiny"]:
        for row in _measure(shape, batches, prompt_tokens, steps, device, bandwidth):
            rows.append(row)
            graphs, peer = (f"{ms:.3f}" if ms else "-" for ms in (row.graphs_ms, row.transformers_ms))
            click.echo(f"{shape:<10} {row.batch:>5} {row.floor_ms:>8.3f} {graphs:>8} {row.eager_ms:>8.3f} {peer:>13}")
    if json_path is not None:
        json_path.write_text(json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _measure(
    shape: str, batches: tuple[int, ...], prompt: int, steps: int, device: str, bandwidth: float
) -> Iterator[Row]:
    import torch

    module = _random(shape, device)
    peers = {batch: _transformers_ms(module, batch, prompt, steps) for batch in batches}
    model, card = _injected(module, device)
    del module
    figures: dict[bool, dict[int, float]] = {}
    for graphs in (False, True) if device.startswith("cuda") else (False,):
        engine = _engine(model, card, max(batches), prompt + steps, graphs)
        figures[graphs] = {batch: _engine_ms(engine, batch, prompt, steps) for batch in batches}
        del engine
        gc.collect()
    weights = _bytes_per_step(model)
    kv = _kv_bytes_per_token(model)
    for batch in batches:
        floor = (weights + batch * (prompt + steps / 2) * kv) / bandwidth * 1e3
        graphs_ms = figures[True][batch] if True in figures else None
        yield Row(shape, batch, round(floor, 3), graphs_ms, figures[False][batch], peers[batch])
    del model
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _random(shape: str, device: str) -> Any:
    """A model of transformers whose values stay finite, whatever they mean."""
    import torch
    import transformers

    name, dtype, sizes = SHAPES[shape]
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(**{"max_position_embeddings": 4096, **sizes} if name != "GPT2" else sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


class _Clock:
    """A streamer of transformers that only looks at the time when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        """Tokens are on the host; first come those of the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more comes."""


def _transformers_ms(module: Any, batch: int, prompt: int, steps: int) -> float:
    import torch

    ids = torch.randint(0, 250, (batch, prompt), device=module.device)
    clock = _Clock()
    module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    gaps = [after - before for before, after in itertools.pairwise(clock.times[2:])]
    return round(statistics.median(gaps) * 1e3, 3)


def _injected(module: Any, device: str) -> tuple[Any, Any]:
    """Our model with the module's weights, and a card for it."""
    from headrace.card import ModelCard
    from headrace.kernels.inject import inject
    from headrace.kernels.policies import find_policy

    architecture = type(module).__name__
    model = inject(module, find_policy(architecture), dtype=module.dtype, device=device).model
    spec = model.spec
    card = ModelCard(
        name="random",
        architecture=architecture,
        family="random",
        fingerprint="random",
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_positions,
    )
    return model, card


def _engine(model: Any, card: Any, batch: int, length: int, graphs: bool) -> Any:
    from headrace.workers.engine import Engine, EngineConfig

    config = EngineConfig(
        max_num_seqs=batch,
        kv_tokens=batch * (length + 32),
        max_model_len=length + 16,
        cuda_graphs=graphs,
        prefix_cache=False,
        max_batch_tokens=8192,
    )
    engine = Engine(model, card, config)
    engine.warm_up()
    return engine


def _engine_ms(engine: Any, batch: int, prompt: int, steps: int) -> float:
    """The median of the steps in which all sequences decode."""
    import torch

    from headrace.messages import Assignment, pack_tokens

    for number in range(batch):
        ids = torch.randint(0, 250, (prompt,), generator=torch.Generator().manual_seed(number)).tolist()
        sampling = {"temperature": 0.0, "max_tokens": steps, "ignore_eos": True}
        engine.add(
            Assignment(request=bytes([number]), choice=0, attempt=1, prompt=pack_tokens(ids), sampling=sampling), 0
        )
    times = []
    while engine.has_work:
        started = time.perf_counter()
        result = engine.step(0.0)  # ends when the tokens are on the host
        if len(result.runs) == batch and not engine._scheduler.num_waiting:
            times.append(time.perf_counter() - started)
    return round(statistics.median(times[2:]) * 1e3, 3)


def _bytes_per_step(model: Any) -> int:
    """Of weights; of an embedding that is no head, single rows are read."""
    skipped = set() if model.spec.head.tied else {"embedding.weight"}
    return sum(p.nbytes for name, p in model.named_parameters() if name not in skipped | {"positions.weight"})


def _kv_bytes_per_token(model: Any) -> int:
    from headrace.kernels.kv import KVCache

    return KVCache.bytes_per_block(model.spec, 1, model.embedding.weight.dtype)


def _read_bandwidth(device: str) -> float:
    """Bytes per second that a sum over 2 GiB reads, at best."""
    import torch

    values = torch.ones(2**29, device=device)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        values.sum().item()
        best = min(best, time.perf_counter() - started)
    return values.nbytes / best


if __name__ == "__main__":
    main()

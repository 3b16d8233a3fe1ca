"""The engine beside `transformers.generate`: one process, the same weights, dtype, threads and prompts, taking turns.

    python -m benchmarks.engine                           the default model, batch 1 and 8
    python -m benchmarks.engine --model DIR --batch 4     a model folder
    python -m benchmarks.engine --shape                   random weights of the default model's shape: nothing to fetch

Both are greedy, ignore end tokens and start from the same token ids. A row is the median of the rounds; `ratio` is the
median of the rounds' own ratios, so a slow spell of the machine hits both sides. The floor counts the bytes that a step
must read (weights and head; keys and values are little here) at the speed at which this machine reads memory.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Row:
    """One batch size; speeds are output tokens per second over the whole call, prompt included."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    headrace_tok_s: float
    headrace_decode_tok_s: float
    headrace_first_token_s: float
    transformers_tok_s: float
    ratio: float
    floor_decode_tok_s: float


@click.command(context_settings={"show_default": True})
@click.option("--model", help="Folder, hub id or .gguf file.  [default: the default model]")
@click.option("--shape", is_flag=True, help="Random weights of the default model's shape instead of a model.")
@click.option("--dtype", default="bfloat16", help="Of weights and cache, for both.")
@click.option("--threads", default=2, help="Compute threads, for both.")
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 8), help="Sequences at once; repeatable.")
@click.option("--prompt-tokens", default=64)
@click.option("--new-tokens", default=64)
@click.option("--rounds", default=5)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results there.")
def main(
    model: str | None,
    shape: bool,
    dtype: str,
    threads: int,
    batches: tuple[int, ...],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Measure the engine on CPU beside transformers."""
    # As in the worker processes: threads that spin while they wait collapse as soon as anybody else needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    with _folder(model, shape) as folder:
        ours, theirs = _Headrace(folder, dtype, max(batches), prompt_tokens + new_tokens), _Transformers(folder, dtype)
        bandwidth = _read_bandwidth()
        rows = [_measure(ours, theirs, n, prompt_tokens, new_tokens, rounds, bandwidth) for n in batches]
    facts = {
        "model": ours.name,
        "dtype": dtype,
        "threads": threads,
        "cpu": platform.processor() or platform.machine(),
        "read_gb_s": round(bandwidth / 1e9, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    _print(facts, rows)
    if json_path is not None:
        json_path.write_text(json.dumps(facts | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _measure(ours: Any, theirs: Any, batch: int, prompt: int, new: int, rounds: int, bandwidth: float) -> Row:
    import torch

    generator = torch.Generator().manual_seed(batch)
    speeds, decodes, firsts, peers, ratios = [], [], [], [], []
    for round_ in range(rounds + 1):
        # New prompts each round: the prefix cache must not spare us what transformers has to do.
        ids = torch.randint(0, ours.vocab_size, (batch, prompt), generator=generator)
        total, first = ours.generate(ids, new)
        peer = theirs.generate(ids, new)
        if round_ == 0:
            continue  # the first one touches the memory
        speeds.append(batch * new / total)
        decodes.append(batch * (new - 1) / (total - first))
        firsts.append(first)
        peers.append(batch * new / peer)
        ratios.append(peer / total)
    return Row(
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        headrace_tok_s=round(statistics.median(speeds), 2),
        headrace_decode_tok_s=round(statistics.median(decodes), 2),
        headrace_first_token_s=round(statistics.median(firsts), 3),
        transformers_tok_s=round(statistics.median(peers), 2),
        ratio=round(statistics.median(ratios), 2),
        floor_decode_tok_s=round(batch * bandwidth / ours.bytes_per_step, 1),
    )


class _Headrace:
    def __init__(self, folder: Path, dtype: str, batch: int, length: int) -> None:
        from headrace.workers.engine import Engine, EngineConfig
        from headrace.workers.engines import load_engine

        config = EngineConfig(dtype=dtype, kv_tokens=batch * (length + 32), max_num_seqs=batch)
        engine = load_engine(folder, config)
        assert isinstance(engine, Engine), "only models that generate are compared"
        self._engine = engine
        self._engine.warm_up()
        self.name = self._engine.card.name
        self.vocab_size = self._engine.card.vocab_size
        parameters = dict(self._engine._runner.model.named_parameters())
        # Of the embedding a step reads single rows; as the head it was packed, which made it a parameter of its own.
        read = [p for name, p in parameters.items() if name != "embedding.weight" or "head.weight" not in parameters]
        self.bytes_per_step = sum(p.numel() * p.element_size() for p in read)

    def generate(self, ids: Any, new: int) -> tuple[float, float]:
        """Seconds for all tokens, and until every sequence has its first."""
        from headrace.messages import Assignment, pack_tokens

        sampling = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True}
        started = time.perf_counter()
        for row in ids.tolist():
            request = os.urandom(16)
            prompt = pack_tokens(row)
            self._engine.add(Assignment(request=request, choice=0, attempt=1, prompt=prompt, sampling=sampling), 0.0)
        count, first = 0, 0.0
        while self._engine.has_work:
            count += len(self._engine.step(0.0).runs)
            if not first and count >= len(ids):
                first = time.perf_counter() - started
        assert count == len(ids) * new
        return time.perf_counter() - started, first


class _Transformers:
    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(self, ids: Any, new: int) -> float:
        """Seconds for all tokens."""
        import torch

        started = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=0,
        )
        assert out.shape[1] == ids.shape[1] + new
        return time.perf_counter() - started


def _read_bandwidth() -> float:
    """Bytes per second that a sum over more memory than the caches hold reads, at best."""
    import torch

    values = torch.ones(2**29)  # 2 GiB: some caches hold half of one
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - started)
    return values.nbytes / best


@contextmanager
def _folder(model: str | None, shape: bool) -> Iterator[Path]:
    if not shape:
        from headrace.workers.models import resolve

        yield resolve(model)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "random-0.5b"
        _save_random(folder)
        yield folder


def _save_random(folder: Path) -> None:
    """A model of the default model's shape (see its config.json) that speaks nonsense."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))


def _print(facts: dict[str, Any], rows: list[Row]) -> None:
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    click.echo(
        f"{'batch':>5} {'headrace':>12} {'transformers':>13} {'ratio':>6} {'decode':>8} {'floor':>8} {'first':>8}"
    )
    for row in rows:
        click.echo(
            f"{row.batch:>5} {row.headrace_tok_s:>6.1f} tok/s {row.transformers_tok_s:>7.1f} tok/s {row.ratio:>5.2f}x "
            f"{row.headrace_decode_tok_s:>8.1f} {row.floor_decode_tok_s:>8.1f} {row.headrace_first_token_s:>6.3f} s"
        )


if __name__ == "__main__":
    main()

"""Our engine as a subject, driven as the worker of a group drives it, without sockets. Imports torch when used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.benchmarks.measure import Timeline
from headrace.benchmarks.models import random_module, spec_of
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.subject import Room
from headrace.workers.config import EngineConfig
from headrace.workers.rank import keep_kernels

if TYPE_CHECKING:
    import torch

__all__ = ["Headrace", "config_for"]

_BLOCK = 16  # tokens of a KV block


class Headrace:
    """The engine, with CUDA graphs or without."""

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        keep_kernels()
        self._device = device
        self._graphs = graphs
        self._engine: Any = None

    def load(self, source: Source, room: Room) -> dict[str, Any]:
        """The engine of a model, warm."""
        import torch

        torch.set_grad_enabled(False)
        started = time.perf_counter()
        max_positions = spec_of(source).max_positions
        config = config_for(room, source, max_positions, device=str(self._device), graphs=self._graphs)
        self._engine = self._from_folder(source, config) if source.folder else self._from_shape(source, config, room)
        loaded = time.perf_counter()
        self._engine.warm_up()
        return {"load_s": loaded - started, "warm_up_s": time.perf_counter() - loaded}

    def generate(
        self,
        prompts: list[list[int]],
        output_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_decode: Callable[[], None] | None = None,
    ) -> Timeline:
        """As a leader would: all requests at once, then step after step."""
        from headrace.messages import Assignment, pack_tokens

        engine, batch = self._engine, len(prompts)
        sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": output_tokens, "ignore_eos": True}
        waiting = []
        for prompt in prompts:
            request = os.urandom(16)
            waiting.append(
                Assignment(request=request, choice=0, attempt=1, prompt=pack_tokens(prompt), sampling=sampling)
            )
        begun: set[bytes] = set()
        count, first, gaps = 0, 0.0, []
        started = time.perf_counter()
        for assignment in waiting:
            engine.add(assignment, 0.0)
        before: float | None = None  # when the last step ended, if all sequences decoded in it
        while engine.has_work:
            result = engine.step(0.0)
            now = time.perf_counter()
            if result.refusals:
                raise RuntimeError(str(result.refusals[0].error.get("message", "refused")))
            count += len(result.runs)
            if len(begun) < batch:
                begun.update(run.request for run in result.runs)
                if len(begun) == batch:
                    first = now - started
                    if on_decode is not None:
                        on_decode()
                before = None
            if len(result.runs) == batch:
                if before is not None:
                    gaps.append(now - before)
                before = now
            else:
                before = None
        total = time.perf_counter() - started
        assert count == batch * output_tokens, f"{count} tokens instead of {batch * output_tokens}"
        return Timeline(total=total, first=first, gaps=gaps)

    def encode(self, texts: list[list[int]]) -> Timeline:
        """One vector for each text."""
        from headrace.messages import Assignment, pack_tokens
        from headrace.tasks import EMBED

        waiting = [
            Assignment(request=os.urandom(16), choice=0, attempt=1, prompt=pack_tokens(text), sampling={}, task=EMBED)
            for text in texts
        ]
        started = time.perf_counter()
        for assignment in waiting:
            self._engine.add(assignment, 0.0)
        count = 0
        while self._engine.has_work:
            result = self._engine.step(0.0)
            if result.refusals:
                raise RuntimeError(str(result.refusals[0].error.get("message", "refused")))
            count += len(result.runs)
        total = time.perf_counter() - started
        assert count == len(texts)
        return Timeline(total=total)

    def unload(self) -> None:
        """Let go of the engine."""
        self._engine = None

    def _from_folder(self, source: Source, config: EngineConfig) -> Any:
        from headrace.workers.engines import load_engine

        assert source.folder is not None
        return load_engine(Path(source.folder), config)

    def _from_shape(self, source: Source, config: EngineConfig, room: Room) -> Any:
        """The values that a peer's module has, in a model of ours."""
        from headrace.card import ModelCard
        from headrace.kernels.inject import inject
        from headrace.kernels.policies import find_policy
        from headrace.kernels.quantize import find_scheme
        from headrace.tasks import EMBED, GENERATE
        from headrace.workers.encoder_engine import EncoderEngine
        from headrace.workers.engine import Engine

        module = random_module(source, self._device, room.seed)
        architecture, scheme = type(module).__name__, find_scheme(source.quantize, self._device)
        policy = find_policy(architecture)
        model = inject(module, policy, dtype=module.dtype, device=self._device, scheme=scheme).model
        spec = model.spec
        card = ModelCard(
            name=source.name,
            architecture=architecture,
            family=policy.family,
            fingerprint="random",
            vocab_size=spec.vocab_size,
            max_model_len=spec.max_positions,
            quantization=source.quantize or "",
            tasks=(EMBED,) if spec.is_encoder else (GENERATE,),
            embedding_size=spec.hidden_size if spec.is_encoder else 0,
        )
        return (EncoderEngine if spec.is_encoder else Engine)(model, card, config)


def config_for(room: Room, source: Source, max_positions: int, *, device: str, graphs: bool) -> EngineConfig:
    """Settings of an engine of a model that has the room, and nothing cached from prompt to prompt."""
    return EngineConfig(
        max_model_len=min(room.length + _BLOCK, max_positions),
        max_num_seqs=room.sequences,
        max_batch_tokens=room.step_tokens,
        block_size=_BLOCK,
        # The last block of a sequence, and of its source in an encoder-decoder, is half empty; one may be taken ahead.
        kv_tokens=room.tokens + 4 * _BLOCK * room.sequences,
        prefix_cache=False,
        cuda_graphs=graphs,
        dtype=source.dtype,
        quantize=source.quantize,
        device=device,
    )

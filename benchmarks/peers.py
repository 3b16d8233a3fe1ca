"""Others as subjects: transformers as it is and compiled, DeepSpeed's kernel injection, vLLM. Imported when used.

A peer that is not installed, cannot quantize as it is asked to, or fails, says so in its row. DeepSpeed and vLLM are
driven by their public names.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from headrace.benchmarks.measure import Timeline
from headrace.benchmarks.models import config_of, peer_module, spec_of
from headrace.benchmarks.shapes import SHAPES, Source
from headrace.benchmarks.subject import Room
from headrace.errors import UnsupportedModelError
from headrace.workers.config import QUANTIZATIONS

if TYPE_CHECKING:
    import torch

__all__ = ["VLLM", "CompiledTransformers", "DeepSpeed", "Library", "Transformers"]

_GREEDY = {"do_sample": False}


class Transformers:
    """`generate` and the plain call, eager."""

    package = "transformers"
    schemes: tuple[str, ...] = ()  # in which it keeps weights, if asked to

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = None

    def load(self, source: Source, room: Room) -> dict[str, Any]:
        """The module.

        Raises:
            UnsupportedModelError: it is to be quantized as this peer does not do it.
        """
        _check(self.package, source, self.schemes)
        import torch

        torch.set_grad_enabled(False)
        started = time.perf_counter()
        self._module = self._made(peer_module(source, self._device, room.seed), source, room)
        return {"version": importlib.metadata.version(self.package), "load_s": time.perf_counter() - started}

    def generate(
        self,
        prompts: list[list[int]],
        output_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_decode: Callable[[], None] | None = None,
    ) -> Timeline:
        """As its users do, with a streamer that only looks at the time."""
        import torch

        clock = _Clock(on_decode)
        started = time.perf_counter()
        ids = torch.tensor(prompts, device=self._device)
        out = self._module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            **_drawn(temperature, top_p),
            repetition_penalty=1.0,
            pad_token_id=0,
            streamer=clock,
            **self._settings(),
        )
        total = time.perf_counter() - started
        times = clock.times[1:]  # the first thing put is the prompt
        assert len(times) == output_tokens, f"{len(times)} tokens instead of {output_tokens}"
        assert len(out) == len(prompts)
        gaps = [after - before for before, after in itertools.pairwise(times)]
        return Timeline(total=total, first=times[0] - started, gaps=gaps)

    def encode(self, texts: list[list[int]]) -> Timeline:
        """The states of all texts, on the host once they are there."""
        import torch

        started = time.perf_counter()
        ids = torch.tensor(texts, device=self._device)
        states = self._module(ids, attention_mask=torch.ones_like(ids))[0]
        states[:, 0].float().cpu()
        return Timeline(total=time.perf_counter() - started)

    def unload(self) -> None:
        """Let go of the module."""
        self._module = None

    def _made(self, module: Any, source: Source, room: Room) -> Any:
        return module

    def _settings(self) -> dict[str, Any]:
        return {}


class CompiledTransformers(Transformers):
    """`generate` with a static cache, which transformers compiles; the first call takes as long as that does."""

    def _settings(self) -> dict[str, Any]:
        from transformers import CompileConfig

        compile_config = CompileConfig()
        compile_config._compile_all_devices = True  # transformers compiles for GPUs only, unless it is told to
        return {"cache_implementation": "static", "compile_config": compile_config}


class DeepSpeed(Transformers):
    """Its kernels injected into the module, as `init_inference` of DeepSpeed does it."""

    package = "deepspeed"

    def _made(self, module: Any, source: Source, room: Room) -> Any:
        import deepspeed

        engine = deepspeed.init_inference(
            module, dtype=module.dtype, replace_with_kernel_inject=True, max_out_tokens=room.length + 1
        )
        return engine.module


class Library(Transformers):
    """Our own kernels injected into the module, as `headrace.init_inference` does it, called as transformers is."""

    package = "headrace"
    schemes = QUANTIZATIONS

    def _made(self, module: Any, source: Source, room: Room) -> Any:
        from headrace.workers.inference import init_inference

        return init_inference(module, dtype=module.dtype, quantize=source.quantize, device=self._device)

    def unload(self) -> None:
        """Free what the engine holds."""
        if self._module is not None:
            self._module.destroy()
        super().unload()


def _check(package: str, source: Source, schemes: Sequence[str]) -> None:
    """Refuse a model that a peer cannot quantize while it loads it: weights of 16 bits would be compared with 8."""
    if source.quantize is not None and source.quantize not in schemes:
        raise UnsupportedModelError(
            f"{package} has no mode here in which it keeps a model's weights as {source.quantize}", param="peer"
        )


def _drawn(temperature: float, top_p: float) -> dict[str, Any]:
    """How transformers is told to draw tokens; it would keep the fifty likeliest if it were not told otherwise."""
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else _GREEDY


class _Clock:
    """A streamer of transformers that only looks at the time when tokens come."""

    def __init__(self, on_decode: Callable[[], None] | None) -> None:
        self.times: list[float] = []
        self._on_decode = on_decode

    def put(self, tokens: Any) -> None:
        """Tokens are on the host; first come those of the prompt."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2 and self._on_decode is not None:
            self._on_decode()

    def end(self) -> None:
        """Nothing more comes."""


class VLLM:
    """Its engine in its own process, stepped as its offline class does it, without text."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._llm: Any = None
        self._folder: TemporaryDirectory[str] | None = None
        self._requests = 0

    def load(self, source: Source, room: Room) -> dict[str, Any]:
        """The engine, warm; of a shape with weights of its own making.

        Raises:
            UnsupportedModelError: it is to be quantized as vLLM does not do it while it loads, or is an encoder, or is
                to run without a GPU.
        """
        _check("vLLM", source, ("fp8",))
        import torch
        from vllm import LLM

        self._check_measured(source)

        started = time.perf_counter()
        folder, load_format = source.folder, "auto"
        if folder is None:
            self._folder = TemporaryDirectory(prefix="hr")
            folder, load_format = self._folder.name, "dummy"
            assert source.shape is not None
            config_of(source).save_pretrained(folder)
        free, total = torch.cuda.mem_get_info(self._device)
        self._llm = LLM(
            model=str(Path(folder)),
            load_format=load_format,
            dtype=source.dtype if source.shape is None else SHAPES[source.shape].dtype,
            quantization=source.quantize,
            skip_tokenizer_init=True,
            max_model_len=room.length + 1,
            max_num_seqs=room.sequences,
            max_num_batched_tokens=max(room.step_tokens, room.length + 1),
            enable_prefix_caching=False,
            gpu_memory_utilization=round(0.85 * free / total, 3),  # of what the others leave
            seed=room.seed,
        )
        return {"version": importlib.metadata.version("vllm"), "load_s": time.perf_counter() - started}

    def generate(
        self,
        prompts: list[list[int]],
        output_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_decode: Callable[[], None] | None = None,
    ) -> Timeline:
        """All requests at once, then step after step."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        sampling = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        for prompt in prompts:
            self._requests += 1
            engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, sampling)
        begun: set[str] = set()
        ended: list[Any] = []
        first, gaps, before = 0.0, [], None
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            ended += [output for output in outputs if output.finished]
            if len(begun) < len(prompts):
                begun.update(output.request_id for output in outputs)
                first = now - started
                before = None
                if len(begun) == len(prompts) and on_decode is not None:
                    on_decode()
            if len(outputs) == len(prompts):
                if before is not None:
                    gaps.append(now - before)
                before = now
            else:
                before = None
        total = time.perf_counter() - started
        counts = [len(output.outputs[0].token_ids) for output in ended]
        assert counts == [output_tokens] * len(prompts), f"{counts} tokens instead of {output_tokens} each"
        return Timeline(total=total, first=first, gaps=gaps)

    def encode(self, texts: list[list[int]]) -> Timeline:
        """Never asked for: encoders are not loaded."""
        raise AssertionError("vLLM loads no encoder here")

    def unload(self) -> None:
        """Let go of the engine."""
        self._llm = None
        if self._folder is not None:
            self._folder.cleanup()

    def _check_measured(self, source: Source) -> None:
        """Refuse at once, which costs the cells of the table, what would fail only after the engine's long start."""
        if self._device.type != "cuda":
            raise UnsupportedModelError(f"vLLM is measured on GPUs only, not on {self._device.type}", param="peer")
        if spec_of(source).is_encoder:  # it reads texts by another class and another engine
            raise UnsupportedModelError("vLLM is measured with models that generate only", param="peer")

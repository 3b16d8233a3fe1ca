"""The process that knows the device and the models, so that the one that reports needs no torch.

facts     of device and software
ceilings  what the device can do
model     what a source is: its vocabulary, the longest text, whether it generates
least     seconds that a case takes at the least
work      what matrix products and attention must read and compute in a decode step, or in all of any other case
write     a folder of a shape
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.benchmarks.costs import Ceilings, Cost, Costs
from headrace.benchmarks.measure import Case
from headrace.benchmarks.shapes import Source
from headrace.benchmarks.worker import answer

__all__ = ["survey"]

_FP8 = "float8_e4m3fn"


def survey(*, device: str, threads: int) -> None:
    """Be the surveyor.

    Raises:
        ConfigError: there is no such device.
    """
    from headrace.workers.device import pick_device
    from headrace.workers.rank_threads import use_threads

    use_threads(threads, crowded=False)
    surveyor = _Surveyor(pick_device(device))
    answer({name: getattr(surveyor, name) for name in ("facts", "ceilings", "model", "least", "work", "write")})


class _Surveyor:
    def __init__(self, device: Any) -> None:
        self._device = device
        self._specs: dict[Source, tuple[Any, Any]] = {}

    def facts(self) -> dict[str, Any]:
        import torch

        gpu = self._device.type == "cuda"
        found = {
            "device": torch.cuda.get_device_name(self._device) if gpu else f"CPU, {torch.get_num_threads()} threads",
            "machine": platform.platform(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }
        for package in ("headrace", "torch", "triton", "transformers"):
            found[package] = _version(package)
        return found | _commit()

    def ceilings(self, dtypes: list[str], read: float | None, matmul: float | None) -> dict[str, Any]:
        import torch

        from headrace.benchmarks.ceilings import matmul_rate, read_rate
        from headrace.kernels.quantize import SCHEMES

        rates = {name: matmul or matmul_rate(self._device, getattr(torch, name)) for name in dtypes}
        if self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) >= SCHEMES["fp8"].capability:
            # Of numbers half as wide, tensor cores multiply twice as many.
            rates[_FP8] = 2 * matmul if matmul else matmul_rate(self._device, torch.float8_e4m3fn)
        read = read or read_rate(self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # it belongs to those who are measured
        return {"read": read, "matmul": rates}

    def model(self, source: dict[str, Any]) -> dict[str, Any]:
        spec, dtype = self._spec(Source(**source))
        return {
            "vocab_size": spec.vocab_size,
            "max_positions": spec.max_positions,
            "generates": not spec.is_encoder,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def least(self, case: dict[str, Any], read: float, matmul: dict[str, float]) -> float:
        parts, ceilings = self._costs(case, read, matmul)
        return sum(part.seconds(ceilings) for part in parts)

    def work(self, case: dict[str, Any], read: float, matmul: dict[str, float]) -> dict[str, dict[str, float]]:
        """By kind: `bytes` and `flops`, and the least seconds for each of the two, `reading` and `computing`."""
        parts, ceilings = self._costs(case, read, matmul)
        whole = sum(parts, Cost())
        return {
            kind: {
                "bytes": cost.bytes,
                "flops": cost.flops,
                "reading": cost.reading(ceilings),
                "computing": cost.computing(ceilings),
            }
            for kind, cost in (("matmul", whole.matmul), ("attention", whole.attention or Cost()))
        }

    def write(self, source: dict[str, Any], folder: str, seed: int) -> None:
        import torch

        from headrace.benchmarks.models import write_folder

        write_folder(Source(**source), Path(folder), self._device, seed)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _costs(self, case: dict[str, Any], read: float, matmul: dict[str, float]) -> tuple[Sequence[Cost], Ceilings]:
        """What a case costs, part by part, and what the device can do in its types."""
        from headrace.benchmarks.measures import MEASURES

        asked = Case(**case | {"source": Source(**case["source"])})
        spec, dtype = self._spec(asked.source)
        costs = Costs(spec, dtype.itemsize, quantized=asked.source.quantize is not None)
        fp8 = matmul.get(_FP8) if asked.source.quantize == "fp8" else None
        ceilings = Ceilings(read=read, matmul=matmul[str(dtype).removeprefix("torch.")], fp8=fp8)
        return MEASURES[asked.measure].cost(costs, asked), ceilings

    def _spec(self, source: Source) -> tuple[Any, Any]:
        from headrace.benchmarks.models import dtype_of, spec_of

        if source not in self._specs:
            self._specs[source] = spec_of(source), dtype_of(source)
        return self._specs[source]


def _commit() -> dict[str, str]:
    """Of a checkout, what is checked out, and whether it was changed since; of what is installed, nothing."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {}
    asked = []
    for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):  # none is installed, or it does not know the folder
            return {}
        asked.append(done.stdout.strip())
    return {"commit": asked[0] + ("+changes" if asked[1] else "")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "headrace":
            from headrace._version import __version__

            return __version__
        return "none"

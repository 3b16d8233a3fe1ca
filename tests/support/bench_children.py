"""Child processes for tests of the benchmark: a worker that fails in every way, and subjects that compute nothing."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from headrace.benchmarks.measure import Timeline
from headrace.benchmarks.worker import answer
from headrace.errors import ConfigError, ModelFilesError

__all__ = ["fake_subject", "unable", "work"]


def work() -> None:
    """Carry out orders, or not."""
    answer(
        {
            "double": lambda number: 2 * number,
            "divide": lambda number: 1 / number,
            "import": lambda: __import__("no_such_package"),
            "load": _load,
            "quit": lambda code: os._exit(code),
            "wait": lambda seconds: time.sleep(seconds),
        }
    )


def _load() -> None:
    raise ModelFilesError("The file is damaged; fetch it again.", param="model")


def unable() -> None:
    """Not even begin."""
    raise ConfigError("There is no such device.")


def fake_subject(*, name: str, device: str, threads: int) -> None:
    """A subject whose steps take no time, but for what is asked of vllm: it cannot load a source called "refused", dies
    of two sequences, and breaks at three."""

    def load(source: dict[str, Any], room: dict[str, Any]) -> dict[str, Any]:
        if name == "vllm" and source["name"] == "refused":
            raise MemoryError("12 GB are missing")
        return {}

    def generate(prompts: dict[str, int], output_tokens: int, sampling: dict[str, float]) -> dict[str, Any]:
        if name == "vllm" and prompts["count"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "vllm" and prompts["count"] == 3:
            raise RuntimeError("an illegal memory access was encountered\nand more")
        step = 0.001 if name == "headrace" else 0.002
        return Timeline(total=1.0, first=0.1, gaps=[step] * (output_tokens - 1)).to_wire()

    answer({"load": load, "generate": generate, "unload": lambda: None})

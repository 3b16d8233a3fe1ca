"""What CUDA graphs took of a GPU, compared with what was kept for them: an estimate, and the cache has the rest.

Most of what graphs take is not torch's: the driver keeps a description of each, of which only it knows the size. It
tells what is free for all, so what other programs take meanwhile counts as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from headrace.workers.memory import GIB, GpuMemory, Needs

__all__ = ["GraphMemory", "compared"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphMemory:
    """Of one engine, in bytes.

    Attributes:
        kept: for graphs.
        spare: that nothing else was promised to, either.
    """

    kept: int
    spare: int

    @classmethod
    def of(cls, memory: GpuMemory, needs: Needs, tokens: int) -> GraphMemory:
        """What an engine has for them beside a cache of so many tokens."""
        return cls(kept=needs.graphs, spare=max(0, memory.allowed - needs.fixed - needs.cache(tokens)))

    def judge(self, taken: int) -> None:
        """Say what they took, and warn if something else may lack it."""
        logger.info("CUDA graphs took %s of the %s that were kept for them.", _gib(taken), _gib(self.kept))
        if taken > self.kept + self.spare:
            logger.warning(
                "CUDA graphs took %s, more than the %s that were left for them, so memory may run short under load. "
                "Start with a lower --max-num-seqs or --kv-tokens, or with --enforce-eager, which has no graphs and is "
                "slower. If nothing else was started on this GPU meanwhile, please report it: then it is our estimate "
                "that is wrong.",
                _gib(taken),
                _gib(self.kept + self.spare),
            )


@contextmanager
def compared(memory: GraphMemory | None) -> Iterator[None]:
    """Within, graphs are captured on the current GPU; afterwards what they took is compared with what was kept for
    them, if that is known."""
    if memory is None:
        yield
        return
    before = _free()
    yield
    memory.judge(before - _free())


def _free() -> int:
    """What the driver has to give, once torch has given back what it does not use."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"

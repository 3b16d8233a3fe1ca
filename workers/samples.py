"""Which bytes of a file of weights stand for all of them in a model's fingerprint. Light to import.

They are read at every start, so what begins early (`headrace.workers.early`) brings them into memory first: behind the
gigabytes of a cold disk each would wait for its turn.
"""

from __future__ import annotations

__all__ = ["SAMPLE_BYTES", "sample_places"]

SAMPLE_BYTES = 4096
_SAMPLES = 256  # of each file


def sample_places(size: int) -> list[int]:
    """First bytes of the samples of a file of `size` bytes, each `SAMPLE_BYTES` long, or as long as the file."""
    return [max(0, size - SAMPLE_BYTES) * index // (_SAMPLES - 1) for index in range(_SAMPLES)]

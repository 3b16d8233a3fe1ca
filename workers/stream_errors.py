"""What is said of streams that an engine has to end."""

from __future__ import annotations

from headrace.errors import DeadlineExceededError, InternalError
from headrace.workers.sequence import Sequence

__all__ = ["not_numbers", "too_late"]


def too_late(sequence: Sequence) -> DeadlineExceededError:
    """Its deadline passed."""
    return DeadlineExceededError(
        f"The time allowed was over after {sequence.num_output} of at most {sequence.max_tokens} tokens; "
        "give more time or ask for fewer tokens.",
        request_id=sequence.stream.request.hex(),
    )


def not_numbers(sequence: Sequence) -> InternalError:
    """Nothing could be chosen from its logits."""
    return InternalError(
        f"The model's logits after {sequence.num_output} tokens hold NaN or infinity, so no token could be chosen; "
        "other requests go on. If it happens again, the weights are damaged or the dtype is too narrow: try float32.",
        request_id=sequence.stream.request.hex(),
    )

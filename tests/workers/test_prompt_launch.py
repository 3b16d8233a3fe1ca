"""A prompt is launched before what only others need of it is computed."""

from headrace.workers import sequence as sequence_module
from headrace.workers.prefix_cache import block_digest
from tests.workers.test_scheduler import make_scheduler, make_sequence


def test_a_prompt_is_launched_before_what_others_may_wait_for_is_computed(monkeypatch):
    computed = []

    def digest(*parts):
        computed.append(parts)
        return block_digest(*parts)

    monkeypatch.setattr(sequence_module, "block_digest", digest)
    scheduler = make_scheduler(num_blocks=256, max_batch_tokens=512, max_model_len=512)
    first, second = (make_sequence(index, list(range(401)), 2) for index in range(2))
    scheduler.add(first)
    plan = scheduler.schedule()
    assert plan.num_tokens == 401
    assert len(computed) == 1, "the first of them is not there, so none is"
    scheduler.advance(plan)
    first.expect()
    scheduler.validate()
    assert len(computed) == 100
    scheduler.add(second)
    assert [chunk.sequence for chunk in scheduler.schedule().chunks] == [first], "the second knows, and waits"

"""Whole histories, one per seed: what must come true whatever happens to whom."""

from collections import Counter

import pytest

from headrace.errors import (
    BrokerConnectionError,
    DeadlineExceededError,
    OverloadedError,
    RequestCancelledError,
    SlowConsumerError,
    UnavailableError,
    WorkerCrashedError,
)
from tests.simulation.simulation import FAULTS, Plan, Simulation

QUICK = range(10)
LONG = range(1000, 1300)

LINKS = ("a client loses its link", "a group loses its link")
AWAY = ("a client is cut off", "a client freezes")
GROUPS = ("a group crashes", "a group freezes", "a group is cut off", "a group drains")
BROKER = ("the broker is killed", "the broker is stopped", "the broker freezes")
# Each of these says that somebody was away, full, too slow, or guilty as far as anybody could know.
ANY = (
    BrokerConnectionError,
    DeadlineExceededError,
    OverloadedError,
    RequestCancelledError,
    SlowConsumerError,
    UnavailableError,
    WorkerCrashedError,
)
# The longest that anybody is away is 25 s, of groups and the broker 12 s; what is beyond that, recovery took.
PLANS = {
    "a calm day": Plan(within=2.0),
    "callers change their minds": Plan(cancels=True, within=8.0),
    "messages get lost or come twice": Plan(faults=("a client's link is shaky",), count=3, within=40.0),
    "links break": Plan(faults=LINKS, count=6, within=8.0),
    "clients are away for a while": Plan(faults=AWAY, count=3, within=60.0),
    "a group dies": Plan(faults=GROUPS, count=1, within=18.0),
    # Who is aboard two groups that die soon after each other looks like the reason for it.
    "groups die": Plan(faults=GROUPS, count=4, excuses=(WorkerCrashedError, UnavailableError)),
    "the broker dies": Plan(faults=BROKER, count=4, within=30.0),
    "a request is poison": Plan(poison=1, within=8.0),
    "anything happens": Plan(faults=tuple(FAULTS), count=12, cancels=True, demanding=True, poison=1, excuses=ANY),
}


def run(plan, seed):
    """The world after one history."""
    simulation = Simulation(seed, PLANS[plan])
    simulation.run()
    return simulation.world


@pytest.mark.parametrize("seed", QUICK)
@pytest.mark.parametrize("plan", PLANS)
def test_everybody_gets_every_token_once(plan, seed):
    run(plan, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("plan", PLANS)
def test_a_year_of_it(plan):
    """Many seeds, and the certainty that what was to be tried did happen."""
    counts = Counter()
    for seed in LONG:
        counts.update(run(plan, seed).counts)
    assert {f"fault: {kind}" for kind in PLANS[plan].faults} <= counts.keys()
    assert counts["request finished length"] > len(LONG)
    if PLANS[plan].poison:
        assert counts["poison is found out"] > len(LONG) // 4


def test_one_seed_one_history():
    first, second = (run("anything happens", 7) for _ in range(2))
    assert first.counts == second.counts
    assert first.history == second.history
    assert first.history != run("anything happens", 8).history

"""The life of a group, decided without a process: restarts, failures for good, draining, hangs."""

import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import InternalError, ModelFilesError, UnsupportedVersionError
from headrace.workers.config import EngineConfig
from headrace.workers.group import EVENT_KINDS, GroupSpec
from headrace.workers.launcher_life import Emit, Ended, GroupLife, Kill, Said, Start, State, Stop, Tell, Tick


def spec(ranks=1):
    return GroupSpec(
        name="g", folder=Path("m"), model_name="tiny", config=EngineConfig(), tensor_parallel=ranks, engine="fake:load"
    )


class Stage:
    """A life with its clock and all that came of it."""

    def __init__(self, ranks=1, **limits):
        self.life = GroupLife(spec(ranks), **limits)
        self.now = 1000.0
        self.ranks = ranks
        self.actions = []

    def feed(self, *events, after=0.0):
        """Events at one time; the actions that follow."""
        # The shell ticks once a second.
        while after > 1.0:
            self.now += 1.0
            after -= 1.0
            self._take(Tick())
        self.now += after
        before = len(self.actions)
        for event in events:
            self._take(event)
        return self.actions[before:]

    def _take(self, event):
        self.actions += self.life.handle(event, self.now)

    def say(self, rank, kind, **fields):
        return self.feed(Said(rank, {"kind": kind, **fields}))

    def serve(self):
        """Bring it up."""
        self.feed(Tick())
        for rank in range(self.ranks):
            self.say(rank, "warm")
        self.say(0, "ready")
        return self

    def die(self, code=-signal.SIGKILL):
        """All ranks end, the first by itself."""
        return self.feed(*(Ended(rank, code) for rank in range(self.ranks)))

    @property
    def kinds(self):
        return [a.event.kind for a in self.actions if isinstance(a, Emit)]


def emitted(actions):
    return [a.event for a in actions if isinstance(a, Emit)]


def test_readiness_tells_where_the_time_of_the_start_went():
    stage = Stage(ranks=2)
    stage.feed(Tick())
    stage.say(1, "warm", phases=[["imports", 2.0, 0, 0]])
    stage.say(0, "warm", phases=[["imports", 3.0, 0, 0], ["weights", 1.0, 99, 0]])  # the rank for which all others wait
    stage.feed(Tick(), after=0.5)
    [event] = emitted(stage.say(0, "ready"))
    assert [(phase.name, phase.seconds, phase.amount) for phase in event.start.phases] == [
        ("imports", 3.0, 0),
        ("weights", 1.0, 99),
        ("broker", 0.5, 0),
    ]
    stage.say(0, "waiting")
    [event] = emitted(stage.say(0, "ready"))
    assert event.start is None  # the broker came back; nothing was started


def test_a_group_comes_up_step_by_step_and_serves_once_all_ranks_are_warm():
    stage = Stage(ranks=2)
    assert Start() in stage.feed(Tick())
    assert stage.feed(Tick()) == []
    [event] = emitted(stage.say(0, "loading", done=10, total=100))
    assert (event.kind, event.done, event.total) == ("loading", 10, 100)
    [event] = emitted(stage.say(1, "loading", done=30, total=100))
    assert (event.done, event.total) == (40, 200)
    stage.say(0, "warming")
    assert stage.say(0, "warm") == []
    assert stage.say(1, "warming") == []
    assert stage.life.state is State.STARTING
    assert stage.say(1, "warm") == [Tell("serve", {})]
    assert stage.life.state is State.SERVING
    assert stage.kinds == ["starting", "loading", "loading", "warming"]
    [event] = emitted(stage.say(0, "ready"))
    assert event.kind == "ready"
    assert stage.say(0, "ready") == []  # a new connection is no news


def test_a_group_that_finds_no_broker_says_so_once():
    stage = Stage()
    stage.feed(Tick())
    stage.say(0, "warm")
    [event] = emitted(stage.say(0, "waiting"))
    assert (event.kind, "broker" in event.text) == ("warming", True)
    assert stage.say(0, "waiting") == []
    assert emitted(stage.say(0, "ready"))[0].kind == "ready"
    assert emitted(stage.say(0, "waiting"))  # it went away
    assert emitted(stage.say(0, "ready"))[0].kind == "ready"


@pytest.mark.parametrize("victim", [0, 2])
def test_the_death_of_any_rank_ends_all_and_starts_the_group_again(victim):
    stage = Stage(ranks=3).serve()
    actions = stage.feed(Ended(victim, -signal.SIGKILL))
    assert Kill() in actions
    [event] = emitted(actions)
    assert event.kind == "lost"
    assert f"rank {victim}" in event.text
    assert "SIGKILL" in event.text
    others = [rank for rank in range(3) if rank != victim]
    assert not emitted(stage.feed(Ended(others[0], -signal.SIGKILL)))
    [event] = emitted(stage.feed(Ended(others[1], -signal.SIGKILL)))
    assert event.kind == "restarting"
    assert Start() not in stage.feed(Tick(), after=0.4)
    assert Start() in stage.feed(Tick(), after=0.2)


def test_restarts_come_later_each_time_and_at_once_again_after_good_service():
    stage = Stage()
    waits = []
    for _ in range(9):
        stage.feed(Tick())
        stage.die()
        waits.append(stage.life.wake_at() - stage.now)
        stage.now = stage.life.wake_at()
    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30, 30])
    stage.serve()
    stage.feed(Said(0, {"kind": "beat", "step": 1, "busy": False}), after=59.0)
    stage.die()
    assert stage.life.wake_at() - stage.now == pytest.approx(30)
    stage.now = stage.life.wake_at()
    stage.serve()
    for _ in range(61):
        stage.feed(Said(0, {"kind": "beat", "step": 1, "busy": False}), after=1.0)
    stage.die()
    assert stage.life.wake_at() - stage.now == pytest.approx(0.5)


@pytest.mark.parametrize("error", [ModelFilesError("a shard is short"), UnsupportedVersionError("version 7")])
def test_an_error_that_trying_again_does_not_mend_is_final(error):
    stage = Stage(ranks=2)
    stage.feed(Tick())
    stage.say(1, "error", error=error.to_wire())
    actions = stage.feed(Ended(1, 1))
    assert actions == [Kill()]
    [event] = emitted(stage.feed(Ended(0, -9)))
    assert event.kind == "failed"
    assert type(event.error) is type(error)
    assert event.text == error.message
    assert stage.life.over
    assert stage.feed(Tick(), after=100.0) == []


def test_any_other_error_is_named_and_tried_again():
    stage = Stage().serve()
    stage.say(0, "error", error=InternalError("ZeroDivisionError: in a step").to_wire())
    event, restarting = emitted(stage.feed(Ended(0, 1)))
    assert event.kind == "lost"
    assert event.text.endswith("ended with code 1: ZeroDivisionError: in a step")
    assert isinstance(event.error, InternalError)
    assert restarting.kind == "restarting"
    stage.feed(Tick(), after=1.0)
    [event, _] = emitted(stage.feed(Ended(0, 0)))  # the next death has a cause of its own
    assert event.error is None


def test_a_rank_that_cannot_be_started_is_tried_again():
    stage = Stage(ranks=2)
    stage.feed(Tick())
    [event] = emitted(stage.feed(Ended(1, None)))
    assert "could not be started" in event.text
    assert emitted(stage.feed(Ended(0, -9)))[0].kind == "restarting"


def test_a_group_that_works_without_progress_is_ended():
    stage = Stage(hung_after=20.0).serve()
    for step in range(40):
        assert not stage.feed(Said(0, {"kind": "beat", "step": step, "busy": True}), Tick(), after=1.0)
    for _ in range(40):  # idle is no hang
        assert not stage.feed(Said(0, {"kind": "beat", "step": 39, "busy": False}), Tick(), after=1.0)
    ended_after = 0
    while not stage.feed(Said(0, {"kind": "beat", "step": 39, "busy": True}), Tick(), after=1.0):
        ended_after += 1
    assert 18 <= ended_after <= 21
    assert stage.actions[-1] == Kill()
    assert "made no step" in stage.actions[-2].event.text
    assert stage.die()[0].event.kind == "restarting"


def test_a_leader_that_says_nothing_is_ended():
    stage = Stage(leader_silence=10.0).serve()
    assert not stage.feed(Tick(), after=9.0)
    [lost, kill] = stage.feed(Tick(), after=2.0)
    assert "said nothing" in lost.event.text
    assert kill == Kill()
    assert stage.life.state is State.DYING


def test_a_pause_of_the_launcher_is_nobody_s_silence():
    """SIGSTOP and SIGCONT of the launcher, or the lid of a laptop."""
    stage = Stage(leader_silence=10.0, hung_after=20.0).serve()
    stage.feed(Said(0, {"kind": "beat", "step": 1, "busy": True}), Tick(), after=1.0)
    stage.now += 3600.0
    assert stage.feed(Tick()) == []
    stage.feed(Tick(), after=9.0)
    assert stage.life.state is State.SERVING
    stage.feed(Tick(), after=3.0)
    assert stage.life.state is State.DYING


def test_a_slow_start_has_half_an_hour_between_words():
    stage = Stage()
    stage.feed(Tick())
    stage.feed(Tick(), after=1700.0)
    stage.say(0, "loading", done=1, total=2)
    stage.feed(Tick(), after=1700.0)
    assert stage.life.state is State.STARTING
    stage.feed(Tick(), after=200.0)
    assert stage.life.state is State.DYING


# --------------------------------------------------------------------------------------------------------- stopping


def test_stopping_drains_and_then_ends_the_followers():
    stage = Stage(ranks=2).serve()
    assert stage.feed(Stop(30.0)) == [Tell("drain", {"grace": 30.0})]
    stage.say(0, "beat", step=3, busy=True)
    assert not stage.life.over
    assert stage.feed(Ended(0, 0)) == [Kill()]
    assert emitted(stage.feed(Ended(1, 0)))[0].kind == "stopped"
    assert stage.life.over


def test_draining_has_an_end():
    stage = Stage().serve()
    stage.feed(Stop(30.0))
    assert stage.life.wake_at() == pytest.approx(stage.now + 35.0)
    assert not stage.feed(Tick(), after=34.0)
    assert stage.feed(Tick(), after=1.0) == [Kill()]
    assert stage.die()[-1].event.kind == "stopped"


def test_the_second_stop_does_not_wait():
    stage = Stage().serve()
    stage.feed(Stop(30.0))
    assert stage.feed(Stop(30.0)) == [Kill()]
    stage.die()
    assert stage.kinds[-1] == "stopped"
    assert stage.feed(Stop(1.0)) == []


def test_a_group_that_has_not_started_up_is_just_ended():
    stage = Stage()
    stage.feed(Tick())
    assert stage.feed(Stop(30.0)) == [Kill()]
    stage.say(0, "warm")
    stage.die()
    assert stage.kinds == ["starting", "stopped"]


def test_stopping_between_two_lives_needs_no_process():
    stage = Stage().serve()
    stage.die()
    assert emitted(stage.feed(Stop(30.0)))[0].kind == "stopped"
    assert stage.feed(Tick(), after=60.0) == []


def test_stopping_a_dying_group_waits_for_its_end_only():
    stage = Stage(ranks=2).serve()
    stage.feed(Ended(1, -9))
    stage.feed(Stop(30.0))
    stage.feed(Ended(0, -9))
    assert stage.kinds[-2:] == ["lost", "stopped"]


def test_a_leader_that_fails_while_it_drains_is_not_started_again():
    stage = Stage().serve()
    stage.feed(Stop(30.0))
    stage.die(code=1)
    assert stage.kinds[-1] == "stopped"


_said = st.one_of(
    st.sampled_from(["warm", "warming", "ready", "waiting"]).map(lambda kind: {"kind": kind}),
    st.builds(lambda d: {"kind": "loading", "done": d, "total": 9}, st.integers(0, 9)),
    st.builds(lambda s, b: {"kind": "beat", "step": s, "busy": b}, st.integers(0, 5), st.booleans()),
    st.sampled_from([ModelFilesError("x"), InternalError("y")]).map(lambda e: {"kind": "error", "error": e.to_wire()}),
)
_moves = st.one_of(
    st.tuples(st.just("say"), st.integers(0, 2), _said),
    st.tuples(st.just("end"), st.integers(0, 2), st.sampled_from([0, 1, -9])),
    st.tuples(st.just("stop"), st.floats(0, 60), st.none()),
    st.tuples(st.just("tick"), st.floats(0, 100), st.none()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_moves, max_size=60))
def test_whatever_happens_there_is_one_life_at_a_time_and_an_end(moves):
    """Processes are real to the extent that only a started one can speak or end, and a killed one does end."""
    life = GroupLife(spec(3))
    now, alive, dying, kinds = 0.0, set(), set(), []

    def feed(event):
        for action in life.handle(event, now):
            match action:
                case Start():
                    assert not alive
                    alive.update(range(3))
                case Kill():
                    dying.update(alive)
                case Tell():
                    assert 0 in alive
                case Emit(event):
                    assert event.kind in EVENT_KINDS
                    kinds.append(event.kind)
        assert not (life.over and alive)

    def end(rank, code):
        alive.discard(rank)
        dying.discard(rank)
        feed(Ended(rank, code))

    feed(Tick())
    for kind, first, second in moves:
        if kind == "say" and first in alive:
            feed(Said(first, second))
        elif kind == "end" and first in alive:
            end(first, second)
        elif kind == "stop":
            feed(Stop(first))
        elif kind == "tick":
            now += first
            feed(Tick())
    feed(Stop(0.0))
    feed(Stop(0.0))
    while alive:
        assert dying == alive, "told to end, it ends"
        end(min(alive), -9)
    assert life.over
    assert kinds[-1] in ("stopped", "failed")

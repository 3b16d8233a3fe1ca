"""From the request table to the clients: what each connection was sent, confirmed and still owes. No sockets.

Delivery is level-triggered: a stream that has something unsent is `dirty`, and each turn sends what the connection's
window allows. A message that could not be sent only moves the cursors back, so nothing is kept twice and nothing lost.
Per connection and turn there is one Tokens message (more only when it grows large), then one Done, then errors.
"""

from __future__ import annotations

from collections.abc import Iterable

from headrace.broker.config import BrokerConfig
from headrace.broker.events import Face
from headrace.broker.mail import Mailer
from headrace.broker.report import Counters
from headrace.broker.requests import TOKEN_BYTES, Job, JobTable, Stream
from headrace.errors import HeadraceError, UnknownRequestError
from headrace.messages import Ack, Done, Error, Finish, TokenRun, Tokens

__all__ = ["Connection", "Delivery"]

_MESSAGE_BYTES = 64 << 10  # of tokens in one message: beyond that the codec looks at every value
_RUN_BYTES = 32  # what a run costs besides its tokens


class Connection:
    """One client connection.

    Attributes:
        jobs: requests whose answers go here.
        dirty: streams with something unsent; the value is the run as it came from the leader, if it can go out as is.
        errors: jobs whose error is unsent.
        unacked: bytes sent and not confirmed.
        stalled: whether the window is shut while something waits.
        progress_at: last time that anything was confirmed, or that it began to owe a confirmation.
    """

    def __init__(self, peer: bytes, now: float) -> None:
        self.peer = peer
        self.heard_at = self.progress_at = now
        self.jobs: dict[bytes, Job] = {}
        self.dirty: dict[Stream, TokenRun | None] = {}
        self.errors: dict[Job, None] = {}
        self.unacked = 0
        self.stalled = False

    def release(self, job: Job) -> None:
        """Stop serving a job here; its cursors go back to what is confirmed."""
        assert job.client is self
        del self.jobs[job.id]
        self.errors.pop(job, None)
        for stream in job.streams:
            self.dirty.pop(stream, None)
            self.unacked -= (stream.sent - stream.acked) * stream.weight
            stream.sent = stream.acked
            stream.done_sent = False
        job.client = None


class Delivery:
    """All client connections and what flows to them."""

    def __init__(self, config: BrokerConfig, jobs: JobTable, mailer: Mailer, counters: Counters) -> None:
        self._config = config
        self._jobs = jobs
        self._mailer = mailer
        self._counters = counters
        self.connections: dict[bytes, Connection] = {}
        self.waiting: dict[Connection, None] = {}  # connections with something to send
        self.orphans: dict[Job, float] = {}  # live jobs without a client, since when

    def connect(self, peer: bytes, now: float) -> Connection:
        """A client said Hello; saying it again changes nothing."""
        conn = self.connections.get(peer)
        if conn is None:
            conn = self.connections[peer] = Connection(peer, now)
        conn.heard_at = now
        return conn

    def disconnect(self, conn: Connection, now: float) -> None:
        """The client is gone; its live jobs wait for it a little."""
        del self.connections[conn.peer]
        self.waiting.pop(conn, None)
        self._mailer.drop(Face.CLIENTS, conn.peer)
        for job in list(conn.jobs.values()):
            conn.release(job)
            if not job.ended:
                self.orphans[job] = now

    def bind(self, job: Job, conn: Connection, now: float) -> None:
        """Answers of this job go to this connection from now on."""
        self.orphans.pop(job, None)
        if job.client is not None and job.client is not conn:
            self._release(job.client, job)
        if job.client is None:
            job.client = conn
            conn.jobs[job.id] = job
        for stream in job.streams:
            stream.progress_at = now
            self.touch(stream)
        if job.error is not None:
            self.fail(job)

    def seek(self, stream: Stream, position: int) -> None:
        """The client holds the tokens below `position`; send what follows, and the end again."""
        conn = stream.job.client
        assert conn is not None
        if stream.logprobs is not None:
            position = max(position, stream.base)  # what came before we have without its probabilities
        conn.unacked -= (stream.sent - stream.acked) * stream.weight
        stream.sent = stream.acked = min(position, stream.have)
        stream.done_sent = stream.final_acked = False
        self.touch(stream)

    def detach(self, job: Job) -> None:
        """Nobody reads this job any more."""
        self.orphans.pop(job, None)
        if job.client is not None:
            self._release(job.client, job)

    def _release(self, conn: Connection, job: Job) -> None:
        conn.release(job)
        if conn.dirty:
            self.waiting[conn] = None  # what it had under way made room for what waits

    def touch(self, stream: Stream) -> None:
        """The stream has something to send, or may have."""
        conn = stream.job.client
        if conn is not None:
            conn.dirty[stream] = None
            self.waiting[conn] = None

    def fail(self, job: Job) -> None:
        """The job has an error to send."""
        self.orphans.pop(job, None)
        conn = job.client
        if conn is not None:
            conn.errors[job] = None
            self.waiting[conn] = None

    # ------------------------------------------------------------------------------------------------ out

    def flush(self, now: float) -> None:
        """Send what the windows allow."""
        for conn in list(self.waiting):
            if self._mailer.is_blocked(Face.CLIENTS, conn.peer):
                continue  # it stays waiting; the retry comes with a tick
            del self.waiting[conn]
            self._flush(conn, now)

    def _flush(self, conn: Connection, now: float) -> None:
        self._send_streams(conn, now)
        if conn.errors:
            for job in list(conn.errors):
                assert job.error is not None
                self._mailer.send(Face.CLIENTS, conn.peer, Error(error=job.error.to_wire(), request=job.id))
                conn.release(job)
            self._send_streams(conn, now)  # their part of the window is free
        if conn.dirty and not conn.stalled:
            self._counters.stream_stalls += 1
        conn.stalled = bool(conn.dirty)

    def _send_streams(self, conn: Connection, now: float) -> None:
        while conn.dirty:
            room = min(self._config.window_bytes - conn.unacked, _MESSAGE_BYTES)
            runs, finishes = self._gather(conn, room, now)
            if runs:
                self._mailer.send(Face.CLIENTS, conn.peer, Tokens(runs=tuple(runs)))
            if finishes:
                self._mailer.send(Face.CLIENTS, conn.peer, Done(finishes=tuple(finishes)))
            if not runs:
                break

    def _gather(self, conn: Connection, room: int, now: float) -> tuple[list[TokenRun], list[Finish]]:
        """One message's worth of runs and the ends that follow them; what does not fit stays dirty."""
        runs: list[TokenRun] = []
        finishes: list[Finish] = []
        if not conn.unacked:
            conn.progress_at = now
        dirty, conn.dirty = conn.dirty, {}
        unacked = conn.unacked
        for stream, run in dirty.items():
            sent = stream.sent
            count = stream.have - sent
            if count:
                weight = stream.job.weight
                if count * weight > room:
                    count = max(0 if unacked else 1, room // weight)  # a window holds one token, however small it is
                    run = None
                if count:
                    if run is None or run[3] != sent:
                        run = stream.run(sent, count)
                    if sent == stream.acked:
                        stream.progress_at = now
                    stream.sent = sent + count
                    unacked += count * weight
                    room -= count * weight + _RUN_BYTES
                    runs.append(run)
            if stream.sent < stream.have:
                conn.dirty[stream] = None
            elif stream.finish is not None and not stream.done_sent:
                stream.done_sent = True
                finishes.append(stream.finish)
        conn.unacked = unacked
        return runs, finishes

    def rewind(self, conn: Connection, message: Tokens | Done) -> None:
        """A message was not sent: its streams go back to where they were."""
        names = message.runs if isinstance(message, Tokens) else message.finishes
        for entry in names:
            job = self._jobs.get(entry.request)
            if job is None or job.client is not conn:
                continue
            stream = job.streams[entry.choice]
            stream.done_sent = False
            if isinstance(entry, TokenRun) and entry.first < stream.sent:
                back = max(entry.first, stream.acked)
                conn.unacked -= (stream.sent - back) * stream.weight
                stream.sent = back
            self.touch(stream)

    def rewind_error(self, conn: Connection, request: bytes) -> bool:
        """An error that ends a request was not sent; False if it is none of ours to send again."""
        job = self._jobs.get(request)
        if job is None or job.error is None or job.client not in (None, conn):
            return False
        job.client = conn
        conn.jobs[job.id] = job
        self.fail(job)
        return True

    # ------------------------------------------------------------------------------------------------ back

    def acknowledge(self, conn: Connection, acks: Iterable[Ack], now: float) -> None:
        """The client confirmed positions; that opens its window."""
        for request, choice, next_index, final in acks:
            job = conn.jobs.get(request)
            if job is None or not 0 <= choice < len(job.streams):
                continue  # late news of a finished or moved request
            stream = job.streams[choice]
            if stream.acked < next_index <= stream.sent:
                conn.unacked -= (next_index - stream.acked) * stream.weight
                stream.acked = next_index
                stream.progress_at = conn.progress_at = now
            if final and stream.done_sent:
                stream.final_acked = True
                if all(s.final_acked for s in job.streams):
                    self._release(conn, job)
        if conn.dirty:
            self.waiting[conn] = None

    def attach(self, conn: Connection, positions: Iterable[Ack], now: float) -> list[bytes]:
        """Move streams to this connection from given positions; returns the ids nobody knows."""
        unknown: dict[bytes, None] = {}
        for request, choice, next_index, final in positions:
            job = self._jobs.get(request)
            known = job is not None and 0 <= choice < len(job.streams) and job.streams[choice].have >= next_index >= 0
            if job is None or not known:
                unknown[request] = None
                continue
            self.bind(job, conn, now)
            stream = job.streams[choice]
            self.seek(stream, next_index)
            if final and stream.finish is not None and stream.sent == stream.have:
                stream.done_sent = stream.final_acked = True
                if all(s.final_acked for s in job.streams):
                    self._release(conn, job)
        return list(unknown)

    def stalled_jobs(self, now: float) -> list[Job]:
        """Live or ended jobs whose reader owes an acknowledgement for too long, and those that wait behind them."""
        limit = now - self._config.stall_timeout
        stalled = []
        for conn in self.connections.values():
            shut = conn.stalled and conn.progress_at < limit
            for job in conn.jobs.values():
                if any((s.acked < s.sent and s.progress_at < limit) or (shut and s.sent < s.have) for s in job.streams):
                    stalled.append(job)
        return stalled

    def forgive(self, gap: float, now: float) -> None:
        """We were away for that long: nobody could be heard, so nobody was silent."""
        for conn in self.connections.values():
            conn.heard_at = min(now, conn.heard_at + gap)
            conn.progress_at = min(now, conn.progress_at + gap)
            for job in conn.jobs.values():
                for stream in job.streams:
                    stream.progress_at = min(now, stream.progress_at + gap)
        for job in self.orphans:
            self.orphans[job] = min(now, self.orphans[job] + gap)

    def refuse(self, conn: Connection, request: bytes, error: HeadraceError) -> None:
        """Tell a client that a request ends before it began."""
        self._counters.rejected[error.code] += 1
        self.tell(conn, request, error)

    def tell(self, conn: Connection, request: bytes, error: HeadraceError) -> None:
        """End a request for its client, whatever becomes of it here."""
        error.request_id = request.hex()
        self._mailer.send(Face.CLIENTS, conn.peer, Error(error=error.to_wire(), request=request))

    def refuse_unknown(self, conn: Connection, requests: Iterable[bytes]) -> None:
        """Tell a client that nobody knows its requests."""
        for request in requests:
            message = "The broker does not know this request; submit it again with the tokens you hold."
            self.refuse(conn, request, UnknownRequestError(message))

    def validate(self) -> None:
        """Assert what must hold between events."""
        for peer, conn in self.connections.items():
            assert conn.peer == peer
            streams = [s for job in conn.jobs.values() for s in job.streams]
            assert conn.unacked == sum((s.sent - s.acked) * s.weight for s in streams)
            heaviest = max((s.weight for s in streams), default=TOKEN_BYTES)
            assert conn.unacked <= self._config.window_bytes + heaviest
            assert all(job.client is conn for job in conn.jobs.values())
            for stream in streams:
                owed = stream.sent < stream.have or (stream.finish is not None and not stream.done_sent)
                assert not owed or stream in conn.dirty or stream.job in conn.errors
        for job in self._jobs.live.values():
            assert job.client is not None or job in self.orphans
        for job in self.orphans:
            assert self._jobs.live.get(job.id) is job
            assert job.client is None

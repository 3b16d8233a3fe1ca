"""The broker without its sockets: `handle(event, now)` returns the actions that follow. No clock, no I/O, no threads.

    clients ── Submit ──► admission ──► queue ──► placement ──► groups
    clients ◄─ Tokens ─── delivery ◄──────────── dispatch ◄─── Tokens

This file routes events, greets peers and watches the time. Lives of streams are in `dispatch`, what clients were sent
in `delivery`, the tables in `requests` and `groups`.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from headrace.broker.admission import check, check_id, digest, quarantine_key
from headrace.broker.blobs import BlobStore, Download
from headrace.broker.config import BrokerConfig
from headrace.broker.delivery import Connection, Delivery
from headrace.broker.dispatch import Dispatcher
from headrace.broker.events import Action, Event, Face, Malformed, PeerLost, Received, SendBlocked, Stop, Tick, TurnEnd
from headrace.broker.groups import Group, GroupState, Model, Registry
from headrace.broker.mail import Mailer
from headrace.broker.report import Counters, describe_group, describe_models
from headrace.broker.requests import TOKEN_BYTES, Job, JobTable, Stream
from headrace.errors import (
    ConflictError,
    DeadlineExceededError,
    HeadraceError,
    InvalidRequestError,
    ModelChangedError,
    OverloadedError,
    ProtocolError,
    RequestCancelledError,
    SlowConsumerError,
    UnavailableError,
    UnknownModelError,
    UnsupportedVersionError,
    WorkerCrashedError,
)
from headrace.messages import (
    PROTOCOL_VERSION,
    Acceptance,
    Accepted,
    Attach,
    Blob,
    Cancel,
    Cards,
    Credit,
    Describe,
    Done,
    Drained,
    Error,
    GetBlob,
    GetStatus,
    GroupHello,
    GroupWelcome,
    Heartbeat,
    Hello,
    Message,
    Ping,
    Pong,
    Refused,
    Request,
    Reset,
    Status,
    Submit,
    Tokens,
    Welcome,
)
from headrace.sampling import MAX_N, SamplingParams

__all__ = ["Broker"]

_MAX_STRANGERS = 1024
_ANSWER_AGAIN = 1.0  # seconds between two answers to a peer that is unknown or talks nonsense
_BLOB_RETRY = 5.0
_RESET_ECHO = 5.0  # a hello this soon after a Reset answers it, and is no sign of a crash
_STALLED_TICK = 1.0  # a longer gap between ticks was our own pause, not the peers' silence


class Broker:
    """The whole state of a broker."""

    def __init__(self, config: BrokerConfig | None = None, *, name: str = "broker", rng: random.Random) -> None:
        self.config = config = config or BrokerConfig()
        self.name = name
        self.counters = Counters()
        self.registry = Registry()
        self.jobs = JobTable(
            window=config.idempotency_window, max_ended=config.max_finished, max_ended_bytes=config.max_finished_bytes
        )
        self._rng = rng
        self._mailer = Mailer()
        self.delivery = Delivery(config, self.jobs, self._mailer, self.counters)
        self.dispatch = Dispatcher(config, self.registry, self.jobs, self.delivery, self._mailer, self.counters)
        self._blobs = BlobStore()
        self._downloads: dict[Group, Download] = {}
        self._parked: OrderedDict[bytes, tuple[bytes, Request, float]] = OrderedDict()  # id -> peer, request, since
        self._answered: OrderedDict[tuple[Face, bytes], float] = OrderedDict()
        self._resets: OrderedDict[bytes, float] = OrderedDict()  # leader -> when it was told to start over
        self._started_at: float | None = None
        self._ticked_at: float | None = None
        self._on_client: dict[type, Callable[[Connection, Any, float], None]] = {
            Submit: self._on_submit,
            Cancel: self._on_cancel,
            Credit: lambda conn, message, now: self.delivery.acknowledge(conn, message.acks, now),
            Attach: self._on_attach,
            Describe: lambda conn, message, now: self._tell(conn, Cards(cards=self.registry.cards())),
            GetBlob: self._on_get_blob,
            Ping: lambda conn, message, now: self._tell(conn, Pong(nonce=message.nonce)),
            GetStatus: lambda conn, message, now: self._tell(conn, Status(report=self.report(now))),
        }
        self._on_leader: dict[type, Callable[[Group, Any, float], None]] = {
            Tokens: self.dispatch.take_tokens,
            Heartbeat: self._on_heartbeat,
            Done: lambda group, message, now: self.dispatch.take_finishes(group, message.finishes, now),
            Refused: lambda group, message, now: self.dispatch.take_refusals(group, message.refusals, now),
            Drained: self._on_drained,
            Blob: self._on_blob,
        }

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at `now` (monotonic seconds) and say what is to be done."""
        if self._started_at is None:
            self._started_at = now
        if type(event) is Received:
            if event.face is Face.WORKERS:
                self._from_leader(event.peer, event.message, now)
            else:
                self._from_client(event.peer, event.message, now)
        elif type(event) is TurnEnd:
            self.dispatch.flush(now)
            self.delivery.flush(now)
        elif type(event) is Tick:
            self._tick(now)
        elif type(event) is SendBlocked:
            self._on_blocked(event, now)
        elif type(event) is PeerLost:
            self._on_lost(event.face, event.peer, now)
        elif type(event) is Malformed:
            self._on_malformed(event, now)
        elif type(event) is Stop:
            self._on_stop()
        return self._mailer.take()

    def report(self, now: float) -> dict[str, Any]:
        """The state for people and metrics; `headrace.broker.report` describes it."""
        models = describe_models(self.registry)
        return {
            "broker": self.name,
            "version": PROTOCOL_VERSION,
            "uptime_seconds": round(now - (now if self._started_at is None else self._started_at), 3),
            "models": models,
            "groups": [describe_group(group, now) for group in self.registry],
            "queue": {
                "depth": self.registry.queued,
                "tokens": sum(model.queue.tokens for model in self.registry.models.values()),
                "parked": len(self._parked),
            },
            "clients": len(self.delivery.connections),
            "requests": {"live": len(self.jobs.live), "finished": len(self.jobs.ended)},
            "counters": self.counters.report(),
        }

    def validate(self) -> None:
        """Assert what must hold between events."""
        self.jobs.validate()
        self.registry.validate()
        self.dispatch.validate()
        self.delivery.validate()
        assert self.registry.queued <= 2 * self.config.max_queued_requests + sum(
            stream.redispatches > 0 or stream.attempt > 0 for m in self.registry.models.values() for stream in m.queue
        )
        assert len(self._parked) <= self.config.max_queued_requests
        assert all(group in self.registry.by_peer.values() for group in self._downloads)

    # ------------------------------------------------------------------------------------------------- clients

    def _from_client(self, peer: bytes, message: Message, now: float) -> None:
        conn = self.delivery.connections.get(peer)
        if type(message) is Hello:
            self._on_hello(peer, message, now)
        elif conn is None:
            self._complain(
                Face.CLIENTS, peer, ProtocolError("Say Hello first; the broker may have been restarted."), now
            )
        else:
            conn.heard_at = now
            self._on_client[type(message)](conn, message, now)

    def _tell(self, conn: Connection, message: Message) -> None:
        self._mailer.send(Face.CLIENTS, conn.peer, message)

    def _on_hello(self, peer: bytes, hello: Hello, now: float) -> None:
        if hello.version != PROTOCOL_VERSION:
            self._mailer.send(Face.CLIENTS, peer, Error(error=_version_error("client", hello.version).to_wire()))
            return
        conn = self.delivery.connect(peer, hello.name, now)
        if len(self.delivery.connections) > self.config.max_clients:
            idle = [c for c in self.delivery.connections.values() if not c.jobs and c is not conn]
            victim = min(idle, key=lambda c: c.heard_at, default=conn)
            self.delivery.disconnect(victim, now)
            if victim is conn:
                text = f"The broker already serves {self.config.max_clients} clients; close some, or try again later."
                self._mailer.send(Face.CLIENTS, peer, Error(error=OverloadedError(text, retry_after=5.0).to_wire()))
                return
        limits = {
            "window_bytes": self.config.window_bytes,
            "max_n": MAX_N,
            "ack_tokens": 64,
            "ack_ms": 250,
            "silence_ms": int(self.config.client_silence * 1000),
            "grace_ms": int(self.config.client_grace * 1000),
            "max_queued_requests": self.config.max_queued_requests,
        }
        self._tell(conn, Welcome(broker=self.name, cards=self.registry.cards(), limits=limits))

    def _on_submit(self, conn: Connection, message: Submit, now: float) -> None:
        accepted = []
        for request in message.requests:
            try:
                job = self._submit(conn, request, now)
            except HeadraceError as error:
                self.delivery.refuse(conn, request.id[:64], error)
            else:
                if job is not None:
                    accepted.append(Acceptance(job.id, job.seed, job.max_tokens))
        if accepted:
            self._tell(conn, Accepted(requests=tuple(accepted)))

    def _submit(self, conn: Connection, request: Request, now: float) -> Job | None:
        """The job of a request, new or known; None while it waits for its model to be announced."""
        check_id(request.id)
        job = self.jobs.get(request.id)
        if job is not None:
            self._resubmit(job, conn, request, now)
            return job
        model = self._model_of(request)
        if model is None:
            self._park(conn, request, now)
            return None
        sampling = check(request, model)
        job = self._new_job(conn, request, model, sampling, now)
        self._check_room(job, sampling.n, model, resumed=request.attempt > 0, now=now)
        self._parked.pop(request.id, None)
        self._admit(job, conn, request, sampling.n, now)
        return job

    def _model_of(self, request: Request) -> Model | None:
        """The model a request names; None if it may appear soon."""
        models = self.registry.models
        if not request.model and len(models) == 1:
            return next(iter(models.values()))
        if request.model in models:
            return models[request.model]
        if not models or request.attempt > 0 or any(request.output):
            return None
        served = ", ".join(sorted(models))
        if not request.model:
            raise InvalidRequestError(f"Several models are served, name one of them: {served}.", param="model")
        raise UnknownModelError(f"No model {request.model[:100]!r} is served; served: {served}.", param="model")

    def _park(self, conn: Connection, request: Request, now: float) -> None:
        if request.id not in self._parked and len(self._parked) >= self.config.max_queued_requests:
            raise OverloadedError("No worker group is ready yet and the waiting room is full.", retry_after=5.0)
        _, _, since = self._parked.get(request.id, (b"", request, now))
        self._parked[request.id] = (conn.peer, request, since)

    def _new_job(self, conn: Connection, request: Request, model: Model, sampling: SamplingParams, now: float) -> Job:
        seed = sampling.seed if sampling.seed is not None else self._rng.getrandbits(63)
        if request.budget_ms is not None and request.budget_ms <= 0:
            raise DeadlineExceededError("The time allowed for the request was over before it arrived.")
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops.update(model.card.eos_token_ids)
        return Job(
            id=request.id,
            model=model.card.name,
            prompt=request.prompt,
            sampling=sampling.replace(seed=seed).to_wire(),
            digest=digest(request, model.card.name, sampling),
            stops=frozenset(stops),
            deadline=None if request.budget_ms is None else now + request.budget_ms / 1000,
            owner=conn.peer,
            now=now,
        )

    def _check_room(self, job: Job, n: int, model: Model, *, resumed: bool, now: float) -> None:
        """Refuse what would overfill the queues; streams that a client brings back have room of their own."""
        if self.dispatch.quarantined(quarantine_key(job.digest, job.max_tokens), now):
            raise WorkerCrashedError("This request took its worker group down before; it is refused. Do not repeat it.")
        waited = 0.0 if model.lost_at is None else now - model.lost_at
        if waited > self.config.unavailable_after and not model.groups:
            raise _unavailable(model.card.name)
        limit = self.config.max_queued_requests * (2 if resumed else 1)
        if self.registry.queued + n > limit:
            self.dispatch.flush(now)  # what came in this turn may fit into free rows
        share = limit * self.config.client_share
        full = self.registry.queued + n > limit or model.queue.waiting_for(job.owner) + n > max(n, share)
        tokens = model.queue.tokens + n * job.prompt_tokens
        if full or (len(model.queue) and not resumed and tokens > self._token_limit(model)):
            rows = sum(group.max_num_seqs for group in model.groups) or 1
            raise OverloadedError(
                f"{self.registry.queued} requests wait already; try again later.",
                retry_after=min(30.0, 1.0 + 0.5 * self.registry.queued / rows),
            )

    def _token_limit(self, model: Model) -> int:
        if self.config.max_queued_tokens is not None:
            return self.config.max_queued_tokens
        return 8 * (sum(group.kv_tokens for group in model.groups) or model.card.max_model_len)

    def _admit(self, job: Job, conn: Connection, request: Request, n: int, now: float) -> None:
        attempt = max(request.attempt, self.jobs.last_attempt(job.id))
        outputs = request.output or (b"",) * n
        job.streams = [
            Stream(job, choice, attempt, output, request.fingerprint if output else "")
            for choice, output in enumerate(outputs)
        ]
        self.jobs.add(job)
        self.counters.requests += 1
        self.counters.prompt_tokens += job.prompt_tokens
        self.delivery.bind(job, conn, now)
        for stream in job.streams:
            self.dispatch.start(stream, now)

    def _resubmit(self, job: Job, conn: Connection, request: Request, now: float) -> None:
        """A known id: attach, if it is the same request; go on from the client's tokens if it holds more than we do."""
        sampling = SamplingParams.from_wire(request.sampling)
        same = digest(request, request.model or job.model, sampling) == job.digest
        same = same and sampling.seed in (None, job.seed) and sampling.max_tokens in (None, job.max_tokens)
        if not same or len(request.output) not in (0, len(job.streams)):
            raise ConflictError("The id is taken by another request; choose 16 new random bytes.")
        outputs = request.output or (b"",) * len(job.streams)
        held = [len(output) // TOKEN_BYTES for output in outputs]
        if max(held) > job.max_tokens or any(len(output) % TOKEN_BYTES for output in outputs):
            raise InvalidRequestError(f"output does not fit max_tokens of {job.max_tokens}.", param="output")
        ahead = [s for s in job.streams if held[s.choice] > s.have and job.error is None]
        if ahead:
            if job.model not in self.registry.models:
                raise _unavailable(job.model)
            self.delivery.detach(job)
            if job.ended:
                self.jobs.revive(job, request.prompt)
            self.delivery.orphans[job] = now
            for stream in ahead:
                self.dispatch.restart(stream, outputs[stream.choice], request.attempt, request.fingerprint, now)
        self.delivery.bind(job, conn, now)
        for stream in job.streams:
            if job.error is None:
                self.delivery.seek(stream, held[stream.choice])

    def _on_cancel(self, conn: Connection, message: Cancel, now: float) -> None:
        for id in message.requests:
            if self._parked.pop(id, None) is not None:
                self.delivery.refuse(conn, id, RequestCancelledError("The request was cancelled."))
            job = self.jobs.live.get(id)
            if job is not None and job.client is None:
                self.dispatch.abandon(job, "client")
            elif job is not None:
                self.dispatch.cancel(job, "client", now)

    def _on_attach(self, conn: Connection, message: Attach, now: float) -> None:
        self.delivery.refuse_unknown(conn, self.delivery.attach(conn, message.positions, now))

    def _on_get_blob(self, conn: Connection, message: GetBlob, now: float) -> None:
        try:
            self._tell(conn, self._blobs.part(message))
        except HeadraceError as error:
            self._tell(conn, Error(error=error.to_wire()))

    # ------------------------------------------------------------------------------------------------- leaders

    def _from_leader(self, peer: bytes, message: Message, now: float) -> None:
        group = self.registry.by_peer.get(peer)
        if type(message) is GroupHello:
            self._on_group_hello(peer, message, now)
        elif group is None:
            self.counters.stale_frames += 1
            if self._may_answer(Face.WORKERS, peer, now):
                self._reset(peer, "The broker does not know this group; say GroupHello.", now)
        else:
            group.heard_at = now
            self._on_leader[type(message)](group, message, now)

    def _reset(self, peer: bytes, reason: str, now: float) -> None:
        self._resets[peer] = now
        self._resets.move_to_end(peer)
        if len(self._resets) > _MAX_STRANGERS:
            self._resets.popitem(last=False)
        self._mailer.send(Face.WORKERS, peer, Reset(reason=reason))

    def _on_group_hello(self, peer: bytes, hello: GroupHello, now: float) -> None:
        problem = _problem_with(hello)
        if problem is not None:
            self._mailer.send(Face.WORKERS, peer, Error(error=problem.to_wire()))
            return
        namesake = self.registry.by_name.get(hello.group)
        if namesake is not None and namesake.peer != peer:
            self.drop_group(namesake, "replaced", now, blame=True)
            self._reset(namesake.peer, f"Another group said it is {hello.group!r}; give each its own name.", now)
        present = self.registry.by_peer.get(peer)
        if present is not None:
            echo = now - self._resets.get(peer, -_RESET_ECHO) < _RESET_ECHO
            self.drop_group(present, "restarted", now, blame=not echo)
        group = Group(peer, hello, now)
        group.missing_blobs = {hash for hash in group.missing_blobs if hash not in self._blobs}
        self.registry.add(group, now)
        heartbeat_ms = int(self.config.heartbeat * 1000)
        self._mailer.send(Face.WORKERS, peer, GroupWelcome(broker=self.name, heartbeat_ms=heartbeat_ms))
        self._mailer.note(logging.INFO, "group joined", group=group.name, model=group.card.name)
        self._fetch_next(group, now)

    def _fetch_next(self, group: Group, now: float) -> None:
        """Ask the leader for a blob that is missing, or declare the group ready."""
        self._downloads.pop(group, None)
        if group.missing_blobs:
            download = self._downloads[group] = Download(min(group.missing_blobs), now)
            self._mailer.send(Face.WORKERS, group.peer, download.next_part)
            return
        model = self.registry.ready(group)
        self.dispatch.changed = True
        self._mailer.note(logging.INFO, "group ready", group=group.name, model=group.card.name)
        for id, (peer, request, _) in list(self._parked.items()):
            if request.model in ("", model.card.name):
                del self._parked[id]
                if (conn := self.delivery.connections.get(peer)) is not None:
                    self._on_submit(conn, Submit(requests=(request,)), now)

    def _on_blob(self, group: Group, part: Blob, now: float) -> None:
        download = self._downloads.get(group)
        if download is None:
            return
        try:
            whole = download.take(part, now)
        except ProtocolError as error:
            self._mailer.send(Face.WORKERS, group.peer, Error(error=error.to_wire()))
            self.drop_group(group, "bad blob", now, blame=False)
            return
        if whole is None:
            self._mailer.send(Face.WORKERS, group.peer, download.next_part)
            return
        self._blobs.add(download.hash, whole)
        for other in self.registry:
            other.missing_blobs.discard(download.hash)
            if other.state is GroupState.LOADING and (other is group or not other.missing_blobs):
                self._fetch_next(other, now)

    def _on_heartbeat(self, group: Group, beat: Heartbeat, now: float) -> None:
        group.advance(beat.step, now)
        group.busy = beat.busy
        if not beat.busy:
            group.step_at = now
        group.load = {k: v for k, v in list(beat.load.items())[:64] if isinstance(v, int | float)}
        if group.load.get("draining") and group.state is GroupState.READY:
            group.state = GroupState.DRAINING
            self.registry.note_loss(self.registry.models[group.card.name], now)
        self.dispatch.review(group)

    def _on_drained(self, group: Group, message: Drained, now: float) -> None:
        self.drop_group(group, "drained", now, blame=False)

    def drop_group(self, group: Group, reason: str, now: float, *, blame: bool) -> None:
        """A group is gone or given up."""
        self._downloads.pop(group, None)
        self.dispatch.lose(group, reason, now, blame=blame)

    # --------------------------------------------------------------------------------------- trouble with peers

    def _may_answer(self, face: Face, peer: bytes, now: float) -> bool:
        """Whether a stranger is told again what is wrong: once a second, lest nonsense be answered by nonsense."""
        key = (face, peer)
        if now - self._answered.get(key, -_ANSWER_AGAIN) < _ANSWER_AGAIN:
            return False
        self._answered[key] = now
        self._answered.move_to_end(key)
        if len(self._answered) > _MAX_STRANGERS:
            self._answered.popitem(last=False)
        return True

    def _complain(self, face: Face, peer: bytes, error: HeadraceError, now: float) -> None:
        if self._may_answer(face, peer, now):
            self._mailer.send(face, peer, Error(error=error.to_wire()))

    def _on_malformed(self, event: Malformed, now: float) -> None:
        self.counters.malformed[event.face.value] += 1
        if self._may_answer(event.face, event.peer, now):
            self._mailer.send(event.face, event.peer, Error(error=ProtocolError(event.reason).to_wire()))
            note = {"face": event.face.value, "peer": event.peer.hex(), "reason": event.reason}
            self._mailer.note(logging.WARNING, "malformed message", **note)
        if event.face is Face.WORKERS and (group := self.registry.by_peer.get(event.peer)) is not None:
            # What it wanted to say is lost, perhaps tokens or an end: nothing it runs can be trusted to complete.
            self.drop_group(group, "malformed", now, blame=False)
            self._reset(event.peer, "A message of this group could not be read.", now)

    def _on_lost(self, face: Face, peer: bytes, now: float) -> None:
        self._mailer.drop(face, peer)
        if face is Face.CLIENTS:
            if (conn := self.delivery.connections.get(peer)) is not None:
                self.delivery.disconnect(conn, now)
        elif (group := self.registry.by_peer.get(peer)) is not None:
            self.drop_group(group, "unreachable", now, blame=True)

    def _on_blocked(self, event: SendBlocked, now: float) -> None:
        face, peer, message = event
        keep: Message | None = message
        if face is Face.CLIENTS:
            conn = self.delivery.connections.get(peer)
            if conn is None:
                return
            if isinstance(message, Tokens | Done):
                self.delivery.rewind(conn, message)
                keep = None
            elif isinstance(message, Error) and self.delivery.rewind_error(conn, message.request):
                keep = None
        elif peer not in self.registry.by_peer:
            return
        if not self._mailer.block(face, peer, keep):
            self._on_lost(face, peer, now)

    def _on_stop(self) -> None:
        error = UnavailableError("The broker is stopping; reconnect when it is back.", retry_after=1.0)
        for peer in self.delivery.connections:
            self._mailer.send(Face.CLIENTS, peer, Error(error=error.to_wire()))
        for group in self.registry:
            self._mailer.send(Face.WORKERS, group.peer, Reset(reason="The broker is stopping."))

    # --------------------------------------------------------------------------------------------------- time

    def _tick(self, now: float) -> None:
        self._forgive_pause(now)
        for face, peer in self._mailer.retry():
            if face is Face.CLIENTS and (conn := self.delivery.connections.get(peer)) is not None:
                self.delivery.waiting[conn] = None
        self._watch_groups(now)
        self._watch_clients(now)
        self._watch_jobs(now)
        self._watch_queues(now)
        self.jobs.expire(now)
        self.registry.forget_models(now, self.config.model_memory)
        cards = [m.card for m in self.registry.models.values()] + [g.card for g in self.registry]
        self._blobs.keep_only(hash for card in cards for hash in card.blobs.values())

    def _forgive_pause(self, now: float) -> None:
        """After a pause of our own (stopped, swapped out) nobody else was silent."""
        gap = now - (now if self._ticked_at is None else self._ticked_at)
        self._ticked_at = now
        if gap > _STALLED_TICK:
            for peer in (*self.registry, *self.delivery.connections.values()):
                peer.heard_at = min(now, peer.heard_at + gap)
            for group in self.registry:
                group.step_at = min(now, group.step_at + gap)
            for job in self.delivery.orphans:
                self.delivery.orphans[job] = min(now, self.delivery.orphans[job] + gap)

    def _watch_groups(self, now: float) -> None:
        silence = self.config.heartbeat * self.config.missed_heartbeats
        for group in self.registry:
            if now - group.heard_at > silence:
                self.drop_group(group, "silent", now, blame=True)
                self._reset(group.peer, "The group was silent for too long.", now)
            elif group.busy and group.streams and now - group.step_at > self.config.progress_timeout:
                self.drop_group(group, "hung", now, blame=True)
                self._reset(group.peer, "The group made no step for too long.", now)
        for download in [d for d in self._downloads.items() if now - d[1].asked_at > _BLOB_RETRY]:
            group, part = download
            part.asked_at = now
            self._mailer.send(Face.WORKERS, group.peer, part.next_part)

    def _watch_clients(self, now: float) -> None:
        for conn in list(self.delivery.connections.values()):
            limit = self.config.client_silence if conn.jobs else self.config.idle_client_timeout
            if now - conn.heard_at > limit:
                self.delivery.disconnect(conn, now)
        for job, since in list(self.delivery.orphans.items()):
            if now - since > self.config.client_grace:
                self.dispatch.abandon(job, "disconnect")
        for id, (peer, _, since) in list(self._parked.items()):
            conn_or_none = self.delivery.connections.get(peer)
            if now - since > self.config.unavailable_after or conn_or_none is None:
                del self._parked[id]
                if conn_or_none is not None:
                    self.delivery.refuse(conn_or_none, id, _unavailable(""))

    def _watch_jobs(self, now: float) -> None:
        for job in [job for job in self.jobs.live.values() if job.deadline is not None and job.deadline <= now]:
            self.dispatch.fail(job, DeadlineExceededError("The time allowed for the request is over."), now)
        for job in self.delivery.stalled_jobs(now):
            if job.ended:
                self.delivery.detach(job)
            else:
                seconds = f"{self.config.stall_timeout:.0f}"
                message = f"The reader confirmed no token for {seconds} s, so the stream was ended."
                self.counters.cancelled["slow_consumer"] += 1
                self.dispatch.fail(job, SlowConsumerError(message), now)

    def _watch_queues(self, now: float) -> None:
        for model in self.registry.models.values():
            if not model.queue:
                continue
            if model.lost_at is not None and now - model.lost_at > self.config.unavailable_after:
                for job in {stream.job: None for stream in model.queue}:
                    self.dispatch.fail(job, _unavailable(model.card.name), now)
            elif model.lost_at is None:
                present = {group.card.fingerprint for group in model.groups} | {""}
                for job in {s.job: None for s in model.queue if s.fingerprint not in present}:
                    message = (
                        f"The model {model.card.name!r} was replaced while this stream was under way; start again."
                    )
                    self.dispatch.fail(job, ModelChangedError(message), now)


def _problem_with(hello: GroupHello) -> HeadraceError | None:
    """Why a group cannot join."""
    card = hello.card
    if hello.version != PROTOCOL_VERSION:
        return _version_error("worker group", hello.version)
    if not hello.group or not card.name or card.vocab_size < 1 or card.max_model_len < 1 or hello.kv_tokens < 1:
        return ProtocolError("A group needs a name, and its card a name, a vocabulary and a context above zero.")
    if len(card.blobs) > 16 or not 1 <= hello.max_num_seqs <= 65536:
        return ProtocolError("A card has at most 16 blobs, and a group runs 1 to 65,536 streams.")
    return None


def _version_error(who: str, theirs: int) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        f"This {who} speaks version {theirs} of the protocol, the broker version {PROTOCOL_VERSION}; "
        "install the same release of headrace on both sides."
    )


def _unavailable(model: str) -> UnavailableError:
    of = f" for {model!r}" if model else ""
    return UnavailableError(f"No worker group is ready{of}; see `headrace status`, and try again.", retry_after=5.0)

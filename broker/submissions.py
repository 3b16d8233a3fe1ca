"""From a client's Submit to a job: new, known, or waiting for its model. `lives` and `delivery` move the streams."""

from __future__ import annotations

import random

from headrace.broker.admission import check, check_id, digest, is_same
from headrace.broker.delivery import Connection, Delivery
from headrace.broker.dispatch import Dispatcher
from headrace.broker.events import Face
from headrace.broker.groups import Model, Registry
from headrace.broker.lives import Lives
from headrace.broker.mail import Mailer
from headrace.broker.refusals import too_late, unavailable
from headrace.broker.report import Counters
from headrace.broker.requests import TOKEN_BYTES, Job, JobTable, Stream
from headrace.broker.room import Room
from headrace.broker.waiting import WaitingRoom
from headrace.errors import (
    ConflictError,
    HeadraceError,
    InvalidRequestError,
    ProtocolError,
    RequestCancelledError,
    UnknownModelError,
)
from headrace.messages import Acceptance, Accepted, Cancel, Error, Request, Submit
from headrace.sampling import SamplingParams
from headrace.tasks import GENERATE, PoolingParams

__all__ = ["Submissions"]

_MAX_SUBMIT = 4096  # requests in one message: each costs some time, and the others wait meanwhile
_MAX_BUDGET_MS = 1 << 40


class Submissions:
    """Takes requests in, once each."""

    def __init__(
        self,
        registry: Registry,
        jobs: JobTable,
        waiting: WaitingRoom,
        room: Room,
        *,
        lives: Lives,
        dispatch: Dispatcher,
        delivery: Delivery,
        mailer: Mailer,
        counters: Counters,
        rng: random.Random,
    ) -> None:
        self._registry = registry
        self._jobs = jobs
        self._waiting = waiting
        self._room = room
        self._lives = lives
        self._dispatch = dispatch
        self._delivery = delivery
        self._mailer = mailer
        self._counters = counters
        self._rng = rng
        self._accepted: list[tuple[Connection, Accepted]] = []  # to be said at the end of the turn

    def take(self, conn: Connection, message: Submit, now: float) -> None:
        """A client wants requests run."""
        if len(message.requests) > _MAX_SUBMIT:
            text = f"A Submit of {len(message.requests):,} requests was dropped; send at most {_MAX_SUBMIT:,} at once."
            self._mailer.send(Face.CLIENTS, conn.peer, Error(error=ProtocolError(text).to_wire()))
        else:
            self._submit_all(conn, message.requests, now)

    def cancel(self, conn: Connection, message: Cancel, now: float) -> None:
        """A client wants requests ended; unknown ones have ended."""
        for id in message.requests:
            job = self._jobs.live.get(id)
            if job is not None and job.client is not None:
                self._lives.cancel(job, "client", now)
            elif job is not None or self._waiting.cancel(id):
                if job is not None:
                    self._lives.abandon(job, "client")
                self._delivery.refuse(conn, id, RequestCancelledError("The request was cancelled."))
            elif (ended := self._jobs.ended.get(id)) is not None and ended.client is conn:
                self._forget_rest(conn, ended)

    def _forget_rest(self, conn: Connection, job: Job) -> None:
        """It ended on its own before the cancel came; what nobody will confirm must not fill the window."""
        if all(stream.finish is not None and stream.finish.reason == "cancelled" for stream in job.streams):
            return  # a cancel said twice: the end of the first is on its way
        told = job.error is None and all(stream.done_sent for stream in job.streams)
        self._delivery.detach(job)
        if not told:
            self._delivery.tell(conn, job.id, RequestCancelledError("The request was cancelled."))

    def unpark(self, model: str, now: float) -> None:
        """A model was announced: submit what waited for it."""
        for peer, request in self._waiting.take(model, now):
            if (conn := self._delivery.connections.get(peer)) is not None:
                self._submit_all(conn, (request,), now)

    def flush(self) -> None:
        """Tell clients what was accepted in this turn: behind the assignments, which a group waits for, and before the
        first tokens."""
        for conn, message in self._accepted:
            if self._delivery.connections.get(conn.peer) is conn:
                self._mailer.send(Face.CLIENTS, conn.peer, message)
        self._accepted.clear()

    def _submit_all(self, conn: Connection, requests: tuple[Request, ...], now: float) -> None:
        accepted = []
        for request in requests:
            try:
                job = self._submit(conn, request, now)
            except HeadraceError as error:
                self._delivery.refuse(conn, request.id[:64], error)
            else:
                if job is not None:
                    accepted.append(Acceptance(job.id, job.seed, job.max_tokens))
        if accepted:
            self._accepted.append((conn, Accepted(requests=tuple(accepted))))

    def _submit(self, conn: Connection, request: Request, now: float) -> Job | None:
        """The job of a request, new or known; None while it waits for its model to be announced."""
        check_id(request.id)
        job = self._jobs.get(request.id)
        if job is not None:
            self._resubmit(job, conn, request, now)
            return job
        model = self._model_of(request)
        if model is None:
            self._waiting.park(conn.peer, request, now)
            return None
        sampling = check(request, model)
        job = self._new_job(conn, request, model, sampling, now)
        resumed = request.attempt > 0
        if not self._room.is_enough(job, sampling.n, model, resumed=resumed):
            self._dispatch.flush(now)  # what came in this turn may fit into free rows
        self._room.check(job, sampling.n, model, resumed=resumed, now=now)
        self._waiting.cancel(request.id)
        self._admit(job, conn, request, sampling.n, now)
        return job

    def _model_of(self, request: Request) -> Model | None:
        """The model a request names; None if it may appear soon."""
        models = self._registry.models
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

    def _new_job(self, conn: Connection, request: Request, model: Model, sampling: SamplingParams, now: float) -> Job:
        seeded = sampling if sampling.seed is not None else sampling.replace(seed=self._rng.getrandbits(63))
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops.update(model.card.eos_token_ids)
        if request.task != GENERATE:
            stops.clear()  # its items are no text, and there are as many as there are
        return Job(
            id=request.id,
            model=model.card.name,
            prompt=request.prompt,
            sampling=seeded.to_wire(),
            task=request.task,
            pooling=PoolingParams.from_wire(request.pooling).to_wire(),
            digest=digest(request, model.card.name, sampling),
            stops=frozenset(stops),
            deadline=_deadline(request, now),
            owner=conn.peer,
            now=now,
        )

    def _admit(self, job: Job, conn: Connection, request: Request, n: int, now: float) -> None:
        attempt = max(request.attempt, self._jobs.last_attempt(job.id))
        outputs = request.output or (b"",) * n
        job.streams = [
            Stream(job, choice, attempt, output, request.fingerprint if output else "")
            for choice, output in enumerate(outputs)
        ]
        self._jobs.add(job)
        self._counters.requests += 1
        self._counters.prompt_tokens += job.prompt_tokens
        self._delivery.bind(job, conn, now)
        for stream in job.streams:
            self._lives.start(stream, now)

    def _resubmit(self, job: Job, conn: Connection, request: Request, now: float) -> None:
        """A known id: attach, if it is the same request; go on from the client's tokens if it holds more than we do."""
        if not is_same(request, job):
            raise ConflictError("The id is taken by another request; choose 16 new random bytes.")
        outputs = request.output or (b"",) * len(job.streams)
        held = [len(output) // TOKEN_BYTES for output in outputs]
        if max(held) > job.max_tokens or any(len(output) % TOKEN_BYTES for output in outputs):
            raise InvalidRequestError(f"output does not fit max_tokens of {job.max_tokens}.", param="output")
        ahead = [(s, outputs[s.choice]) for s in job.streams if held[s.choice] > s.have and job.error is None]
        if ahead:
            model = self._registry.models.get(job.model)
            if model is None:
                raise unavailable(job.model)
            check(request, model)
            job.deadline = _deadline(request, now)
            self._delivery.detach(job)
            if job.ended:
                self._jobs.revive(job, request.prompt)
            self._delivery.orphans[job] = now
            self._lives.restart(ahead, request.attempt, request.fingerprint, now)
        self._delivery.bind(job, conn, now)
        for stream in job.streams:
            if job.error is None:
                self._delivery.seek(stream, held[stream.choice])


def _deadline(request: Request, now: float) -> float | None:
    """When its time is over on our clock.

    Raises:
        DeadlineExceededError: it was over before it arrived.
    """
    if request.budget_ms is None:
        return None
    if request.budget_ms <= 0:
        raise too_late()
    return now + min(request.budget_ms, _MAX_BUDGET_MS) / 1000

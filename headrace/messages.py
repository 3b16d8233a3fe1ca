"""The messages between client, broker and leader: what each side may say, and nothing of how it travels.

A stream is one choice of one request. Every token on the wire is named by (request, choice, attempt, index): the index
is absolute, so both ends can drop repeats and see gaps; the attempt grows each time the broker hands the stream to a
group again, so late output of an earlier one can be told from the present one.

    client -> broker   Hello Submit Cancel Credit Attach Describe GetBlob Ping GetStatus
    broker -> client   Welcome Accepted Tokens Done Error Cards Blob Pong Status
    leader -> broker   GroupHello Heartbeat Tokens Done Refused Drained Blob
    broker -> leader   GroupWelcome Assign Revoke Drain GetBlob Reset Error
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from headrace.card import ModelCard
from headrace.tasks import GENERATE
from headrace.tokens import pack_tokens, unpack_tokens

__all__ = [
    "BROKER_TO_CLIENT",
    "BROKER_TO_LEADER",
    "CLIENT_TO_BROKER",
    "LEADER_TO_BROKER",
    "PROTOCOL_VERSION",
    "Acceptance",
    "Accepted",
    "Ack",
    "Assign",
    "Assignment",
    "Attach",
    "Blob",
    "Cancel",
    "Cards",
    "Credit",
    "Describe",
    "Done",
    "Drain",
    "Drained",
    "Error",
    "Finish",
    "GetBlob",
    "GetStatus",
    "GroupHello",
    "GroupWelcome",
    "Heartbeat",
    "Hello",
    "Message",
    "Ping",
    "Pong",
    "Refusal",
    "Refused",
    "Request",
    "Reset",
    "Revoke",
    "Status",
    "StreamId",
    "Submit",
    "TokenRun",
    "Tokens",
    "Welcome",
    "pack_tokens",
    "unpack_tokens",
]

PROTOCOL_VERSION = 1


# ------------------------------------------------------------------------------------------------ parts of messages


class StreamId(NamedTuple):
    """One attempt at one choice of one request."""

    request: bytes
    choice: int
    attempt: int


class TokenRun(NamedTuple):
    """Tokens of one stream, `first` being the absolute index of the first of them.

    For a task that makes a vector the items are not token ids but its numbers, float32, little-endian as well.

    `logprobs`, if asked for, holds one `[logprob, [[token, logprob], ...]]` per token: the chosen token's, then the
    likeliest ones in falling order.
    """

    request: bytes
    choice: int
    attempt: int
    first: int
    tokens: bytes
    logprobs: list[Any] | None


class Finish(NamedTuple):
    """The end of one stream: `total` tokens in all; `reason` is stop, length or cancelled; `cached` prompt tokens."""

    request: bytes
    choice: int
    attempt: int
    reason: str
    total: int
    cached: int


class Ack(NamedTuple):
    """The client holds all tokens of a stream below `next_index`; with `final`, its end too."""

    request: bytes
    choice: int
    next_index: int
    final: bool


class Acceptance(NamedTuple):
    """The broker took a request; `seed` is the one in force, `max_tokens` the resolved limit."""

    request: bytes
    seed: int
    max_tokens: int


class Refusal(NamedTuple):
    """A leader cannot run a stream; `error` is an error's wire map."""

    request: bytes
    choice: int
    attempt: int
    error: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt with its settings, as a client submits it.

    Attributes:
        id: 16 random bytes chosen by the client; submitting the same request again is harmless.
        model: name of a served model; empty for the only one.
        prompt: token ids, packed.
        sampling: `SamplingParams.to_wire()`.
        budget_ms: time left for all of it, or None.
        output: per choice, packed tokens the client already holds (after a broker restart); empty when new.
        attempt: highest attempt number the client has seen, 0 when new.
        fingerprint: of the model that made `output`, so that other weights never continue it; empty when new.
        task: what is asked for, see `headrace.tasks`; its items travel as tokens do.
        pooling: `PoolingParams.to_wire()`, for a task that makes a vector.
    """

    id: bytes
    model: str
    prompt: bytes
    sampling: dict[str, Any] = field(default_factory=dict)
    budget_ms: int | None = None
    output: tuple[bytes, ...] = ()
    attempt: int = 0
    fingerprint: str = ""
    task: str = GENERATE
    pooling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One stream handed to a group: `output` was generated before (count it as output) and is not sent again."""

    request: bytes
    choice: int
    attempt: int
    prompt: bytes
    output: bytes = b""
    sampling: dict[str, Any] = field(default_factory=dict)
    budget_ms: int | None = None
    task: str = GENERATE
    pooling: dict[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------- client's side


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of a client."""

    version: int = PROTOCOL_VERSION
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The broker's answer: `broker` names this run of it, so a changed name means it was restarted."""

    version: int = PROTOCOL_VERSION
    broker: str = ""
    cards: tuple[ModelCard, ...] = ()
    limits: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Requests to run, many at once."""

    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Requests the broker took."""

    requests: tuple[Acceptance, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Requests to end; unknown ones are ignored, so it can be repeated."""

    requests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Cumulative acknowledgements; they free what the broker holds and let it send more."""

    acks: tuple[Ack, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """Take over streams by id from given positions, after the connection changed."""

    positions: tuple[Ack, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Describe:
    """Ask for the model cards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """The cards of all models that have a ready group."""

    cards: tuple[ModelCard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """The client lives; `nonce` comes back."""

    nonce: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """The broker lives."""

    nonce: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStatus:
    """Ask for groups, queues and counters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A report for people and metrics: plain maps, see `headrace.broker.report`."""

    report: dict[str, Any]


# ---------------------------------------------------------------------------------------------------- both sides


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """All new tokens of one engine step (leader to broker), or of one turn of the broker (broker to client)."""

    runs: tuple[TokenRun, ...]
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Streams that ended well."""

    finishes: tuple[Finish, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """An error's wire map; it ends `request` (all its choices) if that is not empty, else concerns the connection."""

    error: dict[str, Any]
    request: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetBlob:
    """Ask for a part of a blob: `hash` is the sha256 in hexadecimal of the whole."""

    hash: str
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A part of a blob, at most `BLOB_CHUNK` bytes; `total` is the size of the whole."""

    hash: str
    offset: int
    total: int
    data: bytes


# --------------------------------------------------------------------------------------------------- leader's side


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHello:
    """First message of a leader: the group is READY.

    Attributes:
        group: name, unique in the pool; the same after a restart of the group.
        card: the model it serves.
        max_num_seqs: streams it runs at once.
        kv_tokens: tokens its KV cache holds.
        running: streams whose KV it still holds from an earlier connection: a hint for placement, not a claim.
        life: names this run of its process: who comes back under the same one lost a connection and did not die.
    """

    group: str
    card: ModelCard
    max_num_seqs: int
    kv_tokens: int
    version: int = PROTOCOL_VERSION
    running: tuple[StreamId, ...] = ()
    life: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWelcome:
    """The broker's answer to a leader."""

    version: int = PROTOCOL_VERSION
    broker: str = ""
    heartbeat_ms: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """The leader lives, and `step` steps were made in all; `load` holds gauges such as running and kv_blocks_free."""

    step: int
    busy: bool
    load: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """Streams to run."""

    assignments: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """Streams to drop without a word."""

    streams: tuple[StreamId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Streams the leader cannot run."""

    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Finish what runs within `grace_ms`, take nothing new, then say Drained."""

    grace_ms: int = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """The group will run nothing more; what it still had may be placed elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """The broker gave this group up (or does not know it): drop all streams and say GroupHello again."""

    reason: str = ""


Message = (
    Hello
    | Welcome
    | Submit
    | Accepted
    | Cancel
    | Credit
    | Attach
    | Describe
    | Cards
    | Ping
    | Pong
    | GetStatus
    | Status
    | Tokens
    | Done
    | Error
    | GetBlob
    | Blob
    | GroupHello
    | GroupWelcome
    | Heartbeat
    | Assign
    | Revoke
    | Refused
    | Drain
    | Drained
    | Reset
)

CLIENT_TO_BROKER = (Hello, Submit, Cancel, Credit, Attach, Describe, GetBlob, Ping, GetStatus)
BROKER_TO_CLIENT = (Welcome, Accepted, Tokens, Done, Error, Cards, Blob, Pong, Status)
LEADER_TO_BROKER = (GroupHello, Heartbeat, Tokens, Done, Refused, Drained, Blob)
BROKER_TO_LEADER = (GroupWelcome, Assign, Revoke, Drain, GetBlob, Reset, Error)

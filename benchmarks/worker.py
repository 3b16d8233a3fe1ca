"""A child process that answers orders one after the other, and its parent's side. Orders and answers are plain values.

An order that fails is answered with why. What it leaves behind in its process, or on the device, is nobody's to guess:
whoever gets `OrderError` ends the process and starts another one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from headrace.errors import HeadraceError, from_wire
from headrace.processes import Child, describe_exit, parent

__all__ = ["OrderError", "Worker", "answer"]

logger = logging.getLogger(__name__)

_END = "end"
_ENDING = 3.0  # seconds to let go of a device
_STARTING = 180.0  # seconds for an interpreter, and torch on a cold disk


class OrderError(Exception):
    """An order could not be carried out; the message is for the row that it costs.

    Attributes:
        error: what a person can set right, if it is that.
    """

    def __init__(self, why: str, error: HeadraceError | None = None) -> None:
        super().__init__(why)
        self.error = error


class Worker:
    """A child that runs `answer`.

    Args:
        name: of its process.
        target: what it runs; says that it is ready, and answers.
        settings: arguments of that.
    """

    def __init__(self, name: str, target: Callable[..., None], settings: Mapping[str, Any]) -> None:
        self._child = Child(name, target, settings)

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Worker:
        """Start the process; does not wait until it is ready."""
        self._child.start()
        self._ready = False
        return self

    def ask(self, order: str, *, limit: float, **fields: Any) -> Any:
        """What an order brings.

        Args:
            order: its name.
            limit: seconds to wait at most, once the process is up.
            fields: of the order.

        Raises:
            OrderError: it failed, or the process did.
        """
        if not self._ready:
            self._receive("ready", _STARTING)
            self._ready = True
        self._child.send(order, **fields)
        return self._receive("done", limit)["result"]

    def close(self) -> None:
        """End the process, in good order if it is not at work."""
        self._child.send(_END)
        self._child.join(_ENDING)
        self._child.terminate(0.0)

    def _receive(self, wanted: str, limit: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        while (left := deadline - time.monotonic()) > 0 and not self._child.closed:
            message = self._child.receive(left)
            if self._child.error is not None:
                raise OrderError(self._child.error.message, self._child.error)
            if message is not None and message["kind"] == wanted:
                return message
            if message is not None and message["kind"] == "failed":
                error = message["error"]
                raise OrderError(message["why"], None if error is None else from_wire(error))
        if self._child.closed:
            raise OrderError(f"its process {describe_exit(self._child.join(5.0))}")
        raise OrderError(f"took longer than {limit:.0f} s")


def answer(orders: Mapping[str, Callable[..., Any]]) -> None:
    """Be a child that carries out orders until its parent has no more."""
    boss = parent()
    assert boss is not None
    boss.ready()
    while True:
        message = boss.receive()
        assert message is not None
        if message["kind"] == _END:
            return
        order = orders[message.pop("kind")]
        try:
            boss.send("done", result=order(**message))
        except Exception as error:  # whatever a peer raises costs one row
            logger.debug("an order failed", exc_info=True)
            known = error.to_wire() if isinstance(error, HeadraceError) else None
            boss.send("failed", why=_reason(error), error=known)


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    first = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__

"""Taking an address for the broker alone: stale socket files, locks, clear errors. No messages."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import zmq

from headrace.addresses import check_bind
from headrace.broker.owners import port_owner, socket_owner
from headrace.codec import MAX_BODY
from headrace.errors import AddressError

__all__ = ["Listener"]

# Peers x high-water mark x frame size is the memory bound of a ROUTER; its defaults are "no limit" times a thousand.
# No option bounds the frames of one message that does not end: they gather until the connection does. That is one more
# reason why only this user may connect.
_OPTIONS: dict[int, int | bytes] = {
    zmq.ROUTER_MANDATORY: 1,  # without it a ROUTER drops what it cannot send, in silence
    zmq.ROUTER_HANDOVER: 1,
    zmq.LINGER: 0,
    zmq.HANDSHAKE_IVL: 3000,
    zmq.HEARTBEAT_IVL: 2000,
    zmq.HEARTBEAT_TIMEOUT: 6000,
    zmq.MAXMSGSIZE: MAX_BODY,
    zmq.BACKLOG: 1024,
    # Nobody checks this domain, but with one set libzmq hangs up on all that does not speak ZMTP 3. Without, it takes
    # HTTP for the first words of a ZMTP 1 peer and waits for the rest of them for ever.
    zmq.ZAP_DOMAIN: b"headrace",
}

_FAREWELL_MS = 100  # for the last words of a broker that stops


class Listener:
    """A bound ROUTER socket that nobody else can have bound.

    Attributes:
        socket: to poll, receive and send.
        endpoint: the address in force, with the port if 0 was asked for.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, *, high_water: int) -> None:
        check_bind(endpoint)
        self._path = Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
        self._lock = None if self._path is None else _take_lock(self._path, endpoint)
        self._bound = False
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        try:
            for option, value in _OPTIONS.items():
                self.socket.setsockopt(option, value)
            self.socket.setsockopt(zmq.IPV6, int(endpoint.startswith("tcp://[")))
            self.socket.set_hwm(high_water)
            if self._path is None:
                _bind_port(self.socket, endpoint)
            else:
                _bind_file(self.socket, endpoint, self._path)
            self._bound = True
        except BaseException:
            self.close()
            raise
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        """Give the address up; what was not sent within a moment is dropped."""
        self.socket.close(linger=_FAREWELL_MS)
        if self._lock is not None:
            assert self._path is not None
            if self._bound:
                self._path.unlink(missing_ok=True)
            os.close(self._lock)  # the lock goes last, so that nobody's fresh socket file is removed
            self._lock = None


def _take_lock(path: Path, endpoint: str) -> int:
    """Lock `<socket>.lock`, which lives as long as its broker: a socket file without a lock is a dead one's."""
    lock_path = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AddressError(
            f"Cannot create {str(lock_path)!r}: {error.strerror}. Choose a folder you may write to with --endpoint "
            "or HEADRACE_RUNTIME_DIR."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(lock)
        raise AddressError(
            f"{endpoint!r} is in use by the broker with process id {owner}; stop it, or choose another address "
            "with HEADRACE_RUNTIME_DIR."
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _bind_file(socket: zmq.Socket[bytes], endpoint: str, path: Path) -> None:
    """Bind a Unix socket, in place of one that a dead process left, for this user alone."""
    umask = os.umask(0o177)  # it is nobody else's from its first moment
    try:
        if path.is_socket() and (owner := socket_owner(path)) is not None:
            by = f"the process with id {owner}" if owner else "another process"
            raise AddressError(f"{endpoint!r} is in use by {by}; stop it, or choose another address.")
        if path.exists() and not path.is_socket():
            raise AddressError(f"{str(path)!r} exists and is no socket; remove it or choose another address.")
        path.unlink(missing_ok=True)
        socket.bind(endpoint)
    except (OSError, zmq.ZMQError) as error:
        raise AddressError(f"Cannot listen on {endpoint!r}: {error.strerror}; choose another address.") from error
    finally:
        os.umask(umask)


def _bind_port(socket: zmq.Socket[bytes], endpoint: str) -> None:
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno != zmq.EADDRINUSE:
            raise AddressError(f"Cannot listen on {endpoint!r}: {error.strerror}; choose another address.") from error
        owner = port_owner(int(endpoint.rpartition(":")[2]))
        by = "another process" if owner is None else f"the process with id {owner}"
        raise AddressError(f"{endpoint!r} is in use by {by}; stop it or choose another port.") from error

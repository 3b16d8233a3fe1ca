"""Where the processes meet, and which addresses are safe to listen on.

The default is a pair of Unix sockets in a folder only its owner can enter, so nobody else on the machine can connect.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

from headrace.errors import AddressError, ConfigError

__all__ = ["cache_dir", "check_bind", "client_endpoint", "is_loopback", "models_dir", "runtime_dir", "worker_endpoint"]


def runtime_dir() -> Path:
    """The folder of sockets and locks, made with mode 0700: $HEADRACE_RUNTIME_DIR or one below the user's own.

    Raises:
        ConfigError: it cannot be made.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    default = Path(base) / "headrace" if base else cache_dir() / "run"
    path = Path(os.environ.get("HEADRACE_RUNTIME_DIR", default))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The runtime folder {str(path)!r} cannot be made: {error.strerror}. "
            "Set HEADRACE_RUNTIME_DIR to a folder of your own."
        ) from error
    return path


def cache_dir() -> Path:
    """Where models and tokenizers are kept: $HEADRACE_CACHE, else `headrace` in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HEADRACE_CACHE", base / "headrace"))


def models_dir() -> Path:
    """Where fetched and converted models are kept: $HEADRACE_MODELS, else `models` in the cache folder."""
    return Path(os.environ.get("HEADRACE_MODELS", cache_dir() / "models"))


def client_endpoint() -> str:
    """Where clients find the broker: $HEADRACE_ENDPOINT, else a socket in the runtime folder."""
    return os.environ.get("HEADRACE_ENDPOINT") or f"ipc://{runtime_dir() / 'clients.sock'}"


def worker_endpoint() -> str:
    """Where leaders find the broker: $HEADRACE_WORKER_ENDPOINT, else a socket in the runtime folder."""
    return os.environ.get("HEADRACE_WORKER_ENDPOINT") or f"ipc://{runtime_dir() / 'workers.sock'}"


def check_bind(endpoint: str) -> str:
    """The endpoint, if it is one that a process may listen on.

    Raises:
        AddressError: it is malformed, too long for a Unix socket, or reaches beyond this machine.
    """
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        if path.startswith(("@", "*")):
            raise AddressError(
                f"{endpoint!r} is a socket without a file, so everybody on this machine could connect; "
                "write ipc:///path/to.sock."
            )
        if not 0 < len(path.encode()) <= 100:
            raise AddressError(
                f"The socket path {path!r} is empty or longer than 100 bytes, the most a Unix socket takes; "
                "set HEADRACE_RUNTIME_DIR to a shorter folder."
            )
        return endpoint
    try:
        parts = urlsplit(endpoint)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        scheme, host, port = "", None, None
    if scheme != "tcp" or not host or port is None:
        raise AddressError(f"{endpoint!r} is not an address; write ipc:///path/to.sock or tcp://127.0.0.1:PORT.")
    if not is_loopback(host):
        raise AddressError(
            f"{endpoint!r} would listen beyond this machine, which needs keys that this version cannot check yet; "
            "bind to 127.0.0.1 and reach it through an SSH tunnel."
        )
    return endpoint


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Who has an address: process ids for people, from the kernel's own tables, as far as it shows them."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from pathlib import Path

__all__ = ["port_owner", "socket_owner"]

_LISTENS = "0A"
_PEER_TIMEOUT = 1.0


def socket_owner(path: Path) -> int | None:
    """The process that answers at a Unix socket, 0 if it cannot be named; None if nobody answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PEER_TIMEOUT)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return 0  # its backlog is full, so somebody has it
        except OSError:
            return None
        if not hasattr(socket, "SO_PEERCRED"):
            return 0
        size = struct.calcsize("3i")
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return int(pid)


def port_owner(port: int) -> int | None:
    """The process that listens on a TCP port, None if it cannot be seen: another user's, or not on Linux."""
    inodes = set(_listening(port))
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # it ended, or belongs to somebody else
            for link in folder.iterdir():
                found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
                if found and found[1] in inodes:
                    return int(folder.parent.name)
    return None


def _listening(port: int) -> list[str]:
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    found.append(fields[9])
    return found

"""Files by hash, kept in the user's cache folder: a tokenizer of 7 MB travels once, not with every start.

What is read back is checked against its name, so a damaged or forged file is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path

from headrace.addresses import cache_dir
from headrace.errors import ProtocolError

__all__ = ["BlobCache", "check_hash"]

_HASH = re.compile(r"[0-9a-f]{64}")


class BlobCache:
    """A folder of files named by the sha256 of their content."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def _path(self, digest: str) -> Path:
        return (self._folder or cache_dir() / "blobs") / check_hash(digest)

    def get(self, digest: str) -> bytes | None:
        """The content, or None if there is no good copy."""
        try:
            content = self._path(digest).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == digest else None

    def put(self, digest: str, content: bytes) -> None:
        """Keep the content if the disk allows; a full or read-only one costs the next start a download, no more.

        Raises:
            ProtocolError: the content is not what the hash names.
        """
        path = self._path(digest)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ProtocolError(f"A file came from the broker damaged: its hash is not {digest}. Try again.")
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                Path(temporary).replace(path)
            except OSError:
                Path(temporary).unlink(missing_ok=True)


def check_hash(digest: str) -> str:
    """The hash, if it is one: it becomes a file name.

    Raises:
        ProtocolError: it is not a sha256 in hexadecimal.
    """
    if not _HASH.fullmatch(digest):
        raise ProtocolError(f"{digest[:80]!r} is not a sha256; the broker sent a malformed model card.")
    return digest

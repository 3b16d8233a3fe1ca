"""Tokenizers and chat templates by content hash: fetched from leaders in parts, checked, served to clients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from headrace.codec import BLOB_CHUNK
from headrace.errors import InvalidRequestError, ProtocolError
from headrace.messages import Blob, GetBlob

__all__ = ["MAX_BLOB", "BlobStore", "Download"]

MAX_BLOB = 256 << 20


class Download:
    """One blob on its way from one leader."""

    def __init__(self, hash: str, now: float) -> None:
        self.hash = hash
        self.asked_at = now
        self._data = bytearray()

    @property
    def next_part(self) -> GetBlob:
        """The question to ask now."""
        return GetBlob(hash=self.hash, offset=len(self._data))

    def take(self, part: Blob, now: float) -> bytes | None:
        """Add a part; the whole once it is complete and right.

        Raises:
            ProtocolError: sizes make no sense, or the content is not what the hash says.
        """
        if part.hash != self.hash or part.offset != len(self._data):
            return None  # an answer to a question that was asked twice
        end = part.offset + len(part.data)
        if part.total > MAX_BLOB or end > part.total or (not part.data and end < part.total):
            raise ProtocolError(f"Blob {self.hash[:12]} of {part.total:,} bytes came in parts that do not add up.")
        self._data += part.data
        self.asked_at = now
        if len(self._data) < part.total:
            return None
        whole = bytes(self._data)
        if hashlib.sha256(whole).hexdigest() != self.hash:
            raise ProtocolError(f"Blob {self.hash[:12]} does not have the content its hash names; reload the model.")
        return whole


class BlobStore:
    """The blobs that the broker has."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    def __contains__(self, hash: str) -> bool:
        return hash in self._blobs

    def add(self, hash: str, data: bytes) -> None:
        """A blob whose hash was checked."""
        self._blobs[hash] = data

    def keep_only(self, hashes: Iterable[str]) -> None:
        """Drop blobs of models that are gone."""
        wanted = set(hashes)
        self._blobs = {hash: data for hash, data in self._blobs.items() if hash in wanted}

    def part(self, question: GetBlob) -> Blob:
        """The answer to a client.

        Raises:
            InvalidRequestError: there is no such blob, or no such offset in it.
        """
        data = self._blobs.get(question.hash)
        if data is None:
            shown = question.hash[:64]
            raise InvalidRequestError(f"No served model has a blob {shown!r}; ask for the cards again.", param="hash")
        if not 0 <= question.offset <= len(data):
            message = f"Offset {question.offset} is outside the {len(data):,} bytes of this blob."
            raise InvalidRequestError(message, param="offset")
        chunk = data[question.offset : question.offset + BLOB_CHUNK]
        return Blob(hash=question.hash, offset=question.offset, total=len(data), data=chunk)

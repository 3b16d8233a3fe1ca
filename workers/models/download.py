"""Downloads one file over HTTPS: goes on where it was cut off, checks its hash, appears under its name only when whole.

Credentials go to the address they are for and to no other, wherever that redirects to.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from headrace.errors import ModelFilesError, ModelNotFoundError

__all__ = ["RemoteFile", "download", "open_url"]

TIMEOUT = 20.0  # seconds without a byte
RETRIES = 5  # failures in a row, without a byte between them
PAUSE = 1.0  # seconds after the first failure; doubled after each further one
_CHUNK = 1 << 20
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file and what is known of it beforehand.

    Attributes:
        name: under which it is stored; a plain name, or a path below the folder.
        url: where it is.
        size: in bytes.
        sha256: of its content, if known.
        git_sha1: the id that git gives its content, if known.
    """

    name: str
    url: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    def measure(self, path: Path) -> tuple[bool, str]:
        """Whether a file on the disk is this one, and its sha256."""
        sha256 = hashlib.sha256()
        git = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                sha256.update(chunk)
                if self.git_sha1 is not None:
                    git.update(chunk)
        found = sha256.hexdigest()
        right = self.sha256 in (None, found) and self.git_sha1 in (None, git.hexdigest())
        return right and path.stat().st_size == self.size, found


def download(
    file: RemoteFile,
    folder: Path,
    *,
    headers: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> str:
    """Put the file into the folder, unless it is there already; returns its sha256.

    Raises:
        ModelFilesError: what was received is not the file.
        ModelNotFoundError: the server refuses it.
        OSError: the network or the disk failed.
    """
    target = folder / file.name
    if target.is_file():
        right, sha256 = file.measure(target)
        if right:
            progress(file.size)
            return sha256
        target.unlink()
    target.parent.mkdir(exist_ok=True)
    part = folder / f"{file.name}.part"
    resumed = part.exists()
    while True:
        _receive_all(file, part, headers or {}, progress)
        right, sha256 = file.measure(part)
        if right:
            part.rename(target)
            return sha256
        part.unlink()
        if not resumed:
            break
        resumed = False  # what was left from last time may have been damaged: once more, from the start
    raise ModelFilesError(
        f"{file.url} has the sha256 {sha256}, not {file.sha256 or 'the one that its repository states'}: it was "
        "changed on the way or at the mirror, so it is not used."
    )


def open_url(url: str, headers: Mapping[str, str]) -> IO[bytes]:
    """An answer to read from.

    Raises:
        urllib.error.HTTPError: the server answered with an error.
        OSError: no answer.
    """
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in ("http", "https"):
        raise ModelNotFoundError(f"{url!r} is no https address; check HF_ENDPOINT.")
    request = urllib.request.Request(url, headers={"User-Agent": "headrace", **headers})  # noqa: S310  checked above
    answer: IO[bytes] = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
    return answer


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        before, after = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if after.scheme not in ("https", before.scheme):
            raise ModelNotFoundError(
                f"{req.full_url} redirects to the unprotected address {newurl}; it is not followed."
            )
        if new is not None and before.netloc != after.netloc:
            new.remove_header("Authorization")
        return new


def _receive_all(
    file: RemoteFile,
    part: Path,
    headers: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    failures = 0
    while (have := part.stat().st_size if part.exists() else -1) != file.size:
        if have > file.size:
            part.unlink()
            continue
        try:
            _receive(file, part, max(have, 0), headers, progress)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                if error.code not in (408, 429) and error.code < 500:
                    raise ModelNotFoundError(f"{file.url} was refused: {error.code} {error.reason}.") from error
            elif isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise
            failures = 1 if part.exists() and part.stat().st_size > max(have, 0) else failures + 1
            if failures >= RETRIES:
                raise ConnectionError(f"{file.url} broke off {failures} times in a row: {error}") from error
            time.sleep(min(PAUSE * 2.0 ** (failures - 1), 15.0))


def _receive(
    file: RemoteFile, part: Path, have: int, headers: Mapping[str, str], progress: Callable[[int], None]
) -> None:
    """Receive the rest of the file, or as much of it as comes."""
    wanted = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with open_url(file.url, wanted) as answer:
        goes_on = have > 0 and getattr(answer, "status", 200) == 206
        with part.open("ab" if goes_on else "wb") as output:
            done = have if goes_on else 0
            while chunk := answer.read(_CHUNK):
                done += len(chunk)
                if done > file.size:
                    break  # more than announced: the hash would not fit
                output.write(chunk)
                progress(done)
    if done != file.size:
        raise ConnectionError(f"{done:,} of {file.size:,} bytes came")

"""A Hugging Face hub on this machine, with the faults that networks and mirrors have."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves repositories from memory.

    Attributes:
        files: repository -> name -> content.
        refuse: repository -> (status, X-Error-Code) of its listing.
        cut_after: name -> after how many bytes each answer for it breaks off.
        statuses: name -> statuses to answer with before the file is served.
        replace: name -> what is served in place of what the listing says.
        no_ranges: whether ranges are ignored, as by some mirrors.
        moved_to: address that files are redirected to.
        gate: answers for weights wait for it.
        requests: how often each path was asked for.
        ranges: the Range headers that came, by name.
        authorizations: the Authorization headers that came, in order, "" for none.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuse: dict[str, tuple[int, str]] = {}
        self.cut_after: dict[str, int] = {}
        self.statuses: dict[str, list[int]] = {}
        self.replace: dict[str, bytes] = {}
        self.no_ranges = False
        self.moved_to: str | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.requests: Counter[str] = Counter()
        self.ranges: list[tuple[str, str]] = []
        self.authorizations: list[str] = []
        self.url = ""

    def listing(self, repo: str) -> dict:
        siblings = []
        for name, content in self.files[repo].items():
            git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry: dict = {"rfilename": name, "size": len(content), "blobId": git}
            if name.endswith((".safetensors", ".bin", ".gguf")):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            siblings.append(entry)
        return {"id": repo, "sha": COMMIT, "siblings": siblings}

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            self.gate.set()
            server.shutdown()
            thread.join()
            server.server_close()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Tests stay quiet."""

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests[path] += 1
            hub.authorizations.append(self.headers.get("Authorization", ""))
            if path.startswith("/api/models/"):
                self._listing(path.removeprefix("/api/models/").split("/revision/"))
            else:
                self._file(*path.strip("/").split("/resolve/"))

        def _listing(self, parts: list[str]) -> None:
            repo = parts[0]
            status, code = hub.refuse.get(repo, (200 if repo in hub.files else 404, "RepoNotFound"))
            if parts[1] not in ("main", "v1.0", "refs/pr/1", COMMIT):
                status, code = 404, "RevisionNotFound"
            body = json.dumps(hub.listing(repo)).encode() if status == 200 else b"{}"
            self._answer(status, body, {} if status == 200 else {"X-Error-Code": code})

        def _file(self, repo: str, rest: str) -> None:
            name = rest.removeprefix(f"{COMMIT}/")
            if hub.statuses.get(name):
                self._answer(hub.statuses[name].pop(0), b"")
                return
            if hub.moved_to is not None:
                self._answer(302, b"", {"Location": f"{hub.moved_to}/{repo}/resolve/{rest}"})
                return
            if name.endswith(".safetensors"):
                hub.gate.wait(60)
            content = hub.replace.get(name, hub.files[repo][name])
            start, headers, status = 0, {}, 200
            if (asked := self.headers.get("Range")) is not None:
                hub.ranges.append((name, asked))
                if not hub.no_ranges:
                    start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(status, content[start:], headers, cut=hub.cut_after.get(name))

        def _answer(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler

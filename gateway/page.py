"""The chat page at `/` and its files: read once from the package, served with types, validators and a strict policy."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

__all__ = ["CONTENT_SECURITY_POLICY", "assets", "router"]

router = APIRouter(include_in_schema=False)

# No inline script or style, nothing from elsewhere: text that a model wrote cannot run or load anything. Trusted types
# leave DOMPurify as the only part of the page that may turn text into elements.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}


@cache
def assets() -> dict[str, tuple[bytes, str, str]]:
    """Path below `static/` -> content, media type, entity tag; only these can be asked for."""
    found: dict[str, tuple[bytes, str, str]] = {}

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            name = prefix + entry.name
            if entry.is_dir():
                walk(entry, name + "/")
            elif (kind := _TYPES.get(entry.name.rpartition(".")[2])) is not None:
                content = entry.read_bytes()
                found[name] = (content, kind, f'"{hashlib.sha256(content).hexdigest()[:20]}"')

    walk(files("headrace.gateway") / "static", "")
    return found


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The chat page."""
    return _file(request, "index.html")


@router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
async def static(request: Request, name: str) -> Response:
    """A file of the page."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    if name not in assets():
        raise HTTPException(404)
    content, kind, tag = assets()[name]
    # Always asked again, so that an upgrade shows at once; the tag makes that cost nothing.
    headers = {"etag": tag, "cache-control": "no-cache", "content-security-policy": CONTENT_SECURITY_POLICY}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)

"""The chat page as an ASGI application: its files with their types, their caching and the policy that holds scripts in."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Final

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

TYPES: Final[Mapping[str, str]] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
"""What a browser may have; a file with another ending stays where it is."""


def policy(brokers: Sequence[str] = ()) -> str:
    """The Content-Security-Policy: scripts, styles and pictures of the gateway alone, connections to it and to these brokers.

    No HTML is made from strings (trusted types), so an answer cannot become a script whatever it says.
    """
    connections = " ".join(["'self'", *brokers])
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        f"connect-src {connections}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file as it is sent."""

    content_type: str
    body: bytes
    compressed: bytes
    etag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """Every file of the page by its path below the page's address; the page itself as the empty path."""
    found: dict[str, PageFile] = {}
    root = files("llamacpp_mqtt_deploy.gateway").joinpath("page")

    def collect(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                collect(entry, f"{prefix}{entry.name}/")
            elif (ending := "." + entry.name.rpartition(".")[2]) in TYPES:
                body = entry.read_bytes()
                # Without a time in it the compressed form is the same at every start.
                packed = gzip.compress(body, 6, mtime=0)
                etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
                found[f"{prefix}{entry.name}"] = PageFile(TYPES[ending], body, packed, etag)

    collect(root, "")
    found[""] = found["index.html"]
    return found


class Pages:
    """Answers GET and HEAD for the page's files, 404 for everything else; to be mounted behind all other routes."""

    def __init__(self, *, brokers: Sequence[str] = ()) -> None:
        self._policy = policy(brokers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; `brokers` of the constructor are the websocket addresses that the page may speak to."""
        if scope["type"] != "http":
            return
        status, headers, body = self.respond(scope["method"], _path(scope), dict(scope["headers"]))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def respond(
        self, method: str, path: str, asked: Mapping[bytes, bytes]
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body; `path` is relative, without the first slash."""
        file = page_files().get(path)
        if file is None:
            return self._plain(404, b"There is no such page.\n")
        if method not in ("GET", "HEAD"):
            status, headers, body = self._plain(405, b"Only GET and HEAD.\n")
            return status, [*headers, (b"allow", b"GET, HEAD")], body
        headers = [
            (b"etag", file.etag.encode()),
            # Asked about at every visit, and answered with 304: an upgrade is seen at once.
            (b"cache-control", b"no-cache"),
            (b"vary", b"accept-encoding"),
            *self._guards(),
        ]
        if file.etag.encode() in (
            tag.strip().removeprefix(b"W/") for tag in asked.get(b"if-none-match", b"").split(b",")
        ):
            return 304, headers, b""
        body = file.body
        if b"gzip" in asked.get(b"accept-encoding", b""):
            body = file.compressed
            headers.append((b"content-encoding", b"gzip"))
        headers += [(b"content-type", file.content_type.encode()), (b"content-length", b"%d" % len(body))]
        return 200, headers, body if method == "GET" else b""

    def _plain(self, status: int, body: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        length = b"%d" % len(body)
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", length), *self._guards()]
        return status, headers, body

    def _guards(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-security-policy", self._policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
        ]


def _path(scope: Scope) -> str:
    """The path below the place where the page is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).removeprefix("/")

"""What the server refuses before any page sees it, and the headers of every answer.

A page of another site can make a browser send requests to a server on its own machine. Three checks stop that. The Host
header must name this server, so that a foreign name that resolves to it (DNS rebinding) is refused. A post must come from
a page of this server (Origin). No other site may load parts of pages (Sec-Fetch-Site).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The only inline styles are attributes: how strongly a token is coloured."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "vary": "HX-Request",
}


def is_loopback(host: str) -> bool:
    """Whether an address to bind to is this machine alone."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses requests from elsewhere, and adds :data:`HEADERS` to every answer.

    Bound to loopback, the Host header must be a name of loopback. Bound to more, it may also be any address (which cannot
    be rebound), the name that was bound to, or this machine's own name.
    """

    def __init__(self, app: Application, host: str) -> None:
        self.app, self.open = app, not is_loopback(host)
        self.names = {*LOOPBACK, host.lower(), *([socket.gethostname().lower()] if self.open else [])}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket: there are none here
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        if reason := self.refusal(scope["method"], scope["headers"]):
            plain = [(b"content-type", b"text/plain; charset=utf-8")]
            await send_with_headers({"type": "http.response.start", "status": 403, "headers": plain})
            await send({"type": "http.response.body", "body": reason.encode()})
            return
        await self.app(scope, receive, send_with_headers)

    def refusal(self, method: str, headers: list[tuple[bytes, bytes]]) -> str:
        """Why a request is refused; empty if it is not."""
        by_name: dict[str, list[str]] = {}
        for name, value in headers:
            by_name.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = by_name.get("host", [])
        if len(hosts) != 1 or not self.is_own(hosts[0]):
            return "This server does not answer to that Host name."
        get = method in ("GET", "HEAD")
        if not get and [o.lower() for o in by_name.get("origin", [])] != [f"http://{hosts[0].lower()}"]:
            return "Only pages of this server may post to it (the Origin header is another's, or missing)."
        fetch = {name: by_name.get(f"sec-fetch-{name}", [""])[0] for name in ("site", "mode")}
        if fetch["site"] in ("cross-site", "same-site") and not (get and fetch["mode"] == "navigate"):
            return "Other sites may link to this server, and no more."
        return ""

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this server; its port does not matter, since ports can be forwarded."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if any(c in host for c in "/@?#\\ "):
                return False
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.open

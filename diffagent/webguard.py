"""A guard for web servers on the operator's machine, against the pages in the operator's browser.

A browser sends the requests of any page to 127.0.0.1. Two headers, which no page can choose, tell
such requests apart: ``Host`` names another host when a foreign name was made to resolve to this
machine (DNS rebinding), and ``Origin`` names the page that sends a request that may change
something, or that opens a websocket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Names of this machine for itself.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class WebGuard:
    """ASGI middleware that answers only those who name this server, and its own pages.

    Args:
        app: answers what passes.
        hosts: host names, without port, that requests may name beside those of the loopback.
        headers: added to every answer.
    """

    def __init__(
        self, app: ASGIApp, hosts: Iterable[str] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        self._app = app
        self._hosts = {host.lower() for host in (*LOOPBACK, *hosts)}
        self._headers = dict(headers or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with the reason."""
        if scope["type"] not in ("http", "websocket"):  # lifespan
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            status, text = refusal
            await PlainTextResponse(f"{text}\n", status)(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        """HTTP status and reason when the request is refused; None when it passes."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or host_name(hosts[0]) not in self._hosts:
            named = ", ".join(hosts)[:200] or "none"
            return 421, (
                f"This server does not go by the host {named!r}; see --allow-host in SECURITY.md."
            )
        for origin in headers.getlist("origin"):
            if origin.lower().partition("://")[2] != hosts[0].lower():
                return 403, f"Requests of pages from {origin[:200]!r} are refused."
        return None


def host_name(host: str) -> str:
    """Host name of a Host header, in lower case and without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower()

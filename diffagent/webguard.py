"""A guard for web servers on the operator's machine, against pages in the operator's browser.

A browser lets any page send requests to 127.0.0.1. Two headers, which no page can set, expose such
requests: ``Host`` names another host when a foreign name resolves to this machine (DNS rebinding),
and ``Origin`` names the page whose request may change something or opens a websocket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Host names of this machine on its loopback interface.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class WebGuard:
    """ASGI middleware that serves only requests that name this server, from its own pages.

    Args:
        app: application that serves the requests that pass.
        hosts: host names, without port, that requests may state in addition to ``LOOPBACK``.
        headers: added to every response.
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
        """Return HTTP status and reason when the request is refused; None when it passes."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or host_name(hosts[0]) not in self._hosts:
            names = ", ".join(hosts)[:200] or "none"
            return 421, (
                f"This server has no host name {names!r}; see --allow-host in SECURITY.md."
            )
        for origin in headers.getlist("origin"):
            if origin.lower().partition("://")[2] != hosts[0].lower():
                return 403, f"Requests of pages from {origin[:200]!r} are refused."
        return None


def host_name(host: str) -> str:
    """Return the host name of a Host header, in lower case and without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower()

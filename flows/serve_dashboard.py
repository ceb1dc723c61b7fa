"""Prefect's server with its UI, and a server for the results of a store; both guarded.

``prefect server start`` answers requests of every web page: with any Host, and websockets of any
origin. A worker runs commands that it receives from the server, so that a page could run commands
on the operator's machine. This module serves the same application behind ``diffagent.webguard``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from starlette.types import ASGIApp

from diffagent.store.store_server import create_app as create_store_app
from diffagent.webguard import WebGuard

#: No other page can show the UI in a frame and misdirect clicks (clickjacking).
_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def main(
    store: Annotated[Path, typer.Option(help="Directory of artifacts.")] = Path("store"),
    port: Annotated[int, typer.Option(help="Port of Prefect's API and UI.")] = 4200,
    store_port: Annotated[int, typer.Option(help="Port of the store's reports and data.")] = 4201,
    host: Annotated[
        str, typer.Option(help="Address of Prefect's API and UI; the store is always local.")
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name in requests of other machines (repeatable)."),
    ] = None,
) -> None:
    """Serve Prefect's API and UI, and the store's reports, data cards, datasets and pictures."""
    home = os.environ.setdefault("PREFECT_HOME", str(store.resolve() / "prefect"))
    Path(home).mkdir(parents=True, exist_ok=True)  # Prefect creates the last folder only
    os.environ["PREFECT_SERVER_API_HOST"] = host
    os.environ["PREFECT_SERVER_API_PORT"] = str(port)
    names = [*(allow_host or ()), host]
    with (
        _listen("127.0.0.1", store_port, "--store-port") as store_socket,
        _listen(host, port, "--port") as api_socket,
    ):
        api = create_api_app(names, shared=not _is_loopback(host))
        results = _server(create_store_app(store, allow_host or ()))
        threading.Thread(target=results.run, args=([store_socket],), daemon=True).start()
        typer.echo(
            f"Prefect's UI     http://{host}:{port}\n"
            f"Reports, data    http://127.0.0.1:{store_port}  ({store})\n"
            f"For flows and workers: export PREFECT_API_URL=http://{host}:{port}/api"
        )
        with contextlib.suppress(KeyboardInterrupt):  # the server has shut down by then
            _server(api).run([api_socket])


def create_api_app(hosts: list[str], *, shared: bool) -> ASGIApp:
    """Prefect's application behind the guard.

    Args:
        hosts: accepted host names, in addition to those of the loopback.
        shared: other machines reach the server, so that it requires a password.
    """
    from prefect.settings import get_current_settings

    api = get_current_settings().server.api
    if shared and api.auth_string is None:
        raise typer.BadParameter(
            "a server that other machines reach needs a password, since its clients run commands "
            "on its workers: set PREFECT_SERVER_API_AUTH_STRING=USER:PASSWORD, and "
            "PREFECT_API_AUTH_STRING to the same for flows and workers (see SECURITY.md)",
            param_hint="--host",
        )
    if not api.csrf_protection_enabled or "*" in api.cors_allowed_origins:
        raise typer.BadParameter(
            "the settings csrf_protection_enabled or cors_allowed_origins of Prefect's API "
            "let any web page use this server; start it in the directory of prefect.toml, or "
            "set both as it does"
        )
    from prefect.server.api.server import (
        create_app,
    )  # takes seconds; refused options do not wait for it

    return WebGuard(create_app(final=True), hosts, _HEADERS)


def _server(app: ASGIApp) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, log_level="warning"))


def _listen(host: str, port: int, option: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's delay, 40 ms a response, only for an explicit TCP socket.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
        return listener
    except OSError as error:
        raise typer.BadParameter(
            f"cannot listen on {host} port {port}: {error.strerror}; if it is served already, give "
            "another port or stop that process",
            param_hint=option,
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


if __name__ == "__main__":
    typer.run(main)

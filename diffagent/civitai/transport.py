"""Connections with bounds on the time and the size of a whole answer.

A socket's timeout ends only a silence: one byte a second outlives it for ever. So every read of a
connection, of headers and bodies alike, checks the deadline of its request. Redirects are left to
the caller, and requests to this machine never go through a proxy.
"""

from __future__ import annotations

import http.client
import io
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from diffagent.civitai.address import is_loopback
from diffagent.errors import CivitaiError, ServerError

log = logging.getLogger(__name__)

#: The largest answer, unpacked: 100 of the longest models of 7,500 are 12 MB, 200 pictures 3 MB,
#: and a page with one record that is much too long is read, so that the others are kept.
MAX_BODY = 64 << 20
#: Bytes of an error that identify it.
MAX_ERROR_BODY = 64 << 10
_CHUNK = 1 << 16
#: Seconds without a byte after which the wait is logged.
_SILENCE = 15.0
_NO_PROXIES: Any = {"http": None, "https": None, "all": None}


class Deadline:
    """Time at which an answer has to be complete: ``seconds`` from now.

    Args:
        seconds: to wait.
        slowest: bytes a second that renew the time; infinite: no speed does.
    """

    def __init__(self, seconds: float, slowest: float = math.inf) -> None:
        self.seconds, self._slowest = seconds, slowest
        self._begun, self._bytes = time.monotonic(), 0

    def left(self) -> float:
        """Return the seconds that are left; negative after the deadline."""
        return self._begun + self.seconds - time.monotonic()

    def gained(self, size: int) -> bool:
        """Count bytes; return whether they came fast enough to renew the time."""
        self._bytes += size
        if self._bytes < self._slowest * (time.monotonic() - self._begun):
            return False
        self._begun, self._bytes = time.monotonic(), 0
        return True


_request = threading.local()


class _Stream(io.RawIOBase):
    """Bytes of a socket, until the deadline of the request."""

    def __init__(self, sock: socket.socket, file: Any) -> None:
        self._sock, self._file = sock, file
        self._deadline: Deadline = getattr(_request, "deadline", None) or Deadline(math.inf)
        self._silence: float = sock.gettimeout() or math.inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        began = time.monotonic()
        while True:
            left = min(self._deadline.left(), began + self._silence - time.monotonic())
            if left <= 0:
                raise TimeoutError("the answer did not come in time")
            self._sock.settimeout(min(left, _SILENCE))
            try:
                size = self._sock.recv_into(buffer)
            except TimeoutError:
                if (waited := time.monotonic() - began) < self._silence:
                    host = getattr(_request, "host", "the server")
                    log.warning("%s sends nothing since %.0f s; still waiting", host, waited)
                continue
            self._deadline.gained(size)
            return size

    def close(self) -> None:
        self._file.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Stream(sock, self.fp))


class _Connection(urllib3.connection.HTTPConnection):
    response_class = _Response


class _SecureConnection(urllib3.connection.HTTPSConnection):
    response_class = _Response


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
        return manager


class DeadlineSession(requests.Session):
    """A session whose requests have deadlines; threads must not share it."""

    def __init__(self) -> None:
        super().__init__()
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter())

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None: requests would parse the address and read a redirect's whole body."""

    def send_within(
        self,
        method: str,
        url: str,
        deadline: Deadline,
        timeout: tuple[float, float],
        **options: Any,
    ) -> requests.Response:
        """Send a request; the body of the answer is yet to be read, by the same thread.

        Raises:
            ServerError: there is no answer, or it is no HTTP.
        """
        host = url.split("/", 3)[2]
        _request.deadline, _request.host = deadline, host
        if is_loopback(url):
            options["proxies"] = _NO_PROXIES
        timeout = (min(timeout[0], max(deadline.left(), 0.001)), timeout[1])
        try:
            return self.request(
                method, url, timeout=timeout, stream=True, allow_redirects=False, **options
            )
        except _BROKEN as error:
            raise ServerError(f"{host}: transfer broke: {_kind(error)}") from None


#: Exceptions of a broken answer; requests wraps most of them, not all.
_BROKEN = (
    *(requests.RequestException, urllib3.exceptions.HTTPError),
    *(http.client.HTTPException, OSError, ValueError),
)


def chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield the body of an answer in pieces, unpacked.

    Raises:
        ServerError: it broke, is not in its stated encoding, or took too long.
    """
    try:
        yield from response.iter_content(_CHUNK)
    except _BROKEN as error:
        raise ServerError(f"transfer broke: {_kind(error)}") from None


def read_body(response: requests.Response, where: str, limit: int = MAX_BODY) -> bytes:
    """Read the whole body, unpacked.

    Raises:
        CivitaiError: it is longer than ``limit``, the most that memory holds of it.
        ServerError: it broke, or took too long.
    """
    body = bytearray()
    for chunk in chunks(response):
        body += chunk
        if len(body) > limit:
            raise CivitaiError(
                f"{where}: an answer of more than {limit >> 20} MB (unpacked), the most that is "
                "read; the site or a proxy before it is broken"
            )
    return bytes(body)


def error_body(response: requests.Response) -> bytes:
    """Read the beginning of the body of an error; b'' where it cannot be read."""
    body = bytearray()
    try:
        for chunk in chunks(response):
            body += chunk
            if len(body) > MAX_ERROR_BODY:
                break
    except ServerError as error:
        log.debug("the body of %d: %s", response.status_code, error)
    return bytes(body[:MAX_ERROR_BODY])


def redact(response: requests.Response, secret: str) -> None:
    """Remove a secret from the headers of an answer that echoes it."""
    headers: Mapping[str, str] = response.headers
    response.headers.update({name: value.replace(secret, "***") for name, value in headers.items()})
    response.reason = str(response.reason or "").replace(secret, "***")


def _kind(error: BaseException) -> str:
    """Return the kind of a failure; its message may hold a presigned address."""
    cause = error.args[0] if error.args else None
    reason = getattr(cause, "reason", None) or cause
    kind = type(error).__name__
    return f"{kind} ({type(reason).__name__})" if isinstance(reason, BaseException) else kind

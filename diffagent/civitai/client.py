"""The client of Civitai's REST API: polite, patient, and suspicious of what comes back.

Requests go through one rate limiter a process. What may succeed later (429 of the edge, 5xx,
524, broken or cut bodies, HTML in place of JSON) is tried again with jittered exponential backoff
until the time budget of the call is spent; Retry-After is honoured. What cannot succeed is
raised at once: 404, 401/403, a stale cursor, and the 429 that means "page * limit > 1000".

The token (environment variable CIVITAI_TOKEN) goes to the site's own origin alone: never into
an address, a log or an exception, and never along a redirect to another origin, where the
storage behind downloads refuses it with 400.
"""

from __future__ import annotations

import email.utils
import ipaddress
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, urljoin, urlsplit

import orjson
import requests
from requests.auth import AuthBase

import diffagent
from diffagent.civitai.download import Transfer
from diffagent.civitai.pagination import Page, walk
from diffagent.civitai.ratelimit import bucket_of
from diffagent.errors import (
    BadCursor,
    CivitaiError,
    ConfigError,
    DownloadsDisabled,
    EarlyAccess,
    Forbidden,
    NotFound,
    PageCap,
    RateLimited,
    ServerError,
)

log = logging.getLogger(__name__)

USER_AGENT = f"DiffAgent/{diffagent.__version__} (dataset builder; python-requests)"
TOKEN_VARIABLE = "CIVITAI_TOKEN"
#: The site's two fronts: the same API, and either may appear in an address it gives.
SITE_HOSTS = ("civitai.com", "civitai.red")
Params = Mapping[str, Any]
T = TypeVar("T")

_MAX_REDIRECTS = 4


@dataclass(frozen=True)
class Patience:
    """How long and how often a call is tried. All in seconds."""

    first: float = 1.0
    longest: float = 30.0
    budget: float = 600.0
    connect_timeout: float = 10.0
    read_timeout: float = 120.0

    def pause(self, failures: int, rng: random.Random) -> float:
        """Pause after so many failures in a row: exponential, with jitter."""
        return min(self.longest, self.first * 2.0 ** min(failures, 30)) * rng.uniform(0.5, 1.0)


LOOPBACK_PATIENCE = Patience(first=0.02, longest=0.5, budget=120.0)


class _SiteToken(AuthBase):
    """Sets the token for the site's origin only. Being there at all keeps ~/.netrc out."""

    def __init__(self, origin: str, token: str | None) -> None:
        self._origin, self._token = origin, token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token and origin_of(request.url or "") == self._origin:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class CivitaiClient:
    """A session with one site; threads may share it, and share its rate limit.

    Args:
        site_url: 'https://civitai.com' or any address that serves the same API.
        requests_per_second: None means 1 to a real site and no limit to a loopback address.
        patience: None means what fits a real site, or shorter pauses to a loopback address.
        token: None takes it from the environment, when it is there.
    """

    def __init__(
        self,
        site_url: str,
        *,
        requests_per_second: float | None = None,
        patience: Patience | None = None,
        token: str | None = None,
    ) -> None:
        if urlsplit(site_url).scheme not in ("http", "https") or not urlsplit(site_url).hostname:
            raise ConfigError(f"site {site_url!r} is no http(s) address")
        self.origin = origin_of(site_url)
        local = is_loopback(site_url)
        self.patience = patience or (LOOPBACK_PATIENCE if local else Patience())
        if requests_per_second is None and not local:
            requests_per_second = 1.0
        self._bucket = bucket_of(self.origin, requests_per_second)
        self._rng = random.Random(0)
        self._auth = _SiteToken(self.origin, token or os.environ.get(TOKEN_VARIABLE))
        self._local = threading.local()  # requests' sessions are not safe to share
        self._sessions: list[requests.Session] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.requests = 0
        self.retries = 0

    def stop(self) -> None:
        """Give up waiting: calls in other threads fail at their next pause."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections; see ``stop`` for what other threads still wait for."""
        self.stop()
        for session in self._sessions:
            session.close()

    def __enter__(self) -> CivitaiClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Listings

    def get_models(self, cursor: str | None = None, **params: Any) -> Page:
        """One page of /models; parameters are the API's (``types`` may be a list)."""
        return self._page("/api/v1/models", cursor, params)

    def get_images(self, cursor: str | None = None, **params: Any) -> Page:
        """One page of /images, with generation metadata unless ``withMeta`` says otherwise."""
        return self._page("/api/v1/images", cursor, {"withMeta": "true", **params})

    def iter_models(self, **params: Any) -> Iterator[dict[str, Any]]:
        """All models that match, each once."""
        return walk(lambda cursor: self.get_models(cursor, **params))

    def iter_images(self, **params: Any) -> Iterator[dict[str, Any]]:
        """All images that match, each once."""
        return walk(lambda cursor: self.get_images(cursor, **params))

    # Single records

    def get_model(self, model_id: int) -> dict[str, Any]:
        """/models/:id."""
        return self._object(f"/api/v1/models/{model_id:d}")

    def get_version(self, version_id: int) -> dict[str, Any]:
        """/model-versions/:id; its pictures have metadata."""
        return self._object(f"/api/v1/model-versions/{version_id:d}")

    def get_by_hash(self, digest: str) -> dict[str, Any]:
        """The version that has a file with this hash (AutoV1/2/3, SHA256, CRC32, BLAKE3)."""
        return self._object(f"/api/v1/model-versions/by-hash/{quote(digest, safe='')}")

    def get_model_page(self, model_id: int) -> dict[str, Any]:
        """What only the HTML page tells: see ``diffagent.civitai.html.page_settings``.

        Raises:
            SchemaError: the page's state has no form known here.
        """
        from diffagent.civitai.html import page_settings

        page = self._patiently(lambda: self._text(f"/models/{model_id:d}"))
        return page_settings(page)

    # Files

    def resolve_download(self, version: int | str) -> str:
        """The short-lived address of a file, in one unauthorised hop.

        Args:
            version: a version id, or a download path or address of this site.

        Raises:
            EarlyAccess: the version is still for sale.
            DownloadsDisabled: its creator lets nobody download it.
            Forbidden: log-in needed.
            NotFound: no such file, or archived.
        """
        path = f"/api/download/models/{version}" if isinstance(version, int) else version
        return self._patiently(lambda: self._redirect_target(self._own_url(path)))

    def download(
        self,
        url: int | str,
        path: Path,
        *,
        sha256: str | None = None,
        size_bytes: int | None = None,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> Path:
        """Fetch a model file to ``path``, whole and verified, or not at all.

        Bytes go to ``path`` + '.part', which stays when the transfer breaks and is continued
        with a Range request on a freshly resolved address: in this call, and with a ``sha256``
        in any later one.

        Args:
            url: a version id, or a download path or address of this site.
            path: where the file comes to lie, by a rename.
            sha256: hex digest that the file must have.
            size_bytes: size, give or take the site's rounding to 1 kB.
            on_bytes: is called with how many more bytes are there, fewer when the file is begun
                anew; what it raises ends the transfer.

        Raises:
            CivitaiError: size or SHA256 are not as expected, or the site does not give it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        transfer = Transfer(repr(url), part, sha256, size_bytes, on_bytes)
        for last_try in (False, True):
            self._patiently(lambda: self._transfer(url, transfer), progress=lambda: transfer.have)
            problem = transfer.problem()
            if not problem:
                part.replace(path)
                return path
            # Pieces may be of two files, also where one was left by an earlier run.
            in_pieces = transfer.pieces > 1
            transfer.discard()
            if last_try or not in_pieces:
                break
        raise transfer.unexpected(problem)

    def _transfer(self, url: int | str, transfer: Transfer) -> None:
        target = self.resolve_download(url)
        for _ in range(_MAX_REDIRECTS):
            with self._send(target, headers=transfer.headers()) as response:
                if response.status_code in (200, 206, 416):
                    transfer.take(response)
                    return
                if not response.is_redirect:
                    raise self._storage_failure(response)
                target = self._storage_url(response)
        raise ServerError(f"{url!r}: more than {_MAX_REDIRECTS} redirects")

    # How requests are made

    def _own_url(self, path: str) -> str:
        """The address on the configured site of a path, or of an address of either front."""
        parts = urlsplit(path)
        if parts.scheme and not (
            origin_of(path) == self.origin or is_site_host(parts.hostname or "")
        ):
            raise ConfigError(f"{parts.hostname!r} is not the site; give a path")
        query = f"?{parts.query}" if parts.query else ""
        return f"{self.origin}/{parts.path.lstrip('/')}{query}"

    def _page(self, path: str, cursor: str | None, params: Params) -> Page:
        asked = {**params, "cursor": cursor} if cursor else dict(params)
        body = self._object(path, asked)
        items, metadata = body.get("items"), body.get("metadata")
        if not isinstance(items, list):
            raise CivitaiError(f"{path} answered without a list of items: {str(body)[:200]!r}")
        return Page.of(items, next_cursor(metadata if isinstance(metadata, dict) else {}))

    def _object(self, path: str, params: Params | None = None) -> dict[str, Any]:
        return self._patiently(lambda: self._json(path, params or {}))

    def _json(self, path: str, params: Params) -> dict[str, Any]:
        with self._follow(self.origin + path, params) as response:
            if response.status_code != 200:
                raise _failure(response, cursor="cursor" in params)
            kind = response.headers.get("Content-Type", "").lower()
            if "json" not in kind:
                raise ServerError(f"{path}: {kind!r} instead of JSON")
            value = parse_json(response.content, path)
        if not isinstance(value, dict):
            raise ServerError(f"{path}: {type(value).__name__} instead of a JSON object")
        return value

    def _text(self, path: str) -> str:
        with self._follow(self.origin + path, {}) as response:
            if response.status_code != 200:
                raise _failure(response, cursor=False)
            page = response.content.decode("utf-8", "replace")
        if "__NEXT_DATA__" not in page:
            raise ServerError(f"{path}: a page without __NEXT_DATA__ (a challenge?)")
        if not page.rstrip().endswith("</html>"):
            raise ServerError(f"{path}: a page that ends in the middle")
        return page

    def _follow(self, url: str, params: Params) -> requests.Response:
        """GET with redirects between the site's fronts; nobody else is ever asked."""
        response = self._send(url, params=params)
        for _ in range(_MAX_REDIRECTS):
            if not response.is_redirect:
                return response
            target = urljoin(response.url, response.headers["Location"])
            response.close()
            if urlsplit(target).path.startswith("/login"):
                raise Forbidden(f"{urlsplit(url).path}: log-in required; set {TOKEN_VARIABLE}")
            if origin_of(target) != self.origin and not is_site_host(
                urlsplit(target).hostname or ""
            ):
                raise CivitaiError(
                    f"{urlsplit(url).path}: redirected to a foreign host; not followed"
                )
            response = self._send(target)
        response.close()
        raise ServerError(f"{urlsplit(url).path}: more than {_MAX_REDIRECTS} redirects")

    def _redirect_target(self, url: str) -> str:
        path = urlsplit(url).path
        with self._send(url) as response:
            if response.status_code == 200:
                kind = response.headers.get("Content-Type", "")
                raise ServerError(f"{path}: {kind!r} instead of a redirect")
            if not response.is_redirect:
                raise _failure(response, cursor=False)
            target = self._storage_url(response)
        parts = urlsplit(target)
        if "reason=early-access" in parts.query:
            raise EarlyAccess(f"{path}: in early access; a token that has bought it opens it")
        if parts.path.startswith("/login"):
            raise Forbidden(f"{path}: log-in required; set {TOKEN_VARIABLE}")
        if origin_of(target) == self.origin and not parts.path.startswith("/api/"):
            raise Forbidden(f"{path}: sent to the page {parts.path!r}; look there what it asks for")
        return target

    def _storage_url(self, response: requests.Response) -> str:
        """Where a redirect leads: anywhere, but never from https to what can be read on the way."""
        target = urljoin(response.url, response.headers["Location"])
        if urlsplit(self.origin).scheme == "https" and urlsplit(target).scheme != "https":
            raise CivitaiError(
                f"{urlsplit(response.url).path}: redirected to an address that is not https; "
                "not followed"
            )
        return target

    def _storage_failure(self, response: requests.Response) -> CivitaiError:
        if response.status_code in (401, 403) and origin_of(response.url) != self.origin:
            # An address that has expired: the next try gets a new one.
            return ServerError(f"{urlsplit(response.url).path}: {response.status_code} of storage")
        return _failure(response, cursor=False)

    def _send(
        self, url: str, *, params: Params | None = None, headers: Mapping[str, str] | None = None
    ) -> requests.Response:
        self._bucket.acquire()
        with self._lock:
            self.requests += 1
        timeout = (self.patience.connect_timeout, self.patience.read_timeout)
        return self._session().get(
            url,
            params=params,
            headers=headers,
            timeout=timeout,
            stream=True,
            allow_redirects=False,
        )

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.headers["User-Agent"] = USER_AGENT
            session.auth = self._auth
            with self._lock:
                self._sessions.append(session)
        return session

    def _patiently(self, call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Call until it succeeds, fails for good, or gets nowhere for the whole budget."""
        deadline = time.monotonic() + self.patience.budget
        failures, reached = 0, progress()
        while True:
            try:
                return call()
            except requests.RequestException as error:
                problem: ServerError | RateLimited = ServerError(f"transfer broke: {_brief(error)}")
            except (ServerError, RateLimited) as error:
                problem = error
            if progress() > reached:
                deadline, failures = time.monotonic() + self.patience.budget, 0
                reached = progress()
            pause = max(self.patience.pause(failures, self._rng), problem.retry_after or 0.0)
            failures += 1
            if time.monotonic() + pause > deadline:
                raise type(problem)(
                    f"gave up after {failures} tries in {self.patience.budget:.0f} s: {problem}",
                    retry_after=problem.retry_after,
                ) from None
            if problem.retry_after:  # it was said to all of this process
                self._bucket.hold(problem.retry_after)
            with self._lock:
                self.retries += 1
            log.debug("try %d failed (%s); again in %.2f s", failures, problem, pause)
            if self._stopped.wait(pause):
                raise problem


def client_for(site_url: str, requests_per_second: float | None = None) -> CivitaiClient:
    """The client that stages use: the token and patience that fit the address."""
    return CivitaiClient(site_url, requests_per_second=requests_per_second)


def next_cursor(metadata: Mapping[str, Any]) -> str | None:
    """The cursor of the next page; of ``nextPage`` only its cursor is taken, never its host."""
    cursor = metadata.get("nextCursor")
    if cursor is None and isinstance(metadata.get("nextPage"), str):
        cursor = parse_qs(urlsplit(metadata["nextPage"]).query).get("cursor", [None])[0]
    return None if cursor in (None, "") else str(cursor)


def parse_json(body: bytes, where: str) -> Any:
    """JSON as the site may write it: lone surrogates, NaN and huge integers are let through.

    Raises:
        ServerError: the text ends early or is no JSON.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        value = json.loads(body, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{where}: {len(body)} bytes that are no JSON ({error})") from None
    return orjson.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def origin_of(url: str) -> str:
    """scheme://host[:port] of an address, in lower case."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{parts.port}" if parts.port else f"{parts.scheme}://{host}"


def is_site_host(host: str) -> bool:
    """Whether a host is one of the site's fronts or their subdomains."""
    return any(host == known or host.endswith(f".{known}") for known in SITE_HOSTS)


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _failure(response: requests.Response, *, cursor: bool) -> CivitaiError:
    """The error that a status and body mean."""
    status = response.status_code
    where = urlsplit(response.url).path
    said = _error_text(response)
    message = f"{where}: {status} {said!r}"
    if status == 429 and "cursor" in said.lower():
        return PageCap(f"{message}; walk with cursors instead of pages")
    if status == 429:
        return RateLimited(message, retry_after=_retry_after(response))
    if status >= 500 or status in (408, 499):
        return ServerError(message, retry_after=_retry_after(response))
    if status == 400 and (cursor or "cursor" in said.lower()):
        return BadCursor(f"{message}; start the listing again")
    if status in (404, 410):
        return NotFound(message)
    if status in (401, 403) and "early access" in said.lower():
        return EarlyAccess(f"{message}; a token in {TOKEN_VARIABLE} that has bought it opens it")
    if status in (401, 403) and "disabled downloads" in said.lower():
        return DownloadsDisabled(message)
    if status in (401, 403):
        return Forbidden(f"{message}; the item needs a token in {TOKEN_VARIABLE}, or is closed")
    return CivitaiError(f"{message}: not an answer that this client knows")


def _error_text(response: requests.Response) -> str:
    """What an error body says, in any of the site's shapes."""
    try:
        body = orjson.loads(response.content)
    except (orjson.JSONDecodeError, requests.RequestException):
        return response.reason or ""
    if not isinstance(body, dict):
        return str(body)[:200]
    error = body.get("error", body)
    if isinstance(error, str):
        more = (body.get("message"), body.get("deadline"))
        return ": ".join([error, *(text for text in more if isinstance(text, str))])[:200]
    issues = error.get("issues") if isinstance(error, dict) else None
    if isinstance(issues, list) and issues and isinstance(issues[0], dict):
        path = issues[0].get("path")
        where = ".".join(map(str, path)) if isinstance(path, list) else ""
        return f"{where}: {issues[0].get('message')}"[:200]
    return str(body.get("message") or body)[:200]


def _retry_after(response: requests.Response) -> float | None:
    """Seconds of the Retry-After header; a date is compared with the site's own clock."""
    text = response.headers.get("Retry-After", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        now, then = (
            email.utils.parsedate_to_datetime(date).timestamp()
            for date in (response.headers.get("Date", ""), text)
        )
    except ValueError:
        return None
    return max(0.0, then - now)


def _brief(error: requests.RequestException) -> str:
    # An address in the message may be presigned: only the kind of failure is told.
    cause = error.args[0] if error.args else error
    return f"{type(error).__name__} ({type(cause).__name__})"

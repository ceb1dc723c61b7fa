"""The client of Civitai's REST API: polite, patient, and suspicious of what comes back.

Requests go through one rate limiter a process. What may succeed later (429 of the edge, 5xx,
524, broken or cut bodies, HTML in place of JSON) is tried again with jittered exponential backoff
until the time budget of the call is spent; Retry-After is honoured. The first failure of a call is
logged at once as a warning, with the next try and the end of the tries. What cannot succeed is
raised at once: 404, 401/403, a stale cursor, and the 429 that means "page * limit > 1000".

Every answer has bounds: its time and its size (``diffagent.civitai.transport``), and the depth and
size of each record in it (``diffagent.schemas.payloads.flaw``).

The token (environment variable CIVITAI_TOKEN) goes to the site's own origin alone, over https or to
this machine: never into an address, a log or an exception, and never along a redirect to another
origin, where the storage behind downloads refuses it with 400. A site that echoes it gets it
replaced by ``***``.
"""

from __future__ import annotations

import email.utils
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote

import orjson
import requests
from requests.auth import AuthBase

import diffagent
from diffagent.civitai.address import Address, is_loopback, is_site_host, origin_of
from diffagent.civitai.download import Transfer
from diffagent.civitai.lenient_json import loads
from diffagent.civitai.pagination import Page, walk
from diffagent.civitai.ratelimit import bucket_of
from diffagent.civitai.transport import Deadline, Session, error_body, read_body, redact
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
from diffagent.retries import Failure, Patience, Retries
from diffagent.schemas.payloads import whole_number
from diffagent.schemas.printable import printable

__all__ = ["CivitaiClient", "client_for", "is_loopback", "is_site_host", "origin_of"]

log = logging.getLogger(__name__)

USER_AGENT = f"DiffAgent/{diffagent.__version__} (dataset builder; python-requests)"
TOKEN_VARIABLE = "CIVITAI_TOKEN"
Params = Mapping[str, Any]
T = TypeVar("T")

_MAX_REDIRECTS = 4
_MAX_CURSOR = 2_000  # characters: an address that is longer no server takes
_MAX_PARTS = 4_000_000  # arrays and objects of an answer: each takes a hundred bytes or more
_MAX_ITEMS = 1_000  # on a page
_HASHES = 10_000  # a request to by-hash/ids
_LAST_TRY = 1.0  # seconds that the last try has, so that it fails for its own reason
#: Seconds between two warnings of failed tries: of different calls, and of one.
_NEXT_WARNING, _WARN_AGAIN = 5.0, 30.0


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
        try:
            site = Address.parse(site_url)
        except ValueError as error:
            raise ConfigError(f"the site's address cannot be used: {error}") from None
        self.origin, self._is_https = site.origin, site.is_https
        local = site.is_loopback
        self.patience = patience or (LOOPBACK_PATIENCE if local else Patience())
        if requests_per_second is None and not local:
            requests_per_second = 1.0
        self._bucket = bucket_of(self.origin, requests_per_second)
        self._retries = Retries(self.patience)
        self._token = _checked_token(token or os.environ.get(TOKEN_VARIABLE, ""))
        if self._token and not (site.is_https or local):
            log.warning("%s is no https address: the token is not sent to it", self.origin)
            self._token = ""
        self._auth = _SiteToken(self.origin, self._token)
        self._local = threading.local()  # requests' sessions are not safe to share
        self._sessions: list[Session] = []
        self._lock = threading.Lock()
        self._warned = -math.inf
        self.requests = 0
        self.retries = 0

    def stop(self) -> None:
        """Give up waiting: calls in other threads fail at their next pause."""
        self._retries.stop()

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
        """The version that has a file with this hash (AutoV1/2/3, SHA256, CRC32, BLAKE3).

        Of several, the site gives the one that was published first.
        """
        return self._object(f"/api/v1/model-versions/by-hash/{quote(digest, safe='')}")

    def get_ids_by_hash(self, sha256s: Sequence[str]) -> dict[str, tuple[int, int]]:
        """(model id, version id) of each file that the site has, by its SHA256 in lower case.

        One request for 10,000 of them. Needs a site of July 2026 or later: before, model ids were
        not in the answer, and such entries are left out.
        """
        path, ids = "/api/v1/model-versions/by-hash/ids", dict[str, tuple[int, int]]()
        for start in range(0, len(sha256s), _HASHES):
            wanted = [digest.upper() for digest in sha256s[start : start + _HASHES]]
            for row in self._patiently(lambda: self._json(path, {}, list, wanted)):  # noqa: B023
                entry = row if isinstance(row, dict) else {}
                model = whole_number(entry.get("modelId"))
                version = whole_number(entry.get("modelVersionId"))
                if model is not None and version is not None:
                    ids.setdefault(str(entry.get("hash")).lower(), (model, version))
        return ids

    def get_model_page(self, model_id: int) -> dict[str, Any]:
        """What only the HTML page tells: see ``diffagent.civitai.page_html.page_settings``.

        Raises:
            SchemaError: the page's state has no form known here.
        """
        from diffagent.civitai.page_html import page_settings

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
            with self._send(target, headers=transfer.headers(), is_file=True) as response:
                if response.status_code in (200, 206, 416):
                    transfer.take(response)
                    return
                if not response.is_redirect:
                    raise self._storage_failure(response)
                target = self._location(response).url
        raise ServerError(f"{url!r}: more than {_MAX_REDIRECTS} redirects")

    # How requests are made

    def _own_url(self, path: str) -> str:
        """The address on the configured site of a path, or of an address of either front."""
        try:
            address = Address.parse(path, self.origin)
        except ValueError as error:
            raise ConfigError(f"a download address cannot be used: {error}") from None
        if address.origin != self.origin and not address.is_site:
            raise ConfigError(f"{address.host!r} is not the site; give a path")
        return address._replace(origin=self.origin).url

    def _page(self, path: str, cursor: str | None, params: Params) -> Page:
        query = {**params, "cursor": cursor} if cursor else dict(params)
        return self._patiently(lambda: self._one_page(path, query))

    def _one_page(self, path: str, query: Params) -> Page:
        body: dict[str, Any] = self._json(path, query, dict)
        items, metadata = body.get("items"), body.get("metadata")
        if not isinstance(items, list):
            raise CivitaiError(
                f"{path} answered without a list of items but with {list(body)[:9]!r}"
            )
        if len(items) > _MAX_ITEMS:
            raise ServerError(
                f"{path}: {len(items)} items on a page, and 200 are the most there are"
            )
        metadata = metadata if isinstance(metadata, dict) else {}
        return Page.of(items, next_cursor(metadata), metadata.get("dropped"))

    def _object(self, path: str, params: Params | None = None) -> dict[str, Any]:
        return self._patiently(lambda: self._json(path, params or {}, dict))

    def _json(self, path: str, params: Params, form: type[T], body: Any = None) -> T:
        with self._follow(self.origin + path, params, body) as response:
            if response.status_code != 200:
                raise self._failure(response, cursor="cursor" in params)
            kind = response.headers.get("Content-Type", "").lower()
            if "json" not in kind:
                raise ServerError(f"{path}: {kind!r} instead of JSON")
            text = self._body(response, path)
            if text.count(b"[") + text.count(b"{") > _MAX_PARTS:
                raise CivitaiError(f"{path}: JSON of more than {_MAX_PARTS:,} parts; not read")
            value = parse_json(text, path)
        if not isinstance(value, form):
            raise ServerError(f"{path}: JSON of type {type(value).__name__}, not {form.__name__}")
        return value

    def _text(self, path: str) -> str:
        with self._follow(self.origin + path, {}) as response:
            if response.status_code != 200:
                raise self._failure(response)
            page = self._body(response, path).decode("utf-8", "replace")
        if "__NEXT_DATA__" not in page:
            raise ServerError(f"{path}: a page without __NEXT_DATA__ (a challenge?)")
        if not page.rstrip().endswith("</html>"):
            raise ServerError(f"{path}: a page that ends in the middle")
        return page

    def _body(self, response: requests.Response, path: str) -> bytes:
        """The body of an answer, without the token where the site echoes it."""
        return self._redacted(read_body(response, path))

    def _redacted(self, body: bytes) -> bytes:
        return body.replace(self._token.encode(), b"***") if self._token else body

    def _follow(self, url: str, params: Params, body: Any = None) -> requests.Response:
        """Ask, with redirects between the site's fronts; nobody else is ever asked."""
        path = Address.parse(url).path
        response = self._send(url, params=params, body=body)
        for _ in range(_MAX_REDIRECTS):
            if not response.is_redirect:
                return response
            with response:
                target = self._location(response)
            if target.path.startswith("/login"):
                raise Forbidden(f"{path}: log-in required; set {TOKEN_VARIABLE}")
            if target.origin != self.origin and not target.is_site:
                raise CivitaiError(f"{path}: redirected to a foreign host; not followed")
            response = self._send(target.url, body=body)
        response.close()
        raise ServerError(f"{path}: more than {_MAX_REDIRECTS} redirects")

    def _redirect_target(self, url: str) -> str:
        path = Address.parse(url).path
        with self._send(url) as response:
            if response.status_code == 200:
                kind = response.headers.get("Content-Type", "")
                raise ServerError(f"{path}: {kind!r} instead of a redirect")
            if not response.is_redirect:
                raise self._failure(response)
            target = self._location(response)
        if "reason=early-access" in target.query:
            raise EarlyAccess(f"{path}: in early access; a token that has bought it opens it")
        if target.path.startswith("/login"):
            raise Forbidden(f"{path}: log-in required; set {TOKEN_VARIABLE}")
        if target.origin == self.origin and not target.path.startswith("/api/"):
            raise Forbidden(
                f"{path}: sent to the page {target.path!r}; look there what it asks for"
            )
        return target.url

    def _location(self, response: requests.Response) -> Address:
        """Where a redirect leads: never from https to an address that can be read on the way.

        Raises:
            CivitaiError: there, or to no address that is read in one way only.
        """
        path = Address.parse(response.url).path
        # Headers arrive as Latin-1, whatever they are.
        text = response.headers["Location"].encode("latin-1", "replace").decode("utf-8", "replace")
        try:
            target = Address.parse(text, response.url)
        except ValueError as error:
            raise CivitaiError(f"{path}: redirected, but {error}; not followed") from None
        if self._is_https and not target.is_https:
            raise CivitaiError(f"{path}: redirected to an address that is not https; not followed")
        return target

    def _storage_failure(self, response: requests.Response) -> CivitaiError:
        address = Address.parse(response.url)
        if response.status_code in (401, 403) and address.origin != self.origin:
            # An address that has expired: the next try gets a new one.
            return ServerError(f"{address.path}: {response.status_code} of storage")
        return self._failure(response)

    def _failure(self, response: requests.Response, *, cursor: bool = False) -> CivitaiError:
        return _failure(response, self._redacted(error_body(response)), cursor=cursor)

    def _send(
        self,
        url: str,
        *,
        params: Params | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        is_file: bool = False,
    ) -> requests.Response:
        self._bucket.acquire()
        with self._lock:
            self.requests += 1
        patience, budget = self.patience, self._budget()
        if is_file:
            deadline = Deadline(patience.budget, patience.slowest)
        else:
            left = budget.left() if budget else math.inf
            deadline = Deadline(min(patience.answer, max(left, _LAST_TRY)))
        response = self._session().ask(
            "GET" if body is None else "POST",
            url,
            deadline,
            (patience.connect_timeout, patience.read_timeout),
            params=params,
            headers=headers,
            json=body,
        )
        if self._token:
            redact(response, self._token)
        return response

    def _session(self) -> Session:
        session: Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = Session()
            session.headers["User-Agent"] = USER_AGENT
            session.auth = self._auth
            with self._lock:
                self._sessions.append(session)
        return session

    def _budget(self) -> Deadline | None:
        """The time that the call of this thread has left."""
        budget: Deadline | None = getattr(self._local, "budget", None)
        return budget

    def _patiently(self, call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Call until it succeeds, fails for good, or gets nowhere for the whole budget."""
        if self._budget():  # a step of a call that is tried again as a whole
            return call()
        budget = self._local.budget = Deadline(self.patience.budget, self.patience.slowest)
        try:
            return self._try(call, progress, budget)
        finally:
            self._local.budget = None

    def _try(self, call: Callable[[], T], progress: Callable[[], int], budget: Deadline) -> T:
        reached, failures = progress(), 0

        def has_progressed() -> bool:
            nonlocal reached
            gain, reached = progress() - reached, progress()
            return gain > 0 and budget.gained(gain)

        def wait(failure: Failure) -> None:
            nonlocal failures
            failures = failure.failures
            if retry_after := getattr(failure.error, "retry_after", None):
                self._bucket.hold(retry_after)  # it is meant for all calls of this process
            with self._lock:
                self.retries += 1
            self._warn(failure, budget.left())

        result = self._retries.run(
            call,
            seconds_left=budget.left,
            can_retry=lambda error: isinstance(error, ServerError | RateLimited),
            give_up=lambda failure: self._given_up(failure, budget.seconds),
            on_failure=wait,
            has_progressed=has_progressed,
        )
        if failures:
            log.info("%s answers again", self.origin)
        return result

    def _given_up(self, failure: Failure, budget: float) -> CivitaiError:
        """Return the error of a call whose next try would be later than its budget allows."""
        error = failure.error
        is_server = isinstance(error, ServerError)
        kind: type[ServerError] | type[RateLimited] = ServerError if is_server else RateLimited
        retry_after = getattr(error, "retry_after", None)
        wait = retry_after or 0.0
        why = f" (the site asks for {wait:.0f} s of patience)" if wait >= failure.pause else ""
        tries = f"{failure.failures} tries" if failure.failures > 1 else "one try"
        return kind(
            f"{self.origin}: gave up after {tries}; the next one would be later than the "
            f"{budget:.0f} s that are given to it: {error}{why}",
            retry_after=retry_after,
        )

    def _warn(self, failure: Failure, left: float) -> None:
        """Log a failed try: the first of a call at once, further ones now and then.

        Several threads fail at the same time when a site is away: one line stands for all.
        """
        now = time.monotonic()
        with self._lock:
            loud = now - self._warned >= (_NEXT_WARNING if failure.failures == 1 else _WARN_AGAIN)
            self._warned = now if loud else self._warned
        log.log(
            logging.WARNING if loud else logging.DEBUG,
            "%s: try %d failed (%s); next try in %.1f s, the last one before %s",
            *(self.origin, failure.failures, failure.error, failure.pause),
            time.strftime("%H:%M:%S", time.localtime(time.time() + left)),
        )


def client_for(site_url: str, requests_per_second: float | None = None) -> CivitaiClient:
    """The client that stages use: the token and patience that fit the address."""
    return CivitaiClient(site_url, requests_per_second=requests_per_second)


def _checked_token(token: str) -> str:
    """A token without white space around it.

    Raises:
        ConfigError: it holds what no HTTP header may; the message does not contain it.
    """
    token = token.strip()
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(
            f"{TOKEN_VARIABLE} holds white space or characters that no token has; copy the key "
            "from the site's account settings again"
        )
    return token


def next_cursor(metadata: Mapping[str, Any]) -> str | None:
    """The cursor of the next page; of ``nextPage`` only its cursor is taken, never its host.

    Raises:
        ServerError: there is one that no site gives.
    """
    cursor, page = metadata.get("nextCursor"), metadata.get("nextPage")
    if cursor is None and isinstance(page, str):
        query = parse_qs(page.partition("?")[2].partition("#")[0])
        if page and not query.keys() & {"cursor", "page"}:
            raise ServerError("a nextPage that names no next page")
        cursor = query.get("cursor", [None])[0]
    if cursor in (None, ""):
        return None
    if type(cursor) not in (str, int, float) or len(str(cursor)) > _MAX_CURSOR:
        raise ServerError(f"a cursor that is none, or too long: {type(cursor).__name__}")
    return str(cursor)


def parse_json(body: bytes, where: str) -> Any:
    """JSON as the site may write it (see ``diffagent.civitai.lenient_json``).

    Raises:
        ServerError: the text ends early or is no JSON.
    """
    try:
        return loads(body)
    except ValueError as error:
        raise ServerError(f"{where}: {len(body)} bytes that are no JSON ({error})") from None


def _failure(response: requests.Response, body: bytes, *, cursor: bool) -> CivitaiError:
    """The error that a status and body mean."""
    status, where = response.status_code, Address.parse(response.url).path
    said = _error_text(body) or printable(response.reason or "")
    message = f"{where}: {status} {said!r}"
    if status == 429 and "cursor" in said.lower():
        return PageCap(f"{message}; walk with cursors instead of pages")
    if status == 429:
        return RateLimited(message, retry_after=_retry_after(response))
    if status >= 500 or status in (408, 499):
        return ServerError(message, retry_after=_retry_after(response))
    if status == 400 and (cursor or "cursor" in said.lower()):
        return BadCursor(f"{message}; start the listing again")
    if status in (404, 410) or (status == 400 and _is_out_of_range(where)):
        return NotFound(message)
    if status in (401, 403) and re.search("early access|paid access", said, re.IGNORECASE):
        return EarlyAccess(f"{message}; a token in {TOKEN_VARIABLE} that has bought it opens it")
    if status in (401, 403) and "disabled downloads" in said.lower():
        return DownloadsDisabled(message)
    if status in (401, 403):
        return Forbidden(f"{message}; the item needs a token in {TOKEN_VARIABLE}, or is closed")
    return CivitaiError(f"{message}: not an answer that this client knows")


def _is_out_of_range(path: str) -> bool:
    """Whether a path names an id above the site's 32 bits, for which it answers 400, not 404."""
    ident = re.fullmatch(r"/api/v1/model(?:s|-versions)/([0-9]{1,30})", path)
    return ident is not None and int(ident[1]) >= 2**31


def _error_text(body: bytes) -> str:
    """The message of an error body in any of the site's shapes; '' when it is none."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, str):
        more = (value.get("message"), value.get("deadline"))
        return ": ".join([error, *(text for text in more if isinstance(text, str))])[:200]
    issues = error.get("issues") if isinstance(error, dict) else None
    if isinstance(issues, list) and issues and isinstance(issues[0], dict):
        path, message = issues[0].get("path"), issues[0].get("message")
        names = path if isinstance(path, list) else ()
        where = ".".join(str(name) for name in names if isinstance(name, str | int))
        return f"{where}: {message if isinstance(message, str) else ''}"[:200]
    message = value.get("message") if isinstance(value, dict) else None
    return message[:200] if isinstance(message, str) else body[:200].decode("utf-8", "replace")


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
    except (ValueError, TypeError, OverflowError):  # also for years that no clock has
        return None
    return max(0.0, then - now)

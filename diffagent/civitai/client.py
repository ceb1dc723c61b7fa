"""Client of Civitai's REST API: limited rate, retries, and no trust in the answers.

Requests share one rate limiter a process. Transient failures (429 of the edge, 5xx, 524, broken or
cut bodies, HTML in place of JSON) are retried with jittered exponential backoff within the time
budget of the call (``diffagent.civitai.site_calls``); Retry-After is honoured. Lasting failures are
raised at once: 404, 401/403, a stale cursor, and the 429 that means "page * limit > 1000".

Every answer is bounded: its time and its size (``diffagent.civitai.transport``), and the depth and
size of each record in it (``diffagent.schemas.payloads.flaw``).

The token (environment variable CIVITAI_TOKEN) is sent only to the site's own origin, over https or
to this machine. It never enters an address, a log or an exception, and never follows a redirect to
another origin, where the storage behind downloads refuses it with 400. Answers that echo it have it
replaced by ``***``.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import requests
from requests.auth import AuthBase

import diffagent
from diffagent.civitai.address import Address, origin_of
from diffagent.civitai.download import PartialDownload
from diffagent.civitai.error_answers import TOKEN_VARIABLE, error_of, retry_after
from diffagent.civitai.lenient_json import parse_json
from diffagent.civitai.pagination import Page, next_cursor
from diffagent.civitai.ratelimit import bucket_of
from diffagent.civitai.site_calls import SiteCalls
from diffagent.civitai.transport import Deadline, DeadlineSession, error_body, read_body, redact
from diffagent.errors import CivitaiError, ConfigError, EarlyAccess, Forbidden, ServerError
from diffagent.retries import Patience
from diffagent.schemas.payloads import whole_number
from diffagent.schemas.printable import printable

log = logging.getLogger(__name__)

USER_AGENT = f"DiffAgent/{diffagent.__version__} (dataset builder; python-requests)"
Params = Mapping[str, Any]
T = TypeVar("T")

_MAX_REDIRECTS = 4
_MAX_PARTS = 4_000_000  # arrays and objects of an answer: each takes a hundred bytes or more
_MAX_ITEMS = 1_000  # of a page
_HASHES = 10_000  # in a request to by-hash/ids
_LAST_ATTEMPT = 1.0  # seconds of the last attempt, so that it fails for its own reason
LOOPBACK_PATIENCE = Patience(first=0.02, longest=0.5, budget=120.0)


class _SiteToken(AuthBase):
    """Token for the site's origin only; as an ``auth`` it also keeps ~/.netrc out."""

    def __init__(self, origin: str, token: str | None) -> None:
        self._origin, self._token = origin, token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token and origin_of(request.url or "") == self._origin:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class CivitaiClient:
    """Client of one site (``diffagent.civitai.site.Site``); threads share it and its rate limit.

    Args:
        site_url: 'https://civitai.com' or any address that serves the same API.
        requests_per_second: None means 1 to a remote site and no limit to a loopback address.
        patience: None means the defaults, or shorter pauses to a loopback address.
        token: None takes it from the environment, if set.
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
        self.patience = patience or (LOOPBACK_PATIENCE if site.is_loopback else Patience())
        if requests_per_second is None and not site.is_loopback:
            requests_per_second = 1.0
        self._bucket = bucket_of(self.origin, requests_per_second)
        self._calls = SiteCalls(self.origin, self.patience, self._bucket)
        self._token = _checked_token(token or os.environ.get(TOKEN_VARIABLE, ""))
        if self._token and not (site.is_https or site.is_loopback):
            log.warning("%s is no https address: the token is not sent to it", self.origin)
            self._token = ""
        self._auth = _SiteToken(self.origin, self._token)
        self._local = threading.local()  # requests' sessions are not safe to share
        self._sessions: list[DeadlineSession] = []
        self._lock = threading.Lock()
        self.requests = 0

    @property
    def retries(self) -> int:
        """Number of requests that were repeated after a failure."""
        return self._calls.retries

    def stop(self) -> None:
        """Stop waiting: calls in other threads fail at their next pause."""
        self._calls.stop()

    def close(self) -> None:
        """Close the connections and ``stop``."""
        self.stop()
        for session in self._sessions:
            session.close()

    def __enter__(self) -> CivitaiClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Listings

    def get_models(self, cursor: str | None = None, **params: Any) -> Page:
        """Return one page of /models; parameters are the API's (``types`` may be a list)."""
        return self._page("/api/v1/models", cursor, params)

    def get_images(self, cursor: str | None = None, **params: Any) -> Page:
        """Return one page of /images, with generation metadata unless ``withMeta`` is 'false'."""
        return self._page("/api/v1/images", cursor, {"withMeta": "true", **params})

    def _page(self, path: str, cursor: str | None, params: Params) -> Page:
        query = {**params, "cursor": cursor} if cursor else dict(params)
        return self._calls.run(lambda: self._fetch_page(path, query))

    def _fetch_page(self, path: str, query: Params) -> Page:
        body: dict[str, Any] = self._json(path, query, dict)
        items, metadata = body.get("items"), body.get("metadata")
        if not isinstance(items, list):
            raise CivitaiError(
                f"{path} answered without a list of items but with {list(body)[:9]!r}"
            )
        if len(items) > _MAX_ITEMS:
            raise ServerError(f"{path}: {len(items)} items on a page; a page has at most 200")
        metadata = metadata if isinstance(metadata, dict) else {}
        return Page.of(items, next_cursor(metadata), metadata.get("dropped"))

    # Single records

    def get_model(self, model_id: int) -> dict[str, Any]:
        """Return /models/:id."""
        return self._object(f"/api/v1/models/{model_id:d}")

    def get_version(self, version_id: int) -> dict[str, Any]:
        """Return /model-versions/:id; its pictures have metadata."""
        return self._object(f"/api/v1/model-versions/{version_id:d}")

    def get_by_hash(self, digest: str) -> dict[str, Any]:
        """Return the version that has a file with this hash (AutoV1/2/3, SHA256, CRC32, BLAKE3).

        Several versions may have it; the site returns the one that was published first.
        """
        return self._object(f"/api/v1/model-versions/by-hash/{quote(digest, safe='')}")

    def get_ids_by_hash(self, sha256s: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return (model id, version id) of each file that the site has, by its lower-case SHA256.

        One request serves 10,000 hashes. Needs a site of July 2026 or later: earlier answers lack
        model ids, and such entries are left out.
        """
        path, ids = "/api/v1/model-versions/by-hash/ids", dict[str, tuple[int, int]]()
        for start in range(0, len(sha256s), _HASHES):
            batch = [digest.upper() for digest in sha256s[start : start + _HASHES]]
            for row in self._calls.run(lambda: self._json(path, {}, list, batch)):  # noqa: B023
                entry = row if isinstance(row, dict) else {}
                model = whole_number(entry.get("modelId"))
                version = whole_number(entry.get("modelVersionId"))
                if model is not None and version is not None:
                    ids.setdefault(str(entry.get("hash")).lower(), (model, version))
        return ids

    def get_model_page(self, model_id: int) -> dict[str, Any]:
        """Return the settings that only a model's page holds (``page_html.page_settings``).

        Raises:
            SchemaError: the page's state has an unknown form.
        """
        from diffagent.civitai.page_html import page_settings

        return page_settings(self._calls.run(lambda: self._text(f"/models/{model_id:d}")))

    # Files

    def resolve_download(self, version: int | str) -> str:
        """Return the short-lived address of a file, found in one unauthorised hop.

        Args:
            version: a version id, or a download path or address of this site.

        Raises:
            EarlyAccess: the version is for sale.
            DownloadsDisabled: its creator has disabled downloads.
            Forbidden: the file needs a log-in.
            NotFound: no such file, or an archived one.
        """
        path = f"/api/download/models/{version}" if isinstance(version, int) else version
        return self._calls.run(
            lambda: self._redirect_target(Address.on_site(path, self.origin).url)
        )

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

        Bytes go to ``path`` + '.part', which stays when the transfer breaks. A Range request on a
        freshly resolved address continues it: in this call, and with a ``sha256`` in any later one.
        See ``diffagent.civitai.site.Site.download`` for the arguments.

        Raises:
            CivitaiError: the size or SHA256 differs, or the site does not provide the file.
        """
        partial = PartialDownload(repr(url), path, sha256, size_bytes, on_bytes)
        return partial.complete(
            lambda: self._calls.run(
                lambda: self._transfer(url, partial), progress=lambda: partial.size
            )
        )

    def _transfer(self, url: int | str, partial: PartialDownload) -> None:
        target = self.resolve_download(url)
        for _ in range(_MAX_REDIRECTS):
            with self._send(target, headers=partial.headers(), is_file=True) as response:
                if response.status_code in (200, 206, 416):
                    partial.take(response)
                    return
                if not response.is_redirect:
                    raise self._storage_error(response)
                target = self._location(response).url
        raise ServerError(f"{url!r}: more than {_MAX_REDIRECTS} redirects")

    # Requests

    def _object(self, path: str) -> dict[str, Any]:
        return self._calls.run(lambda: self._json(path, {}, dict))

    def _json(self, path: str, params: Params, form: type[T], body: Any = None) -> T:
        with self._follow(self.origin + path, params, body) as response:
            if response.status_code != 200:
                raise self._error(response, has_cursor="cursor" in params)
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
                raise self._error(response)
            page = self._body(response, path).decode("utf-8", "replace")
        if "__NEXT_DATA__" not in page:
            raise ServerError(f"{path}: a page without __NEXT_DATA__ (a challenge?)")
        if not page.rstrip().endswith("</html>"):
            raise ServerError(f"{path}: a page that ends in the middle")
        return page

    def _body(self, response: requests.Response, path: str) -> bytes:
        """Read an answer's body, without the token where the site echoes it."""
        return self._redacted(read_body(response, path))

    def _redacted(self, body: bytes) -> bytes:
        return body.replace(self._token.encode(), b"***") if self._token else body

    def _follow(self, url: str, params: Params, body: Any = None) -> requests.Response:
        """Send a request and follow redirects between the site's fronts, to no other host."""
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
                raise self._error(response)
            target = self._location(response)
        if "reason=early-access" in target.query:
            raise EarlyAccess(f"{path}: in early access; a token that has bought it opens it")
        if target.path.startswith("/login"):
            raise Forbidden(f"{path}: log-in required; set {TOKEN_VARIABLE}")
        if target.origin == self.origin and not target.path.startswith("/api/"):
            raise Forbidden(
                f"{path}: redirected to the page {target.path!r}; open it to see what it requires"
            )
        return target.url

    def _location(self, response: requests.Response) -> Address:
        """Return the target of a redirect.

        Raises:
            CivitaiError: it leads from https to an address that others can read in transit, or to
                no address that every parser reads alike.
        """
        path = Address.parse(response.url).path
        # Headers arrive as Latin-1, whatever their encoding.
        text = response.headers["Location"].encode("latin-1", "replace").decode("utf-8", "replace")
        try:
            target = Address.parse(text, response.url)
        except ValueError as error:
            raise CivitaiError(f"{path}: redirected, but {error}; not followed") from None
        if self._is_https and not target.is_https:
            raise CivitaiError(f"{path}: redirected to an address that is not https; not followed")
        return target

    def _storage_error(self, response: requests.Response) -> CivitaiError:
        address = Address.parse(response.url)
        if response.status_code in (401, 403) and address.origin != self.origin:
            # An address that has expired: the next attempt resolves a new one.
            return ServerError(f"{address.path}: {response.status_code} of storage")
        return self._error(response)

    def _error(self, response: requests.Response, *, has_cursor: bool = False) -> CivitaiError:
        return error_of(
            response.status_code,
            Address.parse(response.url).path,
            self._redacted(error_body(response)),
            has_cursor=has_cursor,
            reason=printable(response.reason or ""),
            retry_after=retry_after(response.headers),
        )

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
        patience, budget = self.patience, self._calls.budget
        if is_file:
            deadline = Deadline(patience.budget, patience.slowest)
        else:
            left = budget.left() if budget else math.inf
            deadline = Deadline(min(patience.answer, max(left, _LAST_ATTEMPT)))
        response = self._session().send_within(
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

    def _session(self) -> DeadlineSession:
        session: DeadlineSession | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = DeadlineSession()
            session.headers["User-Agent"] = USER_AGENT
            session.auth = self._auth
            with self._lock:
                self._sessions.append(session)
        return session


def _checked_token(token: str) -> str:
    """Return a token without white space around it.

    Raises:
        ConfigError: it contains a character that no HTTP header allows; the message omits it.
    """
    token = token.strip()
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(
            f"{TOKEN_VARIABLE} holds white space or characters that no token has; copy the key "
            "from the site's account settings again"
        )
    return token

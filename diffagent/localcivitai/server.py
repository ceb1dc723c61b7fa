"""A local Civitai: the site's public REST API over a replay, with faults on demand.

Routes, filters, error bodies and quirks follow the site as of 2026 (its public source and
documentation). Two sockets serve one application: the API, and the storage that downloads are
redirected to (another origin, which refuses requests that carry ``Authorization``).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from diffagent.errors import CivitaiError
from diffagent.localcivitai.answers import (
    ApiFailure,
    available_file,
    file_digest,
    listed_image,
    listed_model,
    model_answer,
    stored_file,
    validation_failure,
    version_answer,
    version_of_hash,
    versions_of_hashes,
)
from diffagent.localcivitai.faults import Faults
from diffagent.localcivitai.listing import (
    BadParameter,
    ImageQuery,
    Key,
    Listings,
    ModelQuery,
    QueryParameters,
    Selection,
    StaleCursor,
    decode_cursor,
    encode_cursor,
    is_legacy,
)
from diffagent.localcivitai.replay import Replay
from diffagent.schemas.payloads import MODEL_TYPES, whole_number

log = logging.getLogger(__name__)

_PAGE_CAP = 1000
#: Hits that a search gives at most, by any number of cursors.
_SEARCH_HITS = 100_000
#: Ids above are out of range (400). The site's end at 2^31; those of local files are above 2^52.
_MAX_ID = 2**53
_BULK = {"": 100, "/ids": 10_000}  # hashes that by-hash takes in one request
_MAX_REQUEST = 1 << 20
_MAX_NAME = 200  # characters of a name in a header; readers of HTTP refuse long ones
_PUBLIC_CACHE = {"Cache-Control": "public, s-maxage=300, stale-while-revalidate=150"}
Handler = Callable[["LocalCivitai", Request], Response]


class LocalCivitai:
    """The application over a replay: its listings, its faults and the port of its storage."""

    def __init__(self, replay: Replay, faults: Faults) -> None:
        self.replay = replay
        self.listings = Listings(replay)
        self.faults = faults
        self.storage_port = 0
        # A presigned address is valid for this process only; the site's expire as well.
        self.secret = hashlib.blake2b(str(id(self)).encode() + str(time.time()).encode()).digest()

    def app(self) -> Starlette:
        """Return the ASGI application of both origins."""
        api = "/api/v1"
        routes: list[tuple[str, Handler]] = [
            (f"{api}/models", list_models),
            (f"{api}/models/{{id}}", get_model),
            (f"{api}/model-versions/by-hash", get_by_hashes),
            (f"{api}/model-versions/by-hash/ids", get_by_hashes),
            (f"{api}/model-versions/by-hash/{{hash}}", get_by_hash),
            (f"{api}/model-versions/{{id}}", get_version),
            (f"{api}/images", list_images),
            (f"{api}/tags", list_tags),
            (f"{api}/creators", list_creators),
            (f"{api}/enums", list_enums),
            ("/api/download/models/{id}", download),
            ("/models/{id}", model_page),
            ("/models/{id}/{slug}", model_page),
            ("/delivery/{key:path}", deliver),
        ]
        return Starlette(
            routes=[
                Route(
                    path,
                    self._endpoint(handler),
                    methods=["POST" if handler is get_by_hashes else "GET"],
                )
                for path, handler in routes
            ]
        )

    def _endpoint(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        storage = handler is deliver

        async def endpoint(request: Request) -> Response:
            server = request.scope.get("server") or ("", 0)
            if storage != (server[1] == self.storage_port):
                return HTMLResponse("<h1>404</h1>", 404)
            key = f"{request.url.path}?{request.url.query}" if not storage else request.url.path
            request.state.attempt = self.faults.attempt(key)
            fault = self.faults.transport(key, request.state.attempt, storage=storage)
            early = _refusal(fault)
            if early is not None:
                return early
            if request.method == "POST":
                request.state.body = await _small_body(request)
            try:
                response = handler(self, request)
            except ApiFailure as failure:
                return _json(failure.body, failure.status, failure.headers)
            return _damaged(response, fault)

        return endpoint


# --- listings -------------------------------------------------------------------------------


def list_models(site: LocalCivitai, request: Request) -> Response:
    """GET /models."""
    parameters = QueryParameters(parse_qsl(request.url.query, keep_blank_values=True))
    for name in ("favorites", "hidden"):
        if name in parameters:  # whatever the value
            raise ApiFailure(401, {"code": "UNAUTHORIZED", "message": "Unauthorized", "issues": []})
    try:
        query = ModelQuery.parse(parameters)
        limit = _limit(parameters, high=100)
        page = parameters.number("page", low=1)
    except BadParameter as problem:
        raise validation_failure(problem) from None
    if query.query and page is not None:
        text = "Cannot use page param with query search. Use cursor-based pagination."
        raise ApiFailure(400, {"error": text})
    window = _ListingPage(site, request, site.listings.models(query), limit)
    window.place(parameters, page)
    host = _origin(request)
    rows = site.replay.models
    evolve = site.faults.evolve
    items = [
        orjson.dumps(evolve(listed_model(site.replay, i, host, adult=query.adult)))
        for i in window.items(lambda i: rows[i].id)
        if query.ids is None or not site.faults.leaves_out(rows[i].id)
    ]
    return window.response(items)


def list_images(site: LocalCivitai, request: Request) -> Response:
    """GET /images; no record is parsed."""
    parameters = QueryParameters(parse_qsl(request.url.query, keep_blank_values=True))
    try:
        query = ImageQuery.parse(parameters)
        limit = _limit(parameters, high=200)
        page = parameters.number("page", low=1)
        with_meta = parameters.flag("withMeta") is True
        with_tags = parameters.flag("withTags") is True
        flat = parameters.flag("flatMeta")
    except BadParameter as problem:
        raise validation_failure(problem) from None
    if flat is None:
        flat = not is_legacy(parameters)
    window = _ListingPage(site, request, site.listings.images(query), limit)
    window.place(parameters, page)
    replay = site.replay
    items = [
        listed_image(replay, i, meta=with_meta, nested=not flat, tags=with_tags)
        for i in window.items(lambda i: replay.image_id[i])
    ]
    if site.faults.schema_has_changed:
        items = [orjson.dumps(site.faults.evolve(orjson.loads(item))) for item in items]
    return window.response(items)


def _limit(parameters: QueryParameters, *, high: int) -> int:
    limit = parameters.number("limit", high=high)
    return 100 if limit is None else limit


class _ListingPage:
    """One page of a selection, with its faults."""

    def __init__(
        self, site: LocalCivitai, request: Request, selection: Selection, limit: int
    ) -> None:
        self.site, self.request, self.selection, self.limit = site, request, selection, limit
        self.start = 0
        # A deploy between two requests makes the cursor of the first one stale.
        self.epoch = site.faults.epoch
        self.marked = False  # an empty page was served here
        self.page: int | None = None
        self.numeric = False  # the cursor of a search is an offset
        self.metadata: dict[str, Any] = {}

    def place(self, parameters: QueryParameters, page: int | None) -> None:
        """Find the first item by cursor or page.

        Raises:
            ApiFailure: 400 for a stale cursor, 429 for a page beyond the cap.
        """
        cursor, selection = parameters.text("cursor"), self.selection
        self.numeric = bool(parameters.text("query"))
        try:
            if cursor and self.numeric:
                (self.start,), self.marked = decode_cursor(cursor, 1, 0)
                if not 0 <= self.start < _SEARCH_HITS:
                    raise StaleCursor(cursor)
            elif cursor:
                key, self.marked = decode_cursor(cursor, selection.columns, self.epoch)
                self.start = selection.after(key)
        except StaleCursor:
            raise ApiFailure(400, {"error": "Invalid cursor", "code": "BAD_REQUEST"}) from None
        if page is not None and not cursor:
            if page * self.limit > _PAGE_CAP:
                text = "You've requested too many pages, please use cursors instead"
                raise ApiFailure(429, {"error": text})
            self.page, self.start = page, (page - 1) * self.limit

    def items(self, id_of: Callable[[int], int]) -> list[int]:
        """Return the indexes of the items to serve, and set the metadata."""
        faults = self.site.faults
        faults.count_page()
        key, attempt = self.request.url.query, self.request.state.attempt
        stop = min(self.start + self.limit, len(self.selection.items))
        served = list(self.selection.items[self.start : stop])
        follows = self.start > 0 and self.page is None
        if follows and served and not self.marked and faults.page("empty", key, attempt):
            self._more(self.start, empty=True)
            return []
        more = stop < len(self.selection.items) and self.limit
        if more and not (self.numeric and stop >= _SEARCH_HITS):
            back = max(self.start - self.limit, 1)
            looping = follows and self.start > 1 and faults.page("loop", key, attempt)
            self._more(back if looping else stop)
        if follows and served and faults.skips(id_of(served[0]), self.limit):
            del served[0]
        if follows and faults.page("duplicate", key, attempt):
            served = [*self.selection.items[max(self.start - 2, 0) : self.start], *served]
        if self.page is not None:
            self.metadata |= {"currentPage": self.page, "pageSize": self.limit}
        return served

    def response(self, items: list[bytes]) -> Response:
        """Return the JSON answer."""
        if drops := self.site.replay.drops:  # the site has no such field
            self.metadata["dropped"] = drops
        body = b'{"items":[%s],"metadata":%s}' % (b",".join(items), orjson.dumps(self.metadata))
        return Response(body, media_type="application/json", headers=_PUBLIC_CACHE)

    def _more(self, stop: int, *, empty: bool = False) -> None:
        """Set nextCursor and nextPage for a page that begins at ``stop``."""
        selection, faults = self.selection, self.site.faults
        if self.numeric:
            cursor = f"{stop}~1" if empty else str(stop)
        else:
            last: Key = selection.key(selection.items[stop - 1])
            cursor = encode_cursor(last, self.epoch, empty=empty)
        pairs = [
            pair
            for pair in parse_qsl(self.request.url.query, keep_blank_values=True)
            if pair[0] not in ("cursor", "page", "token")
        ]
        # In page mode the site's nextPage has the page, in addition to nextCursor.
        follow = ("page", str(self.page + 1)) if self.page else ("cursor", cursor)
        origin = _origin(self.request)
        if faults.page("moved", self.request.url.query, self.request.state.attempt):
            port = urlsplit(origin).port
            origin = f"http://localhost:{port}"
        address = f"{origin}{self.request.url.path}?{urlencode([*pairs, follow])}"
        self.metadata |= {"nextCursor": cursor, "nextPage": address}


def list_tags(site: LocalCivitai, request: Request) -> Response:
    """GET /tags."""
    rows = [
        {"name": name, "link": f"{_origin(request)}/api/v1/models?tag={quote(name)}"}
        for name, _ in site.replay.tags.most_common()
    ]
    return _numbered(request, rows, "name")


def list_creators(site: LocalCivitai, request: Request) -> Response:
    """GET /creators."""
    rows = [
        {
            "username": name,
            "modelCount": count,
            "link": f"{_origin(request)}/api/v1/models?username={quote(name)}",
        }
        for name, count in site.replay.creators.most_common()
    ]
    return _numbered(request, rows, "username")


def list_enums(site: LocalCivitai, request: Request) -> Response:
    """GET /enums."""
    bases = sorted({base for row in site.replay.models for base in row.base_models})
    return _json({"ModelType": MODEL_TYPES, "BaseModel": bases, "ActiveBaseModel": bases})


def _numbered(request: Request, rows: list[dict[str, Any]], name: str) -> Response:
    parameters = QueryParameters(parse_qsl(request.url.query, keep_blank_values=True))
    try:
        limit = parameters.number("limit", high=200)
        page = parameters.number("page", low=1) or 1
    except BadParameter as problem:
        raise validation_failure(problem) from None
    limit = 20 if limit is None else limit or len(rows)
    query = parameters.text("query").lower()
    rows = [row for row in rows if query in row[name].lower()]
    pages = -(-len(rows) // limit) if limit else 1
    address = f"{_origin(request)}{request.url.path}?" + urlencode({"limit": limit})
    metadata: dict[str, Any] = {
        "totalItems": len(rows),
        "currentPage": page,
        "pageSize": limit,
        "totalPages": pages,
    }
    if page < pages:
        metadata["nextPage"] = f"{address}&page={page + 1}"
    if page > 1:
        metadata["prevPage"] = f"{address}&page={page - 1}"
    return _json({"items": rows[(page - 1) * limit : page * limit], "metadata": metadata})


# --- single records -------------------------------------------------------------------------


def get_model(site: LocalCivitai, request: Request) -> Response:
    """GET /models/:id."""
    return _json(model_answer(site.replay, _number(request), _origin(request)))


def get_version(site: LocalCivitai, request: Request) -> Response:
    """GET /model-versions/:id."""
    return _json(version_answer(site.replay, _number(request), _origin(request)))


def get_by_hash(site: LocalCivitai, request: Request) -> Response:
    """GET /model-versions/by-hash/:hash, any kind of hash, either case."""
    version = version_of_hash(site.replay, str(request.path_params["hash"]))
    return _json(version_answer(site.replay, version, _origin(request)))


def get_by_hashes(site: LocalCivitai, request: Request) -> Response:
    """POST /model-versions/by-hash (versions) and /by-hash/ids, a list of SHA256s as its body.

    The answer lacks hashes that no file has.
    """
    route = request.url.path.rpartition("/by-hash")[2]
    try:
        hashes = orjson.loads(request.state.body)
    except orjson.JSONDecodeError:
        hashes = None
    valid = isinstance(hashes, list) and len(hashes) <= _BULK[route]
    if not valid or not all(isinstance(h, str) and len(h) == 64 for h in hashes):
        raise ApiFailure(400, {"error": "Request must include an array of SHA256 Hashes."})
    versions = versions_of_hashes(site.replay, hashes)
    if not route:
        origin = _origin(request)
        return _json([version_answer(site.replay, v, origin) for _, v in versions.values()])
    return _json(
        [
            {"modelVersionId": version, "modelId": model, "hash": digest}
            for digest, (model, version) in versions.items()
        ]
    )


async def _small_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_REQUEST:
            return b""
    return bytes(body)


def _number(request: Request) -> int:
    text = request.path_params["id"]
    if not (text.isascii() and text.isdigit()):
        raise validation_failure(BadParameter("id", f"Expected number, received {text[:40]!r}"))
    if len(text) > 16 or int(text) > _MAX_ID:
        raise validation_failure(BadParameter("id", f"Number must be at most {_MAX_ID}"))
    return int(text)


# --- the HTML page --------------------------------------------------------------------------


def model_page(site: LocalCivitai, request: Request) -> Response:
    """GET /models/:id, the page of a model: its Next.js state with hardly any HTML around it."""
    text = request.path_params["id"]
    ident = whole_number(text)
    index = None if ident is None else site.replay.model_index.get(ident)
    if index is None:
        return HTMLResponse("<!doctype html><title>404</title><h1>404</h1>", 404)
    model = site.replay.model(index)
    name = str(model.get("name") or "")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()[:_MAX_NAME]).strip("-") or "model"
    if request.path_params.get("slug") != slug:
        return RedirectResponse(f"/models/{model['id']}/{slug}", 308)
    state = {"data": model, "status": "success"}
    arguments = {"input": {"id": model["id"]}, "type": "query"}
    queries = [{"state": state, "queryKey": [["model", "getById"], arguments]}]
    data = {"props": {"pageProps": {"trpcState": {"json": {"queries": queries}}}}}
    # '<' inside a script could end it; Next.js escapes it the same way.
    script = orjson.dumps(data).decode().replace("<", "\\u003c")
    return HTMLResponse(
        f"<!doctype html><html><head><title>{html.escape(name)} | Civitai</title></head><body>"
        f'<div id="__next"></div><script id="__NEXT_DATA__" type="application/json">{script}'
        "</script></body></html>"
    )


# --- downloads ------------------------------------------------------------------------------


def download(site: LocalCivitai, request: Request) -> Response:
    """GET /api/download/models/:versionId: checks, then a presigned address elsewhere."""
    choice = QueryParameters(parse_qsl(request.url.query))
    file = available_file(site.replay, _number(request), choice)
    digest, expires = file_digest(file), str(int(time.time()) + 86400)
    name = str(file.get("name") or "model.safetensors")[:_MAX_NAME]
    query = {
        "X-Amz-Expires": "86400",
        "X-Amz-Date": expires,
        "response-content-disposition": f'attachment; filename="{name}"',
        "X-Amz-Signature": _signature(site, digest, expires),
    }
    host = request.url.hostname or "127.0.0.1"
    address = f"http://{host}:{site.storage_port}/delivery/{digest}?{urlencode(query)}"
    return RedirectResponse(address, 307, headers={"Cache-Control": "no-store"})


def _signature(site: LocalCivitai, key: str, expires: str) -> str:
    return hmac.new(site.secret, f"{key}|{expires}".encode(), hashlib.sha256).hexdigest()


def deliver(site: LocalCivitai, request: Request) -> Response:
    """Send a file from the storage behind the redirect, or a range of it."""
    key, query = request.path_params["key"], dict(request.query_params)
    if "authorization" in request.headers:
        text = "<Error><Code>InvalidArgument</Code><Message>Authorization</Message></Error>"
        return Response(text, 400, media_type="application/xml")
    expires = query.get("X-Amz-Date", "")
    signature = query.get("X-Amz-Signature", "")
    is_signed = hmac.compare_digest(signature, _signature(site, key, expires))
    if not is_signed or float(expires) < time.time():
        text = "<Error><Code>AccessDenied</Code></Error>"
        return Response(text, 403, media_type="application/xml")
    path = stored_file(site.replay, key)
    if path is None:
        text = "<Error><Code>NoSuchKey</Code></Error>"
        return Response(text, 404, media_type="application/xml")
    disposition = query.get("response-content-disposition", "attachment")
    headers = {"Content-Disposition": disposition.encode("ascii", "replace").decode()}
    return FileResponse(path, media_type="application/octet-stream", headers=headers)


# --- answers and their faults ---------------------------------------------------------------


def _origin(request: Request) -> str:
    return f"http://{request.headers.get('host') or request.url.netloc}"


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        orjson.dumps(body),
        status,
        media_type="application/json",
        headers=headers or (_PUBLIC_CACHE if status == 200 else {"Cache-Control": "no-store"}),
    )


def _refusal(fault: str | None) -> Response | None:
    """Return the answer of a fault that replaces the real one."""
    match fault:
        case "too_many":
            return HTMLResponse("<h1>429 Too Many Requests</h1>", 429)
        case "too_many_wait":
            return _json({"error": "Too many requests"}, 429, {"Retry-After": "1"})
        case "unavailable":  # of heavy routes and overloaded searches
            return _json({"error": "Model search is temporarily overloaded"}, 503)
        case "aborted":  # by a proxy; before June 2026 500 or 408
            return _json({"error": "Client Closed Request"}, 499)
        case "timeout":
            return HTMLResponse("<!doctype html><title>524: A timeout occurred</title>", 524)
        case "html":
            return HTMLResponse("<!doctype html><title>Just a moment...</title>", 200)
        case "error_file":
            body = b'{"error":"Model file is temporarily unavailable"}'
            return Response(body, 200, media_type="application/octet-stream")
    return None


def _damaged(response: Response, fault: str | None) -> Response:
    """Return the answer with its body damaged by a fault."""
    if fault not in ("truncated", "cut", "slow", "no_range") or response.status_code >= 300:
        return response
    if isinstance(response, FileResponse):
        if fault == "slow":
            return response
        size = Path(response.path).stat().st_size
        head = {"Content-Length": str(size)}
        # The whole file whatever range was requested, or its first half.
        start = _file_start(Path(response.path), size if fault == "no_range" else size // 2)
        return StreamingResponse(start, 200, head, "application/octet-stream")
    body = bytes(response.body)
    if fault == "cut":
        return Response(body[: len(body) // 2], media_type=response.media_type)
    headers = {"Content-Length": str(len(body))}
    parts = [body[: len(body) // 2]]
    if fault == "slow":
        step = len(body) // 5 + 1
        parts = [body[i : i + step] for i in range(0, len(body), step)]
    return StreamingResponse(_trickle(parts), 200, headers, response.media_type or "text/html")


async def _trickle(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
        await asyncio.sleep(0.05)


async def _file_start(path: Path, length: int) -> AsyncIterator[bytes]:
    with path.open("rb") as stream:
        while length > 0:
            data = stream.read(min(length, 1 << 18))
            length -= len(data)
            yield data


# --- running it -----------------------------------------------------------------------------


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one."""
    # asyncio sets TCP_NODELAY only with an explicit protocol; without it a page takes 40 ms more.
    bound = socket.socket(proto=socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    bound.listen(128)
    return bound


class LocalServer(uvicorn.Server):
    """uvicorn over the two sockets of a local Civitai."""

    def __init__(self, site: LocalCivitai, host: str, port: int) -> None:
        self.bound = [bind(host, port), bind(host, 0)]
        site.storage_port = self.bound[1].getsockname()[1]
        self.url = f"http://{host}:{self.bound[0].getsockname()[1]}"
        # uvicorn logs truncated bodies as errors; here they are injected faults.
        level = "warning" if not site.faults.profile.rates else "critical"
        config = uvicorn.Config(
            site.app(), log_level=level, access_log=False, lifespan="off", ws="none"
        )
        super().__init__(config)

    def serve_forever(self) -> None:
        """Serve until a signal, or until ``should_exit`` is set."""
        self.run(sockets=self.bound)


@contextmanager
def serve(replay: Replay, faults: Faults, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve in a thread of this process for the duration of the block; yield the address."""
    serving = LocalServer(LocalCivitai(replay, faults), host, port)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    try:
        while not serving.started and thread.is_alive():
            time.sleep(0.005)
        if not serving.started:
            raise CivitaiError("the local server did not start; its error is in the log above")
        yield serving.url
    finally:
        serving.should_exit = True
        thread.join(timeout=10)

"""A web server for the results in a store, for the browser of this machine.

It serves only the files of ``SHOWN`` that the manifest of a finished artifact lists: no weights, no
raw snapshots, no unfinished work, and no files of Prefect in the same directory.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from diffagent.errors import ArtifactError
from diffagent.store.manifest_file import MANIFEST, read_manifest
from diffagent.webguard import WebGuard

#: Stage -> suffixes of its files that are results for people: reports, data cards, datasets,
#: pictures.
SHOWN = {
    "evaluate": (".html", ".json", ".parquet", ".png"),
    "shard": (".md", ".png", ".json", ".parquet"),
    "render": (".png", ".parquet"),
    "sft": (".md", ".png"),
    "rrhf": (".md", ".png"),
}
_TYPES = {
    ".html": "text/html",
    ".md": "text/plain",
    ".json": "application/json",
    ".png": "image/png",
    ".parquet": "application/octet-stream",
}
#: Reports show texts of strangers: the browser runs, loads, sends and frames nothing in them.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src "
    "'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "sandbox allow-popups allow-popups-to-escape-sandbox",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}


def create_app(store: Path, hosts: Iterable[str] = ()) -> ASGIApp:
    """Create the application that serves the store's results.

    Args:
        store: directory of artifacts; it need not exist yet.
        hosts: host names that requests may state in addition to those of the loopback.
    """

    def index(request: Request) -> Response:
        return HTMLResponse(_index(store))

    def file(request: Request) -> Response:
        path = find_result(store, request.path_params["path"])
        if path is None:
            return PlainTextResponse("Not found among the results of finished artifacts.\n", 404)
        return FileResponse(path, media_type=_TYPES[path.suffix])

    routes = [Route("/", index), Route("/{path:path}", file)]
    return WebGuard(Starlette(routes=routes), hosts, _HEADERS)


def find_result(store: Path, path: str) -> Path | None:
    """Return the file at ``path``, STAGE/ARTIFACT/FILE in the store, if it may be served.

    The target of a link decides, so that no link leads out of the store or to another file.
    """
    try:
        root = store.resolve(strict=True)
        real = (root / path.lstrip("/")).resolve(strict=True)
        stage, name, *parts = real.relative_to(root).parts
    except (OSError, ValueError):  # missing, not a possible name, or outside of the store
        return None
    directory = root / stage / name
    if real.suffix not in SHOWN.get(stage, ()) or name.startswith("."):
        return None
    try:
        listed = _listed(directory, (directory / MANIFEST).stat().st_mtime_ns)
    except (OSError, ArtifactError):  # not an artifact, or a damaged one
        return None
    return real if "/".join(parts) in listed and real.is_file() else None


@functools.lru_cache(maxsize=256)
def _listed(directory: Path, mtime_ns: int) -> frozenset[str]:
    """List the files of an artifact, read once as long as its manifest stays."""
    return frozenset(entry.path for entry in read_manifest(directory).files)


def _index(store: Path) -> str:
    """Make a page of links to the reports and cards of the store, newest first."""
    links = sorted(_pages(store), reverse=True)
    rows = "\n".join(
        f'<li><a href="/{quote(path)}">{title}</a> <small>{built} UTC, {html.escape(name)}</small>'
        for built, title, name, path in links
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>DiffAgent: results</title>'
        "<style>body{font:16px/1.6 system-ui,sans-serif;max-width:44rem;margin:2rem auto;"
        "padding:0 1rem}li{margin:.4rem 0}small{color:#666;white-space:nowrap}</style>"
        f"<h1>Results</h1><ul>{rows}</ul>"
        f"{'' if rows else '<p>No report and no dataset is in this store yet.</p>'}</html>"
    )


def _pages(store: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (build time, title, artifact, path) of each report and card."""
    titles = {
        ("evaluate", "report.html"): "Evaluation report",
        ("shard", "README.md"): "Data card",
        ("sft", "README.md"): "Model card, SFT",
        ("rrhf", "README.md"): "Model card, RRHF",
    }
    for (stage, file), title in titles.items():
        for directory in (store / stage).glob("*"):
            path = f"{stage}/{directory.name}/{file}"
            if not directory.is_symlink() and find_result(store, path):
                built = read_manifest(directory).created_at
                yield f"{built:%Y-%m-%d %H:%M}", title, directory.name, path

"""Stored form of a record: without traces of how it was fetched, with the crawl that added it."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from diffagent.civitai.address import Address
from diffagent.crawl.snapshot_index import SnapshotIndex
from diffagent.schemas.payloads import GENERATION, objects_in, unwrap_meta, whole_number


def to_stored_form(
    kind: str, item: dict[str, Any], origin: str, previous: SnapshotIndex | None
) -> int:
    """Bring a record into its stored form, in place.

    Nested ``meta.meta`` becomes flat, links to the site relative, and ids in quotes numbers.
    Models, versions and images get the number of the crawl that added them.

    Args:
        kind: 'models', 'images' or 'pages'.
        item: the record.
        origin: of the site.
        previous: the snapshot before this crawl, if any.

    Returns:
        Number of ids that were in quotes.
    """
    text_ids = 0
    meta = item.get("meta")
    if isinstance(meta, dict) and "id" in meta and "meta" in meta:
        item["meta"] = unwrap_meta(meta)
    if isinstance(item.get("modelVersionIds"), list):
        text_ids += sum(map(_is_text_id, item["modelVersionIds"]))
        item["modelVersionIds"] = [_as_number(i) for i in item["modelVersionIds"]]
    for version in objects_in(item.get("modelVersions")):
        _make_relative(version, origin)
        if "id" in version:
            text_ids += _is_text_id(version["id"])
            version["id"] = _as_number(version["id"])
        for file in objects_in(version.get("files")):
            _make_relative(file, origin)
    if kind != "pages":
        _annotate(kind, item, previous)
    return text_ids


def _annotate(kind: str, item: dict[str, Any], previous: SnapshotIndex | None) -> None:
    """Add the number of the crawl that added a model with its versions, or an image."""
    item[GENERATION] = previous.generation(kind, item["id"]) if previous else 0
    for version in objects_in(item.get("modelVersions")) if kind == "models" else ():
        ident = whole_number(version.get("id")) or 0
        generation = previous.generation("versions", ident, item["id"]) if previous else 0
        version[GENERATION] = generation


def _as_number(value: Any) -> Any:
    number = whole_number(value)
    return value if number is None else number


def _is_text_id(value: Any) -> bool:
    return isinstance(value, str) and whole_number(value) is not None


def _make_relative(item: dict[str, Any], origin: str) -> None:
    link = item.get("downloadUrl")
    if not isinstance(link, str):
        return
    try:
        address, parts = Address.parse(link), urlsplit(link)
    except ValueError:
        return  # no link to the site; a download of it reports the problem
    if address.origin == origin or address.is_site:
        item["downloadUrl"] = parts.path + (f"?{parts.query}" if parts.query else "")

"""Reading a crawl's snapshot: compressed JSON lines in the API's own shape, sorted by id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from diffagent.crawl import snapshot as civitai_snapshot
from diffagent.errors import ArtifactError
from diffagent.schemas.payloads import GONE
from diffagent.store import Artifact

Item = dict[str, Any]


def parse_items(lines: Iterable[bytes], before: bytes | None = None) -> Iterator[Item | None]:
    """The items of consecutive lines, each once; ``before`` is the line that they come after.

    A line that is no JSON object with an integer id is yielded as None, so that whoever counts
    can count it. An item that appears again (same id) is passed over.

    Raises:
        ArtifactError: the ids are not in order.
    """
    first = _parse(before) if before else None
    last = first["id"] if first else -1
    for line in lines:
        item = _parse(line)
        if item is not None:
            if item["id"] == last:
                continue
            if item["id"] < last:
                raise ArtifactError(
                    f"item {item['id']} comes after {last}, and a snapshot is sorted by id: it is "
                    "damaged; crawl again with --refresh"
                )
            last = item["id"]
        yield item


def read_items(snapshot: Artifact, kind: str) -> Iterator[Item | None]:
    """Items of ``kind`` in the order of their ids, as `parse_items` gives them.

    Raises:
        ArtifactError: a file is damaged, or the ids are not in order.
    """
    return parse_items(civitai_snapshot.read_lines(snapshot.path, kind))


def read_gone(snapshot: Artifact) -> set[tuple[str, int]]:
    """(kind, id) of what the site has no more: 'models', 'versions', 'images'.

    Raises:
        ArtifactError: a file is damaged.
    """
    rows = civitai_snapshot.read_rows(snapshot.path, GONE)
    return {(row["kind"], row["id"]) for row in rows}


def read_generations(snapshot: Artifact) -> dict[int, str]:
    """The day (YYYY-MM-DD, UTC) of each crawl that brought something new; 0 is the first.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = snapshot.path / "generations.jsonl"
    if not path.exists():
        return {}
    try:
        rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        return {row["generation"]: row["date"] for row in rows}
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{str(path)!r} is damaged ({error}); mend it with: diffagent run "
            "-c FILE --until crawl --refresh"
        ) from None


def _parse(line: bytes) -> Item | None:
    try:
        item = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(item, dict):
        return None
    ident = item.get("id")
    return item if type(ident) is int and 0 <= ident < 2**63 else None

"""Snapshot: the finished form of a crawl, sorted, without duplicates, the same bytes each time.

``KIND/part-NNNNN.jsonl.gz`` for the kinds models, images and pages: canonical JSON lines sorted
by id over all parts. Neither the order of fetching nor page boundaries, repeats or the site's
address leave a trace, so equal contents are equal files.

Each model, version and image has the annotation ``_generation``: the number of the crawl that added
it. ``generations.jsonl`` states their days: {"generation": 0, "date": "YYYY-MM-DD"} of the first
crawl, and a line for each refresh since that brought something new.

A refreshed snapshot (``diffagent.crawl.refresh``) may also hold ``gone/``: one tombstone a line,
``{"kind": "models" | "versions" | "images", "id", "date": "YYYY-MM-DD", "reason"}``, for each item
that the site has no more. Its last good record stays where it was.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from diffagent.crawl.journal import Item, JournalEntry
from diffagent.crawl.memory import SnapshotInventory
from diffagent.errors import ArtifactError
from diffagent.schemas.payloads import GONE, SchemaDrift, canonical, content
from diffagent.store import Artifact

KINDS = ("images", "models", "pages")
GENERATIONS = "generations.jsonl"
#: Rows a part, unless that makes more than ``_MAX_PARTS``; memory holds one part.
_ROWS = {"images": 20_000, "models": 1_000, "pages": 1_000}
_MAX_PARTS = 64
_BUFFER = 1 << 17  # bytes that are split into lines in C
_MEMBER_BYTES = 1 << 20

#: (kind, new, old) -> the record to store of two of one id
Merge = Callable[[str, bytes, bytes], bytes]


def write_snapshot(
    out: Path,
    entries: Iterable[JournalEntry],
    keep: Mapping[str, Sequence[int]],
    scratch: Path,
    *,
    previous: Iterable[Item] = (),
    merge: Merge = lambda kind, new, old: new,
) -> None:
    """Write the items of ``keep`` (kind -> ids) from a journal's entries.

    Args:
        out: the artifact's directory; older parts in it are replaced.
        entries: pages in the order in which they were fetched; the first item of an id counts.
        keep: ids of each kind that belong to the snapshot.
        scratch: a directory for intermediate files, created and removed here.
        previous: items of an earlier snapshot, for the ids that ``entries`` lack.
        merge: chooses the record of an item that both have.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    starts = {kind: _part_starts(kind, sorted(keep.get(kind, ()))) for kind in KINDS}
    missing = {kind: set(keep.get(kind, ())) for kind in KINDS}
    with ExitStack() as stack:
        buckets = {
            (kind, part): stack.enter_context((scratch / f"{kind}-{part}").open("wb"))
            for kind in KINDS
            for part in range(len(starts[kind]))
        }

        def put(items: Iterable[Item]) -> Iterator[tuple[str, int]]:
            for kind, ident, data in items:
                if ident in missing[kind]:
                    part = bisect_right(starts[kind], ident) - 1
                    buckets[kind, part].write(b"%d\t%s\n" % (ident, data))
                    yield kind, ident

        for entry in entries:
            for kind, ident in put(entry.items):
                missing[kind].remove(ident)
        missing = {kind: set(keep.get(kind, ())) for kind in KINDS}
        for _ in put(previous):
            pass
    for kind in (*KINDS, GONE):
        shutil.rmtree(out / kind, ignore_errors=True)
    for kind, part in buckets:
        (out / kind).mkdir(exist_ok=True)
        target = out / kind / f"part-{part:05d}.jsonl.gz"
        _write_part(scratch / f"{kind}-{part}", target, partial(merge, kind))
    shutil.rmtree(scratch)


def write_gone(out: Path, tombstones: Iterable[Mapping[str, Any]]) -> None:
    """Write the tombstones, if there are any."""
    rows = sorted(tombstones, key=lambda row: (row["kind"], row["id"]))
    if rows:
        (out / GONE).mkdir(exist_ok=True)
        write_lines(out / GONE / "part-00000.jsonl.gz", (canonical(row) + b"\n" for row in rows))


def write_generations(out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the generations and their days."""
    (out / GENERATIONS).write_bytes(b"".join(canonical(row) + b"\n" for row in rows))


def read_generations(snapshot: Artifact) -> list[dict[str, Any]]:
    """Read the crawls that a snapshot is made of; an old snapshot without the file has one.

    Raises:
        ArtifactError: the file is damaged.
    """
    rows = generation_rows(snapshot.path)
    date = "" if rows else snapshot.manifest.created_at.date().isoformat()
    return rows or [{"generation": 0, "date": date}]


def generation_rows(directory: Path) -> list[dict[str, Any]]:
    """Read the lines of generations.jsonl; none without such a file.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = directory / GENERATIONS
    try:
        rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        return [{"generation": int(row["generation"]), "date": str(row["date"])} for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from None


@dataclass(frozen=True)
class SnapshotSummary:
    """Number of rows by kind, content digest, drift of the schema, and inventory of a snapshot."""

    rows: dict[str, int]
    digest: str
    drift: dict[str, int]
    inventory: SnapshotInventory


def summarise(out: Path) -> SnapshotSummary:
    """Summarise a snapshot in one pass.

    The digest is the SHA256 over the sorted (kind, id, SHA256 of the content's canonical JSON),
    then over kind and id of the tombstones. Counters and their like
    (``diffagent.schemas.payloads.VOLATILE``) are no content: moved download counts do not make
    another snapshot.
    """
    digest, rows, drift = hashlib.sha256(), {}, SchemaDrift()
    inventory = SnapshotInventory(generations=generation_rows(out))
    look = {"images": drift.image, "models": drift.model}
    for kind in KINDS:
        rows[kind] = 0
        for line in read_lines(out, kind):
            item: dict[str, Any] = orjson.loads(line)
            inner = hashlib.sha256(canonical(content(item))).hexdigest()
            digest.update(f"{kind}\t{item['id']}\t{inner}\n".encode())
            rows[kind] += 1
            if kind in look:
                look[kind](item)
                inventory.add(kind, item)
    for row in read_rows(out, GONE):
        digest.update(f"{GONE}\t{row['kind']}\t{row['id']}\n".encode())
        rows[GONE] = rows.get(GONE, 0) + 1
        inventory.gone.append(row)
    return SnapshotSummary(rows, digest.hexdigest(), drift.report(), inventory)


def read_lines(snapshot: Path, kind: str) -> Iterator[bytes]:
    """Yield the lines of a kind in the order of their ids.

    Raises:
        ArtifactError: a part is damaged.
    """
    for path in sorted(snapshot.glob(f"{kind}/*.jsonl.gz")):
        try:
            with io.BufferedReader(gzip.open(path), _BUFFER) as stream:
                yield from stream
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, error) from None


def read_rows(snapshot: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a kind in the order of their ids.

    Raises:
        ArtifactError: a part is damaged.
    """
    for line in read_lines(snapshot, kind):
        try:
            row: dict[str, Any] = orjson.loads(line)
        except orjson.JSONDecodeError as error:  # the checksum comes behind the damage
            raise _damaged(snapshot / kind, error) from None
        yield row


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{str(path)!r} is damaged ({error}); put its file back from a copy (a mirror), or crawl "
        "again with --refresh: that sets the snapshot aside and takes over its intact records"
    )


def read_snapshot(snapshot: Path) -> Iterator[Item]:
    """Yield all items of a snapshot as a journal holds them."""
    for kind in KINDS:
        for line in read_lines(snapshot, kind):
            yield kind, orjson.loads(line)["id"], line.rstrip(b"\n")


def _part_starts(kind: str, ids: Sequence[int]) -> list[int]:
    """Return the first id of each part."""
    rows = max(_ROWS[kind], -(-len(ids) // _MAX_PARTS))
    return [ids[i] for i in range(0, len(ids), rows)]


def _write_part(bucket: Path, target: Path, merge: Callable[[bytes, bytes], bytes]) -> None:
    merged: dict[int, bytes] = {}
    for line in bucket.read_bytes().splitlines(keepends=True):
        ident, data = line.split(b"\t", 1)
        new = merged.get(int(ident))
        merged[int(ident)] = data if new is None else merge(new, data)
    write_lines(target, (merged[ident] for ident in sorted(merged)))
    bucket.unlink()


def write_lines(target: Path, lines: Iterable[bytes]) -> None:
    """Write lines as gzip members of about a megabyte, each with its checksum.

    One damaged byte costs at most one member.
    """
    with target.open("wb") as stream:
        chunk, size = [], 0
        for line in lines:
            chunk.append(line)
            size += len(line)
            if size >= _MEMBER_BYTES:
                stream.write(gzip.compress(b"".join(chunk), compresslevel=6, mtime=0))
                chunk, size = [], 0
        stream.write(gzip.compress(b"".join(chunk), compresslevel=6, mtime=0))

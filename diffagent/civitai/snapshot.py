"""The finished form of a crawl: sorted, without duplicates, byte for byte the same each time.

``KIND/part-NNNNN.jsonl.gz`` for the kinds models, images and pages: canonical JSON lines sorted
by id over all parts. Neither the order of fetching nor page boundaries, repeats or the site's
address leave a trace, so equal contents are equal files.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from diffagent.civitai.journal import Entry
from schemas.civitai import Drift

KINDS = ("images", "models", "pages")
#: Rows a part, unless that makes more than ``_MAX_PARTS``; memory holds one part.
_ROWS = {"images": 20_000, "models": 1_000, "pages": 1_000}
_MAX_PARTS = 64


def write_snapshot(
    out: Path, entries: Iterable[Entry], keep: Mapping[str, Sequence[int]], scratch: Path
) -> None:
    """Write the items of ``keep`` (kind -> ids) from a journal's entries.

    Args:
        out: the artefact's directory; older parts in it are replaced.
        entries: pages in the order in which they were fetched; the first item of an id counts.
        keep: ids of each kind that belong to the snapshot.
        scratch: a directory for intermediate files, made and removed here.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    starts = {kind: _part_starts(kind, sorted(keep.get(kind, ()))) for kind in KINDS}
    wanted = {kind: set(keep.get(kind, ())) for kind in KINDS}
    with ExitStack() as stack:
        buckets = {
            (kind, part): stack.enter_context((scratch / f"{kind}-{part}").open("wb"))
            for kind in KINDS
            for part in range(len(starts[kind]))
        }
        for entry in entries:
            for kind, ident, data in entry.items:
                if ident in wanted[kind]:
                    wanted[kind].remove(ident)
                    part = bisect_right(starts[kind], ident) - 1
                    buckets[kind, part].write(b"%d\t%s\n" % (ident, data))
    for kind in KINDS:
        shutil.rmtree(out / kind, ignore_errors=True)
    for kind, part in buckets:
        (out / kind).mkdir(exist_ok=True)
        _write_part(scratch / f"{kind}-{part}", out / kind / f"part-{part:05d}.jsonl.gz")
    shutil.rmtree(scratch)


def summarise(out: Path) -> tuple[dict[str, int], str, dict[str, int]]:
    """Rows of each kind, the content digest, and the drift of the schema.

    The digest is the SHA256 over the sorted (kind, id, SHA256 of the canonical JSON).
    """
    digest, rows, drift = hashlib.sha256(), {}, Drift()
    look = {"images": drift.image, "models": drift.model}
    for kind in KINDS:
        rows[kind] = 0
        for line in _lines(out, kind):
            item: dict[str, Any] = orjson.loads(line)
            digest.update(
                f"{kind}\t{item['id']}\t{hashlib.sha256(line.rstrip()).hexdigest()}\n".encode()
            )
            rows[kind] += 1
            if kind in look:
                look[kind](item)
    return rows, digest.hexdigest(), drift.report()


def _lines(out: Path, kind: str) -> Iterator[bytes]:
    for path in sorted(out.glob(f"{kind}/*.jsonl.gz")):
        with gzip.open(path) as stream:
            yield from stream


def _part_starts(kind: str, ids: Sequence[int]) -> list[int]:
    """The first id of each part."""
    rows = max(_ROWS[kind], -(-len(ids) // _MAX_PARTS))
    return [ids[i] for i in range(0, len(ids), rows)]


def _write_part(bucket: Path, target: Path) -> None:
    lines = [line.split(b"\t", 1) for line in bucket.read_bytes().splitlines(keepends=True)]
    lines.sort(key=lambda line: int(line[0]))
    with (
        target.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as stream,
    ):
        stream.writelines(data for _, data in lines)
    bucket.unlink()

"""Salvage of a damaged snapshot, so that a refresh can continue from it.

A part whose SHA256 is the manifest's is good as a whole. Of the others every gzip member with a
right checksum is kept (``snapshot.write_lines`` makes them about a megabyte), and of one that ends
early its whole lines. Missing rows are taken from older snapshots of the same crawl in the same
directory, which hold earlier good records of the same ids. Tombstones, generations and the ids of
the last snapshot are in the memory file as well (``diffagent.crawl.memory``), which is outside the
artifact. The refresh requests all that is still missing from the site, by a walk through all
listings.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from diffagent.crawl.memory import SnapshotInventory
from diffagent.crawl.snapshot import (
    GENERATIONS,
    KINDS,
    generation_rows,
    write_generations,
    write_lines,
)
from diffagent.errors import ArtifactError
from diffagent.schemas.manifest import Manifest
from diffagent.schemas.payloads import GONE
from diffagent.store import Artifact, read_manifest, sha256_file

log = logging.getLogger(__name__)

_MEMBER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00"  # first bytes of a member of write_lines
Row = dict[str, Any]


@dataclass(frozen=True)
class SalvagedSnapshot:
    """The intact part of a damaged snapshot.

    Attributes:
        snapshot: the intact rows.
        complete: whether all rows are intact.
        report: for the metrics.
        missing: (kind, id) -> generation of the lost items, as far as known.
    """

    snapshot: Artifact
    complete: bool
    report: dict[str, Any]
    missing: dict[tuple[str, int], int]


@dataclass
class _PartialSnapshot:
    """A snapshot that may be damaged: its files as far as they can be read.

    Attributes:
        damaged: file -> its damage.
    """

    path: Path
    manifest: Manifest | None
    damaged: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> _PartialSnapshot:
        try:
            manifest = read_manifest(path)
        except ArtifactError:
            manifest = None
        partial = cls(path, manifest)
        if manifest is None:
            partial.damaged["manifest.json"] = "missing or unreadable"
        for entry in manifest.files if manifest else ():
            file = path / entry.path
            if not file.is_file():
                partial.damaged[entry.path] = "missing"
            elif sha256_file(file) != entry.sha256:
                partial.damaged[entry.path] = "not as it was written"
        return partial

    def is_good(self, kind: str) -> bool:
        """Whether all files of a kind, or one by name, are as they were written."""
        return self.manifest is not None and not any(
            name.partition("/")[0] == kind for name in self.damaged
        )

    def _is_cut_short(self, path: Path) -> bool:
        files = self.manifest.files if self.manifest else ()
        sizes = {entry.path: entry.size for entry in files}
        name = path.relative_to(self.path).as_posix()
        return path.stat().st_size < sizes.get(name, path.stat().st_size + 1)

    def rows(self, kind: str) -> Iterator[tuple[Row, bytes]]:
        """Yield every readable row of a kind, in the order of the ids, and its line."""
        last = -1
        for path in sorted(self.path.glob(f"{kind}/*.jsonl.gz")):
            for line in good_lines(path, cut_short=self._is_cut_short(path)):
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError:
                    continue
                ident = row.get("id") if isinstance(row, dict) else None
                if type(ident) is int and (ident > last or kind == GONE):
                    last = ident
                    yield row, line


def salvage(damaged: Path, out: Path, inventory: SnapshotInventory | None) -> SalvagedSnapshot:
    """Write the intact rows of a damaged snapshot to the directory ``out``.

    Args:
        damaged: a snapshot that was set aside; it is not changed.
        out: directory of the result, a snapshot without a manifest; replaced.
        inventory: of the last snapshot, from the memory file.
    """
    shutil.rmtree(out, ignore_errors=True)
    partial = _PartialSnapshot.of(damaged)
    whole = all(map(partial.is_good, (*KINDS, GONE, GENERATIONS)))
    older = [] if whole else [_PartialSnapshot.of(path) for path in _older(damaged)]
    rows = {
        kind: _write_kind(out, kind, [partial] if partial.is_good(kind) else [partial, *older])
        for kind in KINDS
    }
    intact = SnapshotInventory()
    for kind in ("models", "images"):
        for row, _ in _PartialSnapshot(out, None).rows(kind):
            intact.add(kind, row)
    ids_of_kind = {kind: set().union(*ids.values()) for kind, ids in intact.ids.items()}
    missing = {(k, i): n for k, i, n in inventory or () if i not in ids_of_kind.get(k, ())}
    _write_gone(out, partial, older, inventory)
    highest = max((n for generations in intact.ids.values() for n in generations), default=0)
    write_generations(out, _generations(highest, partial, older, inventory))
    complete = all(partial.is_good(kind) for kind in ("models", "images", GONE))
    lost = {kind: sum(k == kind for k, _ in missing) for kind in ("models", "versions", "images")}
    report = {
        "from": damaged.name,
        "damaged_files": partial.damaged,
        "kept": rows,
        "lost": lost if inventory else "unknown: there was no memory file",
    }
    log.warning(
        "%s: took over %s; lost %s. Damaged: %s. %s. No run needs the directory any more; keep it "
        "until you have examined it",
        *(damaged, rows, report["lost"], partial.damaged),
        "All models and pictures are intact"
        if complete
        else "A walk through all listings requests the lost items from the site again; only a copy "
        "of these files restores those that the site has no more",
    )
    digest = partial.manifest.content_digest if partial.manifest else ""
    snapshot = Artifact(stage="crawl", identity="", content_digest=digest, path=out)
    return SalvagedSnapshot(snapshot, complete, report, missing)


def _older(damaged: Path) -> list[Path]:
    """List other snapshots of the same crawl, newest first."""
    identity = damaged.name.partition(".")[0]
    others = (p for p in damaged.parent.glob(f"{identity}.*") if p.is_dir() and p != damaged)
    return sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)


def _write_kind(out: Path, kind: str, sources: Iterable[_PartialSnapshot]) -> int:
    """Write the rows of a kind; for each id the first source counts. Return their number."""
    (out / kind).mkdir(parents=True)
    number = 0

    def lines() -> Iterator[bytes]:
        nonlocal number
        last = -1
        for row, line in heapq.merge(*(s.rows(kind) for s in sources), key=lambda r: r[0]["id"]):
            if row["id"] != last:
                last = row["id"]
                number += 1
                yield line + b"\n"

    write_lines(out / kind / "part-00000.jsonl.gz", lines())
    return number


def _write_gone(
    out: Path,
    partial: _PartialSnapshot,
    older: Iterable[_PartialSnapshot],
    inventory: SnapshotInventory | None,
) -> None:
    """Write the tombstones; the walk through all listings removes those of items that exist."""
    lines = {(row["kind"], row["id"]): line for row, line in partial.rows(GONE)}
    if not partial.is_good(GONE):
        for row in inventory.gone if inventory else ():
            lines.setdefault((row["kind"], row["id"]), orjson.dumps(row))
        for snapshot in older if inventory is None else ():
            for row, line in snapshot.rows(GONE):
                lines.setdefault((row["kind"], row["id"]), line)
    if lines:
        (out / GONE).mkdir()
        write_lines(out / GONE / "part-00000.jsonl.gz", (line + b"\n" for line in lines.values()))


def _generations(
    highest: int,
    partial: _PartialSnapshot,
    older: Iterable[_PartialSnapshot],
    inventory: SnapshotInventory | None,
) -> list[Row]:
    """Return the crawls, at least those up to the ``highest`` generation of an item."""
    rows: list[Row] = []
    for path in [partial.path, *(snapshot.path for snapshot in older)]:
        with contextlib.suppress(ArtifactError):  # another copy may be whole
            rows = max(rows, generation_rows(path), key=len)
    rows = max(rows, inventory.generations if inventory else [], key=len)
    date = datetime.fromtimestamp(partial.path.stat().st_mtime, UTC).date().isoformat()
    return [*rows, *({"generation": n, "date": date} for n in range(len(rows), highest + 1))]


def good_lines(path: Path, *, cut_short: bool) -> Iterator[bytes]:
    """Yield the lines of every gzip member with a right checksum.

    Args:
        path: a part of a snapshot.
        cut_short: its end is known to be missing, so the whole lines before count as good without
            a checksum. Otherwise an unfinished member may be damaged, and is skipped.
    """
    data = path.read_bytes()
    start = 0
    while 0 <= start < len(data):
        decoder = zlib.decompressobj(wbits=31)
        try:
            text = decoder.decompress(memoryview(data)[start:])
        except zlib.error:
            start = data.find(_MEMBER, start + 1)
            continue
        if decoder.eof:
            yield from text.splitlines()
            start = len(data) - len(decoder.unused_data)
            continue
        start = data.find(_MEMBER, start + 1)
        if cut_short and start < 0:
            yield from text.split(b"\n")[:-1]

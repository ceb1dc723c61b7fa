"""Taking over what is good in a damaged snapshot, so that a refresh can go on from it.

A part whose SHA256 is the manifest's is good as a whole. Of the others every gzip member with a
right checksum is kept (``snapshot.write_lines`` makes them about a megabyte), and of one that ends
early its whole lines. What is missing then is taken from older snapshots of the same crawl that
lie beside it: they hold earlier good records of the same ids. Tombstones, generations and the ids
that there were are in the memory file as well (``diffagent.crawl.memory``), which is outside the
artefact. What was lost for all that is asked of the site again, by a walk through all listings.
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

_MEMBER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00"  # how write_lines begins a member
Row = dict[str, Any]


@dataclass(frozen=True)
class SalvagedSnapshot:
    """What was good, as a snapshot; whether it is everything; what to tell; what is missing.

    ``missing``: (kind, id) -> generation of what the damaged snapshot held, as far as is known.
    """

    snapshot: Artifact
    complete: bool
    report: dict[str, Any]
    missing: dict[tuple[str, int], int]


@dataclass
class _DamagedSnapshot:
    """A snapshot that may be damaged: its files as far as they can be read."""

    path: Path
    manifest: Manifest | None
    damaged: dict[str, str] = field(default_factory=dict)  # file -> what is wrong with it

    @classmethod
    def of(cls, path: Path) -> _DamagedSnapshot:
        try:
            manifest = read_manifest(path)
        except ArtifactError:
            manifest = None
        remains = cls(path, manifest)
        if manifest is None:
            remains.damaged["manifest.json"] = "missing or unreadable"
        for entry in manifest.files if manifest else ():
            file = path / entry.path
            if not file.is_file():
                remains.damaged[entry.path] = "missing"
            elif sha256_file(file) != entry.sha256:
                remains.damaged[entry.path] = "not as it was written"
        return remains

    def is_good(self, kind: str) -> bool:
        """Whether all files of a kind, or one by name, are there as they were written."""
        return self.manifest is not None and not any(
            name.partition("/")[0] == kind for name in self.damaged
        )

    def _is_cut_short(self, path: Path) -> bool:
        files = self.manifest.files if self.manifest else ()
        sizes = {entry.path: entry.size for entry in files}
        name = path.relative_to(self.path).as_posix()
        return path.stat().st_size < sizes.get(name, path.stat().st_size + 1)

    def rows(self, kind: str) -> Iterator[tuple[Row, bytes]]:
        """Every row of a kind that can be read, in the order of the ids, and its line."""
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
    """Write what is good in ``damaged``, a snapshot that was set aside, to the directory ``out``.

    Args:
        damaged: only read.
        out: made anew; a snapshot without a manifest.
        inventory: what the memory file says of the last snapshot.
    """
    shutil.rmtree(out, ignore_errors=True)
    remains = _DamagedSnapshot.of(damaged)
    whole = all(map(remains.is_good, (*KINDS, GONE, GENERATIONS)))
    older = [] if whole else [_DamagedSnapshot.of(path) for path in _older(damaged)]
    rows = {
        kind: _write_kind(out, kind, [remains] if remains.is_good(kind) else [remains, *older])
        for kind in KINDS
    }
    kept = SnapshotInventory()
    for kind in ("models", "images"):
        for row, _ in _DamagedSnapshot(out, None).rows(kind):
            kept.add(kind, row)
    have = {kind: set().union(*ids.values()) for kind, ids in kept.ids.items()}
    missing = {(k, i): n for k, i, n in inventory or () if i not in have.get(k, ())}
    _write_gone(out, remains, older, inventory)
    highest = max((n for generations in kept.ids.values() for n in generations), default=0)
    write_generations(out, _generations(highest, remains, older, inventory))
    complete = all(remains.is_good(kind) for kind in ("models", "images", GONE))
    lost = {kind: sum(k == kind for k, _ in missing) for kind in ("models", "versions", "images")}
    report = {
        "from": damaged.name,
        "damaged_files": remains.damaged,
        "kept": rows,
        "lost": lost if inventory else "unknown: there was no memory file",
    }
    log.warning(
        "%s: taken over are %s; lost are %s. Damaged: %s. %s. Keep the directory until you have "
        "looked at it: nothing needs it any more",
        *(damaged, rows, report["lost"], remains.damaged),
        "Nothing of models and pictures is missing"
        if complete
        else "What is lost is asked of the site again, by a walk through all listings; what the "
        "site has no more comes back only from a copy of these files",
    )
    digest = remains.manifest.content_digest if remains.manifest else ""
    snapshot = Artifact(stage="crawl", identity="", content_digest=digest, path=out)
    return SalvagedSnapshot(snapshot, complete, report, missing)


def _older(damaged: Path) -> list[Path]:
    """Other snapshots of the same crawl, the newest first."""
    identity = damaged.name.partition(".")[0]
    beside = (p for p in damaged.parent.glob(f"{identity}.*") if p.is_dir() and p != damaged)
    return sorted(beside, key=lambda path: path.stat().st_mtime, reverse=True)


def _write_kind(out: Path, kind: str, sources: Iterable[_DamagedSnapshot]) -> int:
    """Write the rows of a kind; of several with one id the first source's. Returns how many."""
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
    remains: _DamagedSnapshot,
    older: Iterable[_DamagedSnapshot],
    inventory: SnapshotInventory | None,
) -> None:
    """The tombstones. One too many does no harm: all listings are walked, what is there is back."""
    found = {(row["kind"], row["id"]): line for row, line in remains.rows(GONE)}
    if not remains.is_good(GONE):
        for row in inventory.gone if inventory else ():
            found.setdefault((row["kind"], row["id"]), orjson.dumps(row))
        for snapshot in older if inventory is None else ():
            for row, line in snapshot.rows(GONE):
                found.setdefault((row["kind"], row["id"]), line)
    if found:
        (out / GONE).mkdir()
        write_lines(out / GONE / "part-00000.jsonl.gz", (f + b"\n" for f in found.values()))


def _generations(
    highest: int,
    remains: _DamagedSnapshot,
    older: Iterable[_DamagedSnapshot],
    inventory: SnapshotInventory | None,
) -> list[Row]:
    """Which crawls there were; at the least those up to the ``highest`` that an item speaks of."""
    rows: list[Row] = []
    for path in [remains.path, *(snapshot.path for snapshot in older)]:
        with contextlib.suppress(ArtifactError):  # another copy may be whole
            rows = max(rows, generation_rows(path), key=len)
    rows = max(rows, inventory.generations if inventory else [], key=len)
    date = datetime.fromtimestamp(remains.path.stat().st_mtime, UTC).date().isoformat()
    return [*rows, *({"generation": n, "date": date} for n in range(len(rows), highest + 1))]


def good_lines(path: Path, *, cut_short: bool) -> Iterator[bytes]:
    """Lines of every gzip member with a right checksum.

    Args:
        path: a part of a snapshot.
        cut_short: its end is known to be missing: the whole lines before are good too, though
            nothing vouches for them. Without, an unfinished member may as well be damaged.
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

"""Inventory of a store: which artifacts are the latest, what needs which, and what can be removed.

An artifact is *latest* where a pointer leads to it (``diffagent.store.latest``); in a series
without a pointer the newest is. It is *needed* when a latest one was made from it, directly or
indirectly, and *superseded* otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.schemas.manifest import InputRef, Manifest
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import integrity, latest, local_copies
from diffagent.store.lineage import PREVIOUS
from diffagent.store.manifest_file import read_manifest
from diffagent.store.object_store import list_manifests, list_pointers

#: Names of the directories of artifacts and of their partial, removed and damaged versions.
_NAME = re.compile(r"\.?[0-9a-f]{16}(\.|$)")
Kind = Literal["whole", "damaged", "unfinished"]


@dataclass
class Entry:
    """One directory of a store.

    Attributes:
        stage: name of its stage.
        name: of its directory.
        location: its path or URI.
        kind: a whole artifact, one that was set aside as damaged, or interrupted work.
        size: bytes of its files.
        manifest: None where it is missing or unreadable.
        series: see ``diffagent.store.latest``.
        pointers: names of the pointers that lead to it.
        is_latest: whether it is the latest of its series.
        needed_by: stages of the latest artifacts that were made from it, of the last in each line.
    """

    stage: str
    name: str
    location: str
    kind: Kind
    size: int
    manifest: Manifest | None
    series: str = ""
    pointers: tuple[str, ...] = ()
    is_latest: bool = False
    needed_by: set[str] = field(default_factory=set)

    @property
    def state(self) -> str:
        """Its state in words."""
        if self.kind != "whole":
            return self.kind
        states = ["latest"] if self.is_latest else []
        if self.needed_by:
            states.append(f"needed by {', '.join(sorted(self.needed_by))}")
        return ", ".join(states) or "superseded"


def read_inventory(store: str) -> list[Entry]:
    """List all entries of a store (a directory or a URI), by stage and time, oldest first.

    Raises:
        ArtifactError: the store does not exist or cannot be read.
    """
    runtime = RuntimeConfig(store=store)
    if runtime.remote:
        entries = _remote_entries(runtime.remote)
    elif not Path(store).is_dir():
        raise ArtifactError(
            f"no store {store!r}: no such directory; give the runtime.store of a run"
        )
    else:
        entries = list(_local_entries(Path(store)))
    whole = [entry for entry in entries if entry.kind == "whole"]
    _mark_series(whole)
    _mark_latest(whole)
    contents = _by_content(whole)
    ancestors = {entry.location: _ancestors(entry, contents) for entry in whole if entry.is_latest}
    inner = {entry.location for entries in ancestors.values() for entry in entries}
    for entry in whole:
        for ancestor in ancestors.get(entry.location, ()) if entry.location not in inner else ():
            ancestor.needed_by.add(entry.stage)
    return sorted(entries, key=lambda e: (e.stage, _created(e), e.name))


def superseded(entries: Sequence[Entry], *, other_configs: bool = False) -> list[Entry]:
    """List the whole artifacts that no latest one was made from.

    While a version of a dataset stays, the version that holds all decisions of its history stays
    too, wherever ``latest`` leads: otherwise the next build would decide again what that version
    decided.

    Args:
        entries: of a store.
        other_configs: only the target of ``STAGE/latest`` counts as latest, so that artifacts of
            other configurations than the last run's are superseded too.
    """
    whole = [entry for entry in entries if entry.kind == "whole"]
    roots = [entry for entry in whole if entry.is_latest]
    if other_configs:
        stages = {entry.stage for entry in roots if latest.LATEST in entry.pointers}
        roots = [e for e in roots if latest.LATEST in e.pointers or e.stage not in stages]
    keep, contents = {entry.location for entry in roots}, _by_content(whole)
    for root in roots:
        keep |= {entry.location for entry in _ancestors(root, contents)}
    histories = {_history(entry) for entry in whole if entry.location in keep} - {None}
    keep |= {entry.location for entry in _heads(whole) if _history(entry) in histories}
    return [entry for entry in whole if entry.location not in keep]


def remove(entry: Entry) -> bool:
    """Remove an entry of a local store; False when it is in use, or a run has reused it since."""
    path = Path(entry.location)
    if entry.kind == "unfinished":
        whole = path.with_name(entry.name.removeprefix(".").rpartition(".")[0])
        return local_copies.remove_unused(path, lock=whole)

    def is_removable(directory: Path) -> bool:
        return _pointers_to(directory) <= set(entry.pointers)

    if not local_copies.remove_unused(path, is_removable):
        return False
    for pointer in _pointers_to(path):
        path.with_name(pointer).unlink()
    return True


def _local_entries(store: Path) -> Iterator[Entry]:
    for stage in sorted(path for path in store.iterdir() if path.is_dir()):
        pointers = _local_pointers(stage)
        for path in sorted(p for p in stage.iterdir() if p.is_dir() and not p.is_symlink()):
            if not _NAME.match(path.name):
                continue  # a folder for something else: of models, of pictures
            if path.name.startswith("."):
                if path.name.endswith((".partial", ".removed", ".incoming")):
                    yield _entry_without_manifest(path, "unfinished")
                continue
            try:
                manifest = read_manifest(path)
            except DamagedArtifact:
                yield _entry_without_manifest(path, "damaged")
                continue
            kind: Kind = "damaged" if integrity.is_set_aside(path) else "whole"
            names = tuple(sorted(p for p, name in pointers.items() if name == path.name))
            size = sum(entry.size for entry in manifest.files)
            yield Entry(stage.name, path.name, str(path), kind, size, manifest, pointers=names)


def _entry_without_manifest(path: Path, kind: Kind) -> Entry:
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return Entry(path.parent.name, path.name, str(path), kind, size, None)


def _local_pointers(stage: Path) -> dict[str, str]:
    """Read the pointers of a stage: the name of a directory by the name of the pointer."""
    links = (path for path in stage.glob(f"{latest.LATEST}*") if path.is_symlink())
    return {link.name: str(link.readlink()) for link in links}


def _pointers_to(directory: Path) -> set[str]:
    pointers = _local_pointers(directory.parent)
    return {pointer for pointer, name in pointers.items() if name == directory.name}


def _remote_entries(store: str) -> list[Entry]:
    pointers = list_pointers(store)
    entries = []
    for (stage, name), manifest in list_manifests(store).items():
        names = tuple(sorted(p for (s, p), n in pointers.items() if (s, n) == (stage, name)))
        size = sum(entry.size for entry in manifest.files)
        location = f"{store}/{stage}/{name}"
        entries.append(Entry(stage, name, location, "whole", size, manifest, pointers=names))
    return entries


def _created(entry: Entry) -> float:
    return entry.manifest.created_at.timestamp() if entry.manifest else 0.0


Contents = dict[tuple[str, str, str], Entry]


def _by_content(entries: Sequence[Entry]) -> Contents:
    """Index entries by stage, identity and content, the fields of an ``InputRef``."""
    return {
        (entry.manifest.stage, entry.manifest.identity, entry.manifest.content_digest): entry
        for entry in entries
        if entry.manifest
    }


def _parents(entry: Entry, contents: Contents) -> Iterator[tuple[str, InputRef, Entry | None]]:
    """Yield the inputs with their names, except the history (`PREVIOUS`), which is not needed."""
    for name, refs in entry.manifest.inputs.items() if entry.manifest else ():
        for ref in refs if name != PREVIOUS else ():
            yield name, ref, contents.get((ref.stage, ref.identity, ref.content_digest))


def _ancestors(entry: Entry, contents: Contents) -> list[Entry]:
    """List the ancestors of an entry."""
    seen: dict[str, Entry] = {}
    queue = [entry]
    while queue:
        for _, _, parent in _parents(queue.pop(), contents):
            if parent and parent.location not in seen:
                seen[parent.location] = parent
                queue.append(parent)
    return list(seen.values())


def _history(entry: Entry) -> str | None:
    """Return the digest that the versions of one dataset share; None for other entries."""
    return entry.manifest.metrics.get("history") if entry.manifest else None


def _heads(entries: Sequence[Entry]) -> list[Entry]:
    """List the entries with a history that no other entry continues."""
    continued = {
        (ref.stage, ref.identity, ref.content_digest)
        for entry in entries
        if entry.manifest
        for ref in entry.manifest.inputs.get(PREVIOUS, ())
    }
    return [
        entry
        for names, entry in _by_content(entries).items()
        if _history(entry) and names not in continued
    ]


def _mark_series(entries: Sequence[Entry]) -> None:
    """Set the series of each entry (compare ``diffagent.store.lineage.series_of``)."""
    contents = _by_content(entries)

    def series(entry: Entry) -> str:
        if not entry.series and entry.manifest:
            parents: dict[str, list[str]] = {}
            for name, ref, parent in _parents(entry, contents):
                parents.setdefault(name, []).append(series(parent) if parent else ref.identity)
            entry.series = entry.manifest.series or latest.name_series(
                entry.manifest.stage, entry.manifest.config, parents
            )
        return entry.series

    for entry in entries:
        series(entry)


def _mark_latest(entries: Sequence[Entry]) -> None:
    by_series: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        by_series.setdefault((entry.stage, entry.series), []).append(entry)
    for group in by_series.values():
        targets = [entry for entry in group if entry.pointers]
        newest = max(group, key=lambda e: (_created(e), "." not in e.name))
        for entry in targets or [newest]:
            entry.is_latest = True

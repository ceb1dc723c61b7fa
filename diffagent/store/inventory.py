"""All artefacts of a store: which are the latest, what needs which, and what can go.

An artefact is *latest* where a pointer leads to it (``diffagent.store.latest``); of a series
without a
pointer the newest is. It is *needed* when a latest one was made from it, directly or not, and
*superseded* when neither holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.schemas.config import RuntimeConfig
from diffagent.schemas.manifest import InputRef, Manifest
from diffagent.store import latest, local_copies
from diffagent.store.lineage import PREVIOUS
from diffagent.store.manifest_file import read_manifest
from diffagent.store.object_store import list_manifests, list_pointers

#: How the directories of artefacts, and what belongs to them, are called.
_NAME = re.compile(r"\.?[0-9a-f]{16}(\.|$)")
Kind = Literal["whole", "damaged", "unfinished"]


@dataclass
class Entry:
    """One directory of a store.

    Attributes:
        stage: name of its stage.
        name: of its directory.
        location: its path or URI.
        kind: an artefact, one that was set aside as damaged, or work that was interrupted.
        size: bytes of its files.
        manifest: None where there is none.
        series: see ``diffagent.store.latest``.
        pointers: names of the pointers that lead to it.
        is_latest: of its series.
        needed_by: stages of the latest artefacts that were made from it, the last of each line.
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
    """All entries of a store (a directory or a URI), by stage and time, oldest first.

    Raises:
        ArtifactError: there is no such store, or it cannot be read.
    """
    runtime = RuntimeConfig(store=store)
    if runtime.remote:
        entries = _remote_entries(runtime.remote)
    elif not Path(store).is_dir():
        raise ArtifactError(f"no store {store!r}: no such directory; give runtime.store of a run")
    else:
        entries = list(_local_entries(Path(store)))
    whole = [entry for entry in entries if entry.kind == "whole"]
    _mark_series(whole)
    _mark_latest(whole)
    contents = _by_content(whole)
    below = {entry.location: _ancestors(entry, contents) for entry in whole if entry.is_latest}
    inner = {ancestor.location for ancestors in below.values() for ancestor in ancestors}
    for entry in whole:
        for ancestor in below.get(entry.location, ()) if entry.location not in inner else ():
            ancestor.needed_by.add(entry.stage)
    return sorted(entries, key=lambda e: (e.stage, _created(e), e.name))


def superseded(entries: Sequence[Entry], *, other_configs: bool = False) -> list[Entry]:
    """Whole artefacts that no latest one was made from.

    Of a dataset that stays, the version that knows all decisions of its history stays too, whatever
    ``latest`` leads to: else the next build would decide anew what that one decided.

    Args:
        entries: of a store.
        other_configs: only what ``STAGE/latest`` leads to counts as latest, so that what was made
            with other configurations than the last run's is superseded too.
    """
    whole = [entry for entry in entries if entry.kind == "whole"]
    roots = [entry for entry in whole if entry.is_latest]
    if other_configs:
        pointed = {entry.stage for entry in roots if latest.LATEST in entry.pointers}
        roots = [e for e in roots if latest.LATEST in e.pointers or e.stage not in pointed]
    keep, contents = {entry.location for entry in roots}, _by_content(whole)
    for root in roots:
        keep |= {entry.location for entry in _ancestors(root, contents)}
    histories = {_history(entry) for entry in whole if entry.location in keep} - {None}
    keep |= {entry.location for entry in _heads(whole) if _history(entry) in histories}
    return [entry for entry in whole if entry.location not in keep]


def remove(entry: Entry) -> bool:
    """Remove an entry of a local store; False when it is in use, or a run has found it since."""
    path = Path(entry.location)
    if entry.kind == "unfinished":
        whole = path.with_name(entry.name.removeprefix(".").rpartition(".")[0])
        return local_copies.remove_unused(path, lock=whole)

    def still_unwanted(directory: Path) -> bool:
        return _pointers_to(directory) <= set(entry.pointers)

    if not local_copies.remove_unused(path, still_unwanted):
        return False
    for pointer in _pointers_to(path):
        path.with_name(pointer).unlink()
    return True


def _local_entries(store: Path) -> Iterator[Entry]:
    for stage in sorted(path for path in store.iterdir() if path.is_dir()):
        pointers = _local_pointers(stage)
        for path in sorted(p for p in stage.iterdir() if p.is_dir() and not p.is_symlink()):
            if not _NAME.match(path.name):
                continue  # a folder of something else: of models, of pictures
            if path.name.startswith("."):
                if path.name.endswith((".partial", ".removed", ".incoming")):
                    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
                    yield Entry(stage.name, path.name, str(path), "unfinished", size, None)
                continue
            try:
                manifest = read_manifest(path)
            except DamagedArtifact:
                size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
                yield Entry(stage.name, path.name, str(path), "damaged", size, None)
                continue
            kind: Kind = "damaged" if ".damaged-" in path.name else "whole"
            names = tuple(sorted(p for p, name in pointers.items() if name == path.name))
            size = sum(entry.size for entry in manifest.files)
            yield Entry(stage.name, path.name, str(path), kind, size, manifest, pointers=names)


def _local_pointers(stage: Path) -> dict[str, str]:
    """Names of the pointers of a stage, and of the directories that they lead to."""
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
    """Entries by stage, identity and content: what an ``InputRef`` names."""
    return {
        (entry.manifest.stage, entry.manifest.identity, entry.manifest.content_digest): entry
        for entry in entries
        if entry.manifest
    }


def _parents(entry: Entry, contents: Contents) -> Iterator[tuple[str, InputRef, Entry | None]]:
    """Inputs by name; earlier versions of an artefact are not what it needs (`PREVIOUS`)."""
    for name, refs in entry.manifest.inputs.items() if entry.manifest else ():
        for ref in refs if name != PREVIOUS else ():
            yield name, ref, contents.get((ref.stage, ref.identity, ref.content_digest))


def _ancestors(entry: Entry, contents: Contents) -> list[Entry]:
    """Everything that an entry was made from, itself left out."""
    seen: dict[str, Entry] = {}
    waiting = [entry]
    while waiting:
        for _, _, parent in _parents(waiting.pop(), contents):
            if parent and parent.location not in seen:
                seen[parent.location] = parent
                waiting.append(parent)
    return list(seen.values())


def _history(entry: Entry) -> str | None:
    """The digest that the versions of one dataset share; None for all else."""
    return entry.manifest.metrics.get("history") if entry.manifest else None


def _heads(entries: Sequence[Entry]) -> list[Entry]:
    """Entries with a history that no other entry goes on from."""
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
    """Give each entry its series, as `series_of` of the lineage does for one artefact."""
    contents = _by_content(entries)

    def series(entry: Entry) -> str:
        if not entry.series and entry.manifest:
            parents: dict[str, list[str]] = {}
            for name, ref, parent in _parents(entry, contents):
                parents.setdefault(name, []).append(series(parent) if parent else ref.identity)
            entry.series = entry.manifest.series or latest.series_of(
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
        pointed = [entry for entry in group if entry.pointers]
        newest = max(group, key=lambda e: (_created(e), "." not in e.name))
        for entry in pointed or [newest]:
            entry.is_latest = True

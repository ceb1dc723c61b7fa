"""From what metadata says of a model to a version of the catalogue.

All versions of a snapshot are known here, also those that the filters dropped: a picture made
with a dropped checkpoint is dropped for that reason, not because its checkpoint is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffagent.dabench.catalogue import (
    CHECKPOINT,
    LORA_TYPES,
    WEIGHT_TYPES,
    Catalogue,
    Entry,
    generation_of,
)
from diffagent.dabench.metadata import Reference

#: Answers of the site's by-hash route: version id, or None for an unknown hash.
Lookup = Callable[[str], int | None]

MAX_LORAS, MAX_WEIGHT = 8, 4.0  # of schemas.api
_LAST = "9999"  # a version without a date comes after those with one


@dataclass(frozen=True, slots=True)
class KnownVersion:
    """What is kept of every version of the snapshot. ``dropped``: why, '' when kept."""

    version_id: int
    type: str
    published: str
    base_model: str
    generation: int
    dropped: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """The version that a reference means, and how that is known."""

    version: KnownVersion
    via: str  # civitaiResources | hash | by-hash
    candidates: int  # versions that share the hash; 1 for an id


class Resolver:
    """Index of a snapshot's versions by id and by file hash.

    A file can be uploaded as several versions, and AutoV1 hashes collide. The earliest published
    version of the wanted type is taken then, as the site's by-hash route does.
    """

    def __init__(self, lookup: Lookup | None = None) -> None:
        self._lookup = lookup
        self._versions: dict[int, KnownVersion] = {}
        self._by_hash: dict[str, int | tuple[int, ...]] = {}
        self._entries: dict[int, Entry] = {}
        self._loras_by_stem: dict[str, list[Entry]] = {}

    def add(self, model: Mapping[str, Any], version: Mapping[str, Any], dropped: str) -> None:
        """Take in a version of the snapshot; ``dropped`` is '' when the filters kept it."""
        version_id = version.get("id")
        if type(version_id) is not int or version_id in self._versions:
            return
        published = version.get("publishedAt") or version.get("createdAt") or _LAST
        self._versions[version_id] = KnownVersion(
            version_id,
            str(model.get("type")),
            str(published),
            str(version.get("baseModel")),
            generation_of(version),
            dropped,
        )
        for digest in set(_hashes(version)):
            known = self._by_hash.get(digest)
            if known is None:
                self._by_hash[digest] = version_id
            else:
                held = known if isinstance(known, tuple) else (known,)
                self._by_hash[digest] = (*held, version_id)

    def use(self, catalogue: Catalogue) -> None:
        """Take the entries (and so the names) of the kept versions from ``catalogue``."""
        self._entries = {entry.version_id: entry for entry in catalogue.entries}
        self._loras_by_stem = {}
        for entry in catalogue.loras:
            self._loras_by_stem.setdefault(_stem(entry.file_name), []).append(entry)

    def checkpoint(self, references: Iterable[Reference]) -> Resolved | str:
        """The checkpoint that the references mean (best first), or why there is none."""
        reason = "no id and no hash"
        for reference in references:
            found = self._resolve(reference, (CHECKPOINT,))
            if isinstance(found, Resolved):
                return found
            reason = found
        return reason

    def entry(self, version: KnownVersion) -> Entry:
        """The catalogue's entry of a version that the filters kept."""
        return self._entries[version.version_id]

    def loras(
        self, references: Iterable[Reference], checkpoint: Entry
    ) -> tuple[list[tuple[Entry, float]], list[str]]:
        """LoRAs with weights that fit the checkpoint, and what became of each reference.

        The second list has 'kept by id or hash', 'kept by file name' or the reason why not.
        """
        kept: dict[int, tuple[Entry, float]] = {}
        outcomes: list[str] = []
        for reference in references:
            entry, outcome = self._lora(reference, checkpoint)
            if entry is None:
                outcomes.append(outcome)
            elif abs(reference.weight) > MAX_WEIGHT:
                outcomes.append("weight out of range")
            elif entry.version_id in kept:
                outcomes.append("named twice")
            elif len(kept) == MAX_LORAS:
                outcomes.append(f"more than {MAX_LORAS}")
            else:
                outcomes.append(outcome)
                kept[entry.version_id] = (entry, reference.weight)
        return list(kept.values()), outcomes

    def _lora(self, reference: Reference, checkpoint: Entry) -> tuple[Entry | None, str]:
        found = self._resolve(reference, tuple(LORA_TYPES))
        if isinstance(found, str):
            return self._lora_by_stem(reference, checkpoint) if reference.name else (None, found)
        if found.version.dropped:
            return None, found.version.dropped
        entry = self.entry(found.version)
        if entry.ecosystem != checkpoint.ecosystem:
            return None, "made for another base model"
        return entry, "kept by id or hash"

    def _lora_by_stem(self, reference: Reference, checkpoint: Entry) -> tuple[Entry | None, str]:
        """A prompt tag names the file, which most people keep as it was downloaded."""
        if reference.hash or reference.version_id:  # better evidence says: another file
            return None, "hash not in the snapshot"
        same_name = self._loras_by_stem.get(_stem(reference.name or ""), ())
        fitting = [entry for entry in same_name if entry.ecosystem == checkpoint.ecosystem]
        if len(fitting) == 1:
            return fitting[0], "kept by file name"
        return None, "file name of several" if fitting else "file name unknown"

    def _resolve(self, reference: Reference, types: tuple[str, ...]) -> Resolved | str:
        if reference.version_id is not None:
            version = self._versions.get(reference.version_id)
            if version is None:
                return "version not in the snapshot"
            if version.type not in types:
                return f"version is not a {types[0]}"
            return Resolved(version, "civitaiResources", 1)
        if reference.hash is None:
            return "no id and no hash"
        found = self._versions_of(reference.hash, types)
        if found:
            return Resolved(
                min(found, key=lambda v: (v.published, v.version_id)), "hash", len(found)
            )
        if self._lookup is None or types != (CHECKPOINT,):
            return "hash not in the snapshot"
        version = self._versions.get(self._lookup(reference.hash) or -1)
        if version is None or version.type not in types:
            return "hash not in the snapshot"
        return Resolved(version, "by-hash", 1)

    def _versions_of(self, digest: str, types: tuple[str, ...]) -> list[KnownVersion]:
        ids = self._by_hash.get(digest, ())
        versions = (self._versions[i] for i in (ids if isinstance(ids, tuple) else (ids,)))
        return [version for version in versions if version.type in types]


def _hashes(version: Mapping[str, Any]) -> Iterable[str]:
    files = version.get("files")
    for file in files if isinstance(files, list) else []:
        if not isinstance(file, dict) or file.get("type") not in WEIGHT_TYPES:
            continue
        hashes = file.get("hashes")
        for value in hashes.values() if isinstance(hashes, dict) else ():
            if isinstance(value, str) and len(value) >= 8:
                yield value.upper()


def _stem(file_name: str) -> str:
    name = re.split(r"[\\/]", file_name)[-1].strip().casefold()
    return name.removesuffix(".safetensors")

"""Which earlier datasets a dataset goes on from, and what they decided.

A record keeps its split for as long as its store remembers it. So the stage ``shard`` reads, next
to the filtered records, the versions of the dataset that the store has from before: they are its
input ``previous``, part of its identity and named in its manifest. Two datasets are versions of one
when they are of the same site and ask for the same kind of splits (`_SPLIT_SETTINGS`); how the site
was crawled and what was filtered does not matter.

The history is a line: a dataset goes on from the versions that no other one goes on from (one, but
for stores of before there was a history, and for two that were built at the same time), and carries
all that was decided in ``splits.parquet``. A request that was answered before has the history that
it had then.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffagent.dabench.build.neighbours import Ints
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.splits import NO_SPLIT, SPLITS, Assignment, Codes, Decisions, Prints
from diffagent.dabench.dataset import open_dataset
from diffagent.dabench.parquet_tables import write_table
from diffagent.errors import ArtifactError
from diffagent.schemas.manifest import SCHEMA_VERSION, InputRef, Manifest
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import DECISIONS
from diffagent.store import (
    PREVIOUS,
    Artifact,
    Inputs,
    canonical_json,
    integrity,
    latest,
    read_manifest,
)
from diffagent.store.object_store import list_remote, read_remote

log = logging.getLogger(__name__)

#: The file of a dataset that holds what was decided.
SPLITS_FILE = "splits.parquet"
_STAGE = "shard"
#: Of the stage ``shard``: an older one's answer is an earlier version, not the answer.
VERSION = 3
_SPLIT_SETTINGS = (
    "validation_fraction",
    "test_fraction",
    "near_duplicate_jaccard",
    "series_jaccard",
    "seed",
)
_NAMED = 5  # records that a message names


@dataclass(frozen=True)
class Moved:
    """Records that two versions of a dataset have in different splits."""

    ids: Ints
    old: Codes
    new: Codes

    def __str__(self) -> str:
        named = [
            f"{ident} ({SPLITS[old]} -> {SPLITS[new]})"
            for ident, old, new in zip(self.ids[:_NAMED], self.old, self.new, strict=False)
        ]
        more = f" and {len(self.ids) - _NAMED:,} more" if len(self.ids) > _NAMED else ""
        return f"{', '.join(named)}{more}"


def find_previous(config: DABenchConfig, inputs: Inputs, runtime: RuntimeConfig) -> list[Artifact]:
    """The versions that the dataset of this request goes on from, the newest first.

    Raises:
        ArtifactError: the store cannot be read.
    """
    if len(inputs.get("filtered", ())) != 1:
        return []  # the stage complains
    (filtered,) = inputs["filtered"]
    store = _runtime_store(runtime)
    every = _in_store(store)
    for manifest, place in every:
        if _answers(manifest, config, filtered):
            whole = {_ref(m): _artifact(m, p) for m, p in every if not p.is_damaged}
            return [whole.get(r) or _handle_of(r, place) for r in manifest.inputs[PREVIOUS]]
    history = history_of(filtered.manifest, config.model_dump(mode="json"), store_of(filtered))
    versions = _versions(every, store, history)
    if every and not versions:
        log.warning(
            "splits are decided anew: none of the %d datasets in %s is of this crawl.site and "
            "asks for such splits (%s); so records that they share may be in other splits here",
            *(len(every), store, ", ".join(_SPLIT_SETTINGS)),
        )
    continued = {ref for manifest, _ in versions for ref in manifest.inputs.get(PREVIOUS, ())}
    intact = [_ref(m) for m, place in versions if not place.is_damaged]
    heads = [(m, place) for m, place in versions if _ref(m) not in continued]
    for manifest, place in heads:
        if place.is_damaged and _ref(manifest) not in intact:
            raise ArtifactError(
                "a new version of this dataset would not know what the newest one decided, which "
                f"is damaged and was set aside as {str(place.path)!r}: put the right file back "
                "and rename it, or run what made it again; or delete it, to go on from an older "
                "version, or to decide anew"
            )
    return [_artifact(m, place) for m, place in heads if not place.is_damaged]


def _answers(manifest: Manifest, config: DABenchConfig, filtered: Artifact) -> bool:
    """Whether a version is what this code made of the same config and records."""
    digests = [ref.content_digest for ref in manifest.inputs.get("filtered", ())]
    return (
        (manifest.stage_version, manifest.schema_version) == (VERSION, SCHEMA_VERSION)
        and manifest.config == config.model_dump(mode="json")
        and digests == [filtered.content_digest]
        and PREVIOUS in manifest.inputs
    )


def version_before(dabench: Artifact) -> Artifact | None:
    """The version that a dataset went on from; None: there is none, or it is there no more.

    A dataset of before there was a history went on from the one that was built before it.
    """
    manifest, place = dabench.manifest, _Place(dabench.path, dabench.remote)
    if refs := manifest.inputs.get(PREVIOUS, ()):
        known = {_ref(m): _artifact(m, p) for m, p in _in_store(place.store)}
        return next((known[ref] for ref in refs if ref in known), None)
    if PREVIOUS in manifest.inputs or not manifest.inputs.get("filtered"):
        return None
    if (history := _history_of_version(manifest, place.store)) is None:
        return None
    versions = _versions(_in_store(place.store), place.store, history)
    older = [(m, p) for m, p in versions if m.created_at < manifest.created_at]
    return _artifact(*older[0]) if older else None


def read_decisions(versions: Sequence[Artifact]) -> Decisions:
    """All that these versions (the newest first) decided; what a newer one says counts.

    Raises:
        ArtifactError: one of them is damaged, or there no more.
    """
    decisions = Decisions()
    for artifact in reversed(versions):
        later = _read_file(artifact)
        # The name of a group stands for a group of one split.
        apart = np.isin(decisions.group, later.group)
        if apart.any():
            names, splits, _ = later.groups()
            order = np.argsort(names)
            at = np.minimum(np.searchsorted(names[order], decisions.group), len(names) - 1)
            apart &= splits[order][at] != decisions.split
            decisions.group[apart] = ~decisions.group[apart]
        decisions = decisions.followed_by(later)
    return replace(decisions, age=decisions.groups()[2])


def write_decisions(path: Path, before: Decisions, prints: Prints, made: Assignment) -> None:
    """Write what is decided by now: ``before``, and the splits of ``prints``."""
    rows = np.flatnonzero(made.split != NO_SPLIT)
    rows = rows[np.argsort(prints.ids[rows], kind="stable")]
    now = Decisions(
        ids=prints.ids[rows],
        split=made.split[rows],
        group=made.group[rows],
        age=made.age[rows],
        mark=prints.marks[rows],
        present=np.ones(len(rows), bool),
        cuts=made.cuts,
    )
    every = before.followed_by(now)
    cuts = orjson.dumps({name: list(cut) for name, cut in sorted(every.cuts.items())})
    names = np.array(SPLITS, dtype=object)
    columns = (every.ids, names[every.split], every.group, every.age, every.mark, every.present)
    schema = DECISIONS.with_metadata({"cuts": cuts})
    write_table(
        path,
        pa.table(
            [pa.array(c, field.type) for c, field in zip(columns, DECISIONS, strict=True)],
            schema=schema,
        ),
    )


def check_kept(ids: Ints, split: Codes, before: Artifact) -> None:
    """Raise unless every record that ``before`` has, too, is in the split that it has there.

    The rows of its shards are read, not its memory: so a memory that is wrong is seen.

    Raises:
        ArtifactError: records would move, or ``before`` is damaged.
    """
    moved = find_moved(ids, split, before.local())
    if len(moved.ids):
        raise ArtifactError(
            f"{len(moved.ids):,} records would move to another split than they have in the version "
            f"before, {before.location!r}: {moved}. Its {SPLITS_FILE} does not say what its "
            "shards do: copy that dataset again from where it was made ('diffagent dabench verify' "
            "lists what is wrong with it), or delete its directory, to go on from an older version "
            "or to decide anew"
        )


def find_moved(ids: Ints, split: Codes, before: Path) -> Moved:
    """The records of the dataset ``before`` that have another split there."""
    old_ids, old = read_splits(before)
    common, now, then = np.intersect1d(ids, old_ids, return_indices=True)
    apart = split[now] != old[then]
    return Moved(common[apart], old[then][apart], split[now][apart])


def read_splits(dabench: Path) -> tuple[Ints, Codes]:
    """The ids of all rows of a dataset and their splits, read from its shards.

    Raises:
        ArtifactError: there is no dataset, or a shard is damaged.
    """
    ids, splits = [np.zeros(0, np.int64)], [np.zeros(0, np.int8)]
    for batch in open_dataset(dabench).batches(["id"]):
        ids.append(batch.data["id"].to_numpy())
        splits.append(np.full(len(batch.data), SPLITS.index(batch.split), np.int8))
    return np.concatenate(ids), np.concatenate(splits)


def _read_file(artifact: Artifact) -> Decisions:
    """The decisions of a version; of one without a memory, the splits of its rows."""
    directory = artifact.local()
    path = directory / SPLITS_FILE
    if not directory.is_dir():
        raise ArtifactError(
            f"the version before, {str(directory)!r}, is there no more, and the dataset that went "
            "on from it has to be built again: copy one of the two from where it was made, or "
            "delete the one that is left to go on from an older one"
        )
    if not path.exists():
        return _from_shards(directory)
    try:
        table = pq.read_table(path, schema=DECISIONS)
        stored = orjson.loads((pq.read_schema(path).metadata or {}).get(b"cuts", b"{}"))
        cuts = {name: (float(test), float(both)) for name, (test, both) in stored.items()}
        codes = pc.index_in(table["split"], value_set=pa.array(SPLITS)).to_numpy()
        ids, group, age, mark, present = (
            table[name].to_numpy() for name in ("id", "group", "age", "mark", "present")
        )
        return Decisions(ids, codes.astype(np.int8), group.copy(), age, mark, present, cuts)
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        raise _damaged(path, error) from None


def _from_shards(dabench: Path) -> Decisions:
    """The decisions of a dataset from before there was a memory; its marks are not known."""
    parts = [
        (
            batch.data["id"].to_numpy(),
            np.full(len(batch.data), SPLITS.index(batch.split), np.int8),
            # Before there were groups, a record is one of its own.
            batch.data["group" if "group" in batch.data.schema.names else "id"].to_numpy(),
        )
        for batch in open_dataset(dabench).batches(["id", "group"])
    ]
    if not parts:
        return Decisions()
    ids, split, group = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(ids, kind="stable")
    nothing = np.zeros(len(ids), np.int32)
    return Decisions(
        ids=ids[order],
        split=split[order],
        group=group[order],
        age=nothing,
        mark=nothing.astype(np.uint64),
        present=nothing.astype(bool),
    )


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"cannot read {str(path)!r} of the version before: {error}; copy that dataset again from "
        "where it was made, or delete its directory to go on from an older version"
    )


def history_of(filtered: Manifest, config: Mapping[str, Any], store: str) -> str:
    """A digest that all versions of one dataset share: its site, and the kind of its splits."""
    crawls = [ref.identity for ref in filtered.inputs.get("snapshot", ())]
    site = site_of(filtered, store) or crawls
    settings = [config.get(name) for name in _SPLIT_SETTINGS]
    return hashlib.sha256(canonical_json([site, *settings])).hexdigest()


def _history_of_version(manifest: Manifest, store: str) -> str | None:
    """The same of a version in a store; None when its lineage is gone."""
    if history := manifest.metrics.get("history"):
        return str(history)
    for ref in manifest.inputs.get("filtered", ()):
        if filtered := _manifest(f"{store}/{ref.stage}/{ref.identity[:16]}"):
            return history_of(filtered, manifest.config, store)
    return None


def site_of(filtered: Manifest, store: str) -> str | None:
    """The site whose records were filtered; None when the crawl is there no more."""
    for crawl in _crawls(filtered, store):
        if site := crawl.config.get("site"):
            return str(site).rstrip("/")
    return None


def about_of(filtered: Manifest, store: str) -> dict[str, Any]:
    """Returns the note of the dump whose records were filtered; empty when it has none."""
    for crawl in _crawls(filtered, store):
        if about := crawl.metrics.get("about"):
            return dict(about)
    return {}


def _crawls(filtered: Manifest, store: str) -> Iterator[Manifest]:
    for ref in filtered.inputs.get("snapshot", ()):
        if crawl := _manifest(f"{store}/{ref.stage}/{ref.identity[:16]}"):
            yield crawl


@dataclass(frozen=True)
class _Place:
    """Where an artefact is."""

    path: Path
    remote: str | None

    @property
    def store(self) -> str:
        """The directory or the URI of its store."""
        return self.remote.rsplit("/", 2)[0] if self.remote else str(self.path.parents[1])

    @property
    def is_damaged(self) -> bool:
        """Whether it was set aside because it is damaged."""
        return integrity.is_set_aside(self.path)


_Version = tuple[Manifest, _Place]


def store_of(artifact: Artifact) -> str:
    """The directory or the URI of the store that an artefact lies in."""
    return _Place(artifact.path, artifact.remote).store


def _runtime_store(runtime: RuntimeConfig) -> str:
    return runtime.remote or str(runtime.local_store)


def _versions(every: Sequence[_Version], store: str, history: str) -> list[_Version]:
    """Those that are versions of one dataset."""
    versions = []
    for manifest, place in every:
        own = _history_of_version(manifest, store)
        if own is None:
            log.warning(
                "%s: its splits are not read: its 'filter' artefact is gone, and with it of which "
                "site it is",
                place.remote or place.path,
            )
        elif own == history:
            versions.append((manifest, place))
    return versions


def _rank(version: _Version) -> tuple[bool, datetime, str]:
    """Later versions have a higher one; any that knows its history, than any that does not."""
    manifest, _ = version
    return PREVIOUS in manifest.inputs, manifest.created_at, manifest.content_digest


def _in_store(store: str) -> list[_Version]:
    """All datasets of a store, the newest first."""
    folder = f"{store}/{_STAGE}"
    remote = "://" in store
    local = RuntimeConfig(store=store).local_store / _STAGE
    names = list_remote(folder) if remote else [path.name for path in local.glob("[!.]*/")]
    versions = [
        (manifest, _Place(local / name, f"{folder}/{name}" if remote else None))
        for name in names
        if not latest.is_pointer(name) and (manifest := _manifest(f"{folder}/{name}"))
    ]
    return sorted(versions, key=_rank, reverse=True)


def _manifest(location: str) -> Manifest | None:
    """The manifest at a path or URI; None when there is none that this version can read."""
    try:
        return read_remote(location) if "://" in location else read_manifest(Path(location))
    except ArtifactError as error:
        if "://" in location:
            raise
        if Path(location).is_dir():
            log.warning("%s", error)
        return None


def _artifact(manifest: Manifest, place: _Place) -> Artifact:
    return Artifact.of(manifest, place.path, place.remote)


def _ref(manifest: Manifest) -> InputRef:
    return InputRef(
        stage=manifest.stage,
        identity=manifest.identity,
        content_digest=manifest.content_digest,
    )


def _handle_of(ref: InputRef, place: _Place) -> Artifact:
    """The artefact that ``ref`` names, in the store of ``place``."""
    name = ref.identity[:16]
    remote = f"{place.remote.rpartition('/')[0]}/{name}" if place.remote else None
    return Artifact(**ref.model_dump(), path=place.path.with_name(name), remote=remote)

"""Is a DABench what it says it is? Every problem with its file, row, value and remedy.

Digests, schema and counts against the manifest; every row against the catalogue and the mapping
dictionaries; no near-duplicate prompt, group, post or series on both sides of a split; and no
record in another split than in the version before. One pass over the rows, a batch in memory at a
time, and some over the prompts (`find_leaks`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.dabench.build.history import SPLITS_FILE, find_moved, read_decisions, version_before
from diffagent.dabench.build.leaks import Chunk, Leak, chunk, find_leaks
from diffagent.dabench.build.shard_stage import model_mapping, sampler_mapping
from diffagent.dabench.build.splits import SPLITS, Codes, Split
from diffagent.dabench.dataset import Batch, Dataset, count_rows, find_shards, read_file
from diffagent.dabench.tools.layout import one_line
from diffagent.errors import ArtifactError, DiffAgentError
from diffagent.schemas.api import T2IAPI, ApiError, parse_api
from diffagent.schemas.manifest import Manifest
from diffagent.schemas.printable import printable
from diffagent.schemas.tables import CATALOGUE, DABENCH
from diffagent.store import MANIFEST, PREVIOUS, Artifact, read_manifest, sha256_file
from diffagent.t2i.base_models import ecosystem
from diffagent.t2i.catalogue import AIR_TYPES, Catalogue, Entry, air_of

log = logging.getLogger(__name__)

_MAX_LEAKS = 1000  # near-duplicates that are counted

_REBUILD = "build the dataset again (diffagent shard)"
_RESTORE = "copy the dataset again from where it was made, or build it again (diffagent shard)"
_SPLITS = "build the dataset again with leak-free splits (diffagent shard)"
_UNDO = (
    "test agents of a version with that version alone; to undo it, delete this version and build "
    "it again (diffagent shard): it then goes on from the version before"
)
_REPORT = "build it again from a new 'filter' artefact; if that stays, the parser is at fault"

#: Kind of problem -> remedy. The order is that of the report.
REMEDIES: Mapping[str, str] = {
    "manifest": _RESTORE,
    "file missing": _RESTORE,
    "file digest": _RESTORE,
    "file not in the manifest": "remove the file, or build the dataset again",
    "file unreadable": _RESTORE,
    "shard missing": _RESTORE,
    "schema": f"read it with the version that wrote it, or {_REBUILD}",
    "row count": _RESTORE,
    "catalogue": _REBUILD,
    "catalogue value": _REPORT,
    "mapping of models": _REBUILD,
    "mapping of samplers": f"the table of samplers has changed since: {_REBUILD}",
    "duplicate id": _REBUILD,
    "id in two splits": _SPLITS,
    "group in two splits": _SPLITS,
    "post in two splits": _SPLITS,
    "near-duplicate in two splits": _SPLITS,
    "series in two splits": _SPLITS,
    "moved since the version before": _UNDO,
    "decided otherwise": f"{SPLITS_FILE} and the shards differ: {_RESTORE}",
    "empty prompt": _REPORT,
    "value out of range": _REPORT,
    "api unreadable": _REPORT,
    "api and row differ": _REPORT,
    "api and catalogue differ": _REBUILD,
    "row and catalogue differ": _REBUILD,
    "unknown model": _REBUILD,
    "unknown LoRA": _REBUILD,
    "LoRA does not fit": _REPORT,
    "unknown sampler": _REBUILD,
}

_HEX = re.compile(r"[0-9a-f]{64}")
_USES = {"Image", "RentCivit", "Rent", "Sell"}

#: Column -> (what its values are, whether one is): of rows and entries alike, where they have it.
#: Whether null is allowed is the schema's business.
RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "nsfw_level": ("1, 2, 4, 8 or 16", lambda value: value in {1, 2, 4, 8, 16}),
    "confidence": ("0 to 1", lambda value: 0 <= value <= 1),
    "loras_dropped": ("0 or more", lambda value: value >= 0),
    "reactions": ("0 or more", lambda value: value >= 0),
    "random_split": (f"one of {', '.join(SPLITS)}", lambda value: value in SPLITS),
    "downloads": ("0 or more", lambda value: value >= 0),
    "size_bytes": ("more than 0", lambda value: value > 0),
    "sha256": ("64 lower-case hex digits", lambda value: bool(_HEX.fullmatch(value))),
    "allow_commercial_use": (f"some of {sorted(_USES)}", lambda value: set(value) <= _USES),
}
_STAGES = ("shard", "export")
_NEEDED = ("id", "prompt", "api", "model", "version")  # without these no row can be checked
_KEYS = ("id", "group", "post_id")
_OF_ENTRY = ("base_model", "model_id", "version_id")  # columns that repeat the catalogue's
_IN_API = tuple(name for name in T2IAPI.model_fields if name in DABENCH.names)
_API_OF_ENTRY = ("type", "base_model", "air")
_READ = tuple(n for n in DABENCH.names if n in {*_NEEDED, *_KEYS, *_OF_ENTRY, *_IN_API, *RANGES})
_NOWHERE = -(2**63)  # stands for null among ids


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; ``row`` counts from 0 within the file."""

    kind: str
    file: str
    row: int | None
    value: str
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, with the remedy."""
        return {**self.__dict__, "remedy": REMEDIES[self.kind]}


@dataclass
class Verdict:
    """All kinds of problems with their totals, the first ``limit`` of each in full."""

    path: Path
    limit: int = 20
    rows: int = 0
    files: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.totals

    def add(
        self, kind: str, message: str, *, file: str = "", row: int | None = None, value: object = ""
    ) -> None:
        """Count a problem."""
        if self.totals[kind] < self.limit:
            self.problems.append(Problem(kind, file, row, one_line(value, 120), message))
        self.totals[kind] += 1

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "path": str(self.path),
            "sound": self.sound,
            "rows": self.rows,
            "files": self.files,
            "checked": self.checked,
            "totals": {kind: self.totals[kind] for kind in REMEDIES if self.totals[kind]},
            "problems": [problem.to_dict() for problem in self.problems],
        }


def verify_dabench(
    directory: str | Path, *, limit: int = 20, leaks: bool = True, before: Path | None = None
) -> Verdict:
    """Check the DABench in ``directory``, whatever state it is in.

    Args:
        directory: a ``shard`` artefact, or an export of one.
        limit: problems of each kind to list; all are counted.
        leaks: compare the prompts of different splits (most of the time on large datasets).
        before: an older version, in whose splits all records must still be; None: the one that it
            went on from, when its store still has that.

    Raises:
        ArtifactError: it holds no DABench at all.
    """
    path = Path(directory)
    shards = find_shards(path)
    if not any(shards.values()) and not (path / MANIFEST).exists():
        raise ArtifactError(
            f"{str(path)!r} holds no DABench: give the directory of a 'shard' artefact, or of "
            "what 'diffagent dabench export' wrote"
        )
    verdict = Verdict(path, limit)
    manifest = _check_files(verdict)
    if manifest and manifest.stage not in _STAGES:
        raise ArtifactError(
            f"{str(path)!r} is an artefact of {manifest.stage!r}: 'diffagent artifact verify' "
            "checks its files"
        )
    dataset = Dataset(path, manifest, shards)
    catalogue = _check_catalogue(verdict)
    rows = _Rows(verdict, catalogue)
    files = list(_check_shards(verdict, dataset))
    whole = [rows.read(*file) for file in files]
    rows.finish()
    verdict.rows = rows.places.count
    complete = all(whole) and not verdict.totals["file unreadable"]
    if manifest and complete and not verdict.totals["shard missing"]:
        _check_counts(verdict, manifest, rows.per_split)
    if rows.ids_are_unique:
        codes = rows.places.splits().astype(np.int8)
        _check_history(verdict, dataset, rows.ids, codes, before)
    if leaks and complete:
        _check_leaks(verdict, rows.places, files, dataset)
    return verdict


def _check_files(verdict: Verdict) -> Manifest | None:
    """Compare every file with the manifest; None when there is no manifest to compare with."""
    try:
        manifest = read_manifest(verdict.path)
    except ArtifactError as error:
        verdict.add("manifest", str(error), file=MANIFEST)
        return None
    listed = {MANIFEST}
    for entry in manifest.files:
        listed.add(entry.path)
        file = verdict.path / entry.path
        if not file.is_file():
            verdict.add("file missing", "the manifest lists it", file=entry.path)
        elif file.stat().st_size != entry.size:
            value = f"{file.stat().st_size} bytes"
            verdict.add("file digest", f"not {entry.size} bytes", file=entry.path, value=value)
        elif (digest := sha256_file(file)) != entry.sha256:
            verdict.add("file digest", f"not {entry.sha256}", file=entry.path, value=digest)
    for file in sorted(verdict.path.rglob("*")):
        name = file.relative_to(verdict.path).as_posix()
        if file.is_file() and name not in listed:
            verdict.add("file not in the manifest", "nothing says what it is", file=name)
    verdict.files = len(manifest.files)
    verdict.checked.append(f"size and SHA256 of {len(manifest.files)} files")
    return manifest


def _check_catalogue(verdict: Verdict) -> Catalogue | None:
    """Check the catalogue and the dictionaries made of it; None when it cannot be used."""
    name = "catalogue.parquet"
    try:
        schema = pq.read_schema(verdict.path / name)
        catalogue = Catalogue.load(verdict.path)
    except (OSError, pa.ArrowException, orjson.JSONDecodeError, DiffAgentError) as error:
        verdict.add("catalogue", str(error), file=name)
        return None
    _check_schema(verdict, name, schema, CATALOGUE)
    versions = Counter(entry.version_id for entry in catalogue.entries)
    for row, entry in enumerate(catalogue.entries):
        if versions[entry.version_id] > 1:
            verdict.add("catalogue", "version id twice", file=name, row=row, value=entry.version_id)
        values = {column: getattr(entry, column, None) for column in CATALOGUE.names}
        _check_ranges(verdict, "catalogue value", name, row, values)
        if wanted := _entry_problem(entry):
            verdict.add("catalogue value", wanted, file=name, row=row, value=entry.air)
    mappings = (
        ("mapping of models", "mapping/models.json", model_mapping(catalogue)),
        ("mapping of samplers", "mapping/samplers.json", sampler_mapping()),
    )
    for kind, file, made in mappings:
        wanted_map = orjson.loads(orjson.dumps(made))
        _check_mapping(verdict, kind, file, wanted_map, whole=kind == "mapping of models")
    verdict.checked.append(f"{len(catalogue.entries):,} entries of the catalogue, both mappings")
    return catalogue


def _entry_problem(entry: Entry) -> str:
    """What is wrong between an entry's type, base model, ids and AIR; '' when nothing is."""
    if entry.type not in AIR_TYPES:
        return f"type {entry.type!r} cannot be called"
    air = air_of(entry.ecosystem, entry.type, entry.model_id, entry.version_id)
    return "" if entry.air == air else f"the AIR of these ids is {air}"


def _check_mapping(
    verdict: Verdict, kind: str, file: str, wanted: Mapping[str, Any], *, whole: bool
) -> None:
    """A dictionary has what it should have for each name (and with ``whole``: all the names)."""
    try:
        found = orjson.loads((verdict.path / file).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        verdict.add(kind, str(error), file=file)
        return
    for name in [*found, *(name for name in wanted if name not in found and whole)]:
        if name not in wanted:
            verdict.add(kind, "there is no such name", file=file, value=name)
        elif name not in found:
            verdict.add(kind, "missing; the catalogue has it", file=file, value=name)
        elif found[name] != wanted[name]:
            parts = _differing(found[name], wanted[name])
            verdict.add(kind, f"differs in {', '.join(parts)}", file=file, value=name)


def _differing(found: Any, wanted: Any) -> list[str]:
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return ["form"]
    return sorted(
        name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
    )


def _check_ranges(
    verdict: Verdict, kind: str, file: str, row: int, values: Mapping[str, Any]
) -> None:
    for column, (text, holds) in RANGES.items():
        value = values.get(column)
        if value is not None and not holds(value):
            verdict.add(kind, f"{column} is not {text}", file=file, row=row, value=value)


def _check_schema(verdict: Verdict, file: str, found: pa.Schema, wanted: pa.Schema) -> None:
    if found.equals(wanted):
        return
    for name in [*wanted.names, *(name for name in found.names if name not in wanted.names)]:
        one, other = (s.field(name) if name in s.names else None for s in (found, wanted))
        # Not by their names: a list's elements have another name once they have been in a file.
        if one is None or other is None or not one.equals(other):
            have, want = (_typed(field) for field in (one, other))
            verdict.add("schema", f"column {name!r} is not {want}", file=file, value=have)
    if sorted(found.names) == sorted(wanted.names) and found.names != wanted.names:
        verdict.add("schema", f"the order is not {', '.join(wanted.names)}", file=file)


def _typed(field: pa.Field | None) -> str:
    return f"{field.type}{'' if field.nullable else ' not null'}" if field else "no column"


def _check_shards(verdict: Verdict, dataset: Dataset) -> Iterator[tuple[Split, Path]]:
    """The (split, file) whose rows can be checked; complains of the others and of gaps."""
    for split, paths in dataset.shards.items():
        names = {path.name for path in paths}
        for name in sorted(_expected(split, paths) - names):
            verdict.add("shard missing", f"the {split} split needs it", file=f"data/{name}")
        for path in paths:
            name = path.relative_to(verdict.path).as_posix()
            if path.suffix == ".parquet":
                try:
                    schema = pq.read_schema(path)
                except (OSError, pa.ArrowException) as error:
                    verdict.add("file unreadable", str(error), file=name)
                    continue
                _check_schema(verdict, name, schema, DABENCH)
                if not all(_same_type(schema, column) for column in _NEEDED):
                    continue
            yield split, path
    verdict.checked.append("schema and names of the shards")


def _expected(split: Split, paths: Sequence[Path]) -> set[str]:
    """Names of the shards that a split with these ones must have."""
    if not paths:
        return {f"{split}-00000-of-00001.parquet"}
    counts = {path.stem.rpartition("-of-")[2] for path in paths if "-of-" in path.stem}
    return {
        f"{split}-{number:05d}-of-{count}.parquet"
        for count in counts
        if count.isdigit()
        for number in range(int(count))
    }


def _same_type(schema: pa.Schema, column: str) -> bool:
    found = schema.get_field_index(column)
    return found >= 0 and bool(schema.field(found).type == DABENCH.field(column).type)


class _Places:
    """Which file and row the n-th row that was read lies in."""

    def __init__(self) -> None:
        self._files: list[tuple[Split, str]] = []
        self._starts: list[int] = []
        self.count = 0

    def open(self, split: Split, file: str) -> None:
        """The rows that follow are of this file."""
        self._files.append((split, file))
        self._starts.append(self.count)

    def find(self, position: int) -> tuple[str, int]:
        """File and row."""
        index = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._files[index][1], position - self._starts[index]

    def splits(self) -> npt.NDArray[np.int64]:
        """Number of the split (in SPLITS) of each row."""
        sizes = np.diff([*self._starts, self.count])
        return np.repeat([SPLITS.index(split) for split, _ in self._files], sizes)


class _Rows:
    """Checks row after row, and remembers of all rows only their keys."""

    def __init__(self, verdict: Verdict, catalogue: Catalogue | None) -> None:
        self._verdict, self._catalogue = verdict, catalogue
        self.places = _Places()
        self.per_split: Counter[str] = Counter()
        self._keys: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in _KEYS}

    def read(self, split: Split, path: Path) -> bool:
        """Check the rows of a file; False when it cannot be read to the end."""
        name = path.relative_to(self._verdict.path).as_posix()
        self.places.open(split, name)
        try:
            for batch in read_file(split, path, _READ):
                self._check(name, batch)
                self.places.count += batch.data.num_rows
                self.per_split[split] += batch.data.num_rows
        except DiffAgentError as error:
            self._verdict.add("file unreadable", str(error), file=name)
            return False
        return True

    def _check(self, file: str, batch: Batch) -> None:
        data = batch.data
        for name in _KEYS:
            if _same_type(data.schema, name):
                values = data[name].fill_null(_NOWHERE)
                self._keys[name].append(values.to_numpy(zero_copy_only=False))
        for row, values in enumerate(data.to_pylist(), batch.start):
            if not (values["prompt"] or "").strip():
                self._add("empty prompt", "nothing to learn from", file, row, values["prompt"])
            _check_ranges(self._verdict, "value out of range", file, row, values)
            try:
                api = parse_api(values["api"] or "")
            except ApiError as error:
                self._add("api unreadable", str(error), file, row, values["api"])
                continue
            for name in _IN_API:
                if name in values and values[name] != getattr(api, name):
                    message = f"{name} of the row is {values[name]!r}"
                    self._add("api and row differ", message, file, row, getattr(api, name))
            if self._catalogue:
                self._check_references(self._catalogue, file, row, values, api)

    def _add(self, kind: str, message: str, file: str, row: int, value: object) -> None:
        self._verdict.add(kind, message, file=file, row=row, value=value)

    def _check_references(
        self, catalogue: Catalogue, file: str, row: int, values: Mapping[str, Any], api: T2IAPI
    ) -> None:
        """Everything that the row and its API name is in the catalogue, and says the same."""
        if api.params.sampler not in catalogue.samplers:
            message = "not in mapping/samplers.json"
            self._add("unknown sampler", message, file, row, api.params.sampler)
        entry = catalogue.checkpoint(values["model"], values["version"])
        if entry is None:
            named = f"{values['model']} / {values['version']}"
            self._add("unknown model", "no checkpoint of the catalogue", file, row, named)
        else:
            for name in _OF_ENTRY:
                if name in values and values[name] != getattr(entry, name):
                    message = f"{name} of the catalogue is {getattr(entry, name)!r}"
                    self._add("row and catalogue differ", message, file, row, values[name])
            for name in _API_OF_ENTRY:
                found = getattr(api, name)
                if found is not None and found != getattr(entry, name):
                    message = f"{name} of the catalogue is {getattr(entry, name)!r}"
                    self._add("api and catalogue differ", message, file, row, found)
        for lora in api.loras:
            named = f"{lora.model} / {lora.version}"
            laid = catalogue.lora(lora.model, lora.version)
            if laid is None:
                self._add("unknown LoRA", "no LoRA of the catalogue", file, row, named)
            elif laid.ecosystem != ecosystem(api.base_model):
                message = f"made for {laid.base_model}, not for {api.base_model}"
                self._add("LoRA does not fit", message, file, row, named)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The ids of all rows whose file has them."""
        return np.concatenate([*self._keys["id"], np.zeros(0, np.int64)])

    @property
    def ids_are_unique(self) -> bool:
        """Whether every row that was read has an id of its own."""
        return len(np.unique(self.ids)) == self.places.count

    def finish(self) -> None:
        """Check what takes all rows: unique ids, and groups and posts that lie in one split."""
        splits = self.places.splits()
        for name, found in self._keys.items():
            values = np.concatenate([*found, np.zeros(0, np.int64)])
            if not len(values) or len(values) != len(splits):  # a file has no such column
                continue
            if name == "id":
                self._check_ids(values, splits)
            else:
                kind = "group in two splits" if name == "group" else "post in two splits"
                self._check_one_split(kind, values, splits)
        self._verdict.checked.append(
            f"{len(splits):,} rows: API, references, ranges, unique ids, groups, posts"
        )

    def _check_ids(self, ids: npt.NDArray[np.int64], splits: npt.NDArray[np.int64]) -> None:
        order = np.argsort(ids, kind="stable")
        for position in np.flatnonzero(ids[order][1:] == ids[order][:-1]):
            first, again = int(order[position]), int(order[position + 1])
            kind = "duplicate id" if splits[first] == splits[again] else "id in two splits"
            self._add_pair(kind, first, again, int(ids[again]))

    def _check_one_split(
        self, kind: str, values: npt.NDArray[np.int64], splits: npt.NDArray[np.int64]
    ) -> None:
        """Report each change of split among the rows of one value."""
        order = np.lexsort((splits, values))
        value, split = values[order], splits[order]
        torn = (value[1:] == value[:-1]) & (split[1:] != split[:-1]) & (value[1:] != _NOWHERE)
        for position in np.flatnonzero(torn):
            first, again = int(order[position]), int(order[position + 1])
            self._add_pair(kind, first, again, int(values[again]))

    def _add_pair(self, kind: str, first: int, again: int, value: int) -> None:
        file, row = self.places.find(again)
        self._add(kind, "also in {} row {}".format(*self.places.find(first)), file, row, value)


def _check_counts(verdict: Verdict, manifest: Manifest, found: Mapping[str, int]) -> None:
    for split in SPLITS:
        wanted = manifest.rows.get(split)
        if wanted is not None and found.get(split, 0) != wanted:
            value = f"{found.get(split, 0)} rows"
            verdict.add("row count", f"the manifest says {wanted} of {split}", value=value)
    verdict.checked.append("counts against the manifest")


def _check_history(
    verdict: Verdict,
    dataset: Dataset,
    ids: npt.NDArray[np.int64],
    splits: Codes,
    before: Path | None,
) -> None:
    """No record left its split, and the decisions that the dataset hands on are what it has."""
    artifact = dataset.artifact
    try:
        if artifact and (verdict.path / SPLITS_FILE).is_file():
            decided = read_decisions([artifact])
            places, known = decided.find(ids)
            for row in np.flatnonzero(~(known & (decided.split[places] == splits))):
                message = f"the row is in {SPLITS[splits[row]]}"
                verdict.add("decided otherwise", message, file=SPLITS_FILE, value=int(ids[row]))
            verdict.checked.append(f"rows against {SPLITS_FILE}")
        if before is None and artifact:
            before = _version_before(artifact)
        if before is not None:
            moved = find_moved(ids, splits, before)
            for ident, old, new in zip(moved.ids, moved.old, moved.new, strict=True):
                message = f"{SPLITS[old]} in {str(before)!r}, {SPLITS[new]} here"
                verdict.add("moved since the version before", message, value=int(ident))
            verdict.checked.append(f"splits against those of {before}")
    except ArtifactError as error:
        verdict.add("file unreadable", str(error))


def _version_before(artifact: Artifact) -> Path | None:
    version = version_before(artifact)
    if version is None and artifact.manifest.inputs.get(PREVIOUS):
        log.warning(
            "%s: the version that it went on from is not in its store, so moves were not looked "
            "for; name an older version with --before",
            artifact.location,
        )
    return version.local() if version else None


def _check_leaks(
    verdict: Verdict, places: _Places, files: Sequence[tuple[Split, Path]], dataset: Dataset
) -> None:
    """Prompts of different splits that are alike by the thresholds of the build."""
    threshold, series = dataset.near_duplicate_jaccard, dataset.series_jaccard
    leaks = find_leaks(partial(_chunks, files), threshold, limit=_MAX_LEAKS)
    texts = _texts(files, {leak.other for leak in leaks[: verdict.limit]})
    _add_leaks(verdict, places, "near-duplicate in two splits", leaks, texts)
    verdict.checked.append(f"near-duplicates of {threshold:g} or more across splits")
    if series < threshold and dataset.is_parquet:
        leaks = find_leaks(partial(_chunks, files, creators=True), series, limit=_MAX_LEAKS)
        leaks = [leak for leak in leaks if leak.similarity < threshold]
        texts = _texts(files, {leak.other for leak in leaks[: verdict.limit]})
        _add_leaks(verdict, places, "series in two splits", leaks, texts)
        verdict.checked.append(f"prompts of one creator, {series:g} or more alike, across splits")


def _chunks(
    files: Sequence[tuple[Split, Path]], wanted: Collection[int], *, creators: bool = False
) -> Iterator[Chunk]:
    """All rows, to look for leaks among; with ``creators`` among those of each."""
    for split, path in files:
        code = SPLITS.index(split)
        if code not in wanted:
            rows = count_rows(path)
            nothing = np.zeros(rows, np.int64)
            yield Chunk(np.full(rows, code, np.int8), nothing[:0], nothing)
            continue
        for batch in read_file(split, path, ["prompt", "creator"] if creators else ["prompt"]):
            data = batch.data.to_pydict()
            texts = [text or "" for text in data["prompt"]]
            names = data.get("creator", [None] * len(texts)) if creators else None
            yield chunk(np.full(len(texts), code, np.int8), texts, names)


def _texts(files: Sequence[tuple[Split, Path]], rows: Collection[int]) -> dict[int, str]:
    """The prompts of these rows."""
    texts: dict[int, str] = {}
    start = 0
    for split, path in files if rows else ():
        for batch in read_file(split, path, ["prompt"]):
            for row in rows:
                if 0 <= row - start < len(batch.data):
                    texts[row] = batch.data["prompt"][row - start].as_py() or ""
            start += len(batch.data)
    return texts


def _add_leaks(
    verdict: Verdict, places: _Places, kind: str, leaks: Sequence[Leak], texts: Mapping[int, str]
) -> None:
    if len(leaks) >= _MAX_LEAKS:
        log.warning("%s: counted only the first %d of %r", verdict.path, len(leaks), kind)
    for leak in leaks:
        file, row = places.find(leak.other)
        message = f"{leak.similarity:.2f} like that of {{}} row {{}}".format(*places.find(leak.one))
        verdict.add(kind, message, file=file, row=row, value=texts.get(leak.other, ""))


def verdict_text(verdict: Verdict) -> str:
    """The verdict for a terminal."""
    state = "sound" if verdict.sound else "NOT SOUND"
    lines = [f"{verdict.path}: {state}", *(f"  checked {text}" for text in verdict.checked)]
    for kind, remedy in REMEDIES.items():
        total = verdict.totals[kind]
        if not total:
            continue
        lines += ["", f"{kind}: {total:,}", f"  remedy: {remedy}"]
        shown = [problem for problem in verdict.problems if problem.kind == kind]
        for problem in shown:
            row = "" if problem.row is None else f" row {problem.row}"
            where = f"{problem.file}{row}: " if problem.file else ""
            value = f"{problem.value!r}: " if problem.value else ""
            lines.append(f"  {where}{value}{one_line(problem.message, 300)}")
        if total > len(shown):
            lines.append(f"  ... and {total - len(shown):,} more")
    return "\n".join(map(printable, lines))

"""A DABench on disk, read in batches: what the stage ``shard`` makes, or an export of it.

Both have ``data/SPLIT-*.parquet``, ``catalogue.parquet``, ``mapping/`` and a manifest; an export
of instruction-API pairs has ``SPLIT.json`` instead of the parquet files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.splits import SPLITS, Split
from diffagent.dabench.pairs import from_pair, read_pairs
from diffagent.dabench.parquet_tables import read_batches
from diffagent.errors import ArtifactError
from diffagent.schemas.manifest import Funnel, Manifest
from diffagent.schemas.tables import DABENCH
from diffagent.store import MANIFEST, Artifact, read_manifest
from diffagent.store.lineage import ancestors, lineage_lines
from diffagent.store.local_copies import remote_of

DISTRIBUTIONS = "distributions.json"
_BATCH_ROWS = 8192


@dataclass(frozen=True)
class Batch:
    """Rows ``start ...`` of a file of a split."""

    split: Split
    path: Path
    start: int
    data: pa.RecordBatch


@dataclass(frozen=True)
class Dataset:
    """An opened DABench. ``manifest`` is None when there is none (a copy from elsewhere)."""

    path: Path
    manifest: Manifest | None
    shards: Mapping[Split, tuple[Path, ...]]

    @property
    def is_parquet(self) -> bool:
        """Whether all columns are there; pairs in JSON have only what `from_pair` gives."""
        return all(path.suffix == ".parquet" for paths in self.shards.values() for path in paths)

    @cached_property
    def rows(self) -> dict[Split, int]:
        """Rows of each split, counted in the files."""
        return {split: sum(map(count_rows, paths)) for split, paths in self.shards.items()}

    @property
    def config(self) -> dict[str, Any]:
        """The DABenchConfig it was built with, as its manifest has it; {} when not known."""
        config = self.manifest.config if self.manifest else {}
        found = config.get("dabench", config)  # an export has that of its source
        return found if isinstance(found, dict) else {}

    @property
    def near_duplicate_jaccard(self) -> float:
        """Similarity from which on two prompts must share a split."""
        name = "near_duplicate_jaccard"
        return float(self.config.get(name, DABenchConfig.model_fields[name].default))

    @property
    def series_jaccard(self) -> float:
        """The same for two prompts of one creator; 1 when the manifest says nothing of series."""
        return float(self.config.get("series_jaccard", 1))

    @property
    def random_split(self) -> dict[str, Any]:
        """Rows of each random split and how many of its test are ``exposed``; {}: not known."""
        found = self.manifest.metrics.get("random_split", {}) if self.manifest else {}
        return dict(found)

    @cached_property
    def artifact(self) -> Artifact | None:
        """The handle of its artefact, when it has a manifest."""
        if self.manifest is None:
            return None
        return Artifact(
            stage=self.manifest.stage,
            identity=self.manifest.identity,
            content_digest=self.manifest.content_digest,
            path=self.path,
            remote=remote_of(self.path),
        )

    @cached_property
    def lineage(self) -> tuple[Artifact, ...]:
        """Itself and what it was made from, as far as that lies in its store."""
        return tuple(ancestors(self.artifact)) if self.artifact else ()

    @cached_property
    def funnels(self) -> tuple[Funnel, ...]:
        """What became of everything seen: its own funnels, or those of what it was made from."""
        if self.manifest and self.manifest.funnels:
            return self.manifest.funnels
        return tuple(funnel for parent in self.lineage[1:] for funnel in parent.manifest.funnels)

    @cached_property
    def distributions(self) -> dict[str, Any]:
        """The source before any filter: name -> {unit, counts}; {} when not known."""
        for directory in (self.path, *(parent.path for parent in self.lineage[1:])):
            if (directory / DISTRIBUTIONS).is_file():
                found: dict[str, Any] = orjson.loads((directory / DISTRIBUTIONS).read_bytes())
                return found
        return {}

    @property
    def made_from(self) -> list[str]:
        """The tree of its parents, a line each; an export remembers that of its source."""
        lines = lineage_lines(self.artifact) if self.artifact else []
        known = self.manifest.metrics.get("made_from") if self.manifest else None
        if not known:
            return lines
        return [lines[0], f"  dabench: {known[0]}", *(f"  {line}" for line in known[1:])]

    @property
    def dates(self) -> dict[str, str]:
        """When it and what it was made from were built, by stage; as ``2026-01-31``."""
        known = self.manifest.metrics.get("dates", {}) if self.manifest else {}
        return known | {a.stage: f"{a.manifest.created_at:%Y-%m-%d}" for a in self.lineage}

    def batches(self, columns: Sequence[str] | None = None, *, show: str = "") -> Iterator[Batch]:
        """All rows, split by split and file by file, a batch in memory at a time.

        Args:
            columns: only these, as far as the files have them.
            show: what a progress bar is labelled with, on a terminal; none when empty.
        """
        from tqdm import tqdm

        total = sum(self.rows.values()) if show else 0
        with tqdm(total=total, desc=show, unit="rows", disable=None if show else True) as bar:
            for split, paths in self.shards.items():
                for path in paths:
                    for batch in read_file(split, path, columns):
                        yield batch
                        bar.update(batch.data.num_rows)

    def rows_at(self, positions: Sequence[int]) -> list[tuple[Split, dict[str, Any]]]:
        """The rows at these positions (counted over all splits), in ascending order."""
        wanted, found, first = sorted(positions), [], 0
        for split, paths in self.shards.items():
            for path in paths:
                count = count_rows(path)
                inside = [p - first for p in wanted if first <= p < first + count]
                found += [(split, row) for row in _pick(split, path, inside)]
                first += count
        return found


def open_dataset(directory: str | Path) -> Dataset:
    """Open the DABench in ``directory``.

    Raises:
        ArtifactError: there is none, or its manifest is not one of this version.
    """
    path = Path(directory)
    shards = find_shards(path)
    if not any(shards.values()):
        raise ArtifactError(
            f"{str(path)!r} holds no DABench (data/SPLIT-*.parquet or SPLIT.json): give the "
            "directory of a 'shard' artefact, or of what 'diffagent dabench export' wrote"
        )
    manifest = read_manifest(path) if (path / MANIFEST).exists() else None
    return Dataset(path, manifest, shards)


def find_shards(directory: Path) -> dict[Split, tuple[Path, ...]]:
    """The files of each split, sorted."""
    shards = {split: tuple(sorted(directory.glob(f"data/{split}-*.parquet"))) for split in SPLITS}
    if any(shards.values()):
        return shards
    return {split: tuple(sorted(directory.glob(f"{split}.json"))) for split in SPLITS}


def count_rows(path: Path) -> int:
    """Rows of a file."""
    if path.suffix == ".json":
        return sum(1 for _ in read_pairs(path))
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from None


def read_file(split: Split, path: Path, columns: Sequence[str] | None = None) -> Iterator[Batch]:
    """Batches of one file.

    Raises:
        ArtifactError, SchemaError: the file is damaged.
    """
    start = 0
    is_json = path.suffix == ".json"
    for data in _json_batches(path, columns) if is_json else _parquet_batches(path, columns):
        yield Batch(split, path, start, data)
        start += data.num_rows


def _parquet_batches(path: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    try:
        names = columns
        if columns is not None:
            known = pq.read_schema(path).names
            names = [name for name in columns if name in known]
        yield from read_batches(path, names)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> ArtifactError:
    """The error for a shard that cannot be read."""
    return ArtifactError(
        f"cannot read {str(path)!r}: {error}. The file is damaged: 'diffagent dabench verify' "
        "lists all that is; copy the dataset again from where it was made, or delete it and run "
        "the stage 'shard' again"
    )


def _json_batches(path: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    pairs = read_pairs(path)
    while rows := [from_pair(pair) for pair in islice(pairs, _BATCH_ROWS)]:
        names = [name for name in columns or rows[0] if name in rows[0]]
        schema = pa.schema([DABENCH.field(name) for name in names])
        yield pa.RecordBatch.from_pylist(rows, schema=schema)


def _pick(split: Split, path: Path, positions: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows at positions of one file; of a parquet file only their row groups are read."""
    if not positions:
        return
    if path.suffix == ".json":
        for batch in read_file(split, path):
            inside = [p - batch.start for p in positions if 0 <= p - batch.start < len(batch.data)]
            yield from batch.data.take(inside).to_pylist()
        return
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            inside = [p - first for p in positions if first <= p < first + count]
            if inside:
                yield from file.read_row_group(group).take(inside).to_pylist()
            first += count

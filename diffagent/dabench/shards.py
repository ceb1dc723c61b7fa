"""From pairs to DABench: splits, parquet shards, mapping dictionaries, card."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from diffagent.artifacts import Artifact, StageContext, StageResult, stage
from diffagent.dabench.card import CardFacts, write_card
from diffagent.dabench.catalogue import Catalogue, Entry, renderable_samplers
from diffagent.dabench.splits import SPLITS, Split, group_prompts, join_posts, split_of
from diffagent.dabench.tables import TableWriter, read_rows, table_writer, write_table
from diffagent.errors import ArtifactError
from schemas.config import DABenchConfig
from schemas.dabench import DABENCH

log = logging.getLogger(__name__)


@stage("shard", version=1, config=DABenchConfig)
def build_dabench(config: DABenchConfig, context: StageContext) -> StageResult:
    """Make the dataset of the filtered pairs.

    Writes ``data/SPLIT-00000-of-0000N.parquet`` (DABENCH, rows by id), ``catalogue.parquet``
    (CATALOGUE, complete), ``mapping/models.json``, ``mapping/samplers.json``, ``README.md`` (the
    dataset card) and ``plots/*.png``.

    Raises:
        ArtifactError: there are no pairs.
    """
    filtered = context.one("filtered")
    groups = _groups(filtered, config)
    if not groups:
        raise ArtifactError(
            f"{str(filtered.path)!r} holds no pairs: see the funnel of 'records' in its manifest"
        )
    splits = Counter(split_of(group, config) for group in groups)
    for split in SPLITS:
        if not splits[split]:
            log.warning("split %r is empty: %d pairs are too few", split, len(groups))
    models = _write_shards(filtered, config, context.out, groups, splits)
    catalogue = Catalogue.load(filtered.path)
    write_table(context.out / "catalogue.parquet", catalogue.to_table())
    _write_json(context.out / "mapping" / "models.json", model_mapping(catalogue))
    _write_json(context.out / "mapping" / "samplers.json", sampler_mapping())
    sizes = Counter(groups).most_common(1)[0][1]
    facts = CardFacts(
        rows={split: splits[split] for split in SPLITS},
        models_used=models,
        groups=len(set(groups)),
        largest_group=sizes,
        distributions=orjson.loads(filtered.file("distributions.json").read_bytes()),
        filter_manifest=filtered.manifest,
        config=config,
    )
    write_card(context.out, facts, catalogue)
    return StageResult(
        rows={**facts.rows, "catalogue": len(catalogue.entries)},
        metrics={"groups": facts.groups, "largest_group": sizes, "models_used": models},
    )


def read_split(dabench: Artifact, split: Split) -> Iterator[dict[str, Any]]:
    """Rows (DABENCH) of one split in the order of their ids, streamed."""
    for path in dabench.glob(f"data/{split}-*.parquet"):
        yield from read_rows(path)


def _records(filtered: Artifact, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    for path in filtered.glob("records-*.parquet"):
        yield from read_rows(path, columns)


def _groups(filtered: Artifact, config: DABenchConfig) -> list[int]:
    """Per record the smallest record id of its group."""
    ids: list[int] = []
    posts: list[int | None] = []

    def prompts() -> Iterator[str]:
        for row in _records(filtered, ["id", "prompt", "post_id"]):
            ids.append(row["id"])
            posts.append(row["post_id"])
            yield row["prompt"]

    groups = group_prompts(prompts(), config.near_duplicate_jaccard)
    join_posts(groups, posts)
    return [ids[label] for label in groups.labels()]


def _write_shards(
    filtered: Artifact,
    config: DABenchConfig,
    out: Path,
    groups: list[int],
    splits: Counter[Split],
) -> int:
    """Write all splits in one pass over the records; returns the number of models used."""
    models: set[int] = set()
    with ExitStack() as stack:
        writers = {
            split: _ShardWriter(out, split, splits[split], config, stack) for split in SPLITS
        }
        for row, group in zip(_records(filtered), groups, strict=True):
            models.add(row["model_id"])
            writers[split_of(group, config)].append({**row, "group": group})
    return len(models)


class _ShardWriter:
    """Spreads the rows of a split over files of ``rows_per_shard``."""

    def __init__(
        self, out: Path, split: Split, rows: int, config: DABenchConfig, stack: ExitStack
    ) -> None:
        self._size = config.rows_per_shard
        shards = max(1, -(-rows // self._size))
        names = [f"{split}-{i:05d}-of-{shards:05d}.parquet" for i in range(shards)]
        self._paths = [out / "data" / name for name in names]
        self._stack = stack
        self._file = ExitStack()
        self._writer: TableWriter | None = None
        self._open()

    def _open(self) -> None:
        self._file.close()
        self._file = self._stack.enter_context(ExitStack())
        self._writer = self._file.enter_context(table_writer(self._paths.pop(0), DABENCH))

    def append(self, row: dict[str, Any]) -> None:
        assert self._writer is not None
        if self._writer.rows == self._size:
            self._open()
        self._writer.append(row)


def model_mapping(catalogue: Catalogue) -> dict[str, Any]:
    """Model name -> ids, and per version name: AIR, hash and where to download it.

    Download paths are relative to the site, e.g. ``https://civitai.com`` + path.
    """
    mapping: dict[str, Any] = {}
    for entry in catalogue.entries:
        model = mapping.setdefault(
            entry.model, {"model_id": entry.model_id, "type": entry.type, "versions": {}}
        )
        model["versions"][entry.version] = _version_mapping(entry)
    return dict(sorted(mapping.items()))


def _version_mapping(entry: Entry) -> dict[str, Any]:
    return {
        "version_id": entry.version_id,
        "base_model": entry.base_model,
        "air": entry.air,
        "file_name": entry.file_name,
        "size_bytes": entry.size_bytes,
        "sha256": entry.sha256,
        "download_path": entry.download_path,
        "trained_words": entry.trained_words,
    }


def sampler_mapping() -> dict[str, Any]:
    """Sampler name -> diffusers scheduler and its options."""
    return {
        name: {
            "scheduler": spec.scheduler,
            "options": dict(spec.options),
            "steps_multiplier": spec.steps_multiplier,
            "note": spec.note,
        }
        for name, spec in sorted(renderable_samplers().items())
    }


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))

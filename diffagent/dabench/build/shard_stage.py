"""From pairs to DABench: splits, parquet shards, mapping dictionaries, card."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from diffagent.dabench.build.card import CardFacts, source_of, write_card
from diffagent.dabench.build.history import (
    SPLITS_FILE,
    VERSION,
    about_of,
    check_kept,
    find_previous,
    history_of,
    read_decisions,
    site_of,
    store_of,
    write_decisions,
)
from diffagent.dabench.build.neighbours import Flags, Ints
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.splits import NO_SPLIT, SPLITS, Codes, Prints, Split, random_splits
from diffagent.dabench.dataset import DISTRIBUTIONS, damaged
from diffagent.dabench.filter.funnel import FunnelCounter
from diffagent.dabench.parquet_tables import (
    TableWriter,
    read_batches,
    read_rows,
    table_writer,
    write_table,
)
from diffagent.errors import ArtifactError
from diffagent.schemas.manifest import Funnel
from diffagent.schemas.tables import DABENCH, RECORDS
from diffagent.store import PREVIOUS, Artifact, StageContext, StageResult, stage
from diffagent.t2i.catalogue import Catalogue, Entry, renderable_samplers

log = logging.getLogger(__name__)

#: Reasons why a pair is left out: a new record, and one that an earlier version decided.
NEW_APART = "would straddle two splits"
KNOWN_APART = "changed or came back, and would straddle two splits now"


@dataclass(frozen=True)
class _Plan:
    """Of each record its split (NO_SPLIT: left out), its group and its split by chance.

    ``known``: which splits were decided by an earlier version. ``exposed``: rows of the random test
    split with a near-duplicate, post- or series-mate in the random train split.
    """

    ids: Ints
    split: Codes
    group: Ints
    known: Flags
    by_chance: Codes
    bases: npt.NDArray[np.int16]
    base_models: list[str]
    exposed: int

    @property
    def inside(self) -> Flags:
        """Which records are in the dataset."""
        inside: Flags = self.split != NO_SPLIT
        return inside


@stage("shard", version=VERSION, config=DABenchConfig, history=find_previous)
def build_dabench(config: DABenchConfig, context: StageContext) -> StageResult:
    """Make the dataset of the filtered pairs, with the splits that earlier versions decided.

    Writes ``data/SPLIT-00000-of-0000N.parquet`` (DABENCH, rows by id), ``splits.parquet``
    (DECISIONS), ``catalogue.parquet`` (CATALOGUE, complete), ``mapping/models.json``,
    ``mapping/samplers.json``, ``README.md`` (the dataset card), ``LICENSE.md``, ``plots/*.png`` and
    ``distributions.json`` (of the source, as filtered).

    Raises:
        ArtifactError: there are no pairs, the filter artefact or an earlier version is damaged,
            or a record would move to another split than an earlier version has it in.
    """
    filtered = context.one("filtered")
    versions = [*_itself(context), *context.inputs.get(PREVIOUS, ())]
    plan = _plan(filtered, config, context.out, versions)
    if not len(plan.ids):
        raise ArtifactError(
            f"{str(filtered.path)!r} holds no pairs: see the funnel of 'records' in its manifest"
        )
    rows = _count(plan.split)
    for split, count in rows.items():
        if not count:
            log.warning("split %r is empty: %d pairs are too few", split, len(plan.ids))
    if versions:
        check_kept(plan.ids[plan.inside], plan.split[plan.inside], versions[0])
    models = _write_shards(filtered, config, context.out, plan)
    catalogue = Catalogue.load(filtered.path)
    write_table(context.out / "catalogue.parquet", catalogue.to_table())
    _write_json(context.out / "mapping" / "models.json", model_mapping(catalogue))
    _write_json(context.out / "mapping" / "samplers.json", sampler_mapping())
    distributions = filtered.file(DISTRIBUTIONS).read_bytes()
    (context.out / DISTRIBUTIONS).write_bytes(distributions)
    _, sizes = np.unique(plan.group[plan.inside], return_counts=True)
    facts = CardFacts(
        rows=rows,
        models_used=models,
        source=source_of(site_of(filtered.manifest, store_of(filtered))),
        about=about_of(filtered.manifest, store_of(filtered)),
        groups=len(sizes),
        largest_group=int(sizes.max(initial=0)),
        random_rows=_count(np.where(plan.inside, plan.by_chance, np.int8(NO_SPLIT))),
        exposed=plan.exposed,
        base_models=_base_models(plan),
        distributions=orjson.loads(distributions),
        funnels=(*filtered.manifest.funnels, _funnel(plan)),
        config=config,
    )
    write_card(context.out, facts, catalogue)
    return StageResult(
        rows={**rows, "catalogue": len(catalogue.entries)},
        funnels=facts.funnels,
        metrics={
            "groups": facts.groups,
            "largest_group": facts.largest_group,
            "models_used": models,
            "random_split": {"rows": facts.random_rows, "exposed": facts.exposed},
            "base_models": facts.base_models,
            "history": history_of(
                filtered.manifest, config.model_dump(mode="json"), store_of(filtered)
            ),
        },
    )


def read_split(dabench: Artifact, split: Split) -> Iterator[dict[str, Any]]:
    """Rows (DABENCH) of one split in the order of their ids, streamed.

    Raises:
        ArtifactError: a shard is damaged; it is named, and what to do.
    """
    for path in dabench.glob(f"data/{split}-*.parquet"):
        try:
            yield from read_rows(path)
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from None


def _itself(context: StageContext) -> list[Artifact]:
    """The dataset that is built anew, when it is: it decided, too."""
    return [context.previous] if context.previous else []


def _plan(
    filtered: Artifact, config: DABenchConfig, out: Path, versions: Sequence[Artifact]
) -> _Plan:
    scratch = out / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # of an interrupted run
    try:
        with closing(Prints(filtered.file("prints.parquet"), config, scratch)) as prints:
            before = read_decisions(versions)
            made = prints.splits(before)
            write_decisions(out / SPLITS_FILE, before, prints, made)
            by_chance = random_splits(prints.ids, config)
            inside = prints.kept & (made.split != NO_SPLIT)
            exposed = prints.exposed(np.where(inside, by_chance, np.int8(NO_SPLIT)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    kept = prints.kept
    return _Plan(
        prints.ids[kept],
        made.split[kept],
        made.group[kept],
        made.known[kept],
        by_chance[kept],
        prints.bases[kept],
        prints.base_models,
        int(exposed.sum()),
    )


def _funnel(plan: _Plan) -> Funnel:
    """The drop funnel of the pairs."""
    funnel = FunnelCounter("pairs", ("splits",))
    funnel.keep(int(plan.inside.sum()))
    for known, reason in ((False, NEW_APART), (True, KNOWN_APART)):
        if left_out := int((~plan.inside & (plan.known == known)).sum()):
            funnel.drop("splits", reason, left_out)
    return funnel.result()


def _count(codes: Codes) -> dict[str, int]:
    return {split: int((codes == code).sum()) for code, split in enumerate(SPLITS)}


def _base_models(plan: _Plan) -> dict[str, dict[str, int]]:
    """Rows of each base model in each split, most frequent base model first."""
    order = np.argsort(-np.bincount(plan.bases, minlength=len(plan.base_models)), kind="stable")
    found = {plan.base_models[base]: _count(plan.split[plan.bases == base]) for base in order}
    return {name: counts for name, counts in found.items() if any(counts.values())}


def _write_shards(filtered: Artifact, config: DABenchConfig, out: Path, plan: _Plan) -> int:
    """Write all splits in one pass over the records; returns the number of models used."""
    models: set[int] = set()
    names = np.array(SPLITS, dtype=object)
    rows, start = _count(plan.split), 0
    with ExitStack() as stack:
        writers = {split: _ShardWriter(out, split, rows[split], config, stack) for split in SPLITS}
        for batch in _records(filtered):
            part = slice(start, start + len(batch))
            start += len(batch)
            if not np.array_equal(plan.ids[part], batch["id"].to_numpy()):
                raise ArtifactError(
                    f"the records of {str(filtered.path)!r} are not those that its prints.parquet "
                    "calls kept; delete the directory and run the stage 'filter' again"
                )
            group, chance = pa.array(plan.group[part]), pa.array(names[plan.by_chance[part]])
            whole = pa.RecordBatch.from_arrays([*batch.columns, group, chance], schema=DABENCH)
            models.update(batch["model_id"].filter(plan.inside[part]).unique().to_pylist())
            for code, split in enumerate(SPLITS):
                writers[split].extend(whole.filter(pa.array(plan.split[part] == code)))
    return len(models)


def _records(filtered: Artifact) -> Iterator[pa.RecordBatch]:
    for path in filtered.glob("records-*.parquet"):
        yield from read_batches(path, RECORDS.names)


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
        self._open()

    def _open(self) -> None:
        self._file.close()
        self._file = self._stack.enter_context(ExitStack())
        self._writer: TableWriter = self._file.enter_context(
            table_writer(self._paths.pop(0), DABENCH)
        )

    def extend(self, batch: pa.RecordBatch) -> None:
        while len(batch):
            if self._writer.rows == self._size:
                self._open()
            part = batch.slice(0, self._size - self._writer.rows)
            self._writer.extend(part)
            batch = batch.slice(len(part))


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
            "sigmas": spec.sigmas,
            "note": "; ".join(filter(None, (spec.note, spec.difference))),
        }
        for name, spec in sorted(renderable_samplers().items())
    }


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))

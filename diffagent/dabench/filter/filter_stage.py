"""Stage ``filter``: the catalogue, and the (prompt, API) pairs that pass all filters."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import orjson

from diffagent.crawl.snapshot import read_lines
from diffagent.dabench.filter.batches import Collector, batches, sift
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.funnel import FunnelCounter
from diffagent.dabench.filter.model_filters import ModelSift
from diffagent.dabench.filter.records import DUPLICATE, PairBuilder
from diffagent.dabench.filter.resolve import Lookup, Resolver
from diffagent.dabench.filter.snapshot_rows import read_generations, read_gone, read_items
from diffagent.dabench.parquet_tables import table_writer, write_table
from diffagent.errors import ArtifactError
from diffagent.parallel import ordered_map
from diffagent.schemas.tables import PRINTS, RECORDS
from diffagent.store import StageContext, StageResult, stage
from diffagent.t2i.catalogue import Catalogue, rename

log = logging.getLogger(__name__)

_SMALL = 2**23  # bytes of compressed records that are read before a second process is up
_UNITS = {"model_type": "models", "nsfw": "models"}


@stage("filter", version=4, config=FilterConfig)
def filter_records(config: FilterConfig, context: StageContext) -> StageResult:
    """Turn a snapshot into the catalogue and the (prompt, API) pairs that pass all filters.

    Writes ``catalogue.parquet`` (CATALOGUE), ``records-00000.parquet`` (RECORDS, in the order of
    the snapshot), ``prints.parquet`` (PRINTS), ``distributions.json`` (the source, before any
    filter) and, when the site is asked for unknown hashes, ``by-hash.jsonl`` with its answers.

    Raises:
        ArtifactError: the snapshot is damaged, or no model passes the filters.
    """
    with _site_lookup(config, context) as lookup:
        return _filter(config, context, Resolver(lookup))


def _filter(config: FilterConfig, context: StageContext, resolver: Resolver) -> StageResult:
    snapshot = context.one("snapshot")
    dates = read_generations(snapshot)
    models = ModelSift(config, resolver, read_gone(snapshot), dates)
    for model in read_items(snapshot, "models"):
        models.add(model)
    if not models.entries:
        raise ArtifactError(
            f"none of {models.models.result().seen} models passes the filters; "
            "check filters.model_types and filters.base_models"
        )
    catalogue = Catalogue(rename(models.entries))
    resolver.use(catalogue)
    write_table(context.out / "catalogue.parquet", catalogue.to_table())
    _write_distributions(context.out / "distributions.json", models.distributions)
    log.info("filter: %d model versions in the catalogue", len(catalogue.entries))

    funnel = FunnelCounter("records", ("record", *config.records))
    with (
        table_writer(context.out / "records-00000.parquet", RECORDS) as records,
        table_writer(context.out / "prints.parquet", PRINTS) as prints,
    ):
        collector = Collector(records, prints, funnel, unique=DUPLICATE in config.records)
        pairs = PairBuilder(config, resolver, dates)
        lines = batches(read_lines(snapshot.path, "images"))
        for sifted in ordered_map(sift, pairs, lines, _workers(config, context)):
            collector.add(sifted)
    return StageResult(
        rows={
            "catalogue": len(catalogue.entries),
            "records": records.rows,
            "prints": prints.rows,
        },
        funnels=(models.models.result(), models.versions.result(), funnel.result()),
        metrics={"loras": dict(sorted(collector.loras.items()))},
    )


def _workers(config: FilterConfig, context: StageContext) -> int:
    """Processes that read records: one when they are few, or when the site is asked in between."""
    size = sum(path.stat().st_size for path in context.one("snapshot").glob("images/*.jsonl.gz"))
    return 1 if size < _SMALL or config.max_hash_lookups else context.runtime.tasks.workers


@contextmanager
def _site_lookup(config: FilterConfig, context: StageContext) -> Iterator[Lookup | None]:
    if not config.max_hash_lookups:
        yield None
        return
    from diffagent.dabench.filter.lookup import SiteLookup
    from diffagent.localcivitai.site import open_site

    with open_site(context.site_url, context.runtime) as site:
        yield SiteLookup(context.out / "by-hash.jsonl", site, config.max_hash_lookups)


def _write_distributions(path: Path, distributions: Mapping[str, Counter[str]]) -> None:
    data = {
        name: {
            "unit": _UNITS.get(name, "versions"),
            "counts": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        }
        for name, counts in distributions.items()
    }
    path.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2))

"""Stage ``crawl``: a snapshot of everything that the configuration selects of the site.

A first crawl fetches all of it (``diffagent.crawl.crawler``), a refresh only the parts that can
have changed (``diffagent.crawl.refresh``). ``diffagent.crawl.listing_walks`` walks listings so that
nothing is missed; ``diffagent.crawl.snapshot`` writes the result.

All progress is in a journal (``diffagent.crawl.journal``): a crawl that was killed, or that ran out
of disk or of its time budget, continues after the last whole page.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffagent.crawl.call_pool import CallPool
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_state import CrawlState
from diffagent.crawl.crawler import Crawler, CrawlSetup
from diffagent.crawl.journal import Journal
from diffagent.crawl.memory import CrawlMemory
from diffagent.crawl.refresh import Refresh
from diffagent.crawl.salvage import SalvagedSnapshot, salvage
from diffagent.crawl.snapshot import summarise
from diffagent.crawl.snapshot_index import SnapshotIndex
from diffagent.localcivitai.site import open_site, site_files
from diffagent.localcivitai.sources import read_about
from diffagent.schemas.manifest import Funnel, FunnelStep
from diffagent.store import StageContext, StageResult, stage
from diffagent.store.integrity import damaged_copies

log = logging.getLogger(__name__)

JOURNAL, SCRATCH, SALVAGED = "journal.gz", "scratch", "salvaged"


@dataclass(frozen=True)
class CrawlContext(StageContext):
    """Context of the crawl with the remains of earlier runs of the same request.

    Attributes:
        damaged: without ``previous``, the last snapshot that was found damaged and set aside: its
            intact records are taken over.
        memory: file next to the artifact for facts that help the next refresh and are no content;
            it outlives artifacts and may be missing.
    """

    damaged: Path | None = None
    memory: Path = Path(os.devnull)


def extend_context(context: StageContext, directory: Path) -> CrawlContext:
    """Add the memory file and a damaged snapshot of the request to the context of a crawl."""
    copies = [] if context.previous else damaged_copies(directory)
    return CrawlContext(
        **vars(context),
        damaged=copies[-1] if copies else None,
        memory=directory.with_name(f"{directory.name}.memory.json"),
    )


@stage(
    "crawl",
    version=2,
    config=CrawlConfig,
    files=lambda config: site_files(config.site),
    extend_context=extend_context,
)
def crawl(config: CrawlConfig, context: CrawlContext) -> StageResult:
    """Fetch models, images and pages of the site at ``context.site_url``.

    Writes models/, images/, pages/ and generations.jsonl, and when ``context.previous`` is
    refreshed also gone/ and changes.json (see ``diffagent.crawl.snapshot`` and
    ``diffagent.crawl.refresh``). The intact records of ``context.damaged`` are taken over. The
    content digest does not depend on the site's address, on the order of fetching, on faults, or
    on counters that moved.

    Raises:
        ConfigError: the address names no site.
        CivitaiError: the site stopped answering, or the time budget is spent; the next run
            continues from there.
    """
    started = time.monotonic()
    memory = CrawlMemory.load(context.memory)
    is_new = True
    # The journal is removed last: models without it are the whole snapshot of a run that was
    # killed before its manifest was written.
    if (context.out / JOURNAL).exists() or not (context.out / "models").is_dir():
        is_new = _fetch(config, context, memory)
        shutil.rmtree(context.out / SALVAGED, ignore_errors=True)
        memory.save(context.memory)
        (context.out / JOURNAL).unlink()
    if context.previous and not is_new:
        log.info("nothing new on the site: %s", memory.metrics)
        rows, digest = context.previous.manifest.rows, context.previous.content_digest
        findings = {}
    else:
        summary = summarise(context.out)
        rows, digest = summary.rows, summary.digest
        findings = {"schema_drift": _drift(summary.drift, memory)}
        memory.inventory = summary.inventory
        memory.save(context.memory)  # with the metrics, should this run be killed right here
    seconds = {"seconds": round(time.monotonic() - started, 2)}
    note = read_about(config.site)
    return StageResult(
        rows=rows,
        funnels=_funnels(memory, rows),
        metrics=memory.metrics | seconds | findings | ({"about": note} if note else {}),
        content_digest=digest,
    )


def _fetch(config: CrawlConfig, context: CrawlContext, memory: CrawlMemory) -> bool:
    """Fetch and write the snapshot; fill ``memory``.

    Returns:
        Whether the site had anything new.
    """
    runtime = context.runtime
    previous, salvaged = _previous_snapshot(context, memory)
    is_full = runtime.site.reconcile or (salvaged is not None and not salvaged.complete)
    copies = context.memory.with_name(context.memory.name.removesuffix(".memory.json"))
    with (
        open_site(context.site_url, runtime) as site,
        Journal(context.out / JOURNAL, aside=copies) as journal,
    ):
        state = CrawlState(
            site, journal, budget_seconds=runtime.site.budget_seconds, previous=previous
        )
        request = {
            "version": 2,
            "previous": previous.digest if previous else None,
            "salvaged": context.damaged.name if salvaged and context.damaged else None,
            "reconcile": is_full,
            "date": datetime.now(UTC).date().isoformat(),
        }
        pool = CallPool(site, runtime.site.threads)
        setup = CrawlSetup(config, site, journal, state, pool, context.progress)
        crawler = Crawler(setup)
        if previous:
            crawler = Refresh(
                setup,
                previous,
                memory.looked_at,
                share=runtime.site.refresh_share,
                full=is_full,
                rewrite=salvaged is not None,
            )
        crawler.date = state.resume(request)["date"]
        started = time.monotonic()
        crawler.run()
        seconds = {"fetch_seconds": round(time.monotonic() - started, 2)}
        is_new = crawler.write(context.out, context.out / SCRATCH)
        report = {"salvaged": salvaged.report} if salvaged else {}
        memory.metrics, memory.drops = crawler.metrics() | seconds | report, state.drops()
        return is_new


def _previous_snapshot(
    context: CrawlContext, memory: CrawlMemory
) -> tuple[SnapshotIndex | None, SalvagedSnapshot | None]:
    """Index the snapshot to refresh: the last one, or the intact part of a damaged one."""
    if context.previous:
        return SnapshotIndex.load(context.previous), None
    if context.damaged:
        salvaged = salvage(context.damaged, context.out / SALVAGED, memory.inventory)
        return SnapshotIndex.load(salvaged.snapshot, salvaged.missing), salvaged
    return None, None


def _drift(drift: Mapping[str, int], memory: CrawlMemory) -> dict[str, Any]:
    """Return the fields of unknown form, with the ids that were in quotes, and warn of them."""
    text_ids = memory.metrics.get("text_ids")
    fields = {**drift, **({"ids in quotes, made numbers": text_ids} if text_ids else {})}
    if fields:
        log.warning("%d field(s) of an unknown form: see schema_drift", len(fields))
    return fields


def _funnels(memory: CrawlMemory, rows: Mapping[str, int]) -> tuple[Funnel, ...]:
    """Return the drop funnels of models and images, for each kind with drops."""
    return tuple(
        Funnel(
            unit=kind,
            seen=rows.get(kind, 0) + sum(reasons.values()),
            kept=rows.get(kind, 0),
            steps=tuple(
                FunnelStep(filter="record", reason=reason, dropped=number)
                for reason, number in reasons.items()
            ),
        )
        for kind, reasons in memory.drops.items()
    )

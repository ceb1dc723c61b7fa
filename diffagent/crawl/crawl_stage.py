"""Stage ``crawl``: everything that the configuration asks of the site, as a snapshot.

A first crawl fetches all of it (``diffagent.crawl.crawler``), a refresh what can have changed
(``diffagent.crawl.refresh``); how listings are walked so that nothing is missed is in
``diffagent.crawl.walks``, what the result looks like in ``diffagent.crawl.snapshot``.

All progress is in a journal (``diffagent.crawl.journal``): a crawl that was killed, that ran out
of disk or of its time budget goes on behind the last whole page.
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

from diffagent.crawl.crawler import Crawler, Session
from diffagent.crawl.journal import Journal
from diffagent.crawl.known import Known
from diffagent.crawl.memory import Memory
from diffagent.crawl.refresh import Refresh
from diffagent.crawl.salvage import salvage
from diffagent.crawl.snapshot import summarise
from diffagent.crawl.walks import Walks
from diffagent.localcivitai.site import open_site, site_files
from diffagent.localcivitai.sources import read_about
from diffagent.schemas.config import CrawlConfig
from diffagent.schemas.manifest import Funnel, FunnelStep
from diffagent.store import StageContext, StageResult, stage
from diffagent.store.integrity import damaged_copies

log = logging.getLogger(__name__)

JOURNAL, SCRATCH, SALVAGED = "journal.gz", "scratch", "salvaged"


@dataclass(frozen=True)
class CrawlContext(StageContext):
    """Context of the crawl with what earlier runs of the same request left.

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


@stage("crawl", version=2, config=CrawlConfig, files=site_files, extend_context=extend_context)
def crawl(config: CrawlConfig, context: CrawlContext) -> StageResult:
    """Fetch models, images and pages from ``context.site_url``.

    Writes models/, images/, pages/ and generations.jsonl, and when ``context.previous`` is
    refreshed also gone/ and changes.json (see ``diffagent.crawl.snapshot`` and
    ``diffagent.crawl.refresh``). What is good in ``context.damaged`` is taken over. The
    content digest does not depend on the site's address, on the order of fetching, on faults, or
    on counters that moved.

    Raises:
        ConfigError: the address names no site.
        CivitaiError: the site stopped answering, or the time budget is spent; the next run goes
            on from there.
    """
    note = read_about(config.site)
    about = {"about": note} if note else {}
    journal, started = context.out / JOURNAL, time.monotonic()
    memory = Memory.load(context.memory)
    # The journal is removed last: models without it are the whole snapshot of a run that was
    # killed before its manifest was written.
    if journal.exists() or not (context.out / "models").is_dir():
        new = _fetch(config, context, journal, memory)
        shutil.rmtree(context.out / SALVAGED, ignore_errors=True)
        memory.save(context.memory)
        journal.unlink()
        if context.previous and not new:
            metrics = memory.metrics
            metrics["seconds"] = round(time.monotonic() - started, 2)
            metrics |= about
            log.info("nothing new on the site: %s", metrics)
            rows = context.previous.manifest.rows
            return StageResult(
                rows,
                funnels=_funnels(memory, rows),
                metrics=metrics,
                content_digest=context.previous.content_digest,
            )
    found = summarise(context.out)
    metrics, drift = dict(memory.metrics), found.drift
    memory.ledger = found.ledger  # metrics stay: a run that is killed right here tells them, too
    memory.save(context.memory)
    if metrics.get("text_ids"):
        drift["ids in quotes, made numbers"] = metrics["text_ids"]
    metrics |= {"seconds": round(time.monotonic() - started, 2), "schema_drift": drift, **about}
    if drift:
        log.warning("%d field(s) of a shape not known here: see schema_drift", len(drift))
    return StageResult(
        rows=found.rows,
        funnels=_funnels(memory, found.rows),
        metrics=metrics,
        content_digest=found.digest,
    )


def _funnels(memory: Memory, rows: Mapping[str, int]) -> tuple[Funnel, ...]:
    """The drop funnels of models and images, of each kind that occurred."""
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


def _fetch(config: CrawlConfig, context: CrawlContext, journal: Path, memory: Memory) -> bool:
    """Fetch and write; returns whether there is anything new. ``memory`` gets the metrics."""
    runtime = context.runtime
    known, salvaged = None, None
    if context.previous:
        known = Known.load(context.previous)
    elif context.damaged:
        salvaged = salvage(context.damaged, context.out / SALVAGED, memory.ledger)
        known = Known.load(salvaged.snapshot, salvaged.missing)
    full = runtime.reconcile or (salvaged is not None and not salvaged.complete)
    aside = context.memory.with_name(context.memory.name.removesuffix(".memory.json"))
    with open_site(context.site_url, runtime) as site, Journal(journal, aside=aside) as pages:
        walks = Walks(
            site,
            pages,
            threads=runtime.crawl_threads,
            budget_seconds=runtime.crawl_budget_seconds,
            known=known,
        )
        request = {
            "version": 2,
            "previous": known.digest if known else None,
            "salvaged": context.damaged.name if salvaged and context.damaged else None,
            "reconcile": full,
            "date": datetime.now(UTC).date().isoformat(),
        }
        session = Session(config, site, pages, walks, context.progress)
        work = Crawler(session)
        if known:
            work = Refresh(
                session,
                known,
                memory.looked_at,
                share=runtime.refresh_share,
                full=full,
                rewrite=salvaged is not None,
            )
        work.date = walks.resume(request)["date"]
        started = time.monotonic()
        work.run()
        seconds = {"fetch_seconds": round(time.monotonic() - started, 2)}
        new = work.write(context.out, context.out / SCRATCH)
        report = {"salvaged": salvaged.report} if salvaged else {}
        memory.metrics, memory.drops = work.metrics() | seconds | report, walks.drops()
        return new

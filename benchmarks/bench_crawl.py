"""Crawling the local server: what the client adds at a limit, records a second, a refresh.

Three JSON lines. The site is made up: 1,000 models and 60,000 pictures, served by a process of its
own, which needs a core of its own too. The limit is 50 times the polite one: galleries are read at
once but a listing page after page, so that no limit above 1 / latency is reached there.

``overhead`` is the time of fetching over pages / rate, less one; ``written`` the seconds that
sorting, compressing and checking the snapshot take afterwards. ``records_per_second`` counts every
record that came through HTTP and was parsed: the walks that check each other show most of them
twice.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.localcivitai.faults import Faults
from diffagent.localcivitai.server import serve
from diffagent.localcivitai.site import read_source
from diffagent.localcivitai.sources.dump import write_dump
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact

MODELS, IMAGES, RATE = 1_000, 60_000, 50.0


def models() -> Iterator[dict[str, Any]]:
    for number in range(1, MODELS + 1):
        file = {"id": number, "name": f"{number}.safetensors", "type": "Model", "sizeKB": 1.0}
        version = {"id": 10_000 + number, "name": "v1", "baseModel": "SD 1.5", "files": [file]}
        yield {
            "id": number,
            "name": f"Made up {number}",
            "type": "Checkpoint",
            "description": "<p>Made up.</p>" * 20,
            "stats": {"downloadCount": number},
            "modelVersions": [version],
        }


def images() -> Iterator[dict[str, Any]]:
    for number in range(IMAGES):
        prompt = f"a made-up picture, number {number}, " + "highly detailed, " * 20
        meta = {"prompt": prompt, "seed": number, "steps": 20, "sampler": "Euler a", "cfgScale": 7}
        yield {
            "id": 100_000 + number,
            "url": f"https://image.civitai.com/{number}.jpeg",
            "nsfwLevel": "None",
            "modelVersionIds": [10_001 + number % MODELS],
            "meta": meta,
        }


class Bench:
    """One store, one site."""

    def __init__(self, store: Path, dump: Path, url: str) -> None:
        self.store, self.dump, self.url = store, dump, url

    def run(
        self, source: str, *, limit: int | None = None, refresh: bool = False, **runtime: Any
    ) -> tuple[Artifact, float]:
        """A crawl, and its seconds."""
        config = CrawlConfig(
            site=f"dump:{self.dump}", model_types=(), image_source=source, max_models=limit
        )
        settings = RuntimeConfig(store=str(self.store), site=runtime)
        started = time.monotonic()
        made = crawl.run(config, {}, settings, site_url=self.url, refresh=refresh)
        return made, time.monotonic() - started


def tell(name: str, **figures: float) -> None:
    rounded = {key: round(figure, 4) for key, figure in figures.items()}
    print(json.dumps({"benchmark": f"crawl: {name}", **rounded}), flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder, "dump")
        write_dump(dump, models(), images())
        with serve(read_source(f"dump:{dump}"), Faults()) as url:
            bench = Bench(Path(folder, "store"), dump, url)
            made, seconds = bench.run("versions", limit=500, requests_per_second=RATE)
            pages, fetching = (made.manifest.metrics[n] for n in ("requests", "fetch_seconds"))
            overhead = fetching / ((pages - 1) / RATE) - 1
            written = seconds - fetching
            tell("at a limit", rate=RATE, pages=pages, overhead=overhead, written=written)
            made, seconds = bench.run("feed")
            metrics = made.manifest.metrics
            records = metrics["items_fetched"] + metrics["repeated"]
            tell("without limits", records=records, records_per_second=records / seconds)
            again, seconds = bench.run("feed", refresh=True)
            assert again == made
            tell("an unchanged refresh", seconds=seconds)


if __name__ == "__main__":
    main()

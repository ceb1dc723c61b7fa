"""A week's crawl in simulation: a first crawl and six daily refreshes of a site that moves.

The site is as large as asked for: records of the sandbox with fresh ids, made when they are needed,
so that any size fits. Each day new models, versions and pictures appear, others change, go or
return. It is served by a process of its own with hostile faults; on one day its schema changes in
the middle. The crawl is a process too: it is killed (-9) at random moments and run again, its clock
jumps by days, and before the last day its snapshot is damaged. The last day is a reconciliation.

After every day the snapshot is compared with what the site really holds. One JSON line a day, and
one for the week; a record that is lost, doubled or wrong ends it with an error.

    python benchmarks/bench_week.py --models 100000 --images 2000000
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson

from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.localcivitai.faults import PROFILES, TRANSPORT, Faults, Profile
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.sources.dump import read_records
from diffagent.schemas.payloads import unwrap_meta
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import peak_memory_bytes

DAYS, DAMAGED_BEFORE, SCHEMA_DAY, NEVER = 6, 6, 3, 99
MODEL, VERSION, IMAGE, STEP = 1_000_000, 10_000_000, 100_000_000, 7
CONFIG = CrawlConfig(site="http://week", nsfw=True, model_types=(), image_source="versions")
#: Shares of the catalogue over the week.
NEW, GONE, CHANGED, NEW_VERSION, LOST_VERSION = 0.03, 0.02, 0.03, 0.02, 0.01
_MASK = 2**64 - 1


def dice(seed: int, number: int) -> float:
    """A number in [0, 1) that depends on nothing else (splitmix64)."""
    x = (number * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03 + 1) & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return (x ^ x >> 31) / 2**64


def day_of(seed: int, number: int) -> int:
    return 1 + int(dice(seed, number) * DAYS)


@dataclass(frozen=True)
class Fate:
    """The days on which something appears, goes, returns and changes."""

    born: int
    gone: int = NEVER
    back: int = NEVER
    changed: int = NEVER

    def is_there(self, day: int) -> bool:
        return self.born <= day and not self.gone <= day < self.back

    @classmethod
    def of(cls, seed: int, number: int, initial: int) -> Fate:
        """The fate of the ``number``-th of something of which there were ``initial`` at first."""
        if number >= initial:
            return cls(day_of(seed + 1, number))
        chance = dice(seed, number)
        if chance >= GONE + CHANGED:
            return STEADY
        day = day_of(seed + 1, number)
        if chance >= GONE:
            return cls(0, changed=day)
        return cls(0, gone=day, back=day + 2 if dice(seed + 2, number) < 0.5 else NEVER)


STEADY = Fate(born=0)


class World:
    """The site on any day: a function of the sizes alone."""

    def __init__(self, models: int, images: int) -> None:
        self.models, self.images = models, images
        self.all_models, self.all_images = (n + int(n * NEW) for n in (models, images))
        self.model_fates = [Fate.of(10, k, models) for k in range(self.all_models)]

    # Models: number k has the id MODEL + STEP * k and the versions VERSION + 10 * k + slot.

    def slots(self, k: int, day: int) -> list[int]:
        """Versions of a model that there are on a day: 0 always, 1 appears, 2 goes, on few."""
        chance, turn = dice(20, k), day_of(21, k)
        steady = self.model_fates[k] is STEADY
        has_new = steady and chance < NEW_VERSION and turn <= day
        has_lost = steady and NEW_VERSION <= chance < NEW_VERSION + LOST_VERSION and day < turn
        return [1] * has_new + [0] + [2] * has_lost

    def known_slots(self, k: int, day: int) -> set[int]:
        """Versions that a crawl which misses nothing has seen until a day."""
        return {slot for earlier in range(day + 1) for slot in self.slots(k, earlier)}

    def model_mark(self, k: int, day: int) -> str:
        return f"model {k} as of {int(self.model_fates[k].changed <= day)}"

    def model_records(self, day: int, templates: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for k in range(self.all_models):
            if not self.model_fates[k].is_there(day):
                continue
            model = templates[k % len(templates)]
            version = model["modelVersions"][0]
            ids = (VERSION + 10 * k + slot for slot in self.slots(k, day))
            yield {
                **model,
                "id": MODEL + STEP * k,
                "description": self.model_mark(k, day),
                "stats": {"downloadCount": k + day},
                "modelVersions": [{**version, "id": i, "modelId": MODEL + STEP * k} for i in ids],
            }

    # Pictures: number j has the id IMAGE + STEP * j.

    def image_fate(self, j: int) -> Fate:
        return Fate.of(30, j, self.images)

    def home_of(self, j: int) -> int:
        """The model with whose slot 0 a picture is: one that stays; a few have long galleries."""
        k = int(dice(40, j) * self.models)
        if j % 50 == 0:
            k %= max(1, self.models // 1000)
        while self.model_fates[k] is not STEADY:
            k = (k + 1) % self.models
        return k

    def image_mark(self, j: int, day: int) -> str:
        return f"picture {j} as of {int(self.image_fate(j).changed <= day)}"

    def image_records(self, day: int, templates: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for j in range(self.all_images):
            if not self.image_fate(j).is_there(day):
                continue
            image = templates[j % len(templates)]
            yield {
                **image,
                "id": IMAGE + STEP * j,
                "postId": None,
                "modelVersionIds": [VERSION + 10 * self.home_of(j)],
                "meta": {**image["meta"], "prompt": self.image_mark(j, day)},
            }


# --- the site, a process of its own ---------------------------------------------------------


def serve(world: World, day: int, seed: int) -> None:
    """Serve a day until standard input closes; then say what it took."""
    from diffagent.localcivitai.server import LocalCivitai, LocalServer

    sandbox = Path(os.environ["WEEK_SANDBOX"])
    models = [m for m in read_records(sandbox, "models") if m["modelVersions"]]
    images = [{**i, "meta": unwrap_meta(i["meta"])} for i in read_records(sandbox, "images")]
    images = [i for i in images if i["type"] == "image" and i["meta"]]
    replay = Replay.load(world.model_records(day, models), world.image_records(day, images), None)
    # Waits of whole seconds and trickles only as often as a long run can bear.
    rates = {**PROFILES["hostile"].rates, "too_many_wait": 0.0002, "slow": 0.0005}
    # Behind the models: a schema that changes there makes every gallery news.
    changes = int(world.all_models / 100 * 1.4) + 20 if day == SCHEMA_DAY else 0
    profile = Profile(rates, deploy_every=150, deploys=3, new_schema_after=changes)
    faults = Faults(profile, seed=seed + day)
    serving = LocalServer(LocalCivitai(replay, faults), "127.0.0.1", 0)

    def end() -> None:
        sys.stdin.read()
        refused = sum(faults.injected[kind] for kind in TRANSPORT)
        said = {"requests": faults.requests, "pages": faults.pages, "refused": refused}
        said["other_faults"] = sum(faults.injected.values()) - refused
        print(json.dumps({**said, **usage("server_")}), flush=True)
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
    print(serving.url, flush=True)
    serving.serve_forever()


def usage(prefix: str = "") -> dict[str, int]:
    """Processor time and peak memory of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = round(used.ru_utime + used.ru_stime)
    peak = peak_memory_bytes() // 2**20
    return {f"{prefix}cpu_seconds": seconds, f"{prefix}peak_mb": peak}


# --- the crawl, a process of its own --------------------------------------------------------


def crawl_once(url: str, store: str, day: int, share: float) -> None:
    """Crawl or refresh, with a clock that jumps; prints the directory of the snapshot."""
    from diffagent.crawl import crawl_stage as crawling

    rng, real = random.Random(os.getpid()), time.time

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            jump = timedelta(days=rng.uniform(-3, 3))
            return datetime.now(tz) + timedelta(days=day) + jump

    time.time = lambda: real() + rng.uniform(-1e6, 1e6)
    crawling.datetime = Jumping  # type: ignore[misc]
    runtime = RuntimeConfig(store=store, site={"refresh_share": share, "reconcile": day == DAYS})
    made = crawling.crawl.run(CONFIG, {}, runtime, site_url=url, refresh=True)
    print(json.dumps({"path": str(made.path), "usage": usage()}), flush=True)


# --- the week --------------------------------------------------------------------------------


@dataclass
class Week:
    """Runs the week in ``folder`` and compares every day with the truth."""

    world: World
    folder: Path
    seed: int = 0
    kills: int = 2
    kill_within: float = 2.0
    share: float = 0.25
    known: bytearray = field(init=False)  # of each picture: 0, or 1 + its generation
    generations: list[int] = field(default_factory=list)  # after each day

    def __post_init__(self) -> None:
        self.known = bytearray(self.world.all_images)
        self.rng = random.Random(self.seed)

    def run(self) -> Iterator[dict[str, Any]]:
        """Yield what each day took and found."""
        server = self._start_server(0)
        try:
            for day in range(DAYS + 1):
                started = time.monotonic()
                assert server.stdout
                url, ready = server.stdout.readline().strip(), time.monotonic()
                made, kills = self._crawl(day, url)
                crawled = time.monotonic()
                said = json.loads(server.communicate()[0])
                if day < DAYS:  # the next day's site is made while this day is compared
                    server = self._start_server(day + 1)
                manifest = json.loads(Path(made["path"], "manifest.json").read_bytes())
                found = self._compare(day, Path(made["path"]))
                if day + 1 == DAMAGED_BEFORE:
                    self._damage()
                metrics = manifest["metrics"]
                took = {"waited": ready - started, "crawl": crawled - ready}
                took["compare"] = time.monotonic() - crawled
                yield {
                    "day": day,
                    **{f"{name}_seconds": round(seconds, 1) for name, seconds in took.items()},
                    **{"kills": kills, **made["usage"]},
                    **said,
                    **{name: metrics[name] for name in ("restarts", "loops")},
                    **{"rows": manifest["rows"], "recall": metrics.get("recall")},
                    **found,
                    "salvaged": metrics.get("salvaged", {}).get("lost"),
                }
        finally:
            server.kill()

    def _start_server(self, day: int) -> subprocess.Popen[str]:
        env = {**os.environ, "WEEK_SANDBOX": os.environ.get("WEEK_SANDBOX") or sandbox()}
        command = [sys.executable, __file__, "serve", *self._arguments(day)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def _arguments(self, day: int) -> list[str]:
        sizes = ["--models", str(self.world.models), "--images", str(self.world.images)]
        return [*sizes, "--day", str(day), "--seed", str(self.seed)]

    def _crawl(self, day: int, url: str) -> tuple[dict[str, Any], int]:
        """Run the crawl until it ends by itself; it is killed some times before."""
        command = [sys.executable, __file__, "crawl", "--url", url, "--share", str(self.share)]
        command += ["--store", str(self.folder / "store"), *self._arguments(day)]
        for kills in itertools.count():
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                patience = self.rng.uniform(0.5, self.kill_within) if kills < self.kills else None
                text, _ = child.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                child.communicate()
                continue
            if child.returncode:
                raise SystemExit(f"day {day}: the crawl ended with {child.returncode}")
            made: dict[str, Any] = json.loads(text)
            return made, kills
        raise AssertionError

    def _damage(self) -> None:
        """Cut a part of models, and write zeros into the middle of one of pictures."""
        for kind in ("models", "images"):
            manifests = self.folder.glob("store/crawl/[0-9a-f]*/manifest.json")
            snapshot = next(p.parent for p in manifests if "." not in p.parent.name)
            part = sorted(snapshot.glob(f"{kind}/*"))[-1]
            data = bytearray(part.read_bytes())
            middle = len(data) // 2
            if kind == "models":
                del data[middle:]
            else:
                data[middle : middle + 100] = bytes(100)
            part.write_bytes(data)

    # The truth

    def _compare(self, day: int, snapshot: Path) -> dict[str, Any]:
        """Compare a snapshot with what a crawl that misses nothing has.

        Of pictures a refresh looks at some galleries only, so before the reconciliation of the
        last day nothing known may be lost, and nothing be said gone that is there.
        """
        lines = (snapshot / "generations.jsonl").read_bytes().splitlines()
        self.generations.append(orjson.loads(lines[-1])["generation"])
        wrong: Counter[str] = Counter()
        gone: dict[str, set[int]] = {"models": set(), "versions": set(), "images": set()}
        for row in rows(snapshot, "gone"):
            gone[row["kind"]].add(row["id"])
        self._compare_models(day, snapshot, gone, wrong)
        self._compare_images(day, snapshot, gone["images"], wrong)
        if wrong:
            raise SystemExit(f"day {day}: {dict(wrong)}")
        return {"gone": {kind: len(ids) for kind, ids in gone.items()}, "lost": 0, "doubled": 0}

    def _compare_models(
        self, day: int, snapshot: Path, gone: dict[str, set[int]], wrong: Counter[str]
    ) -> None:
        world, expected = self.world, {"models": set[int](), "versions": set[int]()}
        found = rows(snapshot, "models")
        for k in range(world.all_models):
            fate, ident = world.model_fates[k], MODEL + STEP * k
            if fate.born > day:
                continue
            there = fate.is_there(day)
            model = next(found, {"id": None})
            if model["id"] != ident:
                raise SystemExit(f"day {day}: model {model['id']} where {ident} should be")
            versions = [version["id"] - VERSION - 10 * k for version in model["modelVersions"]]
            wrong["versions lost or doubled"] += sorted(versions) != sorted(
                world.known_slots(k, day)
            )
            if there:
                wrong["stale models"] += model["description"] != world.model_mark(k, day)
                there_now = world.slots(k, day)
                expected["versions"] |= {
                    VERSION + 10 * k + slot for slot in versions if slot not in there_now
                }
            else:
                expected["models"].add(ident)
            # A crawl that was killed after its manifest was there made a generation of its own.
            before, last = [-1, *self.generations][fate.born : fate.born + 2]
            wrong["generations of models"] += not before < model["_generation"] <= last
        wrong["models doubled or made up"] += next(found, None) is not None
        for kind, ids in expected.items():
            wrong[f"tombstones of {kind}"] += len(gone[kind] ^ ids)
        for name in [name for name, number in wrong.items() if not number]:
            del wrong[name]

    def _compare_images(
        self, day: int, snapshot: Path, gone: set[int], wrong: Counter[str]
    ) -> None:
        world, last = self.world, day in (0, DAYS)
        found = rows(snapshot, "images")
        item = next(found, None)
        for j in range(world.all_images):
            fate, ident = world.image_fate(j), IMAGE + STEP * j
            there = fate.is_there(day)
            if item is None or item["id"] != ident:
                wrong["pictures lost"] += bool(self.known[j])
                wrong["pictures missed"] += last and there
                continue
            wrong["pictures made up"] += fate.born > day
            wrong["tombstones of pictures that are there"] += there and ident in gone and last
            wrong["tombstones of pictures without reason"] += ident in gone and (
                fate.gone > day or (last and there)
            )
            wrong["pictures that lack a tombstone"] += last and not there and ident not in gone
            if last and there:
                wrong["stale pictures"] += item["meta"]["prompt"] != world.image_mark(j, day)
            generation = 1 + item["_generation"]
            wrong["generations of pictures"] += self.known[j] not in (0, generation)
            self.known[j] = generation
            item = next(found, None)
        wrong["pictures doubled or made up"] += item is not None
        for name in [name for name, number in wrong.items() if not number]:
            del wrong[name]


def rows(snapshot: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Rows of a snapshot, read without the code under test."""
    for path in sorted(snapshot.glob(f"{kind}/*.jsonl.gz")):
        with gzip.open(path) as lines:
            yield from map(orjson.loads, lines)


def sandbox() -> str:
    """A directory with the sandbox's records."""
    from diffagent.sandbox.files import materialise

    return str(materialise(Path("build/sandbox")))


def main() -> None:
    parser = argparse.ArgumentParser(description="A week's crawl in simulation.")
    parser.add_argument("role", nargs="?", choices=("week", "serve", "crawl"), default="week")
    parser.add_argument("--models", type=int, default=1_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=2, help="a day")
    parser.add_argument("--kill-within", type=float, default=10.0, help="seconds")
    parser.add_argument("--share", type=float, default=0.05, help="runtime.site.refresh_share")
    parser.add_argument("--folder", type=Path, help="where the store is kept; default: nowhere")
    for name in ("--day", "--url", "--store"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    world = World(asked.models, asked.images)
    if asked.role == "serve":
        serve(world, int(asked.day), asked.seed)
    elif asked.role == "crawl":
        crawl_once(asked.url, asked.store, int(asked.day), asked.share)
    else:
        week(world, asked)


def week(world: World, asked: argparse.Namespace) -> None:
    started, days = time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        run = Week(
            world,
            asked.folder or Path(temporary),
            seed=asked.seed,
            kills=asked.kills,
            kill_within=asked.kill_within,
            share=asked.share,
        )
        for day in run.run():
            days.append(day)
            print(json.dumps({"benchmark": "crawl: a day of the week", **day}), flush=True)
    total = {name: sum(day[name] for day in days) for name in ("requests", "refused", "kills")}
    figures = {
        "models": asked.models,
        "images": asked.images,
        "seconds": round(time.monotonic() - started),
        **total,
        "peak_mb": max(day["peak_mb"] for day in days),
        "lost": 0,
        "doubled": 0,
    }
    print(json.dumps({"benchmark": "crawl: a week", **figures}), flush=True)


if __name__ == "__main__":
    main()

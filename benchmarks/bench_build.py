"""From a raw snapshot to shards: seconds and memory by size, and against plain json and pandas.

    python benchmarks/bench_build.py [DIR [RECORDS ...]]

DIR is a dump of the site's records (``models*.jsonl[.gz]``, ``images*.jsonl[.gz]``); without it,
the sandbox's. Its pictures are replicated with fresh ids and posts, and words of their own except
those that more than 1 % of the prompts have, up to 0.1, 1 and 5 million records. One JSON line a
size, each built in a process of its own with two workers: seconds of the stages ``filter`` and
``shard``, and the peak of what they and their workers have in memory together. Then the slope of
log seconds over log records. Up to 1 million records, after each size, the stage ``filter`` against
``plain_build.py``: seconds of both on the clock and of all their processes on a CPU, the ratios of
either, the peak of the plain one, and whether the rows are the same.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import plain_build
import psutil
from pydantic import BaseModel

from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.shard_stage import build_dabench
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.dabench.parquet_tables import read_rows
from diffagent.localcivitai.sources.dump import read_records
from diffagent.sandbox.files import materialise
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact, StageContext, StageResult, open_artifact, stage

SIZES = (100_000, 1_000_000, 5_000_000)
WORKERS = 2
PLAIN = 1_000_000  # records; the plain build has them all in memory
COMMON = 0.01
_WORD = re.compile(r"<[^<>]*>|[A-Za-z]{3,}")


class Source(BaseModel):
    """What a replicated snapshot is made of."""

    dump: str
    records: int


@stage("crawl", version=0, config=Source)
def replicate(config: Source, context: StageContext) -> StageResult:
    """Write a snapshot of ``records`` pictures."""
    models = {item["id"]: item for item in read_records(Path(config.dump), "models")}
    images = sorted(read_records(Path(config.dump), "images"), key=lambda item: item["id"])
    words = Counter(w for item in images for w in set(_words(_prompt(item))))
    common = {word for word, count in words.items() if count > COMMON * len(images)}
    for kind in ("models", "images"):
        (context.out / kind).mkdir(exist_ok=True)
    with gzip.open(context.out / "models" / "part-00000.jsonl.gz", "wb", 1) as file:
        file.writelines(orjson.dumps(models[i]) + b"\n" for i in sorted(models))
    with gzip.open(context.out / "images" / "part-00000.jsonl.gz", "wb", 1) as file:
        file.writelines(map(_line, _replicas(images, config.records, common)))
    return StageResult({"images": config.records})


def _prompt(item: dict[str, Any]) -> str:
    prompt = (item.get("meta") or {}).get("prompt")
    return prompt if isinstance(prompt, str) else ""


def _words(prompt: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(prompt) if word[0] != "<"]


def _replicas(
    images: list[dict[str, Any]], records: int, common: set[str]
) -> Iterator[dict[str, Any]]:
    step = max(item["id"] for item in images) + 1
    for number in range(records):
        replica, position = divmod(number, len(images))
        item = {k: v for k, v in images[position].items() if k[0] != "_"}
        item["id"] += replica * step
        if isinstance(item.get("postId"), int):
            item["postId"] += replica * step
        if replica and (prompt := _prompt(item)):
            own = chr(97 + replica % 26) + chr(97 + replica // 26)
            item["meta"] = {**item["meta"], "prompt": _own(prompt, own, common)}
        yield item


def _own(prompt: str, suffix: str, common: set[str]) -> str:
    def change(found: re.Match[str]) -> str:
        word = found.group()
        return word if word[0] == "<" or word.lower() in common else word + suffix

    return _WORD.sub(change, prompt)


def _line(item: dict[str, Any]) -> bytes:
    return orjson.dumps(item) + b"\n"


def build(snapshot: Artifact, store: str) -> dict[str, Any]:
    """Build once, in this process."""
    runtime = RuntimeConfig(store=store, tasks={"workers": WORKERS})
    started, cpu = time.perf_counter(), cpu_seconds()
    filtered = filter_records.run(FilterConfig(), {"snapshot": [snapshot]}, runtime)
    between, cpu = time.perf_counter(), cpu_seconds() - cpu
    dabench = build_dabench.run(DABenchConfig(), {"filtered": [filtered]}, runtime)
    ended = time.perf_counter()
    return {
        "filter_seconds": round(between - started, 1),
        "filter_cpu_seconds": round(cpu, 1),
        "shard_seconds": round(ended - between, 1),
        "rows": filtered.manifest.rows | dabench.manifest.rows,
        "filtered": str(filtered.path),
    }


def plain(snapshot: Artifact, filtered: Path) -> dict[str, Any]:
    """Build with json and pandas, and compare the rows."""
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.perf_counter(), cpu_seconds()
        file = Path(folder, "rows.jsonl")
        plain_build.save(plain_build.build(snapshot, FilterConfig()), file)
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
        ours = read_rows(filtered / "records-00000.parquet")
        with file.open() as lines:
            pairs = [
                line is not None and json.loads(line) == row
                for line, row in itertools.zip_longest(lines, ours)
            ]
    return {
        "plain_seconds": round(seconds, 1),
        "plain_cpu_seconds": round(cpu, 1),
        "rows": len(pairs),
        "same_rows": all(pairs),
    }


def cpu_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])


def child(task: str, *arguments: str) -> dict[str, Any]:
    """Run ``build`` or ``plain`` in a process of its own, and watch its memory."""
    command = [sys.executable, __file__, f"--{task}", *arguments]
    process = psutil.Popen(command, stdout=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process))
        time.sleep(0.05)
    assert process.returncode == 0
    return json.loads(process.stdout.read().splitlines()[-1]) | {"peak_rss": peak}


def resident(process: psutil.Process) -> int:
    """Bytes of a process and all below it."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:  # it ended between the two calls
        pass
    return total


def main(dump: Path, sizes: list[int], folder: str) -> None:
    seconds = {}
    for records in sorted(sizes):
        source = Source(dump=str(dump), records=records)
        snapshot = str(replicate.run(source, {}, RuntimeConfig(store=folder)).path)
        made = child("build", snapshot, str(Path(folder, "built")))
        seconds[records] = made["filter_seconds"] + made["shard_seconds"]
        shown = {key: value for key, value in made.items() if key != "filtered"}
        rate = round(records / seconds[records])
        line = {"benchmark": "build", "records": records, "records_per_second": rate, **shown}
        print(json.dumps(line), flush=True)
        if records > PLAIN:
            continue
        line = {"benchmark": "build against plain", "records": records}
        line |= child("plain", snapshot, made["filtered"])
        for kind, name in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
            line[f"filter_{kind}"] = made[f"filter_{kind}"]
            line[name] = round(line[f"plain_{kind}"] / made[f"filter_{kind}"], 2)
        print(json.dumps(line), flush=True)
    if len(seconds) > 1:
        (small, fast), *_, (large, slow) = seconds.items()
        slope = math.log(slow / fast) / math.log(large / small)
        print(json.dumps({"benchmark": "build", "slope": round(slope, 3)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        print(json.dumps(build(open_artifact(Path(sys.argv[2])), sys.argv[3])))
    elif sys.argv[1:2] == ["--plain"]:
        print(json.dumps(plain(open_artifact(Path(sys.argv[2])), Path(sys.argv[3]))))
    else:
        dump = Path(sys.argv[1]) if len(sys.argv) > 1 else materialise(Path("build/sandbox"))
        with tempfile.TemporaryDirectory(dir=".") as scratch:
            main(dump, [int(a) for a in sys.argv[2:]] or list(SIZES), scratch)

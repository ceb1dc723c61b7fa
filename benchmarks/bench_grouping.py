"""Grouping and splitting prints: seconds and peak memory at 0.1, 0.5, 1 and 3 million rows.

    python benchmarks/bench_grouping.py [DIR [ROWS ...]]

DIR is an artefact of the stage 'filter' (``prints.parquet``); without it, the sandbox's records.
They are replicated with fresh ids, posts and creators. ``words: own`` gives each replica words of
its own, so that twice the rows are twice the pairs that are alike; with ``words: boilerplate`` the
word pairs that more than 1 % of the records have ("masterpiece, best quality") stay the same in
all of them, as they do when a site grows. One JSON line a size, each measured in a process of its
own (``seconds`` is all but making the input, ``peak_rss`` is that process's), and one with the
slope of log processor seconds over log rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.dabench.build.neighbours import mix
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.splits import NO_SPLIT, Prints, random_splits, shingles
from diffagent.sandbox.files import materialise
from diffagent.schemas.tables import PRINTS
from diffagent.store import peak_memory_bytes

ROWS = (100_000, 500_000, 1_000_000, 3_000_000)
BOILERPLATE = 0.01


def sandbox_prints() -> pa.Table:
    """The sandbox's prompts; every four of them a post, every twenty a creator's."""
    items = map(
        orjson.loads,
        (materialise(Path("build/sandbox")) / "images.jsonl").read_bytes().splitlines(),
    )
    prompts = [text for item in items if (text := (item.get("meta") or {}).get("prompt"))]
    return pa.table(
        {
            "id": range(len(prompts)),
            "generation": [0] * len(prompts),
            "post_id": [number // 4 for number in range(len(prompts))],
            "creator": [f"creator {number // 20}" for number in range(len(prompts))],
            "base_model": ["SD 1.5"] * len(prompts),
            "kept": [True] * len(prompts),
            "shingles": [shingles(prompt) for prompt in prompts],
        },
        schema=PRINTS,
    )


def replicate(source: pa.Table, rows: int, path: Path, words: str) -> None:
    """Write ``rows`` prints made of ``source``; a replica is a row group or more."""
    lists = source["shingles"].combine_chunks()
    tokens = lists.flatten().to_numpy().view(np.uint64)
    sizes = np.diff(lists.offsets.to_numpy())
    owner = np.repeat(np.arange(len(sizes)), sizes)
    _, places, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    common = (counts > BOILERPLATE * len(source))[places] & (words == "boilerplate")
    posts = source["post_id"].combine_chunks()
    with pq.ParquetWriter(path, PRINTS) as writer:
        for replica in range(-(-rows // len(source))):
            salted = mix(tokens ^ mix(np.full(1, replica, np.uint64))) >> np.uint64(1)
            own = np.where(common, tokens, salted).view(np.int64)
            own = own[np.lexsort((own, owner))]
            count = min(len(source), rows - replica * len(source))
            names = [n and f"{n} {replica}" for n in source["creator"].to_pylist()]
            part = source.set_column(0, PRINTS.field("id"), pa.array(first_ids(source, replica)))
            post = pa.compute.add(posts, replica << 32)
            part = part.set_column(2, PRINTS.field("post_id"), post)
            part = part.set_column(3, PRINTS.field("creator"), pa.array(names, pa.string()))
            sets = pa.ListArray.from_arrays(lists.offsets, pa.array(own), PRINTS.field(6).type)
            part = part.set_column(6, PRINTS.field("shingles"), sets)
            writer.write_table(part.slice(0, count), row_group_size=4096)


def first_ids(source: pa.Table, replica: int) -> np.ndarray:
    return np.arange(len(source), dtype=np.int64) + replica * len(source)


def peak_mb() -> int:
    return peak_memory_bytes() // 2**20


def measure(path: Path) -> None:
    """Split the prints of a file; prints the figures."""
    config = DABenchConfig()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        before, started, before_cpu = peak_mb(), time.perf_counter(), time.process_time()
        prints = Prints(path, config, Path(folder))
        made = prints.splits()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - before_cpu
        exposed = int(prints.exposed(random_splits(prints.ids, config)).sum())
        total = time.perf_counter() - started
        prints.close()
        scratch = sum(file.stat().st_size for file in Path(folder).rglob("*.bin"))
    print(
        json.dumps(
            {
                "rows": len(made.group),
                "groups": len(np.unique(made.group)),
                "left_out": int((made.split == NO_SPLIT).sum()),
                "exposed_by_random_split": exposed,
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu_seconds, 2),
                "seconds_exposed": round(total - seconds, 2),
                "peak_rss_mb": peak_mb(),
                "rss_before_mb": before,
                "scratch_mb": round(scratch / 2**20),
            }
        )
    )


def main(source: pa.Table, sizes: list[int]) -> None:
    tokens = pa.compute.list_value_length(source["shingles"])
    head = {"benchmark": "grouping", "records": len(source)}
    print(json.dumps({**head, "mean_word_pairs": round(pa.compute.mean(tokens).as_py(), 1)}))
    with tempfile.TemporaryDirectory() as folder:
        for words in ("own", "boilerplate"):
            found = []
            for rows in sizes:
                path = Path(folder) / "prints.parquet"
                replicate(source, rows, path, words)
                command = [sys.executable, __file__, "--measure", str(path)]
                made = subprocess.run(command, check=True, capture_output=True, text=True)
                found.append(json.loads(made.stdout))
                print(
                    json.dumps({"benchmark": "grouping", "words": words, **found[-1]}), flush=True
                )
            if len(found) > 1:
                logs = np.log([[line["rows"], line["cpu_seconds"]] for line in found])
                slope = round(float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0]), 2)
                print(json.dumps({"benchmark": "grouping", "words": words, "slope": slope}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]))
    else:
        given = sys.argv[1:2]
        prints = pq.read_table(Path(given[0]) / "prints.parquet") if given else sandbox_prints()
        main(prints, [int(rows) for rows in sys.argv[2:]] or list(ROWS))

"""How much of real records the metadata reader reads, and how fast.

    python benchmarks/bench_metadata.py [IMAGES.jsonl[.gz] [LIMIT]]

Without a file, the sandbox's synthetic records. One JSON line a form (records, records per second
of processor time) and one for all: the share of records with each field. The records are items of
``GET /api/v1/images``, one a line.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from diffagent.sandbox.files import materialise
from diffagent.t2i.metadata import Generation, parse_generation

REPEATS = 3
FIELDS: Mapping[str, Callable[[Generation], bool]] = {
    "prompt": lambda made: bool(made.prompt),
    "sampler": lambda made: made.sampler is not None,
    "steps": lambda made: made.steps is not None,
    "cfg_scale": lambda made: made.cfg_scale is not None,
    "size": lambda made: made.width is not None,
    "size_from_image": lambda made: made.size_from_image,
    "seed": lambda made: made.seed is not None,
    "checkpoint_by_id_or_hash": lambda made: any(x.version_id or x.hash for x in made.checkpoints),
    "checkpoint_by_name": lambda made: bool(made.checkpoints),
    "loras": lambda made: bool(made.loras),
    "embeddings": lambda made: bool(made.embeddings or made.negative_embeddings),
    "from_image": lambda made: made.from_image,
}


def read(item: Mapping[str, Any]) -> Generation:
    return parse_generation(
        item.get("meta"), image_width=item.get("width"), image_height=item.get("height")
    )


def rate(items: list[dict[str, Any]]) -> float:
    """Records per second of processor time; the best of a few passes."""
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        for item in items:
            read(item)
        times.append(time.process_time() - started)
    return len(items) / max(min(times), 1e-9)


def main(path: Path, limit: int | None) -> None:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        items = [orjson.loads(line) for line in islice(lines, limit)]
    forms: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    found: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for item in items:
        made = read(item)
        forms[made.form].append(item)
        found.update(name for name, has in FIELDS.items() if has(made))
        if made.sampler_raw and made.sampler is None:
            unknown[made.sampler_raw] += 1
    for form, group in sorted(forms.items()):
        line = {"form": form, "records": len(group), "records_per_second": round(rate(group))}
        print(json.dumps({"benchmark": "metadata", **line}))
    shares = {name: round(found[name] / len(items), 4) for name in FIELDS}
    line = {"records": len(items), "records_per_second": round(rate(items)), "share": shares}
    print(json.dumps({"benchmark": "metadata", **line, "unknown_samplers": unknown}))


if __name__ == "__main__":
    records = (
        Path(sys.argv[1])
        if len(sys.argv) > 1
        else materialise(Path("build/sandbox")) / "images.jsonl"
    )
    main(records, int(sys.argv[2]) if len(sys.argv) > 2 else None)

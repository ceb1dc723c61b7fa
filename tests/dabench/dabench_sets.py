"""A small DABench of synthetic records, made by the real stages, and ways to change one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.shard_stage import build_dabench
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.dabench.parquet_tables import write_table
from diffagent.schemas.manifest import FileEntry
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import MANIFEST, Artifact, files_digest, open_artifact, sha256_file
from tests.dabench.dabench_records import image, model, snapshot, version

CONFIG = DABenchConfig(
    validation_fraction=0.25, test_fraction=0.25, rows_per_shard=9, seed=20
)  # a seed with two shards a split, and LoRAs in all
_THINGS = ("harbour", "tower", "forest", "market", "orchard", "station")
_KINDS = ("ink drawing", "photograph", "clay model", "mosaic")


def record(number: int) -> dict[str, Any]:
    """The ``number``-th record: three models, two samplers, a LoRA with every fifth."""
    thing, kind = _THINGS[number % 6], _KINDS[number % 4]
    prompt = f"{kind} of the {number}th {thing} seen by traveller {number * 7}"
    resources = {"civitaiResources": [{"type": "checkpoint", "modelVersionId": 100}]}
    if number % 5 == 0:
        resources["civitaiResources"].append(
            {"type": "lora", "modelVersionId": 300, "weight": 0.5}  # type: ignore[dict-item]
        )
    sampler = "Euler a" if number % 3 else "DPM++ 2M Karras"
    made = image(number, 100 if number % 2 else 400, prompt=prompt, sampler=sampler)
    if number % 5 == 0:
        made["meta"] |= resources
    return made | {"postId": 1000 + number // 2}


def make_dabench(
    directory: Path,
    *,
    records: int = 48,
    config: DABenchConfig = CONFIG,
    models: list[dict[str, Any]] | None = None,
    change: Callable[[dict[str, Any]], object] = lambda item: None,
) -> Artifact:
    """Build one in ``directory``; ``change`` may edit each record before."""
    items = [record(number) for number in range(1, records + 1)]
    for item in items:
        change(item)
    known = models or [
        model(1),
        model(2, nsfw=True),
        model(3, type="LORA", name="Ink", modelVersions=[version(300)]),
        model(4, name="Sea", modelVersions=[version(400), version(401)]),
        model(5, type="LORA", name="XL", modelVersions=[version(500, baseModel="SDXL 1.0")]),
    ]
    source = snapshot(directory / "snapshot", known, items)
    runtime = RuntimeConfig(store=str(directory / "store"))
    filtered = filter_records.run(FilterConfig(), {"snapshot": [source]}, runtime)
    return build_dabench.run(config, {"filtered": [filtered]}, runtime)


def copy_dabench(made: Artifact, directory: Path) -> Path:
    """A copy that may be changed; it has left its store."""
    return Path(shutil.copytree(made.path, directory / "copy"))


def sign(directory: Path) -> None:
    """Make the manifest say that the files are as they are now."""
    data = json.loads((directory / MANIFEST).read_text())
    files = tuple(
        FileEntry(
            path=p.relative_to(directory).as_posix(), size=p.stat().st_size, sha256=sha256_file(p)
        )
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    )
    data["files"] = [file.model_dump() for file in files]
    data["content_digest"] = files_digest(files)
    (directory / MANIFEST).write_text(json.dumps(data))
    open_artifact(directory)


def shards(directory: Path, split: str) -> list[Path]:
    """The files of a split."""
    return sorted(directory.glob(f"data/{split}-*.parquet"))


def first_row(directory: Path, split: str) -> dict[str, Any]:
    """The first row of a split."""
    row: dict[str, Any] = pq.read_table(shards(directory, split)[0]).slice(0, 1).to_pylist()[0]
    return row


def edit_row(
    path: Path, row: int, change: Callable[[dict[str, Any]], object], *, signed: bool = True
) -> dict[str, Any]:
    """Change a row of a parquet file of a dataset in place; the row as it was."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    before = dict(rows[row])
    change(rows[row])
    write_table(path, pa.Table.from_pylist(rows, schema=table.schema))
    if signed:
        sign(path.parent.parent if path.parent.name == "data" else path.parent)
    return before


def edit_api(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    """A change of a row that changes its API record."""

    def edit(row: dict[str, Any]) -> None:
        api = json.loads(row["api"])
        change(api)
        row["api"] = json.dumps(api, separators=(",", ":"))

    return edit


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file of a dataset in place and sign it."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    sign(path.parent.parent)

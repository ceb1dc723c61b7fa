"""What is in a DABench: counts, funnel, distributions, lengths, sample rows; in one pass."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from diffagent.dabench.dataset import Batch, Dataset
from diffagent.dabench.tools.layout import aligned, one_line, paragraphs, share
from diffagent.errors import DiffAgentError, SchemaError
from diffagent.schemas.api import T2IAPI
from diffagent.schemas.manifest import Funnel
from diffagent.t2i.catalogue import Catalogue

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_MAX_VALUES = 64  # a column of more different values is no category
_SHOWN = 10
_IN_LINE = 5
_NETWORKS = ("loras", "embeddings")
_CARRIED = ("seed",)  # parameters that every API has of its own


class Tally:
    """Counts of the values of a column, as long as they are few; then nothing (``full``)."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.full = False

    def add(self, column: pa.Array) -> None:
        """Count a batch."""
        if self.full:
            return
        if pa.types.is_nested(column.type):  # counted by their text
            column = pa.array([None if v is None else str(v) for v in column.to_pylist()])
        for item in pc.value_counts(column):
            self.counts[str(item["values"].as_py())] += item["counts"].as_py()
        self.full = len(self.counts) > _MAX_VALUES


class Lengths:
    """Exact percentiles of small whole numbers, from how often each occurs."""

    def __init__(self) -> None:
        self._often: npt.NDArray[np.int64] = np.zeros(1, dtype=np.int64)

    def add(self, values: pa.Array) -> None:
        """Count a batch of numbers >= 0."""
        found = np.bincount(values.to_numpy(zero_copy_only=False))
        if len(found) > len(self._often):
            self._often = np.pad(self._often, (0, len(found) - len(self._often)))
        self._often[: len(found)] += found

    def percentiles(self) -> dict[str, int]:
        """Nearest-rank percentiles; {} when nothing was counted."""
        total = int(self._often.sum())
        if not total:
            return {}
        upto = np.cumsum(self._often)
        ranks = [max(1, -(-total * p // 100)) for p in PERCENTILES]
        return {
            f"p{p}": int(np.searchsorted(upto, rank))
            for p, rank in zip(PERCENTILES, ranks, strict=True)
        }


class _Pass:
    """What one pass over the rows collects."""

    def __init__(self) -> None:
        self.columns: dict[str, Tally] = {}
        self.params: dict[str, Counter[str]] = {}
        self.versions: Counter[tuple[str, str]] = Counter()
        self.networks: dict[str, Counter[str]] = {kind: Counter() for kind in _NETWORKS}
        self.base_models: Counter[str] = Counter()
        self.with_networks: Counter[str] = Counter()
        self.characters, self.words = Lengths(), Lengths()
        self.dates: dict[str, list[Any]] = {}

    def add(self, batch: Batch) -> None:
        for name, column in zip(batch.data.schema.names, batch.data.columns, strict=True):
            if pa.types.is_temporal(column.type):
                self._add_dates(name, column)
            else:
                self.columns.setdefault(name, Tally()).add(column)
        prompts = batch.data["prompt"]
        self.characters.add(pc.utf8_length(prompts))
        self.words.add(pc.count_substring_regex(prompts, r"\S+"))
        for row, text in enumerate(batch.data["api"].to_pylist(), batch.start):
            try:
                self._add_api(orjson.loads(text))
            except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise SchemaError(
                    f"{str(batch.path)!r} row {row}: 'api' is no API record ({error!r}); "
                    f"'diffagent dabench verify' lists all that is wrong"
                ) from None

    def _add_dates(self, name: str, column: pa.Array) -> None:
        found = pc.min_max(column).as_py()
        if found["min"] is not None:
            known = self.dates.setdefault(name, [found["min"], found["max"]])
            known[:] = [min(known[0], found["min"]), max(known[1], found["max"])]

    def _add_api(self, api: Mapping[str, Any]) -> None:
        self.versions[api["model"], api["version"]] += 1
        self.base_models[api["base_model"]] += 1
        for kind in _NETWORKS:
            used = api.get(kind, ())
            self.with_networks[kind] += bool(used)
            self.networks[kind].update(f"{one['model']} / {one['version']}" for one in used)
        for name, value in api["params"].items():
            if name not in _CARRIED:
                self.params.setdefault(name, Counter())[str(value)] += 1


def summarise(dataset: Dataset, *, rows: int = 3, seed: int = 0) -> dict[str, Any]:
    """All that ``inspect`` shows, ready for JSON.

    Args:
        dataset: what to look at.
        rows: sample rows to show.
        seed: which rows.

    Raises:
        ArtifactError, SchemaError: a file is damaged.
    """
    seen = _Pass()
    for batch in dataset.batches(show="inspect"):
        seen.add(batch)
    total = sum(dataset.rows.values())
    models: Counter[str] = Counter()
    for (model, _), count in seen.versions.items():
        models[model] += count
    positions = random.Random(seed).sample(range(total), min(rows, total))
    samplers = seen.params.get("sampler", Counter())
    return {
        **_identity(dataset),
        "rows": {**dataset.rows, "all": total},
        "random_split": dataset.random_split,
        "used": {
            "models": len(models),
            "model_versions": len(seen.versions),
            **{kind: len(seen.networks[kind]) for kind in _NETWORKS},
            **{f"pairs_with_{kind}": seen.with_networks[kind] for kind in _NETWORKS},
            "base_models": len(seen.base_models),
            "samplers": len(samplers),
        },
        "catalogue": _catalogue(dataset.path),
        "dates": _dates(dataset, seen),
        "lineage": dataset.made_from,
        "funnels": [funnel.model_dump() for funnel in dataset.funnels],
        "distributions": dataset.distributions,
        "counts": {
            "models": _top(models),
            **{kind: _top(seen.networks[kind]) for kind in _NETWORKS},
            "base_models": _top(seen.base_models),
            "samplers": _top(samplers),
        },
        "params": {n: _top(counts) for n, counts in seen.params.items() if n != "sampler"},
        "columns": {
            name: _top(tally.counts)
            for name, tally in seen.columns.items()
            if not tally.full and _is_category(name, len(tally.counts), total)
        },
        "prompt_characters": seen.characters.percentiles(),
        "prompt_words": seen.words.percentiles(),
        "sample": [{"split": split, **row} for split, row in dataset.rows_at(positions)],
    }


def _top(counts: Counter[str]) -> dict[str, int]:
    """The most frequent values first, those that are equal in alphabetical order."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _is_category(name: str, values: int, rows: int) -> bool:
    """Whether the counts of a column tell something that is not told elsewhere."""
    elsewhere = name in T2IAPI.model_fields or name == "id" or name.endswith("_id")
    return not elsewhere and (values <= _SHOWN or 4 * values <= rows)


def _identity(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    facts: dict[str, Any] = {"path": str(dataset.path), "layout": "parquet"}
    if not dataset.is_parquet:
        facts["layout"] = "instruction-api"
    if manifest:
        facts |= {
            "stage": manifest.stage,
            "stage_version": manifest.stage_version,
            "schema_version": manifest.schema_version,
            "identity": manifest.identity,
            "content_digest": manifest.content_digest,
            "config": dataset.config,
        }
    return facts


def _catalogue(path: Path) -> dict[str, int | str]:
    """Versions that may be called, or why the catalogue cannot be read."""
    try:
        catalogue = Catalogue.load(path)
    except (DiffAgentError, orjson.JSONDecodeError) as error:
        return {"unreadable": str(error)}
    return {
        "checkpoints": len(catalogue.checkpoints),
        "loras": len(catalogue.loras),
        "embeddings": len(catalogue.embeddings),
        "samplers": len(catalogue.samplers),
    }


def _dates(dataset: Dataset, seen: _Pass) -> dict[str, list[str]]:
    """When each stage ran, and first and last of every column of times."""
    made = {f"{stage} built": [date] for stage, date in dataset.dates.items()}
    return made | {name: [str(value) for value in ends] for name, ends in seen.dates.items()}


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal."""
    total = summary["rows"]["all"]
    parts = [
        aligned(_facts(summary), indent=0),
        ["pairs", *aligned([(s, n, share(n, total)) for s, n in summary["rows"].items()])],
        _random_text(summary["random_split"], total),
        *(_funnel_text(funnel) for funnel in summary["funnels"]),
        *(_distribution_text(name, d) for name, d in summary["distributions"].items()),
        *(_counts_text(name, counts, total) for name, counts in summary["counts"].items()),
        _lines_text("parameters", summary["params"], total),
        _lines_text("columns", summary["columns"], total),
        _length_text(summary),
        *(_row_text(row) for row in summary["sample"]),
    ]
    if not summary["funnels"]:
        parts.insert(3, ["funnel: not known here (it lies with the artefact of 'filter')"])
    if summary["lineage"]:
        parts.insert(1, ["made from", *(f"  {line}" for line in summary["lineage"])])
    return paragraphs(parts)


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, object]]:
    used, catalogue = summary["used"], summary["catalogue"]
    facts: list[tuple[str, object]] = [("dataset", summary["path"]), ("layout", summary["layout"])]
    facts += [
        (name.replace("_", " "), summary[name])
        for name in ("stage", "schema_version", "identity", "content_digest")
        if name in summary
    ]
    facts += [(name, " to ".join(ends)) for name, ends in summary["dates"].items()]
    facts += [(name.replace("_", " "), f"{count:,}") for name, count in used.items()]
    facts += [
        (f"{name} in the catalogue", f"{count:,}" if isinstance(count, int) else count)
        for name, count in catalogue.items()
    ]
    return facts


def _random_text(random_split: Mapping[str, Any], total: int) -> list[str]:
    if not random_split:
        return []
    rows, exposed = random_split["rows"], random_split["exposed"]
    return [
        "pairs of a random split, for comparison (column random_split)",
        *aligned([(split, n, share(n, total)) for split, n in rows.items()]),
        f"  {exposed:,} of its test ({share(exposed, rows['test'])}) have a near-duplicate, a "
        "picture of their post or series in its train; of the test above none",
    ]


def _funnel_text(data: Mapping[str, Any]) -> list[str]:
    funnel = Funnel.model_validate(data)
    rows = [
        (step.dropped, share(step.dropped, funnel.seen), step.filter, step.reason)
        for step in funnel.steps
    ]
    head = f"funnel of {funnel.unit}: {funnel.kept:,} of {funnel.seen:,} kept"
    return [
        f"{head} ({share(funnel.kept, funnel.seen)})",
        *aligned(rows, ("dropped", "of seen", "filter", "because")),
    ]


def _distribution_text(name: str, data: Mapping[str, Any]) -> list[str]:
    counts: dict[str, int] = data["counts"]
    title = f"source: {name} of {data['unit']}"
    return _counts_text(title, counts, sum(counts.values()), shown=20)


def _counts_text(
    title: str, counts: Mapping[str, int], total: int, *, shown: int = _SHOWN
) -> list[str]:
    if not counts:
        return []
    items = list(counts.items())
    rows = [(count, share(count, total), one_line(value, 60)) for value, count in items[:shown]]
    if rest := items[shown:]:
        left = sum(count for _, count in rest)
        rows.append((left, share(left, total), f"({len(rest):,} others)"))
    return [title.replace("_", " "), *aligned(rows)]


def _lines_text(title: str, columns: Mapping[str, Mapping[str, int]], total: int) -> list[str]:
    rows = [(name, _short(counts, total)) for name, counts in columns.items()]
    return [title, *aligned(rows)] if rows else []


def _short(counts: Mapping[str, int], total: int) -> str:
    """The most frequent values of a column in one line."""
    items = list(counts.items())
    shown = [f"{one_line(v, 24)} {share(count, total)}" for v, count in items[:_IN_LINE]]
    rest = [f"{len(items) - _IN_LINE:,} others"] if len(items) > _IN_LINE else []
    return ", ".join([*shown, *rest])


def _length_text(summary: Mapping[str, Any]) -> list[str]:
    rows = [
        (unit, *summary[f"prompt_{unit}"].values())
        for unit in ("characters", "words")
        if summary[f"prompt_{unit}"]
    ]
    return ["prompt length", *aligned(rows, ("", *(f"p{p}" for p in PERCENTILES)))]


def _row_text(row: Mapping[str, Any]) -> list[str]:
    """A row: its columns, and the fields of its API in place of its text."""
    api = orjson.loads(row["api"])
    params = ", ".join(f"{name} {value}" for name, value in api.pop("params").items())
    networks = {
        kind: ", ".join(f"{x['model']} / {x['version']} ({x['weight']})" for x in api.pop(kind, ()))
        for kind in _NETWORKS
    }
    facts = {"prompt": row["prompt"], **api, "params": params, **networks}
    facts |= {k: v for k, v in row.items() if k not in (*facts, "api", "id", "split")}
    if facts.get("prompt_raw") == row["prompt"]:
        del facts["prompt_raw"]
    shown = [(name, one_line(v, 160)) for name, v in facts.items() if v not in (None, "", [])]
    return [f"row {row['id']} ({row['split']})", *aligned(shown)]

"""What one DABench has that another has not: rows, splits, catalogue, schema, funnel.

Rows are compared by id, a range of ids in memory at a time: shards are sorted by id, so a range
costs the few row groups that hold it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.dabench.build.splits import SPLITS
from diffagent.dabench.dataset import Dataset
from diffagent.dabench.tools.layout import aligned, one_line, paragraphs
from diffagent.errors import ArtifactError, SchemaError
from diffagent.failures import reading

_RANGE = 50_000  # ids compared at once
_SPLIT = "\0split"  # no column has this name
_Ids = npt.NDArray[np.int64]
_File = tuple[str, int, int]  # split, least and greatest id


@dataclass
class Changes:
    """What became of the rows of a table, by their key."""

    added: int = 0
    removed: int = 0
    common: int = 0
    changed: int = 0
    columns: Counter[str] = field(default_factory=Counter)  # changed rows by column
    examples: dict[str, list[Any]] = field(default_factory=dict)

    def show(self, kind: str, items: Sequence[Any], limit: int) -> None:
        """Keep the first few of a kind."""
        known = self.examples.setdefault(kind, [])
        known += items[: limit - len(known)]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "added": self.added,
            "removed": self.removed,
            "in_both": self.common,
            "changed": self.changed,
            "changed_columns": dict(self.columns.most_common()),
            "examples": {kind: items for kind, items in self.examples.items() if items},
        }


def compare(a: Dataset, b: Dataset, *, examples: int = 5) -> dict[str, Any]:
    """The difference from ``a`` to ``b``, ready for JSON.

    ``leaks`` counts the rows that were held out (test, validation) in ``a`` and are in the train
    split of ``b``: an agent trained on ``b`` has seen what agents trained on ``a`` are tested
    with. ``seen`` counts the other way: rows that agents trained on ``a`` have seen.

    Args:
        a: the older dataset.
        b: the newer one.
        examples: how many of each kind to name.

    Raises:
        ArtifactError: one of them has no parquet files, or a damaged one.
        SchemaError: ids are not unique in one of them.
    """
    for dataset in (a, b):
        if not dataset.is_parquet:
            raise ArtifactError(
                f"{str(dataset.path)!r} holds pairs in JSON, which lack most columns: compare the "
                "datasets that they were exported from"
            )
    rows, moved = _compare_rows(a, b, examples)
    schemas = [_read_schema(next(p for paths in d.shards.values() for p in paths)) for d in (a, b)]
    catalogues = [_read_schema(d.path / "catalogue.parquet") for d in (a, b)]
    found = {
        "rows": rows.to_dict(),
        "splits": {
            "a": dict(a.rows),
            "b": dict(b.rows),
            "moved": {f"{old} -> {new}": n for (old, new), n in sorted(moved.items())},
        },
        "leaks": sum(n for (old, new), n in moved.items() if new == "train"),
        "seen": sum(n for (old, new), n in moved.items() if old == "train"),
        "catalogue": _compare_catalogues(a.path, b.path, examples),
        "samplers": _compare_keys(*(_samplers(d.path) for d in (a, b))),
        "schema": {
            "rows": _compare_keys(*map(_types, schemas)),
            "catalogue": _compare_keys(*map(_types, catalogues)),
        },
        "config": _compare_keys(a.config, b.config),
        "funnels": _compare_funnels(a, b),
    }
    return {"a": _name(a), "b": _name(b), "same": _is_empty(found), **found}


def _name(dataset: Dataset) -> dict[str, str]:
    manifest = dataset.manifest
    digest = {"content_digest": manifest.content_digest} if manifest else {}
    return {"path": str(dataset.path), **digest}


def _is_empty(found: Any) -> bool:
    """Whether there is no change anywhere in a comparison."""
    if isinstance(found, dict):
        return all(_is_empty(v) for k, v in found.items() if k not in ("in_both", "a", "b"))
    return not found


def _compare_rows(a: Dataset, b: Dataset, limit: int) -> tuple[Changes, Counter[tuple[str, str]]]:
    changes, moved = Changes(), Counter[tuple[str, str]]()
    (ids_a, files_a), (ids_b, files_b) = _read_ids(a), _read_ids(b)
    added, removed = np.setdiff1d(ids_b, ids_a), np.setdiff1d(ids_a, ids_b)
    common = np.intersect1d(ids_a, ids_b, assume_unique=True)
    changes.added, changes.removed, changes.common = len(added), len(removed), len(common)
    changes.show("added", added[:limit].tolist(), limit)
    changes.show("removed", removed[:limit].tolist(), limit)
    for begin in range(0, len(common), _RANGE):
        ends = (int(common[begin]), int(common[min(begin + _RANGE, len(common)) - 1]))
        joined = _join(_rows_between(files_a, *ends), _rows_between(files_b, *ends), "id")
        _count_changes(changes, joined, "id", limit, ignore=(_SPLIT,))
        apart = joined.filter(pl.col(_SPLIT) != pl.col(f"{_SPLIT}_b"))
        for old, new, count in apart.group_by(_SPLIT, f"{_SPLIT}_b").len().iter_rows():
            moved[old, new] += count
            these = (pl.col(_SPLIT) == old) & (pl.col(f"{_SPLIT}_b") == new)
            ids = apart.filter(these)["id"].head(limit).to_list()
            changes.show(f"{old} -> {new}", ids, limit)
    return changes, moved


def _read_ids(dataset: Dataset) -> tuple[_Ids, dict[Path, _File]]:
    """Ids of all rows, sorted, and between which ids each file lies."""
    found, files = [np.zeros(0, np.int64)], dict[Path, _File]()
    for batch in dataset.batches(["id"]):
        ids = batch.data["id"].to_numpy()
        low, high = int(ids.min()), int(ids.max())
        known = files.get(batch.path, (batch.split, low, high))
        files[batch.path] = (batch.split, min(known[1], low), max(known[2], high))
        found.append(ids)
    every: _Ids = np.sort(np.concatenate(found))
    if len(twice := every[1:][every[1:] == every[:-1]]):
        raise SchemaError(
            f"{str(dataset.path)!r} has {len(twice)} ids more than once, {twice[0]} for one: "
            "rows cannot be compared; 'diffagent dabench verify' lists them",
            field="id",
        )
    return every, files


def _rows_between(files: Mapping[Path, _File], low: int, high: int) -> pl.DataFrame:
    inside = pl.col("id").is_between(low, high)
    tables = []
    for path, (split, least, most) in files.items():
        if least <= high and low <= most:
            rows = pl.scan_parquet(path).filter(inside).with_columns(pl.lit(split).alias(_SPLIT))
            with reading(path):
                tables.append(rows.collect())
    return pl.concat(tables)


def _join(a: pl.DataFrame, b: pl.DataFrame, key: str) -> pl.DataFrame:
    """Rows of both tables by key; columns of ``b`` have the suffix ``_b``."""
    renamed = b.rename({name: f"{name}_b" for name in b.columns if name != key})
    return a.join(renamed, on=key, how="inner").sort(key)


def _count_changes(
    changes: Changes, joined: pl.DataFrame, key: str, limit: int, *, ignore: Sequence[str] = ()
) -> None:
    """Count the joined rows in which a column that both have differs."""
    names = [
        name
        for name in joined.columns
        if f"{name}_b" in joined.columns
        and name not in ignore
        and joined.schema[name] == joined.schema[f"{name}_b"]
    ]
    differs = joined.select(
        pl.col(name).ne_missing(pl.col(f"{name}_b")).alias(name) for name in names
    )
    changed = differs.select(pl.any_horizontal(pl.all()).alias("any"))["any"] if names else None
    if changed is None or not changed.any():
        return
    changes.changed += int(changed.sum())
    for name in names:
        if count := int(differs[name].sum()):
            changes.columns[name] += count
    if "api" in names:
        changes.columns.update(_api_fields(joined.filter(differs["api"])))
    shown = joined.filter(changed).head(limit - len(changes.examples.get("changed", ())))
    changes.show("changed", [_example(row, key, names) for row in shown.to_dicts()], limit)


def _api_fields(joined: pl.DataFrame) -> Iterator[str]:
    """The fields, as ``api.params.steps``, that differ in each of these rows."""
    for old, new in joined.select("api", "api_b").iter_rows():
        try:
            before, after = _flat(orjson.loads(old)), _flat(orjson.loads(new))
        except orjson.JSONDecodeError:
            continue  # counted as a change of the column 'api'; 'verify' says what it is
        for name in before.keys() | after.keys():
            if before.get(name) != after.get(name):
                yield f"api.{name}"


def _flat(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"": value}
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            found |= {f"{name}.{inner}": leaf for inner, leaf in item.items()}
        else:
            found[name] = item
    return found


def _example(row: Mapping[str, Any], key: str, names: Sequence[str]) -> dict[str, Any]:
    changed = [name for name in names if row[name] != row[f"{name}_b"]]
    return {
        key: row[key],
        "columns": {name: [row[name], row[f"{name}_b"]] for name in changed},
    }


def _compare_catalogues(a: Path, b: Path, limit: int) -> dict[str, Any]:
    """Entries by version id; ``names`` of those that are gone, new, or of another file now."""
    key = "version_id"
    old, new = (_read_catalogue(path) for path in (a, b))
    changes = Changes()
    gone, fresh = old.join(new, on=key, how="anti"), new.join(old, on=key, how="anti")
    changes.added, changes.removed = len(fresh), len(gone)
    for kind, entries in (("added", fresh), ("removed", gone)):
        changes.show(kind, _labels(entries.head(limit)), limit)
    joined = _join(old, new, key)
    changes.common = len(joined)
    _count_changes(changes, joined, key, limit)
    result = changes.to_dict()
    if "sha256" in joined.columns and "sha256_b" in joined.columns:
        hashes = joined.filter(pl.col("sha256").ne_missing(pl.col("sha256_b")))
        result["hash_changed"] = len(hashes)
        if len(hashes):
            result["examples"]["hash changed"] = _labels(hashes.head(limit))
    return result


def _read_catalogue(directory: Path) -> pl.DataFrame:
    path = directory / "catalogue.parquet"
    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(f"cannot read the catalogue {str(path)!r}: {error}") from None
    if table["version_id"].n_unique() != len(table):
        raise SchemaError(
            f"{str(path)!r} lists a version id twice: entries cannot be compared; "
            "'diffagent dabench verify' names it",
            field="version_id",
        )
    return table.sort("version_id")


def _labels(entries: pl.DataFrame) -> list[str]:
    named = entries.select("model", "version", "version_id").iter_rows()
    return [f"{model} / {version} (version {ident})" for model, version, ident in named]


def _samplers(directory: Path) -> dict[str, Any]:
    path = directory / "mapping" / "samplers.json"
    try:
        found: dict[str, Any] = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ArtifactError(f"cannot read {str(path)!r}: {error}") from None
    return found


def _compare_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "added": sorted(b.keys() - a.keys()),
        "removed": sorted(a.keys() - b.keys()),
        "changed": {name: [a[name], b[name]] for name in a if name in b and a[name] != b[name]},
    }


def _read_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"cannot read {str(path)!r}: {error}") from None


def _types(schema: pa.Schema) -> dict[str, str]:
    return {f.name: f"{f.type}{'' if f.nullable else ' not null'}" for f in schema}


def _compare_funnels(a: Dataset, b: Dataset) -> dict[str, Any]:
    """Counts of each reason (and of seen and kept) that differ: {unit: {reason: [a, b]}}."""
    old, new = (_funnel_counts(dataset) for dataset in (a, b))
    found: dict[str, Any] = {}
    for unit, reason in sorted(old.keys() | new.keys()):
        counts = [old.get((unit, reason), 0), new.get((unit, reason), 0)]
        if counts[0] != counts[1]:
            found.setdefault(unit, {})[reason] = counts
    return found


def _funnel_counts(dataset: Dataset) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for funnel in dataset.funnels:
        counts[funnel.unit, "(seen)"], counts[funnel.unit, "(kept)"] = funnel.seen, funnel.kept
        for step in funnel.steps:
            counts[funnel.unit, f"{step.filter}: {step.reason}"] = step.dropped
    return counts


def comparison_text(found: Mapping[str, Any]) -> str:
    """The comparison for a terminal."""
    parts = [aligned([(name, found[name]["path"]) for name in ("a", "b")], indent=0)]
    if found["same"]:
        parts.append(["nothing differs"])
    parts += [
        _split_text(found),
        _changes_text("rows", found["rows"]),
        _changes_text("catalogue", found["catalogue"]),
        *(_keys_text(f"schema of {name}", keys) for name, keys in found["schema"].items()),
        *(_keys_text(name, found[name]) for name in ("samplers", "config")),
        *(_funnel_text(unit, reasons) for unit, reasons in found["funnels"].items()),
        _leak_text(found),
    ]
    return paragraphs(parts)


def _split_text(found: Mapping[str, Any]) -> list[str]:
    splits = found["splits"]
    rows = [(s, splits["a"][s], splits["b"][s], splits["b"][s] - splits["a"][s]) for s in SPLITS]
    moved = [(count, way) for way, count in splits["moved"].items()]
    return ["pairs", *aligned(rows, ("split", "a", "b", "change")), *aligned(moved)]


def _changes_text(title: str, changes: Mapping[str, Any]) -> list[str]:
    names = ("added", "removed", "changed", "hash_changed", "in_both")
    lines = [title, *aligned((n.replace("_", " "), changes[n]) for n in names if n in changes)]
    if columns := changes["changed_columns"]:
        lines += ["  changed columns", *aligned(((n, c) for c, n in columns.items()), indent=4)]
    for kind, items in changes["examples"].items():
        lines.append(f"  {kind}, for example")
        lines += (f"    {line}" for item in items for line in _example_lines(item))
    return lines


def _example_lines(item: Any) -> list[str]:
    if not isinstance(item, dict):
        return [one_line(item, 120)]
    columns = item["columns"]
    key = next(name for name in item if name != "columns")
    return [f"{key} {item[key]}"] + [
        f"  {name}: {one_line(repr(old), 70)} -> {one_line(repr(new), 70)}"
        for name, (old, new) in columns.items()
    ]


def _keys_text(title: str, keys: Mapping[str, Any]) -> list[str]:
    lines = [f"  {kind}: {', '.join(keys[kind])}" for kind in ("added", "removed") if keys[kind]]
    lines += [
        f"  changed: {name}: {one_line(old, 70)} -> {one_line(new, 70)}"
        for name, (old, new) in keys["changed"].items()
    ]
    return [title, *lines] if lines else []


def _funnel_text(unit: str, reasons: Mapping[str, Sequence[int]]) -> list[str]:
    rows = [(reason, a, b, b - a) for reason, (a, b) in reasons.items()]
    return [f"funnel of {unit}", *aligned(rows, ("", "a", "b", "change"))]


def _leak_text(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if found["leaks"]:
        lines.append(
            f"LEAK: {found['leaks']:,} rows held out in a are in the train split of b. Build b "
            "with the splits of a (a record never moves from test to train), or test agents "
            "trained on b with the test split of b alone."
        )
    if found["seen"]:
        lines.append(
            f"note: {found['seen']:,} rows of the train split of a are held out in b: do not test "
            "agents trained on a with them."
        )
    return lines

"""Dumps of the API's records: JSON lines, parquet, or a snapshot of an earlier crawl.

A directory with ``models*`` and ``images*`` as .jsonl, .jsonl.gz or .parquet, perhaps in folders
``models/`` and ``images/`` as in a snapshot, and perhaps ``files/SHA256`` (lower case) with the
model files. Files with 'redacted' in their name are left out. In a snapshot, what has a tombstone
is not on the site.

In parquet a record is a row and its columns are the API's fields; nested ones are nested columns,
or text with JSON. An empty cell says nothing, as a missing key in JSON.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson

from diffagent.civitai.snapshot import GONE
from diffagent.civitai.sources import Records
from diffagent.errors import ConfigError
from schemas.civitai import IMAGE_FIELDS, MODEL_FIELDS, canonical

Row = dict[str, Any]
_FORMATS = (".jsonl", ".jsonl.gz", ".parquet")
_FIELDS = {"models": MODEL_FIELDS, "images": IMAGE_FIELDS}
_BATCH = 1_000
_SHA256 = re.compile("[0-9a-f]{64}")


def open_dump(directory: Path, cache: Path | None = None) -> Records:
    """A dump.

    Raises:
        ConfigError: there is none; while it is read: a record is not one, or a file is damaged.
    """
    if not _parts(directory, "models"):
        raise ConfigError(
            f"{str(directory)!r} holds no models*.jsonl, .jsonl.gz or .parquet, nor a snapshot; "
            "give the directory of a dump"
        )
    files = {p.name: p for p in directory.glob("files/*") if _SHA256.fullmatch(p.name)}
    gone = {(row["kind"], row["id"]) for row in read_records(directory, GONE)}
    images = (i for i in read_records(directory, "images") if ("images", i["id"]) not in gone)
    return Records(_models(directory, gone), images, files)


def _models(directory: Path, gone: set[tuple[str, int]]) -> Iterator[Row]:
    for model in read_records(directory, "models"):
        if ("models", model["id"]) in gone:
            continue
        versions = model.get("modelVersions")
        if gone and isinstance(versions, list):
            there = [v for v in versions if ("versions", v.get("id")) not in gone]
            model["modelVersions"] = there
        yield model


def read_records(directory: Path, kind: str) -> Iterator[Row]:
    """Records of a kind ('models', 'images') of a dump, in the order of files and rows.

    Raises:
        ConfigError: a record is no object with an integer id, or a file is damaged.
    """
    for path in _parts(directory, kind):
        rows = _parquet(path, _FIELDS.get(kind, {})) if path.suffix == ".parquet" else _lines(path)
        for where, record in rows:
            if not isinstance(record, dict) or type(record.get("id")) is not int:
                raise ConfigError(f"{path}: {where} is no object with an integer id")
            yield record


def _parts(directory: Path, kind: str) -> list[Path]:
    found = [*directory.glob(f"{kind}*"), *directory.glob(f"{kind}/*")]
    return sorted(
        path
        for path in found
        if path.is_file() and path.name.endswith(_FORMATS) and "redacted" not in path.name
    )


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield f"line {number}", orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {number} is not JSON: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{path} is damaged behind line {number} ({error}); put it back from a copy, or cut it "
            "there to use what is before"
        ) from None


def _parquet(path: Path, fields: Mapping[str, tuple[type, ...]]) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _record(row, fields, f"{path}: row {number}")
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{path} is no whole parquet file ({error}): make it again") from None


def _record(row: Row, fields: Mapping[str, tuple[type, ...]], where: str) -> Row:
    record = {}
    for key, value in row.items():
        kinds = fields.get(key, ())
        if isinstance(value, str) and value[:1] in ("{", "[") and {dict, list} & set(kinds):
            try:
                record[key] = orjson.loads(value)
                continue
            except orjson.JSONDecodeError as error:
                if str not in kinds:
                    raise ConfigError(f"{where}: column {key!r} is no JSON: {error}") from None
        plain = _plain(value, f"{where}: column {key!r}")
        if plain is not None:
            record[key] = plain
    return record


def _plain(value: Any, where: str) -> Any:
    """A cell as JSON has it; empty cells within it are left out."""
    if isinstance(value, dict):
        cells = {key: _plain(cell, where) for key, cell in value.items()}
        return {key: cell for key, cell in cells.items() if cell is not None}
    if isinstance(value, list):
        if value and all(isinstance(cell, tuple) and len(cell) == 2 for cell in value):
            return _plain(dict(value), where)  # a column of type map
        return [_plain(cell, where) for cell in value]
    if isinstance(value, datetime):
        moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # how a table without empty cells has them
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(f"{where} holds {type(value).__name__}, which JSON has not: leave it out")


def write_dump(directory: Path, models: Any, images: Any) -> None:
    """Write iterables of records as a dump."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind, records in (("models", models), ("images", images)):
        with gzip.open(directory / f"{kind}.jsonl.gz", "wb") as stream:
            stream.writelines(canonical(record) + b"\n" for record in records)

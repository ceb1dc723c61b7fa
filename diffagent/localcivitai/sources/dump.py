"""Dumps of the API's records: JSON lines, parquet, or a snapshot of an earlier crawl.

A directory with ``models*`` and ``images*`` as .jsonl, .jsonl.gz or .parquet, perhaps in folders
``models/`` and ``images/`` as in a snapshot, and perhaps ``files/SHA256`` (lower case) with the
model files. Files with 'redacted' in their name are left out. In a snapshot, what has a tombstone
is not on the site.

In parquet a record is a row and its columns are the API's fields; nested ones are nested columns,
or text with JSON, as they may be in JSON lines. An empty cell means the same as a missing key in
JSON; a cell of a type that JSON lacks (bytes) is left out.

A dump is read as leniently as the site: values that are no records are left out and counted.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from diffagent.civitai.lenient_json import loads
from diffagent.errors import ConfigError
from diffagent.localcivitai.sources import SourceRecords, UnreadableRecord
from diffagent.schemas.payloads import (
    FILE_FIELDS,
    GONE,
    IMAGE_FIELDS,
    MAX_RECORD_BYTES,
    MODEL_FIELDS,
    VERSION_FIELDS,
    canonical,
    flaw,
    whole_number,
)
from diffagent.schemas.printable import printable

log = logging.getLogger(__name__)

Row = dict[str, Any]
Fields = Mapping[str, tuple[type, ...]]
Gone = set[tuple[str, int | None]]
_FORMATS = (".jsonl", ".jsonl.gz", ".parquet")
_FIELDS = {"models": MODEL_FIELDS, "images": IMAGE_FIELDS}
_NESTED = {"modelVersions": VERSION_FIELDS, "files": FILE_FIELDS}
_BATCH = 1_000
_MAX_LINE = 2 * MAX_RECORD_BYTES  # escapes make a record longer
_LOGGED = 10  # bad records of a file that are logged one by one
_SHA256 = re.compile("[0-9a-f]{64}")


def open_dump(directory: Path, cache: Path | None = None) -> SourceRecords:
    """Read a dump, including values that are no records, for ``Replay`` to count.

    Raises:
        ConfigError: there is no dump; later, while records are read: a file is damaged.
    """
    if not _parts(directory, "models"):
        raise ConfigError(
            f"{str(directory)!r} holds no models*.jsonl, .jsonl.gz or .parquet, nor a snapshot; "
            "give the directory of a dump"
        )
    files = {p.name: p for p in directory.glob("files/*") if _SHA256.fullmatch(p.name)}
    tombstones = (row for row in read_records(directory, GONE) if isinstance(row, dict))
    gone = {(str(row.get("kind")), whole_number(row.get("id"))) for row in tombstones}
    images = (i for i in read_records(directory, "images") if not _is_gone("images", i, gone))
    return SourceRecords(_models(directory, gone), images, files)


def _is_gone(kind: str, record: Any, gone: Gone) -> bool:
    return isinstance(record, dict) and (kind, whole_number(record.get("id"))) in gone


def _models(directory: Path, gone: Gone) -> Iterator[Any]:
    for model in read_records(directory, "models"):
        if _is_gone("models", model, gone):
            continue
        versions = model.get("modelVersions") if isinstance(model, dict) else None
        if gone and isinstance(versions, list):
            model["modelVersions"] = [v for v in versions if not _is_gone("versions", v, gone)]
        yield model


def read_records(directory: Path, kind: str) -> Iterator[Any]:
    """Yield the values of a kind ('models', 'images') of a dump, in the order of files and rows.

    They are records and any other JSON; ``UnreadableRecord`` replaces a line that is no JSON.

    Raises:
        ConfigError: a file is damaged.
    """
    fields = _FIELDS.get(kind, {})
    for path in _parts(directory, kind):
        rows, bad = _parquet(path) if path.suffix == ".parquet" else _lines(path), 0
        for where, value in rows:
            record = _opened(value, fields) if isinstance(value, dict) else value
            reason = record.reason if isinstance(record, UnreadableRecord) else flaw(record)
            bad += bool(reason) and kind in _FIELDS
            if reason and bad <= _LOGGED:
                more = "; further ones of this file are only counted" if bad == _LOGGED else ""
                log.warning("%s: %s is left out: %s%s", path, where, printable(reason), more)
            yield record


def _parts(directory: Path, kind: str) -> list[Path]:
    paths = [*directory.glob(f"{kind}*"), *directory.glob(f"{kind}/*")]
    return sorted(
        path
        for path in paths
        if path.is_file() and path.name.endswith(_FORMATS) and "redacted" not in path.name
    )


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while line := stream.readline(_MAX_LINE):
                number += 1
                is_long = len(line) == _MAX_LINE
                while len(line) == _MAX_LINE and not line.endswith(b"\n"):
                    line = stream.readline(_MAX_LINE)
                if is_long:
                    yield (
                        f"line {number}",
                        UnreadableRecord(f"a line of more than {_MAX_LINE} bytes"),
                    )
                elif line.strip():
                    yield f"line {number}", _value(line)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{path} is damaged behind line {number} ({error}); restore it from a copy, or cut it "
            "there to use the lines before"
        ) from None


def _value(line: bytes) -> Any:
    try:
        return loads(line)
    except ValueError:
        return UnreadableRecord("no JSON")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    # An empty cell of a table means a missing key.
                    yield f"row {number}", {k: v for k, v in _plain(row).items() if v is not None}
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{path} is no whole parquet file ({error}): create it again") from None


def _opened(record: Row, fields: Fields) -> Row:
    """Return a record with its nested values parsed where they were text with JSON."""
    for key, value in record.items():
        kinds = fields.get(key, ())
        if isinstance(value, str) and value[:1] in ("{", "[") and {dict, list} & set(kinds):
            with contextlib.suppress(ValueError):  # a text that only begins like JSON stays one
                record[key] = loads(value.encode("utf-8", "replace"))
    for key, inner in _NESTED.items():
        parts = record.get(key)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                _opened(part, inner)
    return record


def _plain(value: Any) -> Any:
    """Return a cell as JSON; values that JSON lacks, and empty cells within it, are left out."""
    if isinstance(value, dict):
        cells = {str(key): _plain(cell) for key, cell in value.items()}
        return {key: cell for key, cell in cells.items() if cell is not None}
    if isinstance(value, list):
        if value and all(isinstance(cell, tuple) and len(cell) == 2 for cell in value):
            return _plain({str(key): cell for key, cell in value})  # a column of type map
        return [_plain(cell) for cell in value]
    if isinstance(value, datetime):
        moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal | float) and not math.isfinite(value):
        return None  # the empty cell of a table that has no others
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value if isinstance(value, str | int | float) else None


def write_dump(directory: Path, models: Any, images: Any) -> None:
    """Write iterables of records as a dump."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind, records in (("models", models), ("images", images)):
        with gzip.open(directory / f"{kind}.jsonl.gz", "wb") as stream:
            stream.writelines(canonical(record) + b"\n" for record in records)

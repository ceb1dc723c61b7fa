"""Parquet files that are the same bytes whenever their rows are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Settings that decide the bytes; nothing here depends on the machine or the clock.
_SETTINGS: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "version": "2.6"}
_ROWS_PER_GROUP = 4096


class TableWriter:
    """Appends rows, or batches of them, to a parquet file, one row group in memory at a time."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._rows: list[Mapping[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._waiting = 0  # rows of those
        self.rows = 0

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; its keys are the columns of the schema."""
        self._rows.append(row)
        self.rows += 1
        if len(self._rows) >= _ROWS_PER_GROUP:
            self.flush()

    def extend(self, batch: pa.RecordBatch) -> None:
        """Add rows that are a batch already, with the columns of the schema."""
        start = 0
        while start < len(batch):
            part = batch.slice(start, _ROWS_PER_GROUP - self._waiting)
            self._batches.append(part)
            self._waiting += len(part)
            self.rows += len(part)
            start += len(part)
            if self._waiting >= _ROWS_PER_GROUP:
                self.flush()

    def flush(self) -> None:
        """Write what is buffered as a row group."""
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self._rows = []
        if self._batches:
            table = pa.Table.from_batches(self._batches).combine_chunks()
            self._writer.write_table(table, row_group_size=_ROWS_PER_GROUP)
            self._batches, self._waiting = [], 0


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[TableWriter]:
    """Open a parquet file for appending rows; it is complete when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, **_SETTINGS) as file:
        writer = TableWriter(file, schema)
        yield writer
        writer.flush()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a whole table, with the settings of `table_writer`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=_ROWS_PER_GROUP, **_SETTINGS)


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, a row group in memory at a time."""
    for batch in read_batches(path, columns):
        yield from batch.to_pylist()


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Batches of a parquet file, a row group in memory at a time."""
    with pq.ParquetFile(path) as file:
        # Asked for all row groups at once, Arrow keeps what it has read until the last one.
        for group in range(file.num_row_groups):
            yield from file.iter_batches(_ROWS_PER_GROUP, row_groups=[group], columns=columns)

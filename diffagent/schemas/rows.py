"""Typed tables: one dataclass gives the Arrow schema, the reader and the writer of its rows.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class VoteRow:
        prompt: str                  # string, not null
        weight: float | None = None  # double, null allowed
        seed: Int32                  # int32, not null

    VOTE_TABLE = Table(VoteRow)
    VOTE_TABLE.write(path, [VoteRow(prompt="a fox", seed=1)])
    VOTE_TABLE.read(path)[0].prompt

A misspelt column is an error of mypy, which knows the attributes of the class, or of the reader,
which checks the columns of the file. Neither turns it into a null.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.schemas.table_error import TableError

if TYPE_CHECKING:
    import polars as pl

#: A whole number of 32 bits; ``int`` has 64.
Int32 = Annotated[int, pa.int32()]

_SCALARS = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_BATCH_ROWS = 4096

RowT = TypeVar("RowT")


def struct_of(row: type) -> pa.StructType:
    """Returns the Arrow type of a value that is a dataclass inside a row."""
    return pa.struct(schema_of(row))


def schema_of(row: type) -> pa.Schema:
    """Returns the Arrow schema of a row: a column for each field, in the order of the class.

    ``str``, ``int``, ``float``, ``bool``, tuples of them and dataclasses have an Arrow type;
    ``Annotated[..., arrow_type]`` states any other. ``... | None`` makes a column nullable.
    """
    hints = typing.get_type_hints(row, include_extras=True)
    return pa.schema([_arrow_field(name, hint) for name, hint in hints.items()])


def _arrow_field(name: str, hint: Any) -> pa.Field:
    stated, nullable = _without_none(hint)
    return pa.field(name, _arrow_type(stated), nullable=nullable)


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    (stated,) = (part for part in typing.get_args(hint) if part is not type(None))
    return stated, True


def _arrow_type(hint: Any) -> pa.DataType:
    if typing.get_origin(hint) is Annotated:
        arrow_type: pa.DataType = typing.get_args(hint)[1]
        return arrow_type
    if typing.get_origin(hint) is tuple:
        return pa.list_(_arrow_type(typing.get_args(hint)[0]))
    return _SCALARS[hint] if hint in _SCALARS else struct_of(hint)


class Table(Generic[RowT]):
    """Reader and writer of the parquet files whose rows are instances of one dataclass.

    Attributes:
        row: the dataclass.
        schema: its Arrow schema.
    """

    def __init__(self, row: type[RowT]) -> None:
        self.row = row
        self.schema = schema_of(row)
        hints = typing.get_type_hints(row, include_extras=True)
        self._decoders = {name: _decoder(hint) for name, hint in hints.items()}

    def to_batch(self, rows: Sequence[RowT]) -> pa.RecordBatch:
        """Returns the rows as one Arrow batch.

        Raises:
            TableError: a value is None whose column is not nullable.
        """
        columns = []
        for field in self.schema:
            values = [getattr(row, field.name) for row in rows]
            if pa.types.is_nested(field.type):
                values = [_encode(value) for value in values]
            columns.append(pa.array(values, field.type))
            if not field.nullable and columns[-1].null_count:
                raise TableError(f"{self.row.__name__}.{field.name} must not be None")
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def to_rows(self, batch: pa.RecordBatch | pa.Table) -> Iterator[RowT]:
        """Yields the rows of Arrow data that has the columns of the schema."""
        columns = []
        for name, decode in self._decoders.items():
            values = batch.column(name).to_pylist()
            columns.append(values if decode is None else map(decode, values))
        for values in zip(*columns, strict=True):
            yield self.row(**dict(zip(self._decoders, values, strict=True)))

    def read(self, path: Path) -> list[RowT]:
        """Reads all rows of a file.

        Raises:
            TableError: the file is damaged or lacks a column, or a column has another type.
        """
        return list(self.iterate(path))

    def iterate(self, path: Path) -> Iterator[RowT]:
        """Reads the rows of a file one by one, with a batch of them in memory; raises as `read`."""
        try:
            with pq.ParquetFile(path) as file:  # pq.read_table would import pandas
                self.check(path, file.schema_arrow)
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(
                        _BATCH_ROWS, row_groups=[group], columns=self.schema.names
                    ):
                        self._check_nulls(path, batch)
                        yield from self.to_rows(batch)
        except pa.ArrowException as error:
            raise _damaged(path, error) from error

    def read_frame(
        self, paths: Sequence[Path], columns: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """Reads columns (all, by default) of files into one polars frame, in the files' order.

        Raises:
            TableError: as `read`; or ``columns`` has a name that the table lacks.
        """
        import polars as pl

        names = list(self.schema.names if columns is None else columns)
        if unknown := sorted({*names} - {*self.schema.names}):
            raise TableError(f"{self.row.__name__} has no column {unknown[0]!r}")
        frames = [pl.from_arrow(pa.Table.from_batches([], self.schema)).select(names)]  # type: ignore[union-attr]
        for path in paths:
            try:
                self.check(path, pq.read_schema(path), names)
                frames.append(pl.read_parquet(path, columns=names).select(names))
            except (pa.ArrowException, pl.exceptions.PolarsError) as error:
                raise _damaged(path, error) from error
        return pl.concat(frames)

    def write(
        self, path: Path, rows: Sequence[RowT], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes the rows as one file.

        Args:
            path: of the file.
            rows: in the order of the file.
            metadata: texts to keep with the schema.
        """
        table = pa.Table.from_batches([self.to_batch(rows)])
        pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")

    def check(self, path: Path, schema: pa.Schema, columns: Iterable[str] | None = None) -> None:
        """Checks that a file has the columns of the table; more of them do no harm.

        Args:
            path: of the file, for the message.
            schema: of the file.
            columns: those that are read; all, by default.

        Raises:
            TableError: a column is missing or has another type.
        """
        for name in self.schema.names if columns is None else columns:
            expected = self.schema.field(name).type
            if name not in schema.names:
                raise TableError(
                    f"{str(path)!r} has no column {name!r} (it has {', '.join(schema.names)}); "
                    f"{_REMEDY}"
                )
            if not _same_type(schema.field(name).type, expected):
                raise TableError(
                    f"{str(path)!r}: column {name!r} is of type {schema.field(name).type}, not "
                    f"{expected}; {_REMEDY}"
                )

    def _check_nulls(self, path: Path, batch: pa.RecordBatch) -> None:
        for field in self.schema:
            if not field.nullable and batch.column(field.name).null_count:
                raise TableError(f"{str(path)!r}: column {field.name!r} has a null; {_REMEDY}")


_REMEDY = "another version wrote the file, or it was edited: run the stage that writes it again"


def _same_type(a: pa.DataType, b: pa.DataType) -> bool:
    """Whether values are of one type; names and nullability inside lists and structs are free."""
    if pa.types.is_nested(a) and pa.types.is_nested(b):
        return a.num_fields == b.num_fields and all(
            _same_type(a.field(i).type, b.field(i).type) for i in range(a.num_fields)
        )
    return bool(a.equals(b) or (pa.types.is_large_string(a) and pa.types.is_string(b)))


def _damaged(path: Path, error: Exception) -> TableError:
    return TableError(f"cannot read {str(path)!r}: {error}; the file is damaged: {_REMEDY}")


def _encode(value: Any) -> Any:
    """Returns a nested value as Arrow takes it: dataclasses as dictionaries."""
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def _decoder(hint: Any) -> Callable[[Any], Any] | None:
    """Returns the inverse of `_encode` for a field; None where a value stays as it is."""
    stated, _ = _without_none(hint)
    if typing.get_origin(stated) is Annotated:
        stated = typing.get_args(stated)[0]
    if typing.get_origin(stated) is tuple:
        item = _decoder(typing.get_args(stated)[0]) or (lambda value: value)
        return lambda values: None if values is None else tuple(map(item, values))
    if dataclasses.is_dataclass(stated):
        row: Any = stated
        return lambda value: None if value is None else row(**value)
    return None

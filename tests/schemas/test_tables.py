"""Typed rows: round trips, exact Arrow schemas, and errors in place of silent nulls."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffagent.errors import ArtifactError, SchemaError
from diffagent.failures import as_error, reading
from diffagent.schemas.rows import Table
from diffagent.schemas.table_error import TableError
from diffagent.schemas.tables import (
    CANDIDATE_TABLE,
    PAIR_TABLE,
    RECORD_TABLE,
    RENDER_TABLE,
    SCORE_TABLE,
    CandidateRow,
    CandidateVersion,
    EmbeddingReference,
    PairRow,
    ReactionCounts,
    RenderRow,
    ScoreRow,
)

CANDIDATE = CandidateRow(
    prompt_id=7, prompt="a fox", candidate=0, source="sft", text="{}", status="valid", logprob=-0.5
)


def _pair() -> PairRow:
    values: dict[str, Any] = {}
    samples = {pa.int64(): 3, pa.int32(): 2, pa.string(): "x", pa.float64(): 0.5, pa.bool_(): True}
    for field in PAIR_TABLE.schema:
        values[field.name] = samples.get(field.type)
    values["creator"] = None
    values["candidates"] = (CandidateVersion(version_id=1, via="hash", confidence=0.9),)
    values["embeddings_raw"] = (
        EmbeddingReference(name="bad-hands", hash=None, weight=1.0, negative=True),
    )
    values["reaction_counts"] = ReactionCounts(like=1, heart=2, laugh=0, cry=0)
    return PairRow(**values)


def test_schemas_are_as_the_files_have_them() -> None:
    nullable = {field.name for field in CANDIDATE_TABLE.schema if field.nullable}
    assert nullable == {"api", "reason", "logprob"}
    assert CANDIDATE_TABLE.schema.field("candidate").type == pa.int32()
    assert PAIR_TABLE.schema.names == [*RECORD_TABLE.schema.names, "group", "random_split"]
    assert str(PAIR_TABLE.schema.field("candidates").type) == (
        "list<element: struct<version_id: int64 not null, via: string not null, "
        "confidence: double not null> not null>"
    )
    assert str(PAIR_TABLE.schema.field("embeddings_raw").type) == (
        "list<item: struct<name: string, hash: string, weight: double, negative: bool>>"
    )


@pytest.mark.parametrize(
    ("table", "row"), [(CANDIDATE_TABLE, CANDIDATE), (PAIR_TABLE, _pair())], ids=["flat", "nested"]
)
def test_rows_round_trip(tmp_path: Path, table: Table[Any], row: Any) -> None:
    path = tmp_path / "table.parquet"
    table.write(path, [row, row], {"key": "value"})
    assert table.read(path) == [row, row]
    assert pq.read_schema(path).equals(table.schema)
    assert pq.read_schema(path).metadata == {b"key": b"value"}
    table.write(path, [])
    assert table.read(path) == []


def test_a_misspelt_column_is_an_error_that_names_file_column_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "renders.parquet"
    row = RenderRow(prompt_id=1, source="sft", candidate=0, seed=0, prompt="a", status="ok")
    RENDER_TABLE.write(path, [row])
    table = pq.read_table(path)
    pq.write_table(
        table.rename_columns([n.replace("note", "notes") for n in table.schema.names]), path
    )
    with pytest.raises(TableError, match=r"renders\.parquet' has no column 'note' .*run the stage"):
        RENDER_TABLE.read(path)
    with pytest.raises(TableError, match="no column 'note'"):
        RENDER_TABLE.read_frame([path])
    assert RENDER_TABLE.read_frame([path], ["seed", "prompt_id"]).rows() == [(0, 1)]
    with pytest.raises(TableError, match="RenderRow has no column 'device'"):
        RENDER_TABLE.read_frame([path], ["device"])
    with pytest.raises(TypeError, match="device"):
        RenderRow(device="cpu")  # type: ignore[call-arg]


def test_columns_of_another_type_or_with_nulls_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    row = ScoreRow(prompt_id=1, source="sft", candidate=0, seed=0, status="ok", clip=0.3)
    SCORE_TABLE.write(path, [row])
    table = pq.read_table(path)
    place = table.schema.get_field_index("seed")
    pq.write_table(table.set_column(place, "seed", pa.array(["0"])), path)
    with pytest.raises(TableError, match="'seed' is of type string, not int64"):
        SCORE_TABLE.read(path)
    pq.write_table(table.set_column(place, "seed", pa.array([None], pa.int64())), path)
    with pytest.raises(TableError, match="'seed' has a null"):
        SCORE_TABLE.read(path)
    with pytest.raises(TableError, match=r"ScoreRow\.seed must not be None"):
        SCORE_TABLE.write(path, [dataclasses.replace(row, seed=None)])  # type: ignore[arg-type]


def test_a_file_with_more_columns_or_of_polars_is_read(tmp_path: Path) -> None:
    path = tmp_path / "candidates.parquet"
    CANDIDATE_TABLE.write(path, [CANDIDATE])
    frame = CANDIDATE_TABLE.read_frame([path, path])
    assert frame.height == 2
    assert frame.columns == CANDIDATE_TABLE.schema.names
    assert CANDIDATE_TABLE.read_frame([]).schema == frame.schema
    frame.with_columns(more=1).write_parquet(path)
    assert CANDIDATE_TABLE.read(path) == [CANDIDATE] * 2


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "candidates.parquet"
    path.write_bytes(b"no parquet")
    for read in (CANDIDATE_TABLE.read, lambda path: CANDIDATE_TABLE.read_frame([path])):
        with pytest.raises(TableError, match=r"candidates\.parquet.*damaged.*run the stage"):
            read(path)


def test_errors_of_tables_are_errors_of_this_project(tmp_path: Path) -> None:
    error = TableError("'x.parquet' has no column 'a'")
    converted = as_error(error, "stage 'score'")
    assert isinstance(converted, SchemaError)
    assert str(converted) == str(error)
    with pytest.raises(ArtifactError, match="has no column 'a'"), reading(tmp_path):
        raise error


def test_rows_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CANDIDATE.prompt = "a wolf"  # type: ignore[misc]

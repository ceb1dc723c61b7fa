"""Tables of typed rows: one definition for schema, reader and writer."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffagent.errors import ArtifactError
from diffagent.schemas.tables import CANDIDATES, JUDGEMENTS, RENDERS, SCORES, CandidateRow, Table

TABLES = (CANDIDATES, RENDERS, SCORES, JUDGEMENTS)
ROW = CandidateRow(7, "a fox", 1, "sft", "{}", None, "invalid", "unparsable", -0.5)


@pytest.mark.parametrize("table", TABLES)
def test_the_schema_has_the_fields_of_the_row(table: Table[Any]) -> None:
    assert table.schema.names == [field.name for field in fields(table.row)]
    assert not table.schema.field("prompt_id").nullable and table.schema.field("reason").nullable
    assert table.schema.field("candidate").type == pa.int32()
    assert table.schema.field("prompt_id").type == pa.int64()


@given(
    st.lists(
        st.builds(
            CandidateRow,
            prompt_id=st.integers(0, 2**62),
            prompt=st.text(),
            candidate=st.integers(0, 2**31 - 1),
            source=st.text(),
            text=st.text(),
            api=st.none() | st.text(),
            status=st.sampled_from(["valid", "invalid"]),
            reason=st.none() | st.text(),
            logprob=st.none() | st.floats(allow_nan=False),
        )
    )
)
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[CandidateRow]
) -> None:
    path = tmp_path_factory.mktemp("rows") / CANDIDATES.file_name
    CANDIDATES.write(rows, path)
    assert CANDIDATES.read(path) == rows
    assert pq.read_schema(path).equals(CANDIDATES.schema)
    assert CANDIDATES.read_frame(path).height == len(rows)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda t: t.rename_columns(["promptid", *t.column_names[1:]]),
            "lacks 'prompt_id'.*unknown",
        ),
        (lambda t: t.drop_columns(["logprob"]), "lacks 'logprob'"),
        (lambda t: t.append_column("device", pa.array(["cpu"])), "unknown column 'device'"),
        (lambda t: t.set_column(0, "prompt_id", pa.array(["7"])), "'prompt_id' is string instead"),
    ],
)
def test_a_file_with_other_columns_is_refused(tmp_path: Path, change: Any, problem: str) -> None:
    path = tmp_path / CANDIDATES.file_name
    CANDIDATES.write([ROW], path)
    pq.write_table(change(pq.read_table(path)), path)
    for read in (CANDIDATES.read, CANDIDATES.read_frame):
        with pytest.raises(ArtifactError, match=f"CandidateRow: .*{problem}"):
            read(path)


def test_a_row_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    wrong: Any = CandidateRow("seven", "a", 0, "sft", "", None, "valid", None)  # type: ignore[arg-type]
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        CANDIDATES.write([wrong], tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()

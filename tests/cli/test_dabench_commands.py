"""``diffagent dabench``: what it prints, its exit codes, and JSON that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from diffagent.cli import main
from diffagent.dabench.tools.dataset_checks import verify_dabench
from diffagent.errors import ConfigError
from diffagent.store import Artifact
from tests.dabench.dabench_sets import copy_dabench, edit_row, make_dabench, shards, sign

runner = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dabench(tmp_path_factory.mktemp("dabench"))


def invoke(*arguments: Any, code: int = 0) -> Result:
    result = runner.invoke(main.app, ["dabench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_help_lists_the_commands() -> None:
    out = invoke("--help").output
    assert all(name in out for name in ("inspect", "diff", "verify", "export"))


def test_inspect(made: Artifact) -> None:
    out = invoke("inspect", made.path, "--rows", 2).output
    assert "funnel of models: 4 of 5 kept" in out and out.count("\nrow ") == 2
    found = orjson.loads(invoke("inspect", made.path, "--rows", 2, "--json").output)
    assert found["rows"]["all"] == 48 and len(found["sample"]) == 2


def test_verify(made: Artifact, tmp_path: Path) -> None:
    assert "sound" in invoke("verify", made.path).output
    directory = copy_dabench(made, tmp_path)
    edit_row(shards(directory, "train")[0], 0, lambda row: row.update(reactions=-1))
    edit_row(shards(directory, "train")[0], 1, lambda row: row.update(reactions=-2))
    out = invoke("verify", directory, "--limit", 1, code=1).output
    assert "value out of range: 2" in out and "remedy: " in out and "... and 1 more" in out
    found = orjson.loads(invoke("verify", directory, "--json", "--no-leaks", code=1).output)
    assert found["totals"] == {"value out of range": 2}
    assert [p["row"] for p in found["problems"]] == [0, 1]
    assert found == verify_dabench(directory, leaks=False).to_dict()


def test_diff(made: Artifact, tmp_path: Path) -> None:
    assert "nothing differs" in invoke("diff", made.path, made.path).output
    directory = copy_dabench(made, tmp_path)
    train, test = shards(directory, "train")[0], shards(directory, "test")[0]
    tables = pq.read_table(train), pq.read_table(test)
    pq.write_table(tables[1], train)
    pq.write_table(tables[0], test)
    sign(directory)
    out = invoke("diff", made.path, directory, code=1).output
    assert "LEAK: 9 rows held out" in out
    found = orjson.loads(invoke("diff", made.path, directory, "--json", code=1).output)
    assert found["splits"]["moved"] == {"test -> train": 9, "train -> test": 9}


def test_export(made: Artifact, tmp_path: Path) -> None:
    out = invoke("export", made.path, tmp_path / "hf", "--format", "hf").output
    assert f"train {made.manifest.rows['train']}, validation" in out
    invoke("export", made.path, tmp_path / "pairs", "--format", "instruction-api")
    for name in ("hf", "pairs"):
        assert "48" in invoke("inspect", tmp_path / name).output
        assert "sound" in invoke("verify", tmp_path / name).output
    with pytest.raises(ConfigError, match="--force"):
        invoke("export", made.path, tmp_path / "hf")
    invoke("export", made.path, tmp_path / "hf", "--force")
    invoke("export", made.path, tmp_path / "x", "--format", "csv", code=2)

"""Each way a dataset can be broken is found, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffagent.dabench.parquet_tables import write_table
from diffagent.dabench.tools.dataset_checks import REMEDIES, verdict_text, verify_dabench
from diffagent.errors import ArtifactError
from diffagent.store import MANIFEST, Artifact
from tests.dabench.dabench_sets import (
    copy_dabench,
    edit_api,
    edit_json,
    edit_row,
    first_row,
    make_dabench,
    shards,
    sign,
)

Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dabench(tmp_path_factory.mktemp("dabench"))


def change(**values: Any) -> Break:
    """Change columns of the first row of the test split."""
    return lambda d: edit_row(shards(d, "test")[0], 0, lambda row: row.update(values))


def change_api(edit: Callable[[dict[str, Any]], object]) -> Break:
    """Change the API of the first test row that has a LoRA."""

    def apply(directory: Path) -> None:
        for path in shards(directory, "test"):
            for number, row in enumerate(pq.read_table(path).to_pylist()):
                if orjson.loads(row["api"])["loras"]:
                    edit_row(path, number, edit_api(edit))
                    return
        raise AssertionError("no test row has a LoRA")

    return apply


def copy_from_train(column: str) -> Break:
    """The first test row gets a value of the first train row."""
    return lambda d: change(**{column: first_row(d, "train")[column]})(d)


def duplicate_id(directory: Path) -> None:
    """The second train row gets the id of the first."""
    path = shards(directory, "train")[0]
    edit_row(path, 1, lambda row: row.update(id=first_row(directory, "train")["id"]))


def continue_a_series(directory: Path) -> None:
    """The first test row gets nearly the prompt of a train row of the same creator."""
    text = "a tall old ship on a sea of "
    for split, end in (("train", "glass and fire"), ("test", "salt at noon")):
        values = {"prompt": text + end, "creator": "one and the same"}
        edit_row(shards(directory, split)[0], 0, lambda row, new=values: row.update(new))


def rename_model(row: dict[str, Any]) -> None:
    row["model"] = "Nowhere"
    edit_api(lambda api: api.update(model="Nowhere"))(row)


def entry(directory: Path, mapped: bool, **values: Any) -> None:
    """Change the catalogue's entry of version 401, which no row uses, and its mapping."""
    edit_row(directory / "catalogue.parquet", 3, lambda row: row.update(values))
    if mapped:
        edit_json(
            directory / "mapping/models.json", lambda m: m["Sea"]["versions"]["v401"].update(values)
        )


def rewrite(change_table: Callable[[pa.Table], pa.Table], name: str = "") -> Break:
    """Write a parquet file with another schema."""

    def apply(directory: Path) -> None:
        path = directory / name if name else shards(directory, "test")[0]
        write_table(path, change_table(pq.read_table(path)))
        sign(directory)

    return apply


def nullable(table: pa.Table) -> pa.Table:
    return table.cast(pa.schema([field.with_nullable(True) for field in table.schema]))


def as_text(table: pa.Table) -> pa.Table:
    at = table.schema.get_field_index("id")
    return table.set_column(at, "id", table["id"].cast(pa.string()))


def signed(edit: Break) -> Break:
    def apply(directory: Path) -> None:
        edit(directory)
        sign(directory)

    return apply


def truncate(path: Path, size: int | None = None) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if size is None else size])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def samplers(edit: Callable[[dict[str, Any]], object]) -> Break:
    return lambda d: edit_json(d / "mapping/samplers.json", edit)


def models(edit: Callable[[dict[str, Any]], object]) -> Break:
    return lambda d: edit_json(d / "mapping/models.json", edit)


BREAKS: list[tuple[str, str, Break]] = [
    ("manifest", "missing", lambda d: (d / MANIFEST).unlink()),
    ("manifest", "not one", lambda d: (d / MANIFEST).write_text("{}")),
    ("file missing", "card", lambda d: (d / "README.md").unlink()),
    ("file digest", "one bit", lambda d: flip(d / "plots/nsfw.png")),
    ("file digest", "size", lambda d: truncate(d / "README.md")),
    ("file not in the manifest", "note", lambda d: (d / "data/note.txt").write_text("x")),
    ("file unreadable", "torn", signed(lambda d: truncate(shards(d, "train")[0]))),
    ("file unreadable", "empty", signed(lambda d: truncate(shards(d, "train")[0], 0))),
    ("shard missing", "second", signed(lambda d: shards(d, "train")[1].unlink())),
    ("shard missing", "all", signed(lambda d: [path.unlink() for path in shards(d, "test")])),
    ("schema", "column more", rewrite(lambda t: t.append_column("extra", t["id"]))),
    ("schema", "column less", rewrite(lambda t: t.drop_columns(["url"]))),
    ("schema", "order", rewrite(lambda t: t.select(t.schema.names[::-1]))),
    ("schema", "nullable", rewrite(nullable)),
    ("schema", "catalogue", rewrite(nullable, "catalogue.parquet")),
    ("row count", "manifest", lambda d: edit_rows_of_manifest(d, "train", 3)),
    ("catalogue", "missing", signed(lambda d: (d / "catalogue.parquet").unlink())),
    ("catalogue", "torn", signed(lambda d: truncate(d / "catalogue.parquet"))),
    ("catalogue", "column", rewrite(lambda t: t.drop_columns(["air"]), "catalogue.parquet")),
    ("catalogue value", "AIR", lambda d: entry(d, True, air="urn:air:sd1:lora:civitai:4@401")),
    ("catalogue value", "hash", lambda d: entry(d, True, sha256="AB" * 32)),
    ("catalogue value", "size", lambda d: entry(d, True, size_bytes=0)),
    ("catalogue value", "downloads", lambda d: entry(d, False, downloads=-1)),
    ("catalogue value", "licence", lambda d: entry(d, False, allow_commercial_use=["Maybe"])),
    ("mapping of models", "value", models(lambda m: m["Sea"].update(model_id=5))),
    ("mapping of models", "version", models(lambda m: m["Sea"]["versions"].pop("v401"))),
    ("mapping of models", "less", models(lambda m: m.pop("XL"))),
    ("mapping of models", "more", models(lambda m: m.update(Nowhere={}))),
    ("mapping of samplers", "value", samplers(lambda m: m["DDIM"].update(scheduler="Other"))),
    ("mapping of samplers", "more", samplers(lambda m: m.update(Magic={}))),
    ("mapping of samplers", "form", samplers(lambda m: m.update(DDIM=1))),
    ("duplicate id", "in train", duplicate_id),
    ("id in two splits", "of train", copy_from_train("id")),
    ("group in two splits", "of train", copy_from_train("group")),
    ("post in two splits", "of train", copy_from_train("post_id")),
    ("near-duplicate in two splits", "of train", copy_from_train("prompt")),
    ("series in two splits", "of train", continue_a_series),
    ("empty prompt", "spaces", change(prompt=" \n")),
    ("value out of range", "nsfw", change(nsfw_level=3)),
    ("value out of range", "nsfw blocked", change(nsfw_level=32)),
    ("value out of range", "reactions", change(reactions=-1)),
    ("value out of range", "split", change(random_split="dev")),
    ("api unreadable", "torn", change(api='{"model":')),
    ("api unreadable", "range", change_api(lambda api: api["params"].update(steps=0))),
    ("api unreadable", "field", change_api(lambda api: api.update(more=1))),
    ("api and row differ", "version", change_api(lambda api: api.update(version="v401"))),
    (
        "api and catalogue differ",
        "AIR",
        change_api(lambda api: api.update(air="urn:air:sd1:checkpoint:civitai:1@2")),
    ),
    ("row and catalogue differ", "id", change(version_id=401)),
    ("unknown model", "renamed", lambda d: edit_row(shards(d, "test")[0], 0, rename_model)),
    ("unknown LoRA", "renamed", change_api(lambda api: api["loras"][0].update(model="No"))),
    (
        "unknown LoRA",
        "checkpoint",
        change_api(lambda api: api["loras"][0].update(model="Sea", version="v401")),
    ),
    (
        "LoRA does not fit",
        "SDXL",
        change_api(lambda api: api["loras"][0].update(model="XL", version="v500")),
    ),
    ("unknown sampler", "magic", change_api(lambda api: api["params"].update(sampler="Magic"))),
]


def edit_rows_of_manifest(directory: Path, split: str, count: int) -> None:
    data = orjson.loads((directory / MANIFEST).read_bytes())
    data["rows"][split] = count
    (directory / MANIFEST).write_bytes(orjson.dumps(data))


def test_a_dataset_as_it_is_made_is_sound(made: Artifact) -> None:
    verdict = verify_dabench(made.path)
    assert verdict.sound and verdict.problems == []
    assert verdict.rows == 48
    assert str(verdict_text(verdict)).startswith(f"{made.path}: sound")


@pytest.mark.parametrize(("kind", "how", "damage"), BREAKS, ids=[f"{k}: {h}" for k, h, _ in BREAKS])
def test_what_is_broken_is_found(
    made: Artifact, tmp_path: Path, kind: str, how: str, damage: Break
) -> None:
    directory = copy_dabench(made, tmp_path)
    damage(directory)
    verdict = verify_dabench(directory)
    assert set(verdict.totals) == {kind}, verdict_text(verdict)
    assert not verdict.sound
    text = verdict_text(verdict)
    assert f"{kind}: " in text and REMEDIES[kind] in text
    assert all(problem.message and problem.kind == kind for problem in verdict.problems)


def test_every_kind_of_problem_has_a_test() -> None:
    with_history = {"moved since the version before", "decided otherwise"}  # test_dabench_history
    assert {kind for kind, _, _ in BREAKS} == set(REMEDIES) - with_history


def test_a_problem_names_file_row_and_value(made: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(made, tmp_path)
    path = shards(directory, "train")[1]
    edit_row(path, 2, lambda row: row.update(reactions=-7))
    (problem,) = verify_dabench(directory).problems
    assert (problem.file, problem.row, problem.value) == (f"data/{path.name}", 2, "-7")
    assert problem.to_dict()["remedy"]


def test_a_row_in_two_splits_names_both_places(made: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(made, tmp_path)
    copy_from_train("id")(directory)
    (problem,) = verify_dabench(directory).problems
    places = {f"data/{shards(directory, s)[0].name} row 0" for s in ("train", "test")}
    assert {f"{problem.file} row {problem.row}", problem.message.removeprefix("also in ")} == places


def test_many_problems_are_counted_and_few_listed(made: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(made, tmp_path)
    path = shards(directory, "train")[0]
    for row in range(5):
        edit_row(path, row, lambda row: row.update(nsfw_level=0), signed=row == 4)
    verdict = verify_dabench(directory, limit=2)
    assert verdict.totals == {"value out of range": 5}
    assert [problem.row for problem in verdict.problems] == [0, 1]
    assert "... and 3 more" in verdict_text(verdict)


def test_leaks_are_looked_for_on_demand(made: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(made, tmp_path)
    copy_from_train("prompt")(directory)
    (problem,) = verify_dabench(directory).problems
    assert problem.value == first_row(directory, "train")["prompt"]
    assert problem.message.startswith("1.00 like that of data/train-00000-of-")
    assert verify_dabench(directory, leaks=False).sound


def test_rows_without_their_columns_are_not_read(made: Artifact, tmp_path: Path) -> None:
    directory = copy_dabench(made, tmp_path)
    rewrite(as_text)(directory)
    verdict = verify_dabench(directory)
    assert verdict.totals["schema"] == 1
    assert set(verdict.totals) == {"schema", "row count"}


def test_a_directory_of_something_else_is_an_error(made: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no DABench"):
        verify_dabench(tmp_path)
    (parent,) = made.path.parent.parent.glob("filter/[0-9a-f]*/")
    with pytest.raises(ArtifactError, match="an artefact of 'filter'"):
        verify_dabench(parent)

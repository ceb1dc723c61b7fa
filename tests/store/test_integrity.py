"""Damage: seen before a stage reads it, set aside, named, repaired by a rerun; edits of people."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import (
    Artifact,
    StageContext,
    StageResult,
    digests,
    integrity,
    open_artifact,
    stage,
    verify_artifact,
)
from tests.store.test_stage import Words, two_machines, write_words

calls: list[str] = []
FOR_PEOPLE = ("README.md", "LICENSE.md", "loss.png", "training_log.jsonl", "plots/models.png")


@stage("toy-model", version=1, config=Words)
def train(config: Words, context: StageContext) -> StageResult:
    """An artifact that took hours: a model with a card and settings that change its answers."""
    calls.append("train")
    table = pa.table({"word": [*config.words] * 1000})
    pq.write_table(table, context.out / "weights.parquet")
    (context.out / "generation_config.json").write_text('{"temperature": 1.0}')
    for name in FOR_PEOPLE:
        (context.out / name).parent.mkdir(exist_ok=True)
        (context.out / name).write_text("# A card\n")
    return StageResult()


@stage("toy-answers", version=1, config=Words)
def answer(config: Words, context: StageContext) -> StageResult:
    """A stage that reads the model."""
    calls.append("answer")
    table = pq.read_table(context.one("model").file("weights.parquet"))
    (context.out / "answers").write_text(str(table.num_rows))
    return StageResult()


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeConfig:
    calls.clear()
    return RuntimeConfig(store=str(tmp_path / "store"))


def flip(path: Path, *, quiet: bool = False) -> None:
    """Change a byte in the middle of a file; quietly: size, mtime and inode stay."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as stream:
        stream.write(data)
    if quiet:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def aside(artifact: Artifact) -> list[str]:
    return [p.name.partition(".")[2] for p in integrity.damaged_copies(artifact.path)]


@pytest.mark.parametrize("name", FOR_PEOPLE)
@pytest.mark.parametrize("change", ["edit", "append", "delete"])
def test_a_card_that_people_edit_costs_nothing(
    runtime: RuntimeConfig, change: str, name: str
) -> None:
    model = train.run(Words(), {}, runtime)
    card = model.path / name
    card.unlink()
    if change != "delete":
        card.write_text("# A note of ours\n" if change == "append" else "# B card\n")
    (model.path / "notes.txt").write_text("not in the manifest at all")
    assert train.run(Words(), {}, runtime) == model
    answer.run(Words(), {"model": [model]}, runtime)
    assert calls == ["train", "answer"] and aside(model) == []
    open_artifact(model.path)


@pytest.mark.parametrize("quiet", [False, True])
def test_what_changes_answers_is_set_aside_and_never_deleted(
    runtime: RuntimeConfig, caplog: pytest.LogCaptureFixture, quiet: bool
) -> None:
    model = train.run(Words(), {}, runtime)
    flip(model.path / "generation_config.json", quiet=quiet)  # the size stays
    again = train.run(Words(), {}, runtime)
    assert again == model and calls == ["train", "train"]
    assert aside(model) == ["damaged-1"]
    damaged = model.path.with_name(f"{model.path.name}.damaged-1")
    assert (damaged / "weights.parquet").read_bytes() == (
        model.path / "weights.parquet"
    ).read_bytes()
    assert "generation_config.json' is damaged" in caplog.text and str(damaged) in caplog.text
    # With the right file and the old name it is whole again.
    (damaged / "generation_config.json").write_text('{"temperature": 1.0}')
    model.path.rename(model.path.with_name("gone"))
    damaged.rename(model.path)
    assert train.run(Words(), {}, runtime) == model and calls == ["train", "train"]


def test_a_damaged_input_is_named_set_aside_and_made_again_by_the_next_run(
    runtime: RuntimeConfig,
) -> None:
    model = train.run(Words(), {}, runtime)
    flip(model.path / "weights.parquet")
    with pytest.raises(
        DamagedArtifact, match=r"weights\.parquet'.*set aside as.*run the same"
    ) as e:
        answer.run(Words(), {"model": [model]}, runtime)
    assert "toy-model" in str(e.value) and calls == ["train"] and aside(model) == ["damaged-1"]
    model = train.run(Words(), {}, runtime)
    answer.run(Words(), {"model": [model]}, runtime)
    assert calls == ["train", "train", "answer"]


def test_a_store_of_before_is_verified_before_its_artifacts_are_read(
    runtime: RuntimeConfig,
) -> None:
    model = train.run(Words(), {}, runtime)
    integrity.forget(model.path)  # nothing is noted of an artifact of an older version
    flip(model.path / "weights.parquet")
    assert train.run(Words(), {}, runtime) == model, "a cached run reads no bytes"
    with pytest.raises(DamagedArtifact, match="weights"):
        answer.run(Words(), {"model": [model]}, runtime)


def test_each_file_is_read_once_a_change(
    runtime: RuntimeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train.run(Words(), {}, runtime)
    integrity.forget(model.path)
    read: list[str] = []
    original = digests.sha256_file
    monkeypatch.setattr(
        digests, "sha256_file", lambda path: (read.append(path.name), original(path))[1]
    )
    digests.cached_sha256.cache_clear()
    for word in "abc":  # as the shards of a stage do
        digests.cached_sha256.cache_clear()  # each in a process of its own
        answer.run(Words(words=(word,)), {"model": [model]}, runtime)
    inputs = [name for name in read if name != "answers"]
    assert sorted(inputs) == ["generation_config.json", "weights.parquet"]
    (model.path / "weights.parquet").touch()
    answer.run(Words(words=("d",)), {"model": [model]}, runtime)
    assert [name for name in read if name == "weights.parquet"] == ["weights.parquet"] * 2


def test_an_input_outside_of_the_store_stays_where_it_is(
    runtime: RuntimeConfig, tmp_path: Path
) -> None:
    model = train.run(Words(), {}, RuntimeConfig(store=str(tmp_path / "other")))
    flip(model.path / "weights.parquet")
    with pytest.raises(DamagedArtifact, match="outside of this store: get a whole copy"):
        answer.run(Words(), {"model": [model]}, runtime)
    assert model.path.exists() and aside(model) == []


def test_an_input_that_a_refresh_replaced_is_not_read_under_its_old_name(
    runtime: RuntimeConfig,
) -> None:
    model = train.run(Words(), {}, runtime)
    other = model.model_copy(update={"content_digest": "0" * 64})
    with pytest.raises(ArtifactError, match=r"has other content.*run the same command again"):
        answer.run(Words(), {"model": [other]}, runtime)


def test_a_damaged_copy_of_a_remote_artifact_is_brought_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = two_machines(tmp_path)
    model = train.run(Words(), {}, here)
    copy = train.run(Words(), {}, there)
    copy.local()
    integrity.forget(copy.path)
    flip(copy.path / "weights.parquet")
    answers = answer.run(Words(), {"model": [model]}, there)
    assert answers.file("answers").read_text() == "3000"
    assert "weights.parquet' is damaged" in caplog.text and "copied from the store" in caplog.text
    assert aside(copy) == [], "the store has it whole"


def test_a_card_that_is_gone_from_a_remote_store_costs_nothing(tmp_path: Path) -> None:
    calls.clear()
    here, there = two_machines(tmp_path)
    model = train.run(Words(), {}, here)
    for card in (p for p in tmp_path.rglob("README.md") if not p.is_relative_to(here.local_store)):
        card.unlink()
    copy = train.run(Words(), {}, there)
    assert copy.local().is_dir() and not copy.path.samefile(model.path)
    verify_artifact(copy, stored=True)
    assert calls == ["train"]


def test_an_unreadable_manifest_is_no_damage(
    runtime: RuntimeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_words.run(Words(), {}, runtime)
    original = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "manifest.json":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ArtifactError, match=re.escape("manifest.json': Permission denied")):
        write_words.run(Words(), {}, runtime)
    assert aside(model) == []

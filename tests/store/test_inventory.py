"""The latest artifacts of a store, its list, and what prune may remove."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffagent.cli import main
from diffagent.errors import ArtifactError, ConfigError
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import (
    Artifact,
    StageContext,
    StageResult,
    artifact_directory,
    inventory,
    latest,
    local_copies,
    open_artifact,
    stage,
)
from diffagent.store.lineage import lineage_lines
from tests.store.test_stage import Words

site = {"text": "one"}


@stage("toy-crawl", version=1, config=Words)
def crawl(config: Words, context: StageContext) -> StageResult:
    """Read the present text of the site."""
    (context.out / "page").write_text(site["text"])
    return StageResult(rows={"pages": 1})


@stage("toy-shard", version=1, config=Words)
def shard(config: Words, context: StageContext) -> StageResult:
    """Copy the text of the snapshot."""
    (context.out / "pairs").write_text(context.one("snapshot").file("page").read_text().upper())
    return StageResult(rows={"pairs": 7})


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeConfig:
    site["text"] = "one"
    return RuntimeConfig(store=str(tmp_path / "store"))


def week(runtime: RuntimeConfig, text: str, config: Words | None = None) -> Artifact:
    """A refresh that finds ``text`` at the site; returns the data set."""
    site["text"] = text
    config = config or Words()
    snapshot = crawl.run(config, {}, runtime, refresh=True)
    return shard.run(config, {"snapshot": [snapshot]}, runtime)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(main.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def states(store: str) -> dict[str, str]:
    return {Path(e.location).name: e.state for e in inventory.read_inventory(store)}


def test_latest_follows_refreshes_and_each_configuration_has_its_own(
    runtime: RuntimeConfig,
) -> None:
    first = week(runtime, "one")
    pointer = Path(runtime.store, "toy-shard", "latest")
    assert open_artifact(pointer) == first and artifact_directory(str(pointer)) == first.path
    second = week(runtime, "two")
    assert second.path != first.path and open_artifact(pointer) == second
    own = pointer.with_name(f"latest-{second.manifest.series}")
    assert first.manifest.series == second.manifest.series
    other = week(runtime, "three", Words(words=("other",)))
    assert other.manifest.series != second.manifest.series
    assert open_artifact(pointer) == other and open_artifact(own) == second
    week(runtime, "two")  # nothing new: the result of the last run is the latest again
    assert open_artifact(pointer) == second
    assert shard.cached(Words(words=("other",)), {"snapshot": []}, runtime) is None
    assert (pointer / "pairs").read_text() == "TWO", "any program can follow it"


def test_a_pointer_is_never_seen_missing(runtime: RuntimeConfig) -> None:
    artifacts = [week(runtime, text) for text in ("one", "two")]
    pointer, over, seen = artifacts[0].path.with_name("latest"), threading.Event(), set()

    def look() -> None:
        while not over.is_set():
            seen.add(str(pointer.readlink()))

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(200):
        for artifact in artifacts:
            latest.point(artifact.path, artifact.manifest.series)
    over.set()
    thread.join()
    assert seen <= {artifact.path.name for artifact in artifacts}


def test_a_store_of_before_gets_its_pointers_when_a_run_finds_it(runtime: RuntimeConfig) -> None:
    dataset = week(runtime, "one")
    for link in Path(runtime.store).glob("*/latest*"):
        link.unlink()
    for manifest in Path(runtime.store).glob("*/*/manifest.json"):  # as older versions wrote them
        manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "series": ""}))
    series = {e.stage: e.series for e in inventory.read_inventory(runtime.store)}
    snapshot = crawl.run(Words(), {}, runtime)
    assert shard.run(Words(), {"snapshot": [snapshot]}, runtime) == dataset
    assert dataset.path.with_name("latest").readlink() == Path(dataset.path.name)
    assert dataset.path.with_name(f"latest-{series['toy-shard']}").exists()
    second = week(runtime, "two")
    assert second.manifest.series == series["toy-shard"], "old and new ones are of one series"


def test_a_remote_store_has_pointers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFAGENT_CACHE", str(tmp_path / "cache"))
    runtime = RuntimeConfig(store=(tmp_path / "s").as_uri())
    week(runtime, "one")
    second = week(runtime, "two")
    assert open_artifact(f"{runtime.store}/toy-shard/latest") == second
    assert artifact_directory(f"{runtime.store}/toy-shard/latest").samefile(second.path)
    listed = {e.location: e.state for e in inventory.read_inventory(runtime.store)}
    assert listed[second.location] == "latest"
    assert sorted(listed.values()) == ["latest", "latest, needed by toy-shard", "superseded"]
    with pytest.raises(ArtifactError, match="no run has written one"):
        open_artifact(f"{runtime.store}/toy-none/latest")
    result = CliRunner().invoke(main.app, ["artifact", "prune", runtime.store])
    assert isinstance(result.exception, ConfigError)


def test_a_wrong_place_is_named(runtime: RuntimeConfig, tmp_path: Path) -> None:
    dataset = week(runtime, "one")
    with pytest.raises(ArtifactError, match=r"did you mean '.*toy-shard/latest'"):
        open_artifact(dataset.path.parent)
    with pytest.raises(ArtifactError, match="no such directory"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="it is a file"):
        open_artifact(dataset.path / "pairs")


def test_prune_keeps_the_latest_and_what_they_need(runtime: RuntimeConfig) -> None:
    first, second = week(runtime, "one"), week(runtime, "two")
    other = week(runtime, "three", Words(words=("other",)))
    damaged = second.path.with_name(f"{second.path.name}.damaged-1")
    partial = first.path.with_name(f".{first.path.name}.partial")
    partial.mkdir()
    (first.path.parent / "someone's").mkdir()
    (first.path.parent / "someone's" / "manifest.json").write_text("{}")
    damaged.mkdir()
    (damaged / "pairs").write_text("TWI")
    state_of = states(runtime.store)
    assert state_of[first.path.name] == "superseded" and state_of[second.path.name] == "latest"
    assert list(state_of.values()).count("superseded") == 2, "the old data set and its snapshot"

    def left() -> set[str]:
        return {e.location for e in inventory.read_inventory(runtime.store)}

    before = left()
    shown = invoke("artifact", "prune", runtime.store)
    assert f"would remove {first.path} (superseded" in shown and "--yes" in shown
    assert left() == before, "nothing is removed without --yes"
    with local_copies.in_use([first.path]):
        assert "in use, stays" in invoke("artifact", "prune", runtime.store, "--yes")
    assert first.path.exists()
    assert "freed" in invoke("artifact", "prune", runtime.store, "--yes")
    assert not first.path.exists() and damaged.exists() and other.path.exists()
    assert len(before - left()) == 2
    assert len(lineage_lines(second)) == 2 and "not in" not in lineage_lines(second)[1]
    invoke("artifact", "prune", runtime.store, "--yes", "--damaged", "--unfinished")
    assert not damaged.exists() and not partial.exists()
    assert (first.path.parent / "someone's").exists(), "no artifact, by its name"
    invoke("artifact", "prune", runtime.store, "--yes", "--other-configs")
    assert not second.path.exists() and open_artifact(other.path) == other
    assert set(states(runtime.store).values()) == {"latest", "latest, needed by toy-shard"}


def test_list_prints_text_and_json(runtime: RuntimeConfig, tmp_path: Path) -> None:
    week(runtime, "one")
    second = week(runtime, "two")
    shown = invoke("artifact", "list", runtime.store)
    assert "latest, needed by toy-shard" in shown and "superseded" in shown
    lines = invoke("artifact", "list", runtime.store, "--json", "--stage", "toy-shard")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["state"] for row in rows] == ["superseded", "whole"]
    assert rows[1]["path"] == str(second.path) and rows[1]["rows"] == {"pairs": 7}
    with pytest.raises(ArtifactError, match="no such directory"):
        inventory.read_inventory(str(tmp_path / "none"))

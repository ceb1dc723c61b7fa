"""Artifacts: identity, atomic commit, damage, resume at any kill point, refresh."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from diffagent.errors import ArtifactError, ConfigError, ServerError, TrainingError
from diffagent.run_config import load_config
from diffagent.schemas.manifest import Funnel, FunnelStep
from diffagent.schemas.runtime import RuntimeConfig, TaskSettings
from diffagent.store import (
    Artifact,
    StageContext,
    StageResult,
    canonical_json,
    child,
    integrity,
    local_copies,
    named_files,
    object_store,
    open_artifact,
    stage,
    verify_artifact,
)
from diffagent.store.child import run_in_child
from diffagent.store.lineage import lineage_lines
from tests.conftest import file_size_limit


class Words(BaseModel):
    model_config = ConfigDict(frozen=True)
    words: tuple[str, ...] = ("a", "b", "c")
    fail: str = ""


@stage("toy-words", version=1, config=Words)
def write_words(config: Words, context: StageContext) -> StageResult:
    """One file a word; an interrupted run leaves the files it had."""
    if config.fail == "server":
        raise ServerError("toy: try again")
    if config.fail == "training":
        raise TrainingError("toy: never again")
    if config.fail == "slow":
        print("still here", flush=True)
        time.sleep(60)
    if config.fail == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    for number, word in enumerate(config.words):
        file = context.out / f"{number}.txt"
        if not file.exists():
            file.write_text(word)
        if os.environ.get("TOY_KILL_AFTER") == str(number):
            os.kill(os.getpid(), signal.SIGKILL)
    return StageResult(rows={"words": len(config.words)})


@stage("toy-wrong", version=1, config=Words)
def wrong_funnel(config: Words, context: StageContext) -> StageResult:
    step = FunnelStep(filter="f", reason="r", dropped=1)
    return StageResult(funnels=(Funnel(unit="words", seen=3, kept=1, steps=(step,)),))


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeConfig:
    return RuntimeConfig(store=str(tmp_path / "store"))


def test_second_run_returns_the_same_artifact(runtime: RuntimeConfig) -> None:
    first = write_words.run(Words(), {}, runtime)
    written = (first.path / "manifest.json").stat().st_mtime_ns
    assert write_words.run(Words(), {}, runtime) == first
    assert (first.path / "manifest.json").stat().st_mtime_ns == written
    verify_artifact(first)
    manifest = first.manifest
    assert [f.path for f in manifest.files] == ["0.txt", "1.txt", "2.txt"]
    assert manifest.rows == {"words": 3} and manifest.identity.startswith(first.path.name)


def test_identity_is_of_config_and_input_contents(runtime: RuntimeConfig) -> None:
    one = write_words.run(Words(), {}, runtime)
    two = write_words.run(Words(words=("x",)), {}, runtime)
    assert write_words.identity(Words(), {}) != write_words.identity(Words(words=("x",)), {})
    assert write_words.identity(Words(), {"a": [one]}) != write_words.identity(
        Words(), {"a": [two]}
    )
    elsewhere = one.model_copy(update={"path": Path("/elsewhere"), "identity": "other"})
    assert write_words.identity(Words(), {"a": [one]}) == write_words.identity(
        Words(), {"a": [elsewhere]}
    ), "the path and the request of an input are not part of it"


def test_identity_is_of_the_files_that_the_config_names(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "weights.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    reader = stage(
        "toy-reader", version=1, config=Words, files=lambda c: named_files("a hub's name", *c.words)
    )(lambda config, context: StageResult())
    config = Words(words=(str(weights.parent),))
    first = reader.identity(config, {})
    assert reader.identity(config, {}) == first
    weights.write_bytes(b"two!")
    assert reader.identity(config, {}) != first, "other weights under the same name"
    weights.write_bytes(b"one")
    weights.with_name("README.md").write_text("a note")
    weights.with_name(".DS_Store").write_text("of a file manager")
    assert reader.identity(config, {}) == first, "when they were written does not matter"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_canonical_json_is_one_spelling_a_value(value: object) -> None:
    data = canonical_json({"b": value, "a": 1})
    assert json.loads(data) == {"a": 1, "b": value}
    assert canonical_json(json.loads(data)) == data


@pytest.mark.parametrize("damage", ["manifest", "missing", "size", "nonsense"])
def test_damage_is_found_and_rebuilt(runtime: RuntimeConfig, damage: str) -> None:
    artifact = write_words.run(Words(), {}, runtime)
    if damage == "manifest":
        (artifact.path / "manifest.json").unlink()
    elif damage == "missing":
        (artifact.path / "1.txt").unlink()
    elif damage == "size":
        (artifact.path / "1.txt").write_text("longer")
    else:
        (artifact.path / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError):
        open_artifact(artifact.path)
    assert write_words.run(Words(), {}, runtime) == artifact
    assert (artifact.path / "1.txt").read_text() == "b"


def test_a_flipped_byte_is_found_by_verify(runtime: RuntimeConfig) -> None:
    artifact = write_words.run(Words(), {}, runtime)
    (artifact.path / "1.txt").write_text("B")
    with pytest.raises(ArtifactError, match=r"1\.txt.*damaged"):
        verify_artifact(artifact)


def test_a_funnel_that_does_not_add_up_is_refused(runtime: RuntimeConfig) -> None:
    with pytest.raises(ArtifactError, match="kept 1 \\+ dropped 1 != seen 3"):
        wrong_funnel.run(Words(), {}, runtime)
    assert wrong_funnel.cached(Words(), {}, runtime) is None


@pytest.mark.parametrize("kill_after", [0, 1, 2])
def test_kill_9_then_the_same_command(tmp_path: Path, kill_after: int) -> None:
    script = textwrap.dedent(
        """
        import sys
        from diffagent.errors import ConfigError
        from diffagent.schemas.runtime import RuntimeConfig
        from diffagent.run_config import load_config
        from tests.store.test_stage import Words
        from tests.store.test_stage import write_words
        from diffagent.schemas.runtime import TaskSettings
        print(write_words.run(Words(), {}, RuntimeConfig(store=sys.argv[1])).model_dump_json())
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    environment = {**os.environ, "TOY_KILL_AFTER": str(kill_after)}
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not list((tmp_path / "store").rglob("manifest.json")), "nothing half-written is visible"
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    resumed = Artifact.model_validate_json(done.stdout)
    undisturbed = write_words.run(Words(), {}, RuntimeConfig(store=str(tmp_path / "other")))
    assert resumed.content_digest == undisturbed.content_digest


def test_refresh_keeps_what_did_not_change(runtime: RuntimeConfig) -> None:
    first = write_words.run(Words(), {}, runtime)
    assert write_words.run(Words(), {}, runtime, refresh=True) == first
    real = [p for p in first.path.parent.iterdir() if p.is_dir() and not p.is_symlink()]
    assert real == [first.path]


@dataclass(frozen=True)
class Resumed(StageContext):
    directory: Path = Path()


def test_a_stage_can_start_from_the_earlier_results_of_its_request(runtime: RuntimeConfig) -> None:
    seen: list[Artifact | None] = []
    reports: list[tuple[float | None, str]] = []

    def extend(context: StageContext, directory: Path) -> Resumed:
        return Resumed(**vars(context), directory=directory)

    @stage("toy-resuming", version=1, config=Words, extend_context=extend)
    def resume(config: Words, context: Resumed) -> StageResult:
        seen.append(context.previous)
        memory = context.directory.with_name(f"{context.directory.name}.memory.json")
        memory.write_text((memory.read_text() if memory.exists() else "") + "x")
        context.progress(0.5, "half")
        (context.out / "same").write_text("always")
        return StageResult()

    first = resume.run(Words(), {}, runtime, progress=lambda f, text: reports.append((f, text)))
    assert resume.run(Words(), {}, runtime) == first
    for _ in range(2):
        assert resume.run(Words(), {}, runtime, refresh=True) == first
    assert seen == [None, first, first]
    assert reports == [(0.5, "half")]
    memory = first.path.with_name(f"{first.path.name}.memory.json")
    assert memory.read_text() == "xxx", "not a part of the artifact, so it outlives a refresh"
    assert [f.path for f in first.manifest.files] == ["same"]


def test_a_refresh_compares_every_byte_of_what_it_starts_from(
    runtime: RuntimeConfig,
) -> None:
    seen: list[Artifact | None] = []

    @stage("toy-words", version=1, config=Words)
    def resume(config: Words, context: StageContext) -> StageResult:
        seen.append(context.previous)
        return write_words.body(config, context)

    first = resume.run(Words(), {}, runtime)
    (first.path / "1.txt").write_text("B")
    # The note on the files was written after the damage, as by a disk that lost a byte silently.
    integrity.note_read(first.path, first.manifest)
    assert resume.run(Words(), {}, runtime) == first, "nothing has changed since the note"
    assert resume.run(Words(), {}, runtime, refresh=True) == first
    assert seen == [None, None], "the damaged one is no start"
    assert (first.path / "1.txt").read_text() == "b"
    (aside,) = integrity.damaged_copies(first.path)
    assert (aside / "1.txt").read_text() == "B"


def test_a_full_disk_says_what_to_do_and_leaves_nothing_visible(runtime: RuntimeConfig) -> None:
    large = Words(words=("a", "b" * 10_000))
    with file_size_limit(5_000), pytest.raises(ArtifactError, match=r"runtime\.store") as caught:
        write_words.run(large, {}, runtime)
    assert "Make room" in str(caught.value) and not caught.value.retryable
    assert write_words.cached(large, {}, runtime) is None


def test_child_process(runtime: RuntimeConfig) -> None:
    entry = "tests.store.test_stage:write_words"
    artifact = run_in_child(entry, Words(), {}, runtime)
    assert artifact == write_words.run(Words(), {}, runtime)
    with pytest.raises(ServerError, match="toy: try again") as caught:
        run_in_child(entry, Words(fail="server"), {}, runtime)
    assert caught.value.retryable
    with pytest.raises(TrainingError, match="never again"):
        run_in_child(entry, Words(fail="training"), {}, runtime)
    with pytest.raises(ArtifactError, match="ended with code -9") as crashed:
        run_in_child(entry, Words(fail="crash"), {}, runtime)
    assert crashed.value.retryable, "killed from outside: the next try resumes"


def test_lines_of_a_child_keep_their_level(caplog: pytest.LogCaptureFixture) -> None:
    """A warning of a child, such as a retry, is a warning in the log of a flow's run too."""
    caplog.set_level("INFO", "diffagent")
    lines = ["WARNING diffagent.x: try 2 of 8", "INFO diffagent.x: fine", "ERROR diffagent: no"]
    program = "import sys; print(*sys.argv[1:], sep='\\n')"
    code, last = child._run_logged(
        [sys.executable, "-c", program, *lines, "words"],
        name="child",
        timeout=60,
        progress=lambda fraction, text: None,
    )
    assert (code, last) == (0, "words")
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "child | diffagent.x: try 2 of 8"),
        ("INFO", "child | INFO diffagent.x: fine"),
        ("ERROR", "child | diffagent: no"),
        ("INFO", "child | words"),
    ]


def test_child_timeout(runtime: RuntimeConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "diffagent")
    hasty = runtime.model_copy(update={"tasks": TaskSettings(timeout_seconds=10.0)})
    with pytest.raises(ArtifactError, match="longer than 10 s"):
        run_in_child("tests.store.test_stage:write_words", Words(fail="slow"), {}, hasty)
    assert "write_words | still here" in caplog.text


def two_machines(tmp_path: Path) -> tuple[RuntimeConfig, RuntimeConfig]:
    """Two machines that share a remote store, each with a cache of its own."""
    store = (tmp_path / "store").as_uri()
    here, there = (
        RuntimeConfig(store=store, cache={"directory": str(tmp_path / n)})
        for n in ("here", "there")
    )
    return here, there


def test_a_remote_store_is_shared(tmp_path: Path) -> None:
    here, there = two_machines(tmp_path)
    artifact = write_words.run(Words(), {}, here)
    assert artifact.location == f"{here.store}/toy-words/{artifact.path.name}"
    assert write_words.cached(Words(words=("z",)), {}, there) is None
    copy = write_words.run(Words(), {}, there)
    assert copy.content_digest == artifact.content_digest
    assert copy.path.is_relative_to(tmp_path / "there") and not copy.path.exists(), "not copied"
    assert copy.manifest == artifact.manifest
    assert copy.file("1.txt").read_text() == "b" and copy.path.exists()
    verify_artifact(copy)
    # A handle of another machine is brought to where this one keeps its copies.
    follower = write_words.run(Words(words=("next",)), {"words": [artifact]}, there)
    assert follower.manifest.inputs["words"][0].content_digest == artifact.content_digest


def test_lineage_of_a_remote_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = two_machines(tmp_path)
    parent = write_words.run(Words(), {}, here)
    built = write_words.run(Words(words=("child",)), {"words": [parent]}, here)
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "read_remote", lambda uri: pytest.fail(f"{uri} is read"))
        assert len(lineage_lines(built)) == 2, "from the copies on this disk"
    child = write_words.run(Words(words=("child",)), {"words": [parent]}, there)
    lines = lineage_lines(child)
    assert len(lines) == 2 and parent.identity[:16] in lines[1] and "not in" not in lines[1]
    assert lineage_lines(open_artifact(child.local())) == lines, "by its directory as well"
    assert not parent.path.is_relative_to(tmp_path / "there")


def test_a_remote_store_is_not_trusted_with_paths(tmp_path: Path) -> None:
    here, there = two_machines(tmp_path)
    artifact = write_words.run(Words(), {}, here)
    manifest = tmp_path / "store" / "toy-words" / artifact.path.name / "manifest.json"
    (folder,) = (p for p in manifest.parent.iterdir() if p.is_dir())
    moved = manifest.parent / "0.txt"
    moved.write_text("a")
    text = manifest.read_text().replace('"0.txt"', '"../0.txt"')
    manifest.write_text(text)
    renamed = hashlib.sha256(
        canonical_json(sorted([e["path"], e["sha256"]] for e in json.loads(text)["files"]))
    ).hexdigest()
    folder.rename(folder.with_name(renamed[:16]))
    stolen = open_artifact(f"{here.store}/toy-words/{artifact.path.name}")
    with pytest.raises(ArtifactError, match="leaves the artifact"):
        stolen.model_copy(update={"path": there.local_store / "toy-words" / "x"}).local()


def test_a_store_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    unwritable = RuntimeConfig(store="nonsense://x/y", cache={"directory": str(tmp_path)})
    with pytest.raises(ArtifactError, match=r"runtime\.store") as caught:
        write_words.run(Words(), {}, unwritable)
    assert not caught.value.retryable
    assert not list(tmp_path.rglob("0.txt"))


def test_the_cache_of_a_remote_store_has_a_bound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, _ = two_machines(tmp_path)
    here = here.model_copy(update={"cache": here.cache.model_copy(update={"max_gb": 2500 / 1e9})})
    configs = [Words(words=(letter * 1000,)) for letter in "abcd"]
    artifacts = [write_words.run(config, {}, here) for config in configs[:3]]
    assert [a.path.exists() for a in artifacts] == [False, True, True], "the first is removed first"
    with local_copies.in_use([artifacts[1].path]):
        last = write_words.run(configs[3], {}, here)
        assert [a.path.exists() for a in artifacts] == [False, True, False], (
            "an artifact in use stays"
        )
    assert artifacts[0].file("0.txt").read_text() == "a" * 1000, "and comes back when it is read"
    # An artifact that the store lacks is never removed.
    shutil.rmtree(tmp_path / "store")
    write_words.run(configs[0].model_copy(update={"words": ("e" * 1000,)}), {}, here)
    assert last.path.exists() and "store does not have it" in caplog.text


def test_credentials_in_the_address_of_a_store_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rewards: {scorers: [], unify: chatgen}\nruntime: {store: 's3://id:key@b/c'}")
    with pytest.raises(ConfigError, match="environment only") as caught:
        load_config(path)
    assert "key" not in str(caught.value)

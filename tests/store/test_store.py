"""The promises of a store, which hold for a directory and for a URI."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffagent.errors import DamagedArtifact
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact, Store, open_store, sha256_file, verify_artifact
from diffagent.store.local_store import LocalStore
from diffagent.store.remote_store import RemoteStore
from diffagent.store.store import home_of
from tests.store.test_stage import Words, write_words


@pytest.fixture(params=["directory", "uri"])
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> RuntimeConfig:
    store = tmp_path / "store"
    if request.param == "directory":
        return RuntimeConfig(store=str(store))
    return RuntimeConfig(store=store.as_uri(), cache={"directory": str(tmp_path / "cache")})


@pytest.fixture
def store(runtime: RuntimeConfig) -> Store:
    return open_store(runtime)


def place(runtime: RuntimeConfig) -> Path:
    return write_words.directory(Words(), {}, runtime)


def replace(store: Store, existing: Artifact) -> Artifact:
    """Commit other content for the request of ``existing``."""
    directory = existing.path
    with store.begin(directory, refresh=True) as present:
        assert present == existing
        partial = directory.with_name(f".{directory.name}.partial")
        partial.mkdir(exist_ok=True)
        (partial / "0.txt").write_text("news")
        entry = existing.manifest.files[0].model_copy(
            update={"size": 4, "sha256": sha256_file(partial / "0.txt")}
        )
        manifest = existing.manifest.model_copy(
            update={"files": (entry,), "content_digest": "f" * 64}
        )
        return store.commit(partial, directory, manifest, present)


def test_the_kind_of_store_follows_the_configuration(tmp_path: Path) -> None:
    local = RuntimeConfig(store=str(tmp_path))
    remote = RuntimeConfig(
        store=f"{tmp_path.as_uri()}/", cache={"directory": str(tmp_path), "max_gb": 2}
    )
    assert open_store(local) == LocalStore(tmp_path)
    assert open_store(remote) == RemoteStore(tmp_path.as_uri(), remote.local_store, 2 * 10**9)


def test_nothing_is_found_before_the_commit(runtime: RuntimeConfig, store: Store) -> None:
    directory = place(runtime)
    assert store.find(directory) is None
    with store.begin(directory) as existing:
        assert existing is None
    artifact = write_words.run(Words(), {}, runtime)
    assert artifact.path == directory
    assert store.find(directory) == artifact
    with store.begin(directory) as existing:
        assert existing == artifact
    store.trim()
    assert store.find(directory) == artifact


def test_newer_content_takes_the_place_of_the_older(runtime: RuntimeConfig, store: Store) -> None:
    artifact = write_words.run(Words(), {}, runtime)
    newer = replace(store, artifact)
    assert store.find(artifact.path) == newer != artifact
    assert newer.file("0.txt").read_text() == "news"
    retired = artifact.path.with_name(f"{artifact.path.name}.{artifact.content_digest[:8]}")
    assert (retired / "1.txt").read_text() == "b"
    assert write_words.cached(Words(), {}, runtime) == newer


@pytest.mark.parametrize("step", [1, 2])
def test_a_commit_that_is_cut_off_is_repeated(
    runtime: RuntimeConfig, store: Store, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The steps are: retire the older content, rename the newer into place."""
    artifact, calls = write_words.run(Words(), {}, runtime), []
    rename = Path.rename

    def cut_off(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == step:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", cut_off)
    with pytest.raises(KeyboardInterrupt):
        replace(store, artifact)
    monkeypatch.setattr(Path, "rename", rename)
    present = store.find(artifact.path)
    assert present in (artifact, None), "never the half of one"
    result = write_words.run(Words(), {}, runtime)
    verify_artifact(result)
    assert [path.name for path in result.glob("*.txt")] == ["0.txt", "1.txt", "2.txt"]


def test_an_input_is_compared_and_stays_while_it_is_read(
    runtime: RuntimeConfig, store: Store
) -> None:
    artifact = write_words.run(Words(), {}, runtime)
    with home_of(artifact, runtime).fetch(artifact, "run it again") as copy:
        assert copy.file("1.txt").read_text() == "b"
        assert copy.path.with_name(f"{copy.path.name}.use").exists()


def test_a_damaged_input_is_repaired_or_set_aside(runtime: RuntimeConfig, store: Store) -> None:
    artifact = write_words.run(Words(), {}, runtime)
    (artifact.path / "1.txt").write_text("B")
    if isinstance(store, RemoteStore):
        with store.fetch(artifact, "run it again") as copy:
            assert copy.file("1.txt").read_text() == "b"
        return
    with pytest.raises(DamagedArtifact, match=r"1\.txt'.*set aside as .*damaged-1': run it again"):
        store.fetch(artifact, "run it again").__enter__()
    assert store.find(artifact.path) is None

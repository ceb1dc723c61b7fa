"""The artifact store on S3, when processes die, servers fail and objects are damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffagent.errors import ArtifactError
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import artifact_directory, object_store, open_artifact, verify_artifact
from tests.conftest import ROOT
from tests.contract.s3_server import ENVIRONMENT, S3Server, s3_server
from tests.store.test_stage import Words, write_words

STORE = "s3://bucket/some/prefix"


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(running: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server with an empty bucket, and an environment that leads to it."""
    import fsspec

    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": running.url}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("DIFFAGENT_CACHE", str(tmp_path / "cache"))
    running.fault = lambda method, path: None
    running.held.clear()
    running.release.clear()
    files = fsspec.filesystem("s3", use_listings_cache=False)
    if files.exists("bucket"):
        files.rm("bucket", recursive=True)
    files.mkdir("bucket")
    object_store.check_writable.cache_clear()
    running.requests.clear()
    return running


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeConfig:
    return RuntimeConfig(store=STORE, cache={"directory": str(tmp_path / "cache")})


def on(machine: str, tmp_path: Path) -> RuntimeConfig:
    return RuntimeConfig(store=STORE, cache={"directory": str(tmp_path / machine)})


def builder(tmp_path: Path, machine: str, before: str = "") -> list[str]:
    """A command that builds the toy artifact on a machine of its own; ``before`` runs first."""
    code = textwrap.dedent(f"""
        from pathlib import Path
        from diffagent.schemas.runtime import RuntimeConfig
        from tests.store.test_stage import Words
        from tests.store.test_stage import write_words
        {before}
        runtime = RuntimeConfig(store={STORE!r}, cache={{'directory': {str(tmp_path / machine)!r}}})
        print(write_words.run(Words(), {{}}, runtime).content_digest)
    """)
    return [sys.executable, "-c", code]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ}, stdout=subprocess.PIPE, text=True
    )


def test_the_manifest_is_the_last_object(s3: S3Server, tmp_path: Path) -> None:
    artifact = write_words.run(Words(), {}, on("one", tmp_path))
    sent = [path for path in s3.asked("PUT") if ".diffagent" not in path]
    assert sorted(p.rsplit("/", 1)[1] for p in sent[:3]) == ["0.txt", "1.txt", "2.txt"]
    pointers = ["latest", f"latest-{artifact.manifest.series}"]
    assert [p.rsplit("/", 1)[1] for p in sent[3:]] == ["manifest.json"] * 2 + pointers
    assert sent[4] == f"/bucket/some/prefix/toy-words/{artifact.path.name}/manifest.json"

    s3.requests.clear()
    there = on("two", tmp_path)
    copy = write_words.cached(Words(), {}, there)
    assert copy and copy.location == artifact.location
    assert len(s3.requests) <= 3, "a manifest and a listing, whatever the number of files"
    assert [p.read_text() for p in copy.glob("*.txt")] == ["a", "b", "c"]
    verify_artifact(copy)
    assert artifact_directory(artifact.location) == open_artifact(artifact.location).path
    assert not any(
        secret.encode() in data
        for data in s3.objects().values()
        for secret in (ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], ENVIRONMENT["AWS_ACCESS_KEY_ID"])
    )


def test_killed_in_the_middle_of_an_upload(s3: S3Server, tmp_path: Path) -> None:
    s3.fault = lambda method, path: "hold" if method == "PUT" and path.endswith("/1.txt") else None
    process = start(builder(tmp_path, "one"))
    assert s3.held.wait(60)
    deadline = time.monotonic() + 30
    while sum(name.endswith(".txt") for name in s3.objects()) < 2:
        assert time.monotonic() < deadline
    process.kill()
    process.wait()
    s3.fault = lambda method, path: None
    s3.release.set()
    here, elsewhere = on("one", tmp_path), on("two", tmp_path)
    assert not s3.asked("PUT", "manifest.json")
    assert write_words.cached(Words(), {}, elsewhere) is None, (
        "without a manifest it does not count"
    )

    s3.requests.clear()
    artifact = write_words.run(Words(), {}, here)
    assert [p.rsplit("/", 1)[1] for p in s3.asked("PUT", ".txt")] == ["1.txt"], (
        "the others are there"
    )
    copy = write_words.cached(Words(), {}, elsewhere)
    assert copy and copy.content_digest == artifact.content_digest
    verify_artifact(copy)


def test_a_large_file_is_seen_whole_or_not_at_all(s3: S3Server, tmp_path: Path) -> None:
    """In parts: killed between two of them, nothing is there; then the same command sends it."""
    before = (
        "import s3fs.core, tests.store.test_stage as toys; "
        "s3fs.core.calculate_chunksize = lambda size, chunksize=None: 5 * 2**20; "
        "toys.Words.model_fields['words'].default = (chr(97) * 11 * 2**20,); "
        "toys.Words.model_rebuild(force=True)"
    )
    command = builder(tmp_path, "one", before)
    s3.fault = lambda method, path: "hold" if "partNumber=2" in path else None
    process = start(command)
    assert s3.held.wait(120)
    process.kill()
    process.wait()
    s3.release.set()
    assert not [name for name in s3.objects() if name.endswith("0.txt")]
    s3.fault = lambda method, path: None
    done = start(command)
    assert done.wait(120) == 0
    (name,) = (name for name in s3.objects() if name.endswith("0.txt"))
    assert len(s3.objects()[name]) == 11 * 2**20


def test_a_server_that_fails_now_and_then(s3: S3Server, runtime: RuntimeConfig) -> None:
    left = {"PUT": 1, "GET": 2}

    def fault(method: str, path: str) -> str | None:
        left[method] = left.get(method, 0) - 1
        return "error" if left[method] >= 0 else None

    s3.fault = fault
    artifact = write_words.run(Words(), {}, runtime)
    assert left["PUT"] < 0 and left["GET"] < 0
    verify_artifact(artifact)


def test_a_store_that_is_away_loses_no_work(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.fault = lambda method, path: "error" if method == "PUT" and ".txt" in path else None
    failing = on("one", tmp_path)
    with pytest.raises(ArtifactError, match="cannot write") as caught:
        write_words.run(Words(), {}, failing)
    assert caught.value.retryable and "run the same command again" in str(caught.value)
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)

    s3.fault = lambda method, path: None
    (built,) = tmp_path.glob("one/*/toy-words/*/manifest.json")
    written = built.stat().st_mtime_ns
    again = write_words.run(Words(), {}, failing)
    assert built.stat().st_mtime_ns == written, "sent, not built again"
    assert open_artifact(again.location).content_digest == again.content_digest


def test_a_truncated_object_is_built_again(
    s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = write_words.run(Words(), {}, on("one", tmp_path))
    (name,) = (name for name in s3.objects() if name.endswith("1.txt"))
    put(name, b"")
    there = on("two", tmp_path)
    assert (
        write_words.cached(Words(), {}, there) is None
        and "missing or have another size" in caplog.text
    )
    assert write_words.run(Words(), {}, there).content_digest == artifact.content_digest
    assert s3.objects()[name] == b"b"


def test_a_changed_byte_is_found_by_its_digest(s3: S3Server, tmp_path: Path) -> None:
    artifact = write_words.run(Words(), {}, on("one", tmp_path))
    (name,) = (name for name in s3.objects() if name.endswith("1.txt"))
    put(name, b"B")
    copy = write_words.cached(Words(), {}, on("two", tmp_path))
    assert copy
    verify_artifact(artifact)  # the files on disk, from which it was sent, are whole
    for look in (copy.local, lambda: verify_artifact(artifact, stored=True)):
        with pytest.raises(ArtifactError, match=r"1\.txt' is damaged.*delete it and run"):
            look()
    assert not copy.path.exists(), "nothing damaged is ever in place"
    remove(name)
    assert (
        write_words.run(Words(), {}, on("two", tmp_path)).content_digest == artifact.content_digest
    )
    verify_artifact(copy)


def test_a_download_that_is_cut_short_is_made_again(s3: S3Server, tmp_path: Path) -> None:
    large = Words(words=("x" * 100_000,))
    write_words.run(large, {}, on("one", tmp_path))
    cuts = iter(["cut"])
    s3.fault = lambda method, path: (
        next(cuts, None) if method == "GET" and path.endswith("0.txt") else None
    )
    copy = write_words.run(large, {}, on("two", tmp_path))
    assert copy.file("0.txt").read_text() == "x" * 100_000


def test_two_machines_build_the_same_at_once(s3: S3Server, tmp_path: Path) -> None:
    """No lock reaches other machines: both build, and the result is whole and the same."""
    meet = textwrap.dedent(f"""
        import time
        body = write_words.body
        def slow(config, context):
            Path({str(tmp_path)!r}, context.out.parents[2].name + '.ready').touch()
            while len(list(Path({str(tmp_path)!r}).glob('*.ready'))) < 2:
                time.sleep(0.01)
            return body(config, context)
        object.__setattr__(write_words, 'body', slow)
    """).replace("\n", "\n        ")
    processes = [start(builder(tmp_path, machine, meet)) for machine in ("one", "two")]
    digests = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    copy = write_words.cached(Words(), {}, on("three", tmp_path))
    assert copy and digests == [copy.content_digest] * 2
    verify_artifact(copy)
    assert len([name for name in s3.objects() if name.endswith(".txt")]) == 3


def test_writers_of_different_contents_never_mix(s3: S3Server, tmp_path: Path) -> None:
    """A stage that breaks its promise, or a refreshed crawl: the last manifest wins, whole."""
    artifact = write_words.run(Words(), {}, on("one", tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.txt").write_text("not a")
    entry = artifact.manifest.files[0].model_copy(
        update={"size": 5, "sha256": object_store.hashlib.sha256(b"not a").hexdigest()}
    )
    replaced = artifact.manifest.model_copy(update={"files": (entry,), "content_digest": "other"})
    (other / "manifest.json").write_text(replaced.model_dump_json())
    object_store.push(other, replaced, artifact.location)
    files = {name: data for name, data in s3.objects().items() if name.endswith("0.txt")}
    assert sorted(files.values()) == [b"a", b"not a"], "both are there whole"
    with pytest.raises(ArtifactError, match="replaced by an artifact with other content"):
        artifact.model_copy(update={"path": tmp_path / "elsewhere" / "x"}).local()


def test_a_missing_bucket_is_told_before_the_work(s3: S3Server, tmp_path: Path) -> None:
    runtime = RuntimeConfig(store="s3://no-such-bucket/x", cache={"directory": str(tmp_path)})
    with pytest.raises(ArtifactError, match="no-such-bucket") as caught:
        write_words.run(Words(), {}, runtime)
    assert not caught.value.retryable and not list(tmp_path.rglob("*.txt"))


def test_the_command_line_reads_artifacts_of_the_store(s3: S3Server, tmp_path: Path) -> None:
    artifact = write_words.run(Words(), {}, on("one", tmp_path))

    def diffagent(*words: str) -> str:
        command = [sys.executable, "-m", "diffagent", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert artifact.identity in diffagent("artifact", "show", artifact.location)
    assert not s3.asked("GET", ".txt"), "showing copies nothing"
    assert "all 3 files" in diffagent("artifact", "verify", artifact.location)
    assert len(s3.asked("GET", ".txt")) == 3


def put(name: str, data: bytes) -> None:
    import fsspec

    fsspec.filesystem("s3", use_listings_cache=False).pipe_file(name, data)


def remove(name: str) -> None:
    import fsspec

    fsspec.filesystem("s3", use_listings_cache=False).rm_file(name)

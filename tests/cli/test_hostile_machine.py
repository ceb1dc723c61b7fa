"""Machines that do not let a run write: full disks, stores and homes without access, other runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffagent.errors import ArtifactError
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact, StageContext, StageResult, stage
from diffagent.train.sft_config import SFTConfig
from diffagent.train.sft_stage import train_sft
from tests.agent.agent_world import make_world
from tests.conftest import file_size_limit
from tests.store.test_stage import Words, write_words

TINY = SFTConfig(
    hidden_size=16,
    num_hidden_layers=1,
    vocab_size=300,
    max_steps=2,
    per_device_train_batch_size=2,
    save_steps=1,
)

SANDBOX_CONFIG = Path(__file__).parents[2] / "configs" / "sandbox.yaml"


@contextmanager
def directory_without_access(*, content: Path | None = None) -> Iterator[Path]:
    """A directory in which this process may read and not write, root or not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    store = folder / "store"
    shutil.copytree(content, store) if content else store.mkdir()
    for path in (folder, store, *store.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        else:
            store.chmod(0o555)
        yield store
    finally:
        if root:
            os.seteuid(0)
        store.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("limit", [2_000, 20_000, 40_000])
def test_a_disk_that_fills_while_training(tmp_path: Path, limit: int) -> None:
    """Tokenizer, weights and optimizer are written by three libraries with errors of their own."""
    inputs = {"dabench": [make_world(tmp_path, train=12, test=4)]}
    runtime = RuntimeConfig(store=str(tmp_path), device="cpu")
    with file_size_limit(limit), pytest.raises(ArtifactError, match="Make room") as caught:
        train_sft.run(TINY, inputs, runtime)
    assert "stage 'sft': cannot write" in str(caught.value) and "\n" not in str(caught.value)
    assert train_sft.cached(TINY, inputs, runtime) is None, "nothing half-written is visible"


def test_a_store_without_access_serves_what_it_has(tmp_path: Path) -> None:
    write_words.run(Words(), {}, RuntimeConfig(store=str(tmp_path)))
    with directory_without_access(content=tmp_path) as store:
        runtime = RuntimeConfig(store=str(store))
        assert write_words.run(Words(), {}, runtime).path.parent == store / "toy-words"
        with pytest.raises(ArtifactError, match=r"no access to '.*runtime\.store") as caught:
            write_words.run(Words(words=("new",)), {}, runtime)
        assert "Permission denied" in str(caught.value) and str(store) in str(caught.value)


@pytest.mark.parametrize("place", ["file", "file/below", "/dev/null", "/proc/nothing", "/proc/1"])
def test_a_store_that_cannot_be(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    runtime = RuntimeConfig(store=str(tmp_path / place))
    with pytest.raises(ArtifactError, match=r"runtime\.store"):
        write_words.run(Words(), {}, runtime)


@pytest.mark.parametrize("home", [None, "/dev/null", "/proc"])
def test_no_home_is_needed(home: str | None, tmp_path: Path) -> None:
    dabench = make_world(tmp_path, train=12, test=4)
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    if home:
        environment["HOME"] = home
    command = [sys.executable, "-m", "diffagent", "select", "a red circle", "--dabench"]
    command += [str(dabench.path), "--selector", "neighbours", "--store", str(tmp_path / "fits")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith('{"prompt"'), done.stderr


@pytest.mark.parametrize("home", ["/dev/null", "/proc"])
def test_the_sandbox_needs_no_home_and_a_missing_folder_is_named(home: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": home, "TMPDIR": str(tmp_path)}
    site, store = tmp_path / "site", tmp_path / "store"
    crawl = [
        "diffagent",
        "run",
        "--only",
        "crawl",
        "-c",
        str(SANDBOX_CONFIG),
        "--set",
        f"crawl.site=dump:{site}",
    ]
    crawl += ["--set", f"runtime.store={store}", "--set", "crawl.max_models=1"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    refused = run(*crawl)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "`python -m diffagent.sandbox DIR`" in refused.stderr
    assert run("diffagent.sandbox", str(site)).returncode == 0
    assert run(*crawl).returncode == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    refused = run("diffagent.sandbox", str(tmp_path / "thesis"))
    assert refused.returncode == 1 and refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr


def test_a_second_run_is_told_of_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun, go_on, made = threading.Event(), threading.Event(), []

    @stage("toy-slow", version=1, config=Words)
    def slow(config: Words, context: StageContext) -> StageResult:
        begun.set()
        assert go_on.wait(30)
        (context.out / "done").write_text("once")
        return StageResult()

    def build() -> None:
        made.append(slow.run(Words(), {}, RuntimeConfig(store=str(tmp_path))))

    threads = [threading.Thread(target=build) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    while "waiting for" not in caplog.text:
        assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)
    first, second = made
    assert isinstance(first, Artifact) and first == second
    assert f"process {os.getpid()} on" in caplog.text and str(first.path) in caplog.text

"""Shared fixtures. Tests need no network and nothing outside the checkout."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from diffagent import compat
from diffagent.schemas.manifest import FileEntry, Manifest
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.train.sft_config import SFTConfig

if TYPE_CHECKING:
    from diffagent.store import Artifact

# Before torch or transformers are imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

compat.install()  # some test modules import transformers before anything of diffagent


@pytest.fixture(scope="session")
def sandbox_site() -> Path:
    """The sandbox's site where configs/sandbox.yaml names it; written once for all workers."""
    from diffagent.sandbox.files import materialise

    target = ROOT / "build" / "sandbox"
    target.parent.mkdir(exist_ok=True)
    with FileLock(target.parent / ".sandbox.lock"):
        return materialise(target)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Like a full disk: no file of this process grows beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def reseal(artifact: Artifact) -> None:
    """Let the manifest of an artefact list its files as a test has changed them.

    Its content digest stays, so that handles on it stay valid.
    """
    from diffagent.store import MANIFEST, sha256_file

    manifest = artifact.manifest
    files = tuple(
        entry.model_copy(update={"size": path.stat().st_size, "sha256": sha256_file(path)})
        for entry in manifest.files
        for path in (artifact.path / entry.path,)
    )
    changed = manifest.model_copy(update={"files": files})
    (artifact.path / MANIFEST).write_text(changed.model_dump_json())


def sealed(stage: str, directory: Path) -> Artifact:
    """The artefact of a stage whose files a test has put into ``directory``."""
    from diffagent.store import MANIFEST, files_digest, open_artifact, sha256_file

    (directory / MANIFEST).unlink(missing_ok=True)
    files = tuple(
        FileEntry(
            path=p.relative_to(directory).as_posix(), size=p.stat().st_size, sha256=sha256_file(p)
        )
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    )
    manifest = Manifest(
        stage=stage,
        stage_version=1,
        identity=f"{stage:0<64}",
        content_digest=files_digest(files),
        config={},
        files=files,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        wall_seconds=0,
        peak_memory_bytes=0,
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json())
    return open_artifact(directory)


@dataclass(frozen=True)
class AgentRun:
    """A small DABench and an agent that learnt to answer it."""

    runtime: RuntimeConfig
    config: SFTConfig
    dabench: Artifact
    agent: Artifact


@pytest.fixture(scope="session")
def agent_run(tmp_path_factory: pytest.TempPathFactory) -> AgentRun:
    """An agent of 0.1 M parameters after seconds of training: it writes valid APIs."""
    import torch

    from diffagent.train.sft_stage import train_sft
    from tests.agent.agent_world import make_world

    torch.set_num_threads(1)
    store = Path(tmp_path_factory.mktemp("agent"))
    runtime = RuntimeConfig(store=str(store), device="cpu")
    dabench = make_world(store, train=400, test=24, validation=40)
    config = SFTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        vocab_size=600,
        max_steps=100,
        learning_rate=8e-3,
        per_device_train_batch_size=8,
        max_length=192,
    )
    return AgentRun(
        runtime, config, dabench, train_sft.run(config, {"dabench": [dabench]}, runtime)
    )

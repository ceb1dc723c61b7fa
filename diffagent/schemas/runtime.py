"""Settings that change how stages run but not what they make; never part of an identity."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from diffagent.schemas.section import Section


class _RuntimeSection(Section):
    """A section whose texts are printed a line each."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_lines(cls, value: Any) -> Any:
        """Refuse paths and addresses of several lines."""
        if isinstance(value, str) and "\n" in value:
            raise ValueError("holds a line end; leave it out")
        return value


class CacheSettings(_RuntimeSection):
    """Local copies of the artifacts of a store that is a URI."""

    directory: str | None = Field(
        default=None,
        description="directory where artifacts are built and read; null: $DIFFAGENT_CACHE, or "
        "~/.cache/diffagent",
    )
    max_gb: float = Field(
        default=100,
        gt=0,
        description="limit of finished artifacts, in 10^9 bytes; the least recently used are "
        "removed first",
    )


class ModelFileSettings(_RuntimeSection):
    """Model files: where they are found, and the cache of downloaded ones."""

    directory: str | None = Field(
        default=None, description="cache of model files; null: 'models' in the local store"
    )
    max_gb: float | None = Field(
        default=None,
        gt=0,
        description="limit of that cache, in 10^9 bytes; the least recently used files are "
        "removed first, but none that is pinned or in use; null: no limit",
    )
    folders: tuple[str, ...] = Field(
        default=(),
        description="folders of model files, or installations of A1111 or ComfyUI, that are read "
        "in place before anything is downloaded",
    )
    configs: tuple[str, ...] = Field(
        default=(),
        description="folders with the diffusers configuration (model_index.json, no weights) of "
        "architectures that the package does not have; those in DIRECTORY/configs are read too",
    )
    max_downloads: int = Field(
        default=2, ge=1, le=32, description="concurrent downloads, of all processes together"
    )

    @property
    def max_bytes(self) -> int | None:
        """Limit of the cache in bytes."""
        return None if self.max_gb is None else round(self.max_gb * 1e9)


class TaskSettings(_RuntimeSection):
    """Where and how the tasks of a flow run."""

    workers: int = Field(
        default=2, ge=1, description="concurrent tasks of a flow, and processes of a stage"
    )
    runner: Literal["threads", "ray", "workers"] = Field(
        default="threads",
        description="where samples, answers, renders and scores are made: in the process of the "
        "flow, on Ray (extra ray; RAY_ADDRESS), or by Prefect workers (deployment run-stage)",
    )
    ray_gpus: float = Field(
        default=0, ge=0, description="GPUs that Ray reserves for a task that loads a network"
    )
    lost_after_seconds: float = Field(
        default=60,
        gt=0,
        description="seconds without a heartbeat after which a stage on a Prefect worker is lost",
    )
    timeout_seconds: float = Field(
        default=6 * 3600, gt=0, description="seconds after which a stage in a child process fails"
    )


class SiteSettings(_RuntimeSection):
    """How the site is read."""

    requests_per_second: float | None = Field(
        default=None,
        gt=0,
        description="rate limit; null: 1, and no limit for a loopback address",
    )
    threads: int = Field(
        default=4, ge=1, le=64, description="concurrent requests; all share the rate limit"
    )
    budget_seconds: float | None = Field(
        default=None,
        gt=0,
        description="seconds after which a crawl stops; the next one resumes it; null: no limit",
    )
    refresh_share: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="share of the unchanged versions whose pictures a refresh requests, the least "
        "recently requested first",
    )
    reconcile: bool = Field(
        default=False,
        description="a refresh walks whole listings again and reports the recall of earlier ones",
    )
    faults: Literal["none", "flaky", "hostile"] = Field(
        default="none", description="faults that an embedded server simulates"
    )


class RenderServerSettings(_RuntimeSection):
    """The server of render.backend 'a1111' or 'comfyui'."""

    url: str | None = Field(
        default=None,
        description="address; credentials are $DIFFAGENT_RENDER_AUTH, USER:PASSWORD or "
        "'Bearer TOKEN'",
    )
    timeout_seconds: float = Field(
        default=900, gt=0, description="seconds for one picture, loading of models included"
    )
    models: dict[str, str] = Field(
        default={},
        description="SHA256 -> file name on that server, for models under other names",
    )


class ScoringSettings(_RuntimeSection):
    """How pictures are scored."""

    decode_threads: int = Field(default=4, ge=1, le=64, description="threads that read pictures")
    compile: bool = Field(
        default=False,
        description="torch.compile of the scorers: a minute at the start, faster batches after it",
    )


class RuntimeConfig(_RuntimeSection):
    """How stages run on this machine; never part of an identity."""

    store: str = Field(
        default="store",
        description="directory of artifacts, or an fsspec URI (s3://BUCKET/PREFIX); credentials "
        "and the endpoint come from the environment (AWS_*)",
    )
    device: str = Field(default="auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    cache: CacheSettings = CacheSettings()
    models: ModelFileSettings = ModelFileSettings()
    tasks: TaskSettings = TaskSettings()
    site: SiteSettings = SiteSettings()
    render_server: RenderServerSettings = RenderServerSettings()
    scoring: ScoringSettings = ScoringSettings()
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=(),
        description="where training logs its steps, in addition to the log in the agent; "
        "'tensorboard' (extra tensorboard) writes to logs/STAGE/IDENTITY in the local store",
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _accept_one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("store")
    @classmethod
    def _check_store(cls, store: str) -> str:
        if "://" in store and ("@" in store or "?" in store):
            raise ValueError("credentials and options of a store come from the environment only")
        return store

    @property
    def models_directory(self) -> Path:
        """Directory of the cache of model files."""
        directory = self.models.directory
        return Path(directory) if directory else self.local_store / "models"

    @property
    def remote(self) -> str | None:
        """URI of the store; None if it is a directory."""
        return self.store.rstrip("/") if "://" in self.store else None

    @property
    def local_store(self) -> Path:
        """Directory where artifacts are built and read: the store, or the cache of a remote one."""
        if self.remote is None:
            return Path(self.store)
        cache = self.cache.directory or os.environ.get("DIFFAGENT_CACHE") or "~/.cache/diffagent"
        name = hashlib.sha256(self.remote.encode()).hexdigest()[:16]
        return Path(cache).expanduser() / name

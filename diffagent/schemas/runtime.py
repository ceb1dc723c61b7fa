"""Settings that change how stages run but not what they make; never part of an identity."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from diffagent.schemas.section import Section


class RuntimeConfig(Section):
    """How stages run on this machine; never part of an identity."""

    store: str = Field(
        default="store",
        description="directory of artefacts, or an fsspec URI (s3://BUCKET/PREFIX); credentials "
        "and the endpoint are the environment's (AWS_*)",
    )
    cache: str | None = Field(
        default=None,
        description="of a store that is a URI: directory where its artefacts are built and read; "
        "$DIFFAGENT_CACHE or ~/.cache/diffagent",
    )
    cache_gb: float = Field(
        default=100,
        gt=0,
        description="GB of finished artefacts kept there; what was not used for longest goes first",
    )
    models: str | None = Field(
        default=None, description="cache of model files; 'models' in the store or in its cache"
    )
    models_max_gb: float | None = Field(
        default=None,
        gt=0,
        description="limit of that cache in 10^9 bytes: what was not used for the longest time "
        "goes, but nothing that is pinned or in use; no limit",
    )
    model_folders: tuple[str, ...] = Field(
        default=(),
        description="folders of model files, or installations of A1111 or ComfyUI, that are read "
        "in place before anything is downloaded",
    )
    max_downloads: int = Field(
        default=2, ge=1, le=32, description="of model files at once, by all processes"
    )
    device: str = Field(default="auto", description="'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    workers: int = Field(default=2, ge=1, description="concurrent tasks of a flow")
    runner: Literal["threads", "ray", "workers"] = Field(
        default="threads",
        description="where a flow's samples, answers, renders and scores are made: in its own "
        "process, on Ray (extra ray; RAY_ADDRESS), or by Prefect workers (deployment run-stage)",
    )
    ray_gpus: float = Field(
        default=0, ge=0, description="GPUs that Ray reserves for a task that loads a network"
    )
    lost_after_seconds: float = Field(
        default=60,
        gt=0,
        description="a Prefect worker that was not heard of for so long has lost its stage",
    )
    requests_per_second: float | None = Field(
        default=None, gt=0, description="to the site; default 1, unlimited to a loopback address"
    )
    crawl_threads: int = Field(
        default=4, ge=1, le=64, description="calls to the site at once; all share one rate limit"
    )
    crawl_budget_seconds: float | None = Field(
        default=None, gt=0, description="a crawl stops after so long; the next one goes on"
    )
    refresh_share: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="part of the unchanged versions whose pictures a refresh asks for, those first "
        "that were not looked at for the longest",
    )
    reconcile: bool = Field(
        default=False,
        description="a refresh walks whole listings again and reports what it had missed (recall)",
    )
    faults: Literal["none", "flaky", "hostile"] = Field(
        default="none", description="of the embedded server"
    )
    render_url: str | None = Field(
        default=None,
        description="address of the server of render.backend a1111 or comfyui; credentials are "
        "$DIFFAGENT_RENDER_AUTH, USER:PASSWORD or 'Bearer TOKEN'",
    )
    render_timeout_seconds: float = Field(
        default=900, gt=0, description="that a server may take for a picture, loading included"
    )
    server_models: dict[str, str] = Field(
        default={},
        description="SHA256 -> file name on that server, of models that it has under other names",
    )
    decode_threads: int = Field(default=4, ge=1, le=64, description="that read pictures to score")
    compile_scorers: bool = Field(
        default=False, description="torch.compile: a minute at the start, faster batches after it"
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=(),
        description="where training logs its steps as it goes, beside the log in the agent; "
        "'tensorboard' (extra tensorboard) writes to logs/STAGE/IDENTITY in the local store",
    )
    stage_timeout_seconds: float = Field(default=6 * 3600, gt=0)

    @field_validator("*", mode="before")
    @classmethod
    def _check_lines(cls, value: Any) -> Any:
        """Refuse text of several lines: paths and addresses are printed a line each."""
        if isinstance(value, str) and "\n" in value:
            raise ValueError("holds a line end; leave it out")
        return value

    @property
    def models_directory(self) -> Path:
        """Where the cache of model files is."""
        return Path(self.models) if self.models else self.local_store / "models"

    @property
    def models_max_bytes(self) -> int | None:
        """The limit of that cache."""
        return None if self.models_max_gb is None else round(self.models_max_gb * 1e9)

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("store")
    @classmethod
    def _check_store(cls, store: str) -> str:
        if "://" in store and ("@" in store or "?" in store):
            raise ValueError("credentials and options of a store come from the environment alone")
        return store

    @property
    def remote(self) -> str | None:
        """The store's URI; None when it is a directory."""
        return self.store.rstrip("/") if "://" in self.store else None

    @property
    def local_store(self) -> Path:
        """Where artefacts are built and read: the store itself, or the cache of a remote one."""
        if self.remote is None:
            return Path(self.store)
        cache = self.cache or os.environ.get("DIFFAGENT_CACHE") or "~/.cache/diffagent"
        name = hashlib.sha256(self.remote.encode()).hexdigest()[:16]
        return Path(cache).expanduser() / name

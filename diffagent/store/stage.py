"""Stages: named, versioned functions of (config, inputs) that fill a directory.

The identity of a request is the sha256 of {stage, versions, config, content digests of the inputs
and of the local files that the config names}. Equal requests have equal identities, so a stage that
has run once is found in its store (``diffagent.store.store``) and not run again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from diffagent.errors import ArtifactError
from diffagent.failures import explained
from diffagent.schemas.manifest import SCHEMA_VERSION, FileEntry, Funnel, Manifest
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import latest
from diffagent.store.artifact import Artifact
from diffagent.store.digests import (
    cached_sha256,
    file_state,
    files_digest,
    json_digest,
    sha256_file,
)
from diffagent.store.lineage import PREVIOUS, series_of
from diffagent.store.manifest_file import MANIFEST
from diffagent.store.provenance import library_versions, peak_memory_bytes
from diffagent.store.store import Store, home_of, open_store

log = logging.getLogger(__name__)

C = TypeVar("C", bound=BaseModel)

#: Callback for the progress of a stage: the fraction done (None: unknown), and a text.
Progress = Callable[[float | None, str], None]
#: Inputs of a stage: name -> artifacts (one, or one per shard).
Inputs = Mapping[str, Sequence[Artifact]]

_DAMAGED_VERSION = (
    "it is the version before: put the right file back and rename it, or run what made it again "
    "(the same configuration and crawl); or delete it, to go on from an older version"
)


@dataclass
class StageResult:
    """Facts that a stage reports about its files, for the manifest."""

    rows: dict[str, int] = field(default_factory=dict)
    funnels: tuple[Funnel, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    #: Set when equal contents may have different bytes (a crawl); by default the files decide.
    content_digest: str | None = None


@dataclass(frozen=True)
class StageContext:
    """Arguments of a stage body in addition to its config.

    Attributes:
        inputs: artifacts by name of the input, on this disk and whole.
        out: directory to fill; it may hold files of an interrupted run of the same request.
        runtime: settings of this machine.
        site_url: address of the Civitai API that this run talks to.
        previous: the whole artifact of this request that a refresh replaces.
        progress: takes the fraction done (None: unknown) and a text for a person who watches.
    """

    inputs: Inputs
    out: Path
    runtime: RuntimeConfig
    site_url: str = ""
    previous: Artifact | None = None
    progress: Progress = lambda fraction, text: None

    def one(self, name: str) -> Artifact:
        """Return the single artifact of input ``name``."""
        artifacts = self.inputs.get(name, ())
        if len(artifacts) != 1:
            raise ArtifactError(f"input {name!r} needs one artifact, got {len(artifacts)}")
        return artifacts[0]

    def many(self, name: str) -> Sequence[Artifact]:
        """Return all artifacts of input ``name`` (one per shard), in their order."""
        if not self.inputs.get(name):
            raise ArtifactError(f"input {name!r} is missing")
        return self.inputs[name]


#: Finds the earlier artifacts of a stage that a request continues, in its store.
History = Callable[[C, Inputs, RuntimeConfig], Sequence[Artifact]]
#: Makes the context of a stage that uses more of what earlier runs of its request left, given the
#: plain context and the directory of the request (where its artifact is, or will be).
ExtendContext = Callable[[StageContext, Path], StageContext]


@dataclass(frozen=True)
class Stage(Generic[C]):
    """A named, versioned function of (config, inputs) that fills a directory."""

    name: str
    version: int
    body: Callable[[C, Any], StageResult]
    config_type: type[C]
    files: Callable[[C], Sequence[Path]] = lambda config: ()
    history: History[C] | None = None
    extend_context: ExtendContext = lambda context, directory: context

    def identity(self, config: C, inputs: Inputs) -> str:
        """Return the sha256 that names this request; equal requests have equal identities."""
        return json_digest(
            {
                "stage": self.name,
                "stage_version": self.version,
                "schema_version": SCHEMA_VERSION,
                "config": config.model_dump(mode="json"),
                "files": [
                    [path.name, cached_sha256(path, file_state(path.stat()))]
                    for path in self.files(config)
                ],
                "inputs": {
                    name: [artifact.content_digest for artifact in artifacts]
                    for name, artifacts in inputs.items()
                },
            }
        )

    def directory(self, config: C, inputs: Inputs, runtime: RuntimeConfig) -> Path:
        """Return where the artifact of this request is built and read on this machine."""
        inputs = self._with_history(config, inputs, runtime)
        return open_store(runtime).root / self.name / self.identity(config, inputs)[:16]

    def cached(self, config: C, inputs: Inputs, runtime: RuntimeConfig) -> Artifact | None:
        """Return the artifact of this request when the store has it whole.

        In a local store it becomes the latest of its stage (``diffagent.store.latest``), and a
        damaged one is set aside as ``NAME.damaged-N``. From a remote store only the manifest and
        the sizes of the files are read.
        """
        return open_store(runtime).find(self.directory(config, inputs, runtime))

    def run(
        self,
        config: C,
        inputs: Inputs,
        runtime: RuntimeConfig,
        *,
        site_url: str = "",
        refresh: bool = False,
        progress: Progress = lambda fraction, text: None,
    ) -> Artifact:
        """Return the artifact of this request; build or resume it when needed.

        With ``refresh`` it is built again: when the content is the same, the old artifact stays,
        otherwise the old one is kept as ``IDENTITY.CONTENT`` and the new one takes its place.

        Raises:
            DiffAgentError: an input is damaged (it is set aside, so that the next run makes it
                again), the disk is full, the store cannot be reached, the funnel does not add
                up, or the body raised any exception.
        """
        store = open_store(runtime)
        with explained(f"stage {self.name!r}", store.root / self.name):
            inputs = self._with_history(config, inputs, runtime)
            directory = self.directory(config, inputs, runtime)
            if not refresh and (artifact := store.find(directory)):
                log.info("%s: cached in %s", self.name, artifact.location)
                return artifact  # no lock is taken: a read-only store is enough
            with store.begin(directory, refresh=refresh) as existing:
                if existing and not refresh:
                    log.info("%s: cached in %s", self.name, existing.location)
                    artifact = existing
                else:
                    with _fetched(inputs, runtime) as fetched:
                        partial = directory.with_name(f".{directory.name}.partial")
                        context = StageContext(
                            fetched, partial, runtime, site_url, existing, progress
                        )
                        context = self.extend_context(context, directory)
                        artifact = self._build(config, context, store, directory)
            store.trim()
        return artifact

    def _with_history(self, config: C, inputs: Inputs, runtime: RuntimeConfig) -> Inputs:
        """Add the earlier artifacts that a request continues to its inputs."""
        if self.history is None or PREVIOUS in inputs:
            return inputs
        return {**inputs, PREVIOUS: self.history(config, inputs, runtime)}

    def _build(self, config: C, context: StageContext, store: Store, directory: Path) -> Artifact:
        """Let the body fill the partial directory, and commit that unless it has no news."""
        partial, previous = context.out, context.previous
        partial.mkdir(exist_ok=True)
        (partial / MANIFEST).unlink(missing_ok=True)  # of a run killed just before the rename
        started = time.monotonic()
        result = self.body(config, context)
        manifest = self._manifest(config, context.inputs, partial, result, started)
        if previous and previous.content_digest == manifest.content_digest:
            log.info("%s: nothing new; %s stays", self.name, previous.location)
            shutil.rmtree(partial)
            return previous
        artifact = store.commit(partial, directory, manifest, previous)
        log.info("%s: built %s in %.1f s", self.name, directory, manifest.wall_seconds)
        return artifact

    def _manifest(
        self, config: C, inputs: Inputs, out: Path, result: StageResult, started: float
    ) -> Manifest:
        for funnel in result.funnels:
            try:
                funnel.check()
            except ValueError as error:
                raise ArtifactError(f"stage {self.name!r}: {error}") from None
        files = _list_files(out)
        settings = config.model_dump(mode="json")
        series = {
            name: [series_of(artifact) for artifact in artifacts]
            for name, artifacts in inputs.items()
            if name != PREVIOUS
        }
        return Manifest(
            stage=self.name,
            stage_version=self.version,
            identity=self.identity(config, inputs),
            content_digest=result.content_digest or files_digest(files),
            series=latest.name_series(self.name, settings, series),
            config=settings,
            inputs={
                name: tuple(artifact.reference for artifact in artifacts)
                for name, artifacts in inputs.items()
            },
            files=files,
            rows=result.rows,
            funnels=result.funnels,
            metrics=result.metrics,
            created_at=datetime.now(UTC),
            wall_seconds=time.monotonic() - started,
            peak_memory_bytes=peak_memory_bytes(),
            versions=library_versions(),
        )


def stage(
    name: str,
    *,
    version: int,
    config: type[C],
    files: Callable[[C], Sequence[Path]] = lambda config: (),
    history: History[C] | None = None,
    extend_context: ExtendContext = lambda context, directory: context,
) -> Callable[[Callable[[C, Any], StageResult]], Stage[C]]:
    """Make a stage of a function ``body(config, context) -> StageResult``.

    Args:
        name: of the stage, in stores and identities.
        version: raise it whenever the same request would give another result.
        config: type of the config.
        files: lists the local files, weights for example, that a config names; their contents are
            part of the identity.
        history: finds the earlier artifacts of the stage that a request continues; they become
            its input ``PREVIOUS``, so they are part of its identity and lineage.
        extend_context: makes the context of a body that uses more of what earlier runs of its
            request left than ``context.previous``.
    """

    def wrap(body: Callable[[C, Any], StageResult]) -> Stage[C]:
        return Stage(name, version, body, config, files, history, extend_context)

    return wrap


@contextlib.contextmanager
def _fetched(inputs: Inputs, runtime: RuntimeConfig) -> Iterator[Inputs]:
    """Keep the inputs on this disk as long as the block runs, compared with their manifests."""
    with contextlib.ExitStack() as stack:

        def fetch(artifact: Artifact, name: str) -> Artifact:
            remedy = f"run the same command again, and the stage {artifact.stage!r} makes it again"
            if name == PREVIOUS:
                remedy = _DAMAGED_VERSION
            return stack.enter_context(home_of(artifact, runtime).fetch(artifact, remedy))

        yield {
            name: [fetch(artifact, name) for artifact in artifacts]
            for name, artifacts in inputs.items()
        }


def _list_files(directory: Path) -> tuple[FileEntry, ...]:
    """List all files below ``directory`` with sizes and digests, sorted by path."""
    return tuple(
        FileEntry(
            path=path.relative_to(directory).as_posix(),
            size=path.stat().st_size,
            sha256=sha256_file(path),
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )

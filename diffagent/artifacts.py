"""Artefacts: directories that exist only when they are whole, and the stages that make them.

A stage is a function of (config, inputs) that fills a directory. Its identity is the sha256 of
{stage, versions, config, digests of the inputs and of local files that the config names}; the
artefact lies in
``STORE/STAGE/IDENTITY[:16]``. Work happens in a hidden partial directory beside it, which stays
when the process dies so that the stage can resume; ``manifest.json`` is written last and the
directory is renamed into place. No manifest: it never happened.

A store that is a URI has the artefacts that count; they are built and read in a local directory
(``diffagent.cache``), sent when they are whole, and brought when a stage reads them
(``diffagent.remote``).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from diffagent import cache, errors
from diffagent.errors import ArtifactError, DiffAgentError
from diffagent.remote import (
    check_writable,
    missing_files,
    pull,
    push,
    read_remote,
    verify_remote,
)
from schemas.config import RuntimeConfig
from schemas.manifest import SCHEMA_VERSION, FileEntry, Funnel, InputRef, Manifest

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
#: Exit code of a child whose stage raised a DiffAgentError (which is then in its answer file).
EXPECTED_FAILURE = 3
_RECORDED_VERSIONS = ("diffagent", "torch", "transformers", "trl", "diffusers", "pyarrow", "polars")

C = TypeVar("C", bound=BaseModel)


class Artifact(BaseModel):
    """A handle on a committed artefact: small, and safe to pass between processes.

    With ``remote``, its URI, ``path`` may have nothing yet: ``local`` brings the files, and so
    does whatever reads one.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    identity: str
    content_digest: str
    path: Path
    remote: str | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest, read from disk, or from the store when the files are not here."""
        if not self.remote:
            return read_manifest(self.path)
        return read_manifest(self.path) if _is_here(self) else _told_by_store(self)

    @property
    def location(self) -> str:
        """Where it is, for people and for the command line."""
        return self.remote or str(self.path)

    def local(self) -> Path:
        """Its directory on this machine, brought from the store when it is not there.

        Raises:
            ArtifactError: the store cannot be read, or has another or a damaged one by now.
        """
        if self.remote and not _is_here(self):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                _bring(self)
        return self.path

    def file(self, name: str) -> Path:
        """Path of a file of this artefact.

        Raises:
            ArtifactError: the artefact has no such file.
        """
        path = self.local() / name
        if not path.exists():
            raise ArtifactError(
                f"{self.stage} artefact {str(self.path)!r} has no file {name!r}; "
                "delete the directory and run the stage again"
            )
        return path

    def glob(self, pattern: str) -> list[Path]:
        """Files matching ``pattern``, sorted by path."""
        return sorted(self.local().glob(pattern))


#: How a stage tells how far it is: the fraction done (None: unknown), and a text.
Progress = Callable[[float | None, str], None]
#: What a stage reads: name of the input -> artefacts (one, or one a shard).
Inputs = Mapping[str, Sequence[Artifact]]
#: Name of the input that holds earlier artefacts of the same stage: its history in the store.
PREVIOUS = "previous"


@dataclass
class StageResult:
    """What a stage reports beside its files."""

    rows: dict[str, int] = field(default_factory=dict)
    funnels: tuple[Funnel, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    #: Set when equal contents may lie in different bytes (a crawl); else the files decide.
    content_digest: str | None = None


@dataclass(frozen=True)
class StageContext:
    """What a stage body gets beside its config.

    ``out`` may hold what an interrupted run of the same identity left behind.
    ``site_url`` is the address of the Civitai API that this run talks to.
    ``previous`` is the artefact that is being refreshed; None: there is none, or it is not asked
    for. ``damaged`` is one that was found damaged and set aside, when there is no other: what is
    good in it can be taken over (stages that ``salvage`` alone). ``memory`` is a file beside it
    for what helps the next refresh and is no content: it outlives artefacts, and may be missing.
    ``progress`` takes the fraction done (None: unknown) and a text for who watches the run.
    """

    inputs: Inputs
    out: Path
    runtime: RuntimeConfig
    site_url: str = ""
    previous: Artifact | None = None
    damaged: Path | None = None
    memory: Path = Path(os.devnull)
    progress: Progress = lambda fraction, text: None

    def one(self, name: str) -> Artifact:
        """The single artefact of input ``name``."""
        artifacts = self.inputs.get(name, ())
        if len(artifacts) != 1:
            raise ArtifactError(f"input {name!r} needs one artefact, got {len(artifacts)}")
        return artifacts[0]

    def many(self, name: str) -> Sequence[Artifact]:
        """All artefacts of input ``name`` (one a shard), in the order given."""
        if not self.inputs.get(name):
            raise ArtifactError(f"input {name!r} is missing")
        return self.inputs[name]


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_file(path: Path) -> str:
    """Hex SHA256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.lru_cache(maxsize=1024)
def _known_digest(path: Path, size: int, mtime_ns: int) -> str:
    """SHA256 of a file, read once by a process as long as its size and time stay."""
    return sha256_file(path)


def named_files(*names: str | Path | None) -> list[Path]:
    """The local files that values of a config name.

    Args:
        names: a file, a directory (all files in it), or anything else (nothing), such as the
            name of a model on a hub.
    """
    files: list[Path] = []
    for path in (Path(name) for name in names if name):
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        files += [path] if path.is_file() else []
    return files


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artefact's directory.

    Raises:
        ArtifactError: there is none, or it is not a manifest.
    """
    try:
        return Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except OSError as error:
        raise ArtifactError(f"no artefact in {str(directory)!r}: {error.strerror}") from None
    except ValidationError as error:
        raise ArtifactError(
            f"{str(directory / MANIFEST)!r} is not a manifest of this version: "
            f"{error.errors()[0]['msg']}; delete the directory and run the stage again"
        ) from None


def open_artifact(directory: str | Path) -> Artifact:
    """A handle on the artefact in ``directory`` or at a URI, its files checked by size.

    Raises:
        ArtifactError: no manifest, or a file is missing or of another size.
    """
    if "://" in str(directory):
        return _open_remote(str(directory))
    path = Path(directory)
    manifest = read_manifest(path)
    for entry in manifest.files:
        file = path / entry.path
        if not file.is_file() or file.stat().st_size != entry.size:
            raise ArtifactError(
                f"{str(file)!r} is missing or not {entry.size} bytes long as its manifest says; "
                f"delete {str(path)!r} and run the stage {manifest.stage!r} again"
            )
    return _handle(manifest, path, cache.remote_of(path))


def artifact_directory(text: str) -> Path:
    """The directory that a person names: by a path, or by the URI of an artefact, brought here.

    Raises:
        ArtifactError: there is no artefact at the URI, or it cannot be had.
    """
    return open_artifact(text).local() if "://" in text else Path(text)


def _open_remote(uri: str) -> Artifact:
    *store, stage, name = uri.rstrip("/").split("/")
    runtime = RuntimeConfig(store="/".join(store))
    found = find_in_store(runtime.local_store / stage / name, f"{runtime.remote}/{stage}/{name}")
    if found is None:
        raise ArtifactError(f"no artefact at {uri!r}; give STORE/STAGE/NAME, as the runs print it")
    cache.mark(runtime.local_store, str(runtime.remote))
    return found


def find_in_store(directory: Path, uri: str) -> Artifact | None:
    """A handle on the artefact at ``uri``, whose local side is ``directory``; None: none there.

    Raises:
        ArtifactError: the store cannot be read.
    """
    manifest = read_remote(uri)
    return _handle(manifest, directory, uri) if manifest else None


def _handle(manifest: Manifest, directory: Path, uri: str | None) -> Artifact:
    return Artifact(
        stage=manifest.stage,
        identity=manifest.identity,
        content_digest=manifest.content_digest,
        path=directory,
        remote=uri,
    )


def _told_by_store(artifact: Artifact) -> Manifest:
    """The manifest of this very artefact in its remote store."""
    manifest = read_remote(artifact.remote or "")
    if manifest is None or manifest.content_digest != artifact.content_digest:
        raise ArtifactError(
            f"{artifact.remote!r} is there no more, or was replaced by one of other content, since "
            "this run began; run the same command again"
        )
    return manifest


def _folder(manifest: Manifest) -> str:
    """Where in a remote store the files of an artefact lie."""
    return files_digest(manifest.files)[:16]


def _is_here(artifact: Artifact) -> bool:
    try:
        stat = (artifact.path / MANIFEST).stat()
    except OSError:
        return False
    return _known_whole(artifact.path, stat.st_ino, stat.st_mtime_ns) == artifact.content_digest


@functools.lru_cache(maxsize=1024)
def _known_whole(directory: Path, inode: int, mtime_ns: int) -> str:
    """Content digest of a whole artefact, looked at once by a process while it stays; else ''."""
    try:
        return open_artifact(directory).content_digest
    except ArtifactError:
        return ""


def _bring(artifact: Artifact) -> None:
    """Make ``artifact.path`` hold this very artefact; the caller has its lock."""
    directory = artifact.path
    if directory.exists():
        try:
            here = open_artifact(directory)
        except ArtifactError as error:
            log.warning("%s; it is copied from the store again", error)
            shutil.rmtree(directory)
        else:
            if here.content_digest == artifact.content_digest:
                return
            _set_aside(here)
    manifest = _told_by_store(artifact)
    with _full_disk_explained(directory):
        pull(artifact.remote or "", _folder(manifest), manifest, directory)


def _set_aside(artifact: Artifact) -> None:
    """Make room for newer content of the same request."""
    old = artifact.path.with_name(f"{artifact.path.name}.{artifact.content_digest[:8]}")
    shutil.rmtree(old, ignore_errors=True)
    artifact.path.rename(old)


def verify_artifact(artifact: Artifact, *, stored: bool = False) -> None:
    """Read every byte and compare it with the manifest.

    Args:
        artifact: what is read on this disk when it is there.
        stored: read what its remote store has all the same.

    Raises:
        ArtifactError: a file's SHA256 is not the manifest's.
    """
    if artifact.remote and (stored or not artifact.path.exists()):
        manifest = _told_by_store(artifact)
        verify_remote(artifact.remote, _folder(manifest), manifest)
        return
    for entry in artifact.manifest.files:
        if sha256_file(artifact.path / entry.path) != entry.sha256:
            raise ArtifactError(
                f"{str(artifact.path / entry.path)!r} is damaged (SHA256 differs); "
                f"delete {str(artifact.path)!r} and run the stage {artifact.stage!r} again"
            )


def files_digest(files: Sequence[FileEntry]) -> str:
    """Digest of an artefact's contents: names and SHA256 of its files."""
    return hashlib.sha256(
        canonical_json([[f.path, f.sha256] for f in sorted(files, key=lambda f: f.path)])
    ).hexdigest()


def peak_memory_bytes() -> int:
    """Peak resident set of this process so far.

    Linux hands ``ru_maxrss`` down through fork and exec: a child of a large parent would report
    the parent's, so there the kernel's own mark of this address space is read.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Stage(Generic[C]):
    """A named, versioned function of (config, inputs) that fills a directory."""

    name: str
    version: int
    body: Callable[[C, StageContext], StageResult]
    config_type: type[C]
    files: Callable[[C], Sequence[Path]] = lambda config: ()
    salvages: bool = False
    history: Callable[[C, Inputs, RuntimeConfig], Sequence[Artifact]] | None = None

    def _with_history(self, config: C, inputs: Inputs, runtime: RuntimeConfig) -> Inputs:
        """The inputs, and those that the store has from before for a stage with a history."""
        if self.history is None or PREVIOUS in inputs:
            return inputs
        return {**inputs, PREVIOUS: self.history(config, inputs, runtime)}

    def identity(self, config: C, inputs: Inputs) -> str:
        """sha256 that names this request; equal requests have equal identities."""
        stats = [(path, path.stat()) for path in self.files(config)]
        return hashlib.sha256(
            canonical_json(
                {
                    "stage": self.name,
                    "stage_version": self.version,
                    "schema_version": SCHEMA_VERSION,
                    "config": config.model_dump(mode="json"),
                    "files": [
                        [path.name, _known_digest(path, stat.st_size, stat.st_mtime_ns)]
                        for path, stat in stats
                    ],
                    "inputs": {
                        name: [artifact.content_digest for artifact in artifacts]
                        for name, artifacts in inputs.items()
                    },
                }
            )
        ).hexdigest()

    def directory(self, config: C, inputs: Inputs, runtime: RuntimeConfig) -> Path:
        """Where the artefact of this request is built and read on this machine."""
        inputs = self._with_history(config, inputs, runtime)
        return runtime.local_store / self.name / self.identity(config, inputs)[:16]

    def cached(self, config: C, inputs: Inputs, runtime: RuntimeConfig) -> Artifact | None:
        """The artefact of this request when the store has it whole.

        In a local store a damaged one is removed, or set aside as ``NAME.damaged-N`` when its
        contents could not be made again. Of a remote store the manifest and the sizes of the
        files are asked for; none is copied.
        """
        directory = self.directory(config, inputs, runtime)
        if not runtime.remote:
            return self._open(directory) if directory.exists() else None
        uri = self._uri(directory, runtime)
        manifest = read_remote(uri)
        if manifest is None:
            return None
        if lost := missing_files(uri, _folder(manifest), manifest):
            log.warning(
                "%d files of %s, such as %r, are missing or not as long as its manifest says; it "
                "is built again",
                *(len(lost), uri, lost[0].path),
            )
            return None
        return _handle(manifest, directory, uri)

    def _uri(self, directory: Path, runtime: RuntimeConfig) -> str:
        return f"{runtime.remote}/{self.name}/{directory.name}"

    def _open(self, directory: Path) -> Artifact | None:
        try:
            return open_artifact(directory)
        except ArtifactError as error:
            self._put_away(directory, error)
            return None

    def _put_away(self, directory: Path, error: ArtifactError) -> None:
        if not self.salvages:
            log.warning("%s; it is built again", error)
            shutil.rmtree(directory)
            return
        number = 1 + max(map(_damage_number, _damaged(directory)), default=0)
        aside = directory.with_name(f"{directory.name}.damaged-{number}")
        directory.rename(aside)
        what = str(error).partition("; ")[0]
        log.warning("%s; set aside as %s, and what is good in it is taken over", what, aside)

    def _verified(self, known: Artifact) -> Artifact | None:
        """The artefact, unless one of its bytes is not as it was written."""
        try:
            verify_artifact(known)
        except ArtifactError as error:
            self._put_away(known.path, error)
            return None
        return known

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
        """Return the artefact of this request, building or resuming it when needed.

        With ``refresh`` it is built anew; when the content is the same the old artefact stays,
        else it is kept as ``IDENTITY.CONTENT`` and the new one takes its place.

        Raises:
            ArtifactError: an input is damaged, the disk is full, the store cannot be reached, or
                the funnel does not add up.
        """
        inputs = self._with_history(config, inputs, runtime)
        directory = self.directory(config, inputs, runtime)
        directory.parent.mkdir(parents=True, exist_ok=True)
        if runtime.remote:
            cache.mark(runtime.local_store, runtime.remote)
        with FileLock(f"{directory}.lock"):
            known = self.cached(config, inputs, runtime) or self._unsent(directory, runtime)
            if known and not refresh:
                log.info("%s: cached in %s", self.name, known.location)
                return known
            if runtime.remote:
                check_writable(runtime.remote)
            known = self._previous(known, config, inputs, runtime)
            here = {
                name: [_here(artifact, runtime) for artifact in artifacts]
                for name, artifacts in inputs.items()
            }
            with cache.in_use(a.path for a in _all(here) if a.remote):
                for artifact in _all(here):
                    artifact.local()
                memory = directory.with_name(f"{directory.name}.memory.json")
                damaged = (
                    None if known else max(_damaged(directory), key=_damage_number, default=None)
                )
                made = self._build(
                    config,
                    StageContext(
                        here,
                        directory.with_name(f".{directory.name}.partial"),
                        runtime,
                        site_url,
                        known,
                        damaged,
                        memory,
                        progress,
                    ),
                    directory,
                )
        if runtime.remote:
            _trim(runtime)
        return made

    def _previous(
        self, known: Artifact | None, config: C, inputs: Inputs, runtime: RuntimeConfig
    ) -> Artifact | None:
        """What is refreshed, on this disk; where its contents are salvaged, every byte read."""
        if known and known.remote:
            _bring(known)
        if known and self.salvages and not self._verified(known):
            return self._previous(self.cached(config, inputs, runtime), config, inputs, runtime)
        return known

    def _build(self, config: C, context: StageContext, directory: Path) -> Artifact:
        """Let the body fill the partial directory, and rename it into place."""
        known, partial, runtime = context.previous, context.out, context.runtime
        partial.mkdir(exist_ok=True)
        (partial / MANIFEST).unlink(missing_ok=True)  # of a run killed just before the rename
        started = time.monotonic()
        with _full_disk_explained(directory):
            result = self.body(config, context)
        manifest = self._manifest(config, context.inputs, partial, result, started)
        if known and known.content_digest == manifest.content_digest:
            log.info("%s: nothing new; %s stays", self.name, known.location)
            shutil.rmtree(partial)
            return known
        with _full_disk_explained(directory):
            _write_durably(partial / MANIFEST, manifest.model_dump_json(indent=1).encode())
        if known:
            _set_aside(known)
        partial.rename(directory)
        log.info("%s: built %s in %.1f s", self.name, directory, manifest.wall_seconds)
        return self._send(open_artifact(directory), runtime)

    def _unsent(self, directory: Path, runtime: RuntimeConfig) -> Artifact | None:
        """What was built here whole and never reached the remote store is sent there now."""
        if runtime.remote and directory.exists() and (built := self._open(directory)):
            return self._send(built, runtime)
        return None

    def _send(self, built: Artifact, runtime: RuntimeConfig) -> Artifact:
        if not runtime.remote:
            return built
        uri, manifest = self._uri(built.path, runtime), built.manifest
        push(built.path, manifest, uri, _folder(manifest))
        return built.model_copy(update={"remote": uri})

    def _manifest(
        self, config: C, inputs: Inputs, out: Path, result: StageResult, started: float
    ) -> Manifest:
        files = tuple(
            FileEntry(
                path=p.relative_to(out).as_posix(), size=p.stat().st_size, sha256=sha256_file(p)
            )
            for p in sorted(out.rglob("*"))
            if p.is_file()
        )
        for funnel in result.funnels:
            try:
                funnel.check()
            except ValueError as error:
                raise ArtifactError(f"stage {self.name!r}: {error}") from None
        return Manifest(
            stage=self.name,
            stage_version=self.version,
            identity=self.identity(config, inputs),
            content_digest=result.content_digest or files_digest(files),
            config=config.model_dump(mode="json"),
            inputs={
                name: tuple(
                    InputRef(stage=a.stage, identity=a.identity, content_digest=a.content_digest)
                    for a in artifacts
                )
                for name, artifacts in inputs.items()
            },
            files=files,
            rows=result.rows,
            funnels=result.funnels,
            metrics=result.metrics,
            created_at=datetime.now(UTC),
            wall_seconds=time.monotonic() - started,
            peak_memory_bytes=peak_memory_bytes(),
            versions=_library_versions(),
        )


def _trim(runtime: RuntimeConfig) -> None:
    """Keep the local side of a remote store within its bound."""

    def in_store(directory: Path) -> bool:
        here = read_manifest(directory)
        told = read_remote(f"{runtime.remote}/{directory.parent.name}/{directory.name}")
        return told is not None and told.content_digest == here.content_digest

    try:
        cache.trim(runtime.local_store, int(runtime.cache_gb * 1e9), in_store)
    except ArtifactError as error:  # what was made is made
        log.warning("the cache %s is not trimmed: %s", runtime.local_store, error)


def _all(inputs: Inputs) -> Iterator[Artifact]:
    return itertools.chain.from_iterable(inputs.values())


def _here(artifact: Artifact, runtime: RuntimeConfig) -> Artifact:
    """The handle as this machine has it: another one may keep its cache elsewhere."""
    if not artifact.remote:
        return artifact
    own = runtime.model_copy(update={"store": artifact.remote.rsplit("/", 2)[0]})
    path = own.local_store / artifact.stage / artifact.path.name
    return artifact.model_copy(update={"path": path})


def _damaged(directory: Path) -> list[Path]:
    """What was set aside of an artefact."""
    return list(directory.parent.glob(f"{directory.name}.damaged-*"))


def _damage_number(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def stage(
    name: str,
    *,
    version: int,
    config: type[C],
    files: Callable[[C], Sequence[Path]] = lambda config: (),
    salvages: bool = False,
    history: Callable[[C, Inputs, RuntimeConfig], Sequence[Artifact]] | None = None,
) -> Callable[..., Stage[C]]:
    """Make a stage of a function ``body(config, context) -> StageResult``.

    Bump ``version`` whenever the same request would give a different answer. ``files`` says which
    local files, weights for example, the config names: their contents are part of the request.
    ``salvages``: a damaged artefact is set aside for the body instead of removed. ``history``
    finds the earlier artefacts of the stage that a request goes on from; they are its input
    ``PREVIOUS``, so they are part of its identity and of its lineage.
    """

    def wrap(body: Callable[[C, StageContext], StageResult]) -> Stage[C]:
        return Stage(name, version, body, config, files, salvages, history)

    return wrap


def run_in_child(
    entry: str,
    config: BaseModel,
    inputs: Inputs,
    runtime: RuntimeConfig,
    *,
    site_url: str = "",
) -> Artifact:
    """Run the stage ``entry`` ('package.module:attribute') in a process of its own.

    A child gives heavy stages a real timeout and gives their memory back. The same command
    works by hand: ``python -m diffagent.run_stage RUN.json``.

    Raises:
        ArtifactError: the child failed (the tail of its log is in the message) or timed out.
    """
    with tempfile.TemporaryDirectory(prefix="diffagent-") as folder:
        request, answer = Path(folder, "run.json"), Path(folder, "artifact.json")
        request.write_bytes(
            canonical_json(
                {
                    "entry": entry,
                    "config": config.model_dump(mode="json"),
                    "inputs": {
                        name: [artifact.model_dump(mode="json") for artifact in artifacts]
                        for name, artifacts in inputs.items()
                    },
                    "runtime": runtime.model_dump(mode="json"),
                    "site_url": site_url,
                    "answer": str(answer),
                    "parent": os.getpid(),
                }
            )
        )
        code, tail = _run_logged(
            [sys.executable, "-m", "diffagent.run_stage", str(request)],
            name=entry.rpartition(":")[2],
            timeout=runtime.stage_timeout_seconds,
        )
        if code == 0:
            return Artifact.model_validate_json(answer.read_bytes())
        if code == EXPECTED_FAILURE:
            said = json.loads(answer.read_bytes())
            failure: DiffAgentError = getattr(errors, said["error"])(said["message"])
            failure.retryable = said["retryable"]
            raise failure
        crash = ArtifactError(f"{entry} ended with code {code}:\n{tail}")
        crash.retryable = code < 0  # killed from outside: the next try resumes
        raise crash


def _run_logged(command: list[str], *, name: str, timeout: float) -> tuple[int, str]:
    """Run a command, logging its lines as they come; returns its exit code and last lines."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout, stop)
    timer.start()
    tail: deque[str] = deque(maxlen=40)
    try:
        for line in process.stdout or ():
            tail.append(line)
            log.info("%s | %s", name, line.rstrip())
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    if expired.is_set():
        raise ArtifactError(
            f"{name} took longer than {timeout:.0f} s and was stopped; raise "
            "runtime.stage_timeout_seconds, or run it again to resume"
        )
    return code, "".join(tail)


@contextlib.contextmanager
def _full_disk_explained(directory: Path) -> Iterator[None]:
    """Turn "no space left" into an error that says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ArtifactError(
            f"cannot write {str(error.filename or directory.parent)!r}: {error.strerror}; nothing "
            "half-written is visible. Make room, or move the store (runtime.store), then run the "
            "same command again: it goes on from what was written"
        ) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that replaces it when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _library_versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for name in _RECORDED_VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions

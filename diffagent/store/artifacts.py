"""Artefacts: directories that exist only when they are whole, and the stages that make them.

A stage is a function of (config, inputs) that fills a directory. Its identity is the sha256 of
{stage, versions, config, digests of the inputs and of local files that the config names}; the
artefact lies in
``STORE/STAGE/IDENTITY[:16]``. Work happens in a hidden partial directory beside it, which stays
when the process dies so that the stage can resume; ``manifest.json`` is written last and the
directory is renamed into place. No manifest: it never happened.

A store that is a URI has the artefacts that count; they are built and read in a local directory
(``diffagent.store.local_copies``), sent when they are whole, and brought when a stage reads them
(``diffagent.store.object_store``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from diffagent.store import local_copies, latest, wholeness
from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.failures import explained
from diffagent.store.locks import locked
from diffagent.store.object_store import check_writable, missing_files, pull, push, read_pointer, read_remote, verify_remote, write_pointer
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.manifest import SCHEMA_VERSION, FileEntry, Funnel, InputRef, Manifest

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
sha256_file = wholeness.sha256_file
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
            with locked(self.path):
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
_Held = contextlib.AbstractContextManager[None]
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


def named_files(*names: str | Path | None) -> list[Path]:
    """The local files that values of a config name.

    Args:
        names: a file, a directory (all files in it, but hidden ones and README.md, which people
            edit), or anything else (nothing), such as the name of a model on a hub.
    """
    files: list[Path] = []
    for path in (Path(name) for name in names if name):
        inside = path.rglob("*") if path.is_dir() else ()
        files += sorted(
            p for p in inside if p.is_file() and p.name[0] != "." and p.name != "README.md"
        )
        files += [path] if path.is_file() else []
    return files


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artefact's directory.

    Raises:
        DamagedArtifact: there is none, or it is not a manifest.
        ArtifactError: it cannot be read.
    """
    try:
        return Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedArtifact(
            f"no artefact in {str(directory)!r}: {describe_directory(directory)}"
        ) from None
    except OSError as error:
        raise ArtifactError(
            f"cannot read {str(directory / MANIFEST)!r}: {error.strerror}; check its permissions"
        ) from None
    except ValidationError as error:
        raise DamagedArtifact(
            f"{str(directory / MANIFEST)!r} is not a manifest of this version: "
            f"{error.errors()[0]['msg']}; delete the directory and run the stage again"
        ) from None


def describe_directory(directory: Path) -> str:
    """Describe a directory that a person named by mistake, with a remedy."""
    if not directory.is_dir():
        there = "it is a file" if directory.exists() else "there is no such directory"
        return f"{there}; give STORE/STAGE/NAME, as the runs print it, or STORE/STAGE/latest"
    if (directory / MANIFEST).exists():
        stage = read_manifest(directory).stage
        return f"it is an artefact of the stage {stage!r}; 'diffagent artifact list' shows others"
    below = sorted(path.parent.name for path in directory.glob("*/" + MANIFEST))
    if not below:
        return f"it has no {MANIFEST}; give STORE/STAGE/NAME, as the runs print it"
    name = latest.LATEST if latest.LATEST in below else below[0]
    return f"it holds artefacts of a stage; did you mean {str(directory / name)!r}?"


def open_artifact(directory: str | Path) -> Artifact:
    """A handle on the artefact in ``directory`` or at a URI, its files checked by size.

    A file that has changed since it was last read is read again (``diffagent.store.wholeness``). A
    pointer (``STORE/STAGE/latest``) is followed once: the handle is on what it leads to now.

    Raises:
        DamagedArtifact: no manifest, or a file is not the manifest's.
        ArtifactError: it cannot be read.
    """
    if "://" in str(directory):
        return _open_remote(str(directory))
    path = Path(directory)
    if path.is_symlink():
        path = path.resolve()
    manifest = read_manifest(path)
    wholeness.check(path, manifest)
    return _handle(manifest, path, local_copies.remote_of(path))


def artifact_directory(text: str) -> Path:
    """The directory that a person names: by a path, or by the URI of an artefact, brought here.

    A pointer (``latest``) is followed, and an artefact of a store is compared with its manifest,
    each file once a change; a directory that is no artefact comes back as it is.

    Raises:
        ArtifactError: there is no artefact at the URI, it cannot be had, or it is damaged.
    """
    if "://" not in text and not Path(text, MANIFEST).exists():
        return Path(text)
    directory = open_artifact(text).local()
    wholeness.check(directory, read_manifest(directory), "unread")
    return directory


def _open_remote(uri: str) -> Artifact:
    *store, stage, name = ["", "", *uri.rstrip("/").split("/")]
    runtime = RuntimeConfig(store="/".join(store).lstrip("/"))
    if not runtime.remote or runtime.remote.endswith(":"):
        raise ArtifactError(
            f"{uri!r} names no artefact; give STORE/STAGE/NAME, as the runs print it"
        )
    if latest.is_pointer(name):
        name = read_pointer(f"{runtime.remote}/{stage}/{name}")
    found = find_in_store(runtime.local_store / stage / name, f"{runtime.remote}/{stage}/{name}")
    if found is None:
        raise ArtifactError(f"no artefact at {uri!r}; give STORE/STAGE/NAME, as the runs print it")
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


def _bring(artifact: Artifact, read: Literal["changed", "unread"] = "changed") -> None:
    """Make ``artifact.path`` hold this very artefact; the caller has its lock.

    Of what is there already the files are compared that ``read`` says (``wholeness.check``).
    """
    directory, damaged = artifact.path, None
    if directory.exists():
        try:
            here = open_artifact(directory)
            wholeness.check(directory, read_manifest(directory), read)
        except DamagedArtifact as error:
            what = str(error).partition("; ")[0]
            log.warning("%s; it is copied from the store again", what)
            damaged = wholeness.set_aside(directory)
        else:
            if here.content_digest == artifact.content_digest:
                return
            _set_aside(here)
    manifest = _told_by_store(artifact)
    local_copies.mark(directory.parents[1], str(artifact.remote).rsplit("/", 2)[0])
    with explained(f"copying {artifact.remote}", directory.parent):
        pull(artifact.remote or "", _folder(manifest), manifest, directory)
    wholeness.remember(directory, manifest)
    if damaged:
        shutil.rmtree(damaged)


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
        DamagedArtifact: a file's SHA256 is not the manifest's.
    """
    if artifact.remote and (stored or not artifact.path.exists()):
        manifest = _told_by_store(artifact)
        verify_remote(artifact.remote, _folder(manifest), manifest)
        return
    wholeness.check(artifact.path, artifact.manifest, "all")


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
        return hashlib.sha256(
            canonical_json(
                {
                    "stage": self.name,
                    "stage_version": self.version,
                    "schema_version": SCHEMA_VERSION,
                    "config": config.model_dump(mode="json"),
                    "files": [
                        [path.name, wholeness.digest_once(path)] for path in self.files(config)
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

        In a local store a damaged one is set aside as ``NAME.damaged-N``, and a whole one becomes
        the latest of its stage (``diffagent.store.latest``). Of a remote store the manifest and the
        sizes of the files are asked for; none is copied.
        """
        return self._cached(self.directory(config, inputs, runtime), runtime, locked)

    def _cached(
        self, directory: Path, runtime: RuntimeConfig, lock: Callable[[Path], _Held]
    ) -> Artifact | None:
        if not runtime.remote:
            artifact = self._open(directory, lock)
            if artifact:
                _point(artifact)
            return artifact
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

    def _open(self, directory: Path, lock: Callable[[Path], _Held]) -> Artifact | None:
        """The artefact in ``directory``; None: there is none, or no more, since it is damaged."""
        if not directory.exists():
            return None
        try:
            return open_artifact(directory)
        except DamagedArtifact:
            pass
        with lock(directory):  # another process may have set it aside, and built it again
            try:
                return open_artifact(directory)
            except DamagedArtifact as error:
                if directory.exists():
                    self._put_away(directory, error)
                return None

    def _put_away(self, directory: Path, error: ArtifactError) -> None:
        aside = wholeness.set_aside(directory)
        what = str(error).partition("; ")[0]
        then = "what is good in it is taken over" if self.salvages else "it is built again"
        log.warning(
            "%s; set aside as %s, and %s (to keep it: put the right file back, and rename it)",
            *(what, aside, then),
        )

    def _verified(self, artifact: Artifact) -> Artifact | None:
        """The artefact, unless one of its bytes is not as it was written."""
        try:
            verify_artifact(artifact)
        except DamagedArtifact as error:
            self._put_away(artifact.path, error)
            return None
        return artifact

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
            DiffAgentError: an input is damaged (it is set aside, so that the next run makes it
                again), the disk is full, the store cannot be reached, the funnel does not add
                up, or the body failed, whatever it raised.
        """
        with explained(f"stage {self.name!r}", runtime.local_store / self.name):
            inputs = self._with_history(config, inputs, runtime)
            directory = self.directory(config, inputs, runtime)
            if not refresh and (artifact := self.cached(config, inputs, runtime)):
                log.info("%s: cached in %s", self.name, artifact.location)
                return artifact  # no lock is taken: a store that cannot be written will do
            context = StageContext(
                {name: [_here(a, runtime) for a in given] for name, given in inputs.items()},
                directory.with_name(f".{directory.name}.partial"),
                runtime,
                site_url,
                memory=directory.with_name(f"{directory.name}.memory.json"),
                progress=progress,
            )
            directory.parent.mkdir(parents=True, exist_ok=True)
            if runtime.remote:
                local_copies.mark(runtime.local_store, runtime.remote)
            with locked(directory):
                artifact = self._run(config, context, directory, refresh)
            if runtime.remote:
                _trim(runtime)
        return artifact

    def _run(self, config: C, context: StageContext, directory: Path, refresh: bool) -> Artifact:
        """``run`` with the lock of ``directory``."""
        runtime, inputs = context.runtime, list(_all(context.inputs))
        previous = self._cached(directory, runtime, _held) or self._unsent(directory, runtime)
        if previous and not refresh:
            log.info("%s: cached in %s", self.name, previous.location)
            return previous
        if runtime.remote:
            check_writable(runtime.remote)
        previous = self._previous(previous, directory, runtime)
        with local_copies.in_use(a.path for a in inputs if _in_store(a.path, runtime)):
            earlier = context.inputs.get(PREVIOUS, ())
            for artifact in inputs:
                _check_input(artifact, runtime, is_previous=artifact in earlier)
            copies = [] if previous else wholeness.damaged_copies(directory)
            damaged = copies[-1] if copies else None
            artifact = self._build(
                config, replace(context, previous=previous, damaged=damaged), directory
            )
        if not artifact.remote:
            _point(artifact)
        return artifact

    def _previous(
        self, artifact: Artifact | None, directory: Path, runtime: RuntimeConfig
    ) -> Artifact | None:
        """The artefact to refresh, on this disk; of a stage that salvages every byte is read."""
        if artifact and artifact.remote:
            _bring(artifact)
        if artifact and self.salvages and not self._verified(artifact):
            again = self._cached(directory, runtime, _held)
            return self._previous(again, directory, runtime)
        return artifact

    def _build(self, config: C, context: StageContext, directory: Path) -> Artifact:
        """Let the body fill the partial directory, and rename it into place."""
        previous, partial, runtime = context.previous, context.out, context.runtime
        partial.mkdir(exist_ok=True)
        (partial / MANIFEST).unlink(missing_ok=True)  # of a run killed just before the rename
        started = time.monotonic()
        result = self.body(config, context)
        manifest = self._manifest(config, context.inputs, partial, result, started)
        if previous and previous.content_digest == manifest.content_digest:
            log.info("%s: nothing new; %s stays", self.name, previous.location)
            shutil.rmtree(partial)
            return previous
        _write_durably(partial / MANIFEST, manifest.model_dump_json(indent=1).encode())
        if previous:
            _set_aside(previous)
        partial.rename(directory)
        wholeness.remember(directory, manifest)
        log.info("%s: built %s in %.1f s", self.name, directory, manifest.wall_seconds)
        return self._send(open_artifact(directory), runtime)

    def _unsent(self, directory: Path, runtime: RuntimeConfig) -> Artifact | None:
        """What was built here whole and never reached the remote store is sent there now."""
        if runtime.remote and (built := self._open(directory, _held)):
            return self._send(built, runtime)
        return None

    def _send(self, built: Artifact, runtime: RuntimeConfig) -> Artifact:
        if not runtime.remote:
            return built
        uri, manifest = self._uri(built.path, runtime), built.manifest
        push(built.path, manifest, uri, _folder(manifest))
        for pointer in latest.pointers(manifest.series):
            write_pointer(f"{runtime.remote}/{self.name}/{pointer}", built.path.name)
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
        from diffagent.store.lineage import series_of  # which reads artefacts

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
            series=latest.series_of(
                self.name,
                config.model_dump(mode="json"),
                {
                    name: [series_of(a) for a in artifacts]
                    for name, artifacts in inputs.items()
                    if name != PREVIOUS
                },
            ),
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


def _held(directory: Path) -> _Held:
    """In place of ``locked``, for a caller that has the lock."""
    return contextlib.nullcontext()


def _trim(runtime: RuntimeConfig) -> None:
    """Keep the local side of a remote store within its bound."""

    def in_store(directory: Path) -> bool:
        here = read_manifest(directory)
        told = read_remote(f"{runtime.remote}/{directory.parent.name}/{directory.name}")
        return told is not None and told.content_digest == here.content_digest

    try:
        local_copies.trim(runtime.local_store, int(runtime.cache.max_gb * 1e9), in_store)
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


def _in_store(directory: Path, runtime: RuntimeConfig) -> bool:
    """Whether ``directory`` is an artefact of this run's store, which its stages can make again."""
    return directory.resolve().parent.parent == runtime.local_store.resolve()


def _check_input(artifact: Artifact, runtime: RuntimeConfig, *, is_previous: bool) -> None:
    """Compare an input with its manifest before a stage reads it, each file once a change.

    A damaged copy of a remote artefact is brought again; a damaged artefact of the store is set
    aside, so that the next run makes it again.

    Raises:
        DamagedArtifact: the input is damaged.
        ArtifactError: it was replaced since the run began.
    """
    path = artifact.local()
    try:
        manifest = read_manifest(path)
        if manifest.content_digest != artifact.content_digest:
            raise ArtifactError(
                f"{str(path)!r} has other content than when this run began (a refresh replaced "
                "it); run the same command again"
            )
        wholeness.check(path, manifest, "unread")
        return
    except DamagedArtifact as error:
        damage = str(error).partition("; ")[0]
    if artifact.remote:
        with locked(path):
            _bring(artifact, "unread")
        return
    if not _in_store(path, runtime):
        raise DamagedArtifact(f"{damage}; it lies outside of this store: get a whole copy of it")
    with locked(path):
        try:  # another shard may have set it aside, and another run may have made it again
            wholeness.check(path, read_manifest(path), "unread")
            return
        except DamagedArtifact:
            aside = wholeness.set_aside(path) if path.exists() else None
    where = f"{damage}; set aside{f' as {str(aside)!r}' if aside else ''}"
    if is_previous:
        raise DamagedArtifact(
            f"{where}, and it is the version before: put the right file back and rename it, or run "
            "what made it again (the same configuration and crawl); or delete it, to go on from an "
            "older version"
        )
    raise DamagedArtifact(
        f"{where}: run the same command again, and the stage {artifact.stage!r} makes it again"
    )


def _point(artifact: Artifact) -> None:
    """Let the pointers of a local store lead to ``artifact``."""
    from diffagent.store.lineage import series_of  # which reads artefacts

    latest.point(artifact.path, series_of(artifact))


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

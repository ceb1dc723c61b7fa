"""Handles on artifacts, opened by path or URI.

An artifact is a directory with a manifest, ``STORE/STAGE/IDENTITY[:16]``. A directory without a
manifest counts as if the stage had never run.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from diffagent.errors import ArtifactError
from diffagent.schemas.manifest import InputRef, Manifest
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import integrity, latest, local_copies, object_store
from diffagent.store.locks import locked
from diffagent.store.manifest_file import MANIFEST, read_manifest


class Artifact(BaseModel):
    """A handle on a committed artifact: small, and safe to pass between processes.

    Of an artifact with a ``remote`` (its URI), the directory ``path`` is a copy that may not exist
    yet: ``local`` fetches it, and so does every method that reads a file.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    identity: str
    content_digest: str
    path: Path
    remote: str | None = None

    @classmethod
    def of(cls, manifest: Manifest, path: Path, remote: str | None = None) -> Artifact:
        """Return a handle on the artifact with this manifest, path and URI."""
        return cls(
            stage=manifest.stage,
            identity=manifest.identity,
            content_digest=manifest.content_digest,
            path=path,
            remote=remote,
        )

    @property
    def manifest(self) -> Manifest:
        """The manifest, read from disk, or from the store when there is no copy on this disk."""
        if self.remote and not self._is_local():
            return object_store.read_expected(self.remote, self.content_digest)
        return read_manifest(self.path)

    @property
    def location(self) -> str:
        """The URI or path, for people and for the command line."""
        return self.remote or str(self.path)

    @property
    def reference(self) -> InputRef:
        """The entry of this artifact in the manifests of those made from it."""
        return InputRef(
            stage=self.stage, identity=self.identity, content_digest=self.content_digest
        )

    def local(self) -> Path:
        """Return its directory on this machine, fetched from the store where needed.

        Raises:
            ArtifactError: the store cannot be read, or has other or damaged content by now.
        """
        if self.remote and not self._is_local():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path):
                local_copies.fetch_copy(self.remote, self.content_digest, self.path)
        return self.path

    def file(self, name: str) -> Path:
        """Return the path of a file of this artifact.

        Raises:
            ArtifactError: the artifact has no such file.
        """
        path = self.local() / name
        if not path.exists():
            raise ArtifactError(
                f"{self.stage} artifact {str(self.path)!r} has no file {name!r}; "
                "delete the directory and run the stage again"
            )
        return path

    def glob(self, pattern: str) -> list[Path]:
        """Return the files that match ``pattern``, sorted by path."""
        return sorted(self.local().glob(pattern))

    def _is_local(self) -> bool:
        return local_copies.is_current(self.path, self.content_digest)


def open_artifact(directory: str | Path) -> Artifact:
    """Open the artifact in ``directory`` or at a URI; its files are checked by size.

    A file that has changed since it was last read is read again (``diffagent.store.integrity``). A
    pointer (``STORE/STAGE/latest``) is followed once: the handle is on the present target.

    Raises:
        DamagedArtifact: the manifest is missing, or a file is not the manifest's.
        ArtifactError: it cannot be read.
    """
    if "://" in str(directory):
        return _open_remote(str(directory))
    path = Path(directory)
    if path.is_symlink():
        path = path.resolve()
    return Artifact.of(integrity.checked_manifest(path), path, local_copies.remote_of(path))


def find_remote(uri: str, directory: Path) -> Artifact | None:
    """Open the artifact at ``uri`` whose local copy is ``directory``; None where there is none.

    Raises:
        ArtifactError: the store cannot be read.
    """
    manifest = object_store.read_remote(uri)
    return Artifact.of(manifest, directory, uri) if manifest else None


def artifact_directory(text: str) -> Path:
    """Return the directory that a person names by a path or by the URI of an artifact.

    A pointer (``latest``) is followed. An artifact is compared with its manifest, each file once
    per change; a directory without a manifest is returned as it is.

    Raises:
        ArtifactError: there is no artifact at the URI, or it cannot be read or is damaged.
    """
    if "://" not in text and not Path(text, MANIFEST).exists():
        return Path(text)
    directory = open_artifact(text).local()
    integrity.checked_manifest(directory, "unread")
    return directory


def verify_artifact(artifact: Artifact, *, stored: bool = False) -> None:
    """Read every byte and compare it with the manifest.

    Args:
        artifact: whose copy on this disk is read where there is one.
        stored: read the files of the remote store in any case.

    Raises:
        DamagedArtifact: the SHA256 of a file is not the manifest's.
    """
    if artifact.remote and (stored or not artifact.path.exists()):
        manifest = object_store.read_expected(artifact.remote, artifact.content_digest)
        object_store.verify_remote(artifact.remote, manifest)
    else:
        integrity.check(artifact.path, artifact.manifest, "all")


def _open_remote(uri: str) -> Artifact:
    *store, stage, name = ["", "", *uri.rstrip("/").split("/")]
    runtime = RuntimeConfig(store="/".join(store).lstrip("/"))
    if not runtime.remote or runtime.remote.endswith(":"):
        raise ArtifactError(
            f"{uri!r} names no artifact; give STORE/STAGE/NAME, as the runs print it"
        )
    if latest.is_pointer(name):
        name = object_store.read_pointer(f"{runtime.remote}/{stage}/{name}")
    directory = runtime.local_store / stage / name
    artifact = find_remote(f"{runtime.remote}/{stage}/{name}", directory)
    if artifact is None:
        raise ArtifactError(f"no artifact at {uri!r}; give STORE/STAGE/NAME, as the runs print it")
    return artifact

"""Stores of artifacts: one protocol, for a directory or a URI.

A store holds the artifact of a request in ``STAGE/IDENTITY[:16]``. Work happens in a hidden partial
directory next to it, which stays when the process dies, so that the stage can resume;
``manifest.json`` is written last and the directory is renamed into place.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from diffagent.schemas.manifest import Manifest
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store.artifact import Artifact
from diffagent.store.local_store import LocalStore
from diffagent.store.remote_store import RemoteStore


class Store(Protocol):
    """A store of artifacts.

    Methods take the ``directory`` of a request, ``ROOT/STAGE/NAME``: where its artifact is built
    and read on this machine.
    """

    @property
    def root(self) -> Path:
        """Directory of this machine where artifacts are built and read."""

    def find(self, directory: Path) -> Artifact | None:
        """Return the artifact of a request when the store has it whole; no file is copied.

        Raises:
            ArtifactError: the store cannot be read.
        """

    def begin(
        self, directory: Path, *, refresh: bool = False
    ) -> AbstractContextManager[Artifact | None]:
        """Lock a request as long as the block runs, and yield the artifact that it has by now.

        Args:
            directory: of the request.
            refresh: compare every byte of that artifact, on this disk.

        Raises:
            ArtifactError: the store cannot be written.
        """

    def fetch(self, artifact: Artifact, remedy: str) -> AbstractContextManager[Artifact]:
        """Yield an artifact on this disk, compared with its manifest and safe from removal.

        Args:
            artifact: of this store, or in a directory outside of any store.
            remedy: end of the message about a damaged artifact that is set aside.

        Raises:
            DamagedArtifact: it is damaged, and this store has no other copy.
            ArtifactError: it has other content by now, or cannot be read.
        """

    def commit(
        self, partial: Path, directory: Path, manifest: Manifest, existing: Artifact | None
    ) -> Artifact:
        """Turn a partial directory into the artifact of its request.

        Args:
            partial: holds all files except the manifest.
            directory: of the request, whose lock the caller holds (``begin``).
            manifest: of the artifact.
            existing: the artifact that it replaces.

        Raises:
            ArtifactError: the store cannot be written; the artifact is whole on this disk.
        """

    def trim(self) -> None:
        """Keep the local side of the store within its limit."""


def open_store(runtime: RuntimeConfig) -> Store:
    """Open the store that a run is configured with."""
    if runtime.remote is None:
        return LocalStore(runtime.local_store)
    return RemoteStore(runtime.remote, runtime.local_store, int(runtime.cache.max_gb * 1e9))


def home_of(artifact: Artifact, runtime: RuntimeConfig) -> Store:
    """Open the store that an input comes from, with its local side as on this machine."""
    if artifact.remote is None:
        return LocalStore(runtime.local_store)
    return open_store(runtime.model_copy(update={"store": artifact.remote.rsplit("/", 2)[0]}))

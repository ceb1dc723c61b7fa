"""The store at a URI, with local copies: artifacts are built and read in a directory with a limit.

They are sent when they are whole (``diffagent.store.object_store``) and fetched when a stage reads
them (``diffagent.store.local_copies``).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.schemas.manifest import Manifest
from diffagent.store import latest, local_copies, object_store
from diffagent.store.artifact import Artifact, find_remote
from diffagent.store.local_store import check_input, open_or_set_aside, put_in_place
from diffagent.store.locks import locked
from diffagent.store.manifest_file import read_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteStore:
    """The store at ``uri`` (see ``diffagent.store.store.Store``).

    Attributes:
        uri: without a slash at its end.
        root: its local side.
        max_bytes: limit of the whole artifacts in ``root``.
    """

    uri: str
    root: Path
    max_bytes: int

    def find(self, directory: Path) -> Artifact | None:
        """Return the artifact that the store has whole; only manifest and sizes are read."""
        uri = self._uri(directory)
        manifest = object_store.read_remote(uri)
        if manifest is None:
            return None
        if missing := object_store.missing_files(uri, manifest):
            log.warning(
                "%d files of %s, such as %r, are missing or have another size than in its "
                "manifest; the stage runs again",
                *(len(missing), uri, missing[0].path),
            )
            return None
        return Artifact.of(manifest, directory, uri)

    @contextlib.contextmanager
    def begin(self, directory: Path, *, refresh: bool = False) -> Iterator[Artifact | None]:
        """Hold the local lock of ``directory`` and yield the artifact that the store has.

        An artifact that was built here and never reached the store is sent now. No lock reaches
        other machines: see ``diffagent.store.object_store`` for writers at the same time.
        """
        directory.parent.mkdir(parents=True, exist_ok=True)
        local_copies.mark(self.root, self.uri)
        with locked(directory):
            object_store.check_writable(self.uri)
            artifact = self.find(directory)
            if artifact is None and (unsent := open_or_set_aside(directory)):
                artifact = self._send(directory, unsent.manifest)
            if artifact and refresh:
                uri = self._uri(directory)
                local_copies.fetch_copy(uri, artifact.content_digest, directory, "all")
            yield artifact

    @contextlib.contextmanager
    def fetch(self, artifact: Artifact, remedy: str) -> Iterator[Artifact]:
        """Yield an input whose copy is on this disk; a damaged copy is fetched again."""
        path = self.root / artifact.stage / artifact.path.name
        copy = artifact.model_copy(update={"path": path})
        with local_copies.in_use([path]):
            copy.local()
            try:
                check_input(copy)
            except DamagedArtifact:
                with locked(path):
                    local_copies.fetch_copy(
                        self._uri(path), artifact.content_digest, path, "unread"
                    )
            yield copy

    def commit(
        self, partial: Path, directory: Path, manifest: Manifest, existing: Artifact | None
    ) -> Artifact:
        """Rename ``partial`` to ``directory`` and send it to the store."""
        put_in_place(partial, directory, manifest, existing)
        return self._send(directory, manifest)

    def trim(self) -> None:
        """Remove the least recently used local copies beyond the limit."""

        def in_store(directory: Path) -> bool:
            stored = find_remote(self._uri(directory), directory)
            digest = read_manifest(directory).content_digest
            return stored is not None and stored.content_digest == digest

        try:
            local_copies.trim(self.root, self.max_bytes, in_store)
        except ArtifactError as error:  # the result of the run is safe
            log.warning("the cache %s is not trimmed: %s", self.root, error)

    def _send(self, directory: Path, manifest: Manifest) -> Artifact:
        uri = self._uri(directory)
        object_store.push(directory, manifest, uri)
        for pointer in latest.pointers(manifest.series):
            object_store.write_pointer(
                f"{self.uri}/{directory.parent.name}/{pointer}", directory.name
            )
        return Artifact.of(manifest, directory, uri)

    def _uri(self, directory: Path) -> str:
        return f"{self.uri}/{directory.parent.name}/{directory.name}"

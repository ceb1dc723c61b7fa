"""The store in a directory: artifacts are renamed into place, damaged ones are set aside."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.schemas.manifest import Manifest
from diffagent.store import integrity, latest
from diffagent.store.artifact import Artifact, open_artifact
from diffagent.store.atomic_writes import write_durably
from diffagent.store.integrity import Extent
from diffagent.store.lineage import series_of
from diffagent.store.local_copies import in_use, remote_of
from diffagent.store.locks import locked
from diffagent.store.manifest_file import MANIFEST

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalStore:
    """The store in the directory ``root`` (see ``diffagent.store.store.Store``)."""

    root: Path

    def find(self, directory: Path) -> Artifact | None:
        """Return the whole artifact in ``directory``, which becomes the latest of its stage.

        A damaged one is set aside as ``NAME.damaged-N``. Without damage no lock is taken: a store
        that cannot be written can be read.
        """
        if not directory.exists():
            return None
        try:
            artifact: Artifact | None = open_artifact(directory)
        except DamagedArtifact:
            with locked(directory):  # another process may have set it aside and built it again
                artifact = open_or_set_aside(directory)
        return _point(artifact) if artifact else None

    @contextlib.contextmanager
    def begin(self, directory: Path, *, refresh: bool = False) -> Iterator[Artifact | None]:
        """Hold the lock of ``directory`` and yield the artifact in it."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            artifact = open_or_set_aside(directory, "all" if refresh else "changed")
            yield _point(artifact) if artifact else None

    @contextlib.contextmanager
    def fetch(self, artifact: Artifact, remedy: str) -> Iterator[Artifact]:
        """Yield an input whose files were compared with its manifest, each once per change."""
        is_inside = artifact.path.resolve().parent.parent == self.root.resolve()
        with in_use([artifact.path] if is_inside else []):
            try:
                check_input(artifact)
            except DamagedArtifact as error:
                damage = integrity.first_clause(error)
                if not is_inside:
                    raise DamagedArtifact(
                        f"{damage}; it lies outside of this store: get a whole copy of it"
                    ) from None
                _set_aside_input(artifact, damage, remedy)
            yield artifact

    def commit(
        self, partial: Path, directory: Path, manifest: Manifest, existing: Artifact | None
    ) -> Artifact:
        """Rename ``partial`` to ``directory``, which becomes the latest of its stage."""
        return _point(put_in_place(partial, directory, manifest, existing))

    def trim(self) -> None:
        """Do nothing: a local store has no limit."""


def open_or_set_aside(directory: Path, extent: Extent = "changed") -> Artifact | None:
    """Open the artifact in a directory whose lock the caller holds; set a damaged one aside."""
    if not directory.exists():
        return None
    try:
        manifest = integrity.checked_manifest(directory, extent)
    except DamagedArtifact as error:
        log.warning(
            "%s; set aside as %s, and the stage runs again (to keep it: put the right file back, "
            "and rename it)",
            *(integrity.first_clause(error), integrity.set_aside(directory)),
        )
        return None
    return Artifact.of(manifest, directory, remote_of(directory))


def put_in_place(
    partial: Path, directory: Path, manifest: Manifest, existing: Artifact | None
) -> Artifact:
    """Write the manifest into ``partial`` and rename that to ``directory``.

    The content that ``directory`` has so far (``existing``) stays as ``IDENTITY.CONTENT``.
    """
    write_durably(partial / MANIFEST, manifest.model_dump_json(indent=1).encode())
    if existing:
        integrity.retire(directory, existing.content_digest)
    partial.rename(directory)
    integrity.note_read(directory, manifest)
    return Artifact.of(manifest, directory, remote_of(directory))


def check_input(artifact: Artifact) -> None:
    """Compare the files of an input with its manifest, each once per change.

    Raises:
        DamagedArtifact: the input is damaged.
        ArtifactError: it has other content by now.
    """
    manifest = integrity.checked_manifest(artifact.path, "unread")
    if manifest.content_digest != artifact.content_digest:
        raise ArtifactError(
            f"{str(artifact.path)!r} has other content than when this run began (a refresh "
            "replaced it); run the same command again"
        )


def _set_aside_input(artifact: Artifact, damage: str, remedy: str) -> None:
    """Set a damaged input aside, so that the next run makes it again.

    Raises:
        DamagedArtifact: unless another run has made it again in the meantime.
    """
    path, place = artifact.path, ""
    with locked(path):
        try:
            check_input(artifact)
            return
        except DamagedArtifact:
            if path.exists():  # otherwise another shard has set it aside
                place = f" as {str(integrity.set_aside(path))!r}"
    raise DamagedArtifact(f"{damage}; set aside{place}: {remedy}")


def _point(artifact: Artifact) -> Artifact:
    """Let the pointers of the store lead to ``artifact``, which is returned."""
    latest.point(artifact.path, series_of(artifact))
    return artifact

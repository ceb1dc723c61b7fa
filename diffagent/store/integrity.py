"""Comparison of an artifact's files with its manifest; each file is read once per change.

``.NAME.read.json`` next to the artifact notes which files were read, and the state that they had
(size, times, inode). So a look at the directory shows whether a file has changed since, and only
that file is read again. In a store that cannot be written there is no note, and files are read once
per process.

Files for people (``FileEntry.for_people``) may change: no stage reads them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from diffagent.errors import DamagedArtifact
from diffagent.schemas.manifest import FileEntry, Manifest
from diffagent.store.atomic_writes import atomic_file
from diffagent.store.digests import FileState, cached_sha256, file_state, sha256_file
from diffagent.store.manifest_file import read_manifest

log = logging.getLogger(__name__)

#: Files whose SHA256 is compared: those that changed since they were read, also those that were
#: never read, or all.
Extent = Literal["changed", "unread", "all"]
#: Size in bytes from which reading takes a while and is logged.
_LARGE = 2**30
_DAMAGED = ".damaged-"


def check(directory: Path, manifest: Manifest, extent: Extent = "changed") -> None:
    """Compare the files in ``directory`` with ``manifest``, sizes first.

    Raises:
        DamagedArtifact: a file is missing, or has another size or content.
        OSError: a file cannot be read.
    """
    entries = [entry for entry in manifest.files if not entry.for_people]
    states = {entry.path: _state(directory, entry, manifest.stage) for entry in entries}
    notes = _read_notes(directory)
    if extent == "changed":
        entries = [e for e in entries if e.path in notes and notes[e.path] != _note(e, states)]
    elif extent == "unread":
        entries = [e for e in entries if notes.get(e.path) != _note(e, states)]
    size = sum(entry.size for entry in entries)
    if size > _LARGE:
        log.info("reading %.1f GB of %s, once, to verify it", size / 1e9, directory)
    for entry in entries:
        path, state = directory / entry.path, states[entry.path]
        digest = sha256_file(path) if extent == "all" else cached_sha256(path, state)
        if digest != entry.sha256:
            raise DamagedArtifact(
                f"{str(path)!r} is damaged (its SHA256 is not its manifest's); put the right file "
                f"back, or run the stage {manifest.stage!r} again, which makes it again"
            )
    if entries:
        _write_notes(directory, {**notes, **{e.path: _note(e, states) for e in entries}})


def checked_manifest(directory: Path, extent: Extent = "changed") -> Manifest:
    """Read the manifest of an artifact and compare the files with it.

    Raises:
        DamagedArtifact: the manifest is missing, or a file is not the manifest's.
        ArtifactError: the manifest cannot be read.
    """
    manifest = read_manifest(directory)
    check(directory, manifest, extent)
    return manifest


def note_read(directory: Path, manifest: Manifest) -> None:
    """Note that the files in ``directory`` were just read or written as ``manifest`` lists them."""
    entries = [entry for entry in manifest.files if not entry.for_people]
    states = {entry.path: _state(directory, entry, manifest.stage) for entry in entries}
    _write_notes(directory, {entry.path: _note(entry, states) for entry in entries})


def forget(directory: Path) -> None:
    """Remove the note on an artifact that is removed or set aside."""
    _note_file(directory).unlink(missing_ok=True)


def set_aside(directory: Path) -> Path:
    """Rename a damaged artifact to ``NAME.damaged-N`` and return that path; nothing is removed.

    The caller holds the lock of the artifact.
    """
    number = 1 + max(map(_number, damaged_copies(directory)), default=0)
    aside = directory.with_name(f"{directory.name}{_DAMAGED}{number}")
    directory.rename(aside)
    forget(directory)
    return aside


def is_set_aside(directory: Path) -> bool:
    """Whether a directory has the name of a damaged artifact that was set aside."""
    return _DAMAGED in directory.name


def damaged_copies(directory: Path) -> list[Path]:
    """List the damaged artifacts that were set aside from ``directory``, the oldest first."""
    return sorted(directory.parent.glob(f"{directory.name}{_DAMAGED}*"), key=_number)


def retire(directory: Path, content_digest: str) -> None:
    """Rename an artifact to ``NAME.CONTENT``, to make room for newer content of its request."""
    retired = directory.with_name(f"{directory.name}.{content_digest[:8]}")
    shutil.rmtree(retired, ignore_errors=True)
    directory.rename(retired)


def first_clause(error: DamagedArtifact) -> str:
    """Return the message of an error up to its remedy, for a message with another remedy."""
    return str(error).partition("; ")[0]


def _state(directory: Path, entry: FileEntry, stage: str) -> FileState:
    path = directory / entry.path
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        problem = "missing"
    else:
        if stat.st_size == entry.size and path.is_file():
            return file_state(stat)
        problem = f"{stat.st_size} bytes long"
    raise DamagedArtifact(
        f"{str(path)!r} is {problem}, its manifest has {entry.size} bytes; put the right file "
        f"back, or run the stage {stage!r} again, which makes it again"
    )


def _note(entry: FileEntry, states: Mapping[str, FileState]) -> list[int | str]:
    return [entry.sha256, *states[entry.path]]


def _note_file(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.read.json")


def _read_notes(directory: Path) -> dict[str, list[int | str]]:
    try:
        notes = json.loads(_note_file(directory).read_bytes())
    except (OSError, ValueError):  # none yet, or it was cut off: the files are read again
        return {}
    return notes if isinstance(notes, dict) else {}


def _write_notes(directory: Path, notes: Mapping[str, list[int | str]]) -> None:
    try:
        with atomic_file(_note_file(directory)) as temporary:
            temporary.write_text(json.dumps(notes), encoding="utf-8")
    except OSError as error:
        log.debug("%s is not noted as read: %s", directory, error)


def _number(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0

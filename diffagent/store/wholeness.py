"""Whether the files of an artefact are those of its manifest, each read once a change.

Which files were read, and how they looked then (size, times, inode), is noted in
``.NAME.read.json`` next to the artefact; so one look at the directory tells whether a file has
changed since, and only that one is read again. A store that cannot be written has no note, and its
files are read once a process.

Files for people (``FileEntry.for_people``) may change: no stage reads them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from diffagent.errors import DamagedArtifact
from diffagent.schemas.manifest import FileEntry, Manifest

log = logging.getLogger(__name__)

#: Bytes that take a while to read: worth a message.
_LARGE = 2**30
#: How a file looked when it was read: size, mtime and ctime in ns, inode.
Look = tuple[int, int, int, int]


def check(
    directory: Path, manifest: Manifest, read: Literal["changed", "unread", "all"] = "changed"
) -> None:
    """Compare the files in ``directory`` with ``manifest``, sizes first.

    Args:
        directory: an artefact.
        manifest: its manifest.
        read: which files are compared by SHA256 too: those that changed since they were read,
            also those that were never read, or all.

    Raises:
        DamagedArtifact: a file is missing, of another size or of another content.
        OSError: a file cannot be read.
    """
    entries = [entry for entry in manifest.files if not entry.for_people]
    looks = {entry.path: _look(directory, entry, manifest.stage) for entry in entries}
    noted = _read_note(directory)
    if read == "changed":
        entries = [e for e in entries if e.path in noted and noted[e.path] != _note(e, looks)]
    elif read == "unread":
        entries = [e for e in entries if noted.get(e.path) != _note(e, looks)]
    size = sum(entry.size for entry in entries)
    if size > _LARGE:
        log.info("reading %.1f GB of %s, once, to verify it", size / 1e9, directory)
    for entry in entries:
        path = directory / entry.path
        if _digest(path, looks[entry.path], again=read == "all") != entry.sha256:
            raise DamagedArtifact(
                f"{str(path)!r} is damaged (its SHA256 is not its manifest's); put the right file "
                f"back, or run the stage {manifest.stage!r} again, which makes it again"
            )
    if entries:
        _write_note(directory, {**noted, **{e.path: _note(e, looks) for e in entries}})


def remember(directory: Path, manifest: Manifest) -> None:
    """Note that the files in ``directory`` have just been read or written as ``manifest`` says."""
    entries = [entry for entry in manifest.files if not entry.for_people]
    looks = {entry.path: _look(directory, entry, manifest.stage) for entry in entries}
    _write_note(directory, {entry.path: _note(entry, looks) for entry in entries})


def forget(directory: Path) -> None:
    """Remove the note on an artefact that is removed or set aside."""
    _note_file(directory).unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex SHA256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_once(path: Path) -> str:
    """Hex SHA256 of a file, read once a process as long as it does not change."""
    return _digest(path, _look_of(path.stat()))


def _look(directory: Path, entry: FileEntry, stage: str) -> Look:
    path = directory / entry.path
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        state = "missing"
    else:
        if stat.st_size == entry.size and path.is_file():
            return _look_of(stat)
        state = f"{stat.st_size} bytes long"
    raise DamagedArtifact(
        f"{str(path)!r} is {state}, its manifest has {entry.size} bytes; put the right file back, "
        f"or run the stage {stage!r} again, which makes it again"
    )


def _look_of(stat: os.stat_result) -> Look:
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def _digest(path: Path, look: Look, *, again: bool = False) -> str:
    return sha256_file(path) if again else _digest_once(path, look)


@functools.lru_cache(maxsize=16384)
def _digest_once(path: Path, look: Look) -> str:
    return sha256_file(path)


def _note(entry: FileEntry, looks: Mapping[str, Look]) -> list[int | str]:
    return [entry.sha256, *looks[entry.path]]


def _note_file(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.read.json")


def _read_note(directory: Path) -> dict[str, list[int | str]]:
    try:
        noted = json.loads(_note_file(directory).read_bytes())
    except (OSError, ValueError):  # none yet, or it was cut off: the files are read again
        return {}
    return noted if isinstance(noted, dict) else {}


def _write_note(directory: Path, noted: Mapping[str, list[int | str]]) -> None:
    file = _note_file(directory)
    temporary = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_text(json.dumps(noted), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        log.debug("%s is not noted as read: %s", directory, error)
        with contextlib.suppress(OSError):
            temporary.unlink()


def set_aside(directory: Path) -> Path:
    """Rename a damaged artefact to ``NAME.damaged-N``, whose path comes back; nothing is removed.

    The caller holds the lock of the artefact.
    """
    number = 1 + max(map(_number, damaged_copies(directory)), default=0)
    aside = directory.with_name(f"{directory.name}.damaged-{number}")
    directory.rename(aside)
    forget(directory)
    return aside


def is_aside(directory: Path) -> bool:
    """Whether a directory has the name of a damaged artefact that was set aside."""
    return ".damaged-" in directory.name


def damaged_copies(directory: Path) -> list[Path]:
    """Damaged artefacts that were set aside of ``directory``, the oldest first."""
    return sorted(directory.parent.glob(f"{directory.name}.damaged-*"), key=_number)


def _number(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0

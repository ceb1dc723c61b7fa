"""Digests of values and files, from which identities and content digests are made."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffagent.schemas.manifest import FileEntry

#: Size, mtime and ctime in ns, and inode of a file; they change whenever its content does.
FileState = tuple[int, int, int, int]


def canonical_json(value: Any) -> bytes:
    """Encode a value as JSON with sorted keys and no spaces, in UTF-8: one spelling per value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def json_digest(value: Any) -> str:
    """Return the hex SHA256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hex SHA256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.lru_cache(maxsize=16384)
def cached_sha256(path: Path, state: FileState) -> str:
    """Return the hex SHA256 of a file, read once per process as long as its state stays."""
    return sha256_file(path)


def file_state(stat: os.stat_result) -> FileState:
    """Return the part of a file's status that changes with its content."""
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def files_digest(files: Sequence[FileEntry]) -> str:
    """Return the digest of an artifact's contents: the names and SHA256 of its files."""
    return json_digest([[f.path, f.sha256] for f in sorted(files, key=lambda f: f.path)])


def named_files(*names: str | Path | None) -> list[Path]:
    """List the local files that values of a config name.

    Args:
        names: a file, a directory (all its files except hidden ones and README.md, which people
            edit), or anything else (no file), such as the name of a model on a hub.
    """
    files: list[Path] = []
    for path in (Path(name) for name in names if name):
        below = path.rglob("*") if path.is_dir() else ()
        files += sorted(
            p for p in below if p.is_file() and p.name[0] != "." and p.name != "README.md"
        )
        files += [path] if path.is_file() else []
    return files

"""Names that stay: ``STORE/STAGE/latest`` leads to what the last run of a stage made or found.

A refresh gives what it makes a new path. ``latest`` follows it, and so does ``latest-SERIES`` for
each configuration: an artefact's series names its stage with its own configuration and those of
its ancestors, whatever their content. In a local store both are symbolic links, replaced in one
step; in a remote one they are small objects that hold a name, written after the artefact.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LATEST = "latest"


def is_pointer(name: str) -> bool:
    """Whether ``name`` is that of a pointer and not that of an artefact."""
    return name == LATEST or name.startswith(f"{LATEST}-")


def pointers(series: str) -> tuple[str, str]:
    """Names of the pointers that lead to the latest artefact of ``series``."""
    return LATEST, f"{LATEST}-{series}"


def series_of(stage: str, config: Mapping[str, Any], parents: Mapping[str, Sequence[str]]) -> str:
    """Eight hexadecimal digits that name a stage, its configuration and its parents' series."""
    text = json.dumps([stage, config, {k: list(v) for k, v in parents.items()}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def point(directory: Path, series: str) -> None:
    """Let the pointers of ``series`` lead to ``directory``, the artefact that a run ended with.

    A store that cannot be written keeps the pointers that it has.
    """
    for name in pointers(series):
        link = directory.with_name(name)
        try:
            if link.is_symlink() and str(link.readlink()) == directory.name:
                continue
            _replace(link, directory.name)
        except OSError as error:
            log.info("%s does not lead to %s: %s", link, directory.name, error.strerror)


def _replace(link: Path, target: str) -> None:
    new = link.with_name(f".{link.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        new.symlink_to(target)
        new.replace(link)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()

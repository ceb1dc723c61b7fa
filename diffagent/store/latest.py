"""Stable names: ``STORE/STAGE/latest`` leads to the last artifact that a run made or reused.

A refresh gives its result a new path. ``latest`` follows it, and so does ``latest-SERIES`` for each
configuration: the series of an artifact names its stage with its own configuration and those of its
ancestors, whatever their content. In a local store both are symbolic links, replaced in one step;
in a remote store they are small objects that hold a name, written after the artifact.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffagent.store.atomic_writes import atomic_file

log = logging.getLogger(__name__)

LATEST = "latest"


def is_pointer(name: str) -> bool:
    """Whether ``name`` is that of a pointer and not that of an artifact."""
    return name == LATEST or name.startswith(f"{LATEST}-")


def pointers(series: str) -> tuple[str, str]:
    """Return the names of the pointers that lead to the latest artifact of ``series``."""
    return LATEST, f"{LATEST}-{series}"


def name_series(stage: str, config: Mapping[str, Any], parents: Mapping[str, Sequence[str]]) -> str:
    """Return eight hex digits that name a stage, its configuration and its parents' series."""
    text = json.dumps([stage, config, {k: list(v) for k, v in parents.items()}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def point(directory: Path, series: str) -> None:
    """Let the pointers of ``series`` lead to ``directory``, the result of a run.

    A store that cannot be written keeps the pointers that it has.
    """
    for name in pointers(series):
        link = directory.with_name(name)
        try:
            if link.is_symlink() and str(link.readlink()) == directory.name:
                continue
            with atomic_file(link) as temporary:
                temporary.symlink_to(directory.name)
        except OSError as error:
            log.info("%s does not lead to %s: %s", link, directory.name, error.strerror)

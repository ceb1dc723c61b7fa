"""Sources of records other than the web site: ``KIND:DIRECTORY`` as a crawl's address.

A source is a function that turns a directory into ``SourceRecords``: models and images in the API's
form, and their model files. ``FolderSite`` and the local server read all sources alike, so a crawl,
its refreshes and tombstones work on each of them. A new source is one module and one line of
``SOURCES``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffagent.errors import ConfigError
from diffagent.t2i.catalogue import SYNTHETIC


@dataclass(frozen=True)
class UnreadableRecord:
    """Placeholder of a record that a source cannot read; ``reason`` is counted."""

    reason: str


@dataclass(frozen=True)
class SourceRecords:
    """Contents of a source; ``files`` maps a SHA256 in lower case to a model file.

    Models and images are any JSON values, and ``UnreadableRecord``. ``Replay`` counts values that
    are no records, by the rules of a crawl.
    """

    models: Iterable[Any]
    images: Iterable[Any]
    files: Mapping[str, Path] = field(default_factory=dict)


#: (directory, file in which the source may store results that take long to compute) -> records
Source = Callable[[Path, Path | None], SourceRecords]

SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "dump": "diffagent.localcivitai.sources.dump:open_dump",
        "local": "diffagent.localcivitai.sources.local:open_folder",
        "release": "diffagent.localcivitai.sources.release:open_release",
    }
)


def require_source(site: str) -> tuple[str, Path]:
    """Returns the kind and the directory of ``KIND:DIRECTORY``.

    Raises:
        ConfigError: there is no such kind of source or no such directory.
    """
    kind, colon, directory = site.partition(":")
    if colon and kind in SOURCES and Path(directory).is_dir():
        return kind, Path(directory)
    kinds = ", ".join(f"'{name}:DIR'" for name in SOURCES)
    raise ConfigError(
        f"site {site!r} is neither an http(s) address nor one of {kinds} with a directory that "
        "exists; `python -m diffagent.sandbox DIR` writes the dump of configs/sandbox.yaml"
    )


def about_file(site: str) -> Path | None:
    """Returns the note ``about.json`` of a dump, if it has one.

    It describes the records of a dump that was made by a program: ``{"source": "built from ...",
    "limits": ["..."], "version": "..."}``. A dataset card quotes source and limits; a dump whose
    note changed is crawled anew.
    """
    kind, _, directory = site.partition(":")
    note = Path(directory, "about.json")
    return note if kind == "dump" and note.is_file() else None


def read_about(site: str) -> dict[str, Any]:
    """Returns the contents of `about_file`; empty when there is none.

    Raises:
        ConfigError: the note is not usable.
    """
    note = about_file(site)
    if note is None:
        return {}
    try:
        about = json.loads(note.read_text(encoding="utf-8"))
        return {"source": str(about["source"]), "limits": [str(text) for text in about["limits"]]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(note)!r} is not usable ({type(error).__name__}: {error}); it must be JSON: "
            '{"source": "built from ...", "limits": ["..."]}'
        ) from error


def open_source(site: str, cache: Path | None = None) -> SourceRecords:
    """Read the records of ``KIND:DIRECTORY``.

    Raises:
        ConfigError: there is no such source or directory, or it lacks the expected files.
    """
    kind, directory = require_source(site)
    module, _, name = SOURCES[kind].partition(":")
    source: Source = getattr(importlib.import_module(module), name)
    return source(directory, cache)


def synthetic_id(sha256: str) -> int:
    """Return the id of an item that the site does not have, from its SHA256 in hex."""
    return SYNTHETIC + int(sha256[:13], 16)

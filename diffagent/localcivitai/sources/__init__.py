"""Where records come from when it is not a site: ``KIND:DIRECTORY`` as a crawl's address.

A source is a function that turns a directory into ``Records``: models and images in the API's
shape, and the model files that go with them. The local server serves these as it serves anything,
so that a crawl, its refreshes and tombstones work on every source alike. A new source is one module
and one line of ``SOURCES``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffagent.errors import ConfigError
from diffagent.t2i.catalogue import SYNTHETIC


@dataclass(frozen=True)
class Unreadable:
    """Stands for a record that a source cannot read; ``reason`` is counted."""

    reason: str


@dataclass(frozen=True)
class Records:
    """The contents of a source; ``files`` maps a SHA256 in lower case to a model file.

    Models and images are any JSON values, and ``Unreadable``: what is no record is left out and
    counted by the server, as it is by a crawl.
    """

    models: Iterable[Any]
    images: Iterable[Any]
    files: Mapping[str, Path] = field(default_factory=dict)


#: (directory, file where the source may keep what is slow to find out) -> what it holds
Source = Callable[[Path, Path | None], Records]

SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "dump": "diffagent.localcivitai.sources.dump:open_dump",
        "local": "diffagent.localcivitai.sources.local:open_folder",
        "release": "diffagent.localcivitai.sources.release:open_release",
    }
)


def is_source(site: str) -> bool:
    """Whether an address names a source and a directory that exists."""
    kind, colon, directory = site.partition(":")
    return bool(colon) and kind in SOURCES and Path(directory).is_dir()


def open_source(site: str, cache: Path | None = None) -> Records:
    """The records behind ``KIND:DIRECTORY``.

    Raises:
        ConfigError: there is no such source or directory, or it does not hold what it should.
    """
    if not is_source(site):
        kinds = ", ".join(f"'{kind}:DIR'" for kind in SOURCES)
        raise ConfigError(f"{site!r} is none of {kinds} with a directory that exists")
    kind, _, directory = site.partition(":")
    module, _, name = SOURCES[kind].partition(":")
    source: Source = getattr(importlib.import_module(module), name)
    return source(Path(directory), cache)


def synthetic_id(sha256: str) -> int:
    """The id of something that the site does not know, from its SHA256 in hex."""
    return SYNTHETIC + int(sha256[:13], 16)

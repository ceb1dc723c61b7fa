"""The Civitai that a configuration names: a web site, or a folder of records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffagent.civitai.client import CivitaiClient
from diffagent.civitai.site import Site
from diffagent.errors import ConfigError
from diffagent.localcivitai.faults import Faults
from diffagent.localcivitai.folder_site import FolderSite
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.sources import about_file, open_source, require_source
from diffagent.schemas.runtime import RuntimeConfig


@contextmanager
def open_site(address: str, runtime: RuntimeConfig) -> Iterator[Site]:
    """Open the Civitai at an address for the duration of the block.

    Args:
        address: an http(s) address, or a source (``diffagent.localcivitai.sources``) such as
            'dump:DIR' or 'local:DIR'. The records of a source are read in this process.
        runtime: rate limit of the requests; with ``faults`` the records of a source are served by
            a local server with these faults, in a thread of this process.

    Raises:
        ConfigError: the address is none of these, or faults are requested of a web site.
    """
    if address.startswith(("http://", "https://")):
        if runtime.site.faults != "none":
            raise ConfigError(
                f"runtime.site.faults={runtime.site.faults!r} applies to a folder of records, and "
                f"{address!r} is a web site; set runtime.site.faults=none"
            )
        with CivitaiClient(address, requests_per_second=runtime.site.requests_per_second) as client:
            yield client
        return
    require_source(address)
    cache = runtime.local_store / "local-files.json"
    if runtime.site.faults == "none":
        yield FolderSite(lambda: read_source(address, cache))
        return
    from diffagent.localcivitai.server import serve

    with (
        serve(read_source(address, cache), Faults(runtime.site.faults)) as url,
        CivitaiClient(url, requests_per_second=runtime.site.requests_per_second) as client,
    ):
        yield client


def read_source(address: str, cache: Path | None = None) -> Replay:
    """Read and index the records of a source.

    Args:
        address: 'KIND:DIR'.
        cache: file for results that take long to compute, such as hashes of large files.

    Raises:
        ConfigError: there is no such source, or its directory lacks the expected files.
    """
    records = open_source(address, cache)
    return Replay.load(records.models, records.images, records.files)


def site_files(site: str) -> list[Path]:
    """Return the note of a dump that has one; no other file, since a site may change."""
    note = about_file(site)
    return [note] if note else []

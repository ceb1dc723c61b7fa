"""Where a run's Civitai is: the real site, or an embedded one that lives as long as the run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffagent.errors import CivitaiError, ConfigError
from diffagent.localcivitai.faults import PROFILES, FaultName
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.sources import about_file, open_source, require_source

log = logging.getLogger(__name__)

_READY = "serving on "


@contextmanager
def embedded_site(
    site: str, faults: FaultName = "none", cache: Path | None = None
) -> Iterator[str]:
    """Yield the address of a Civitai API.

    Args:
        site: an http(s) address (which is yielded as it is), or a source
            (``diffagent.localcivitai.sources``) such as 'dump:DIR' or 'local:DIR', which a child
            process serves on a free port of the loopback interface.
        faults: fault profile of the embedded server.
        cache: where a source may keep what is slow to find out, such as hashes of large files.

    Raises:
        ConfigError: ``site`` is none of these, or faults are asked of a real site.
        CivitaiError: the embedded server does not start.
    """
    if site.startswith(("http://", "https://")):
        yield site.rstrip("/")
        return
    if faults not in PROFILES:
        raise ConfigError(f"no fault profile {faults!r}; choose one of {sorted(PROFILES)}")
    command = [sys.executable, "-m", "diffagent", "civitai", "serve", "--port", "0"]
    require_source(site)
    command += ["--parent", str(os.getpid()), "--faults", faults, "--site", site]
    command += ["--cache", str(cache)] if cache else []
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline().strip()
        if not line.startswith(_READY):
            raise CivitaiError(
                f"the local Civitai for {site!r} did not start (see above); "
                f"try it by hand: {' '.join(command[2:])}"
            )
        url = line.removeprefix(_READY)
        log.info("local Civitai for %r on %s, faults: %s", site, url, faults)
        yield url
    finally:
        server.kill()  # it only reads: nothing to save
        server.communicate()


def replay_of(site: str, cache: Path | None = None) -> Replay:
    """The records behind a source.

    Raises:
        ConfigError: there is no such source, or it does not hold what it should.
    """
    records = open_source(site, cache)
    return Replay.load(records.models, records.images, records.files)


def site_files(site: str) -> list[Path]:
    """Returns the note of a dump that has one; no other file, since a site may change."""
    note = about_file(site)
    return [note] if note else []

"""Where a run's Civitai is: the real site, or an embedded one that lives as long as the run."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffagent.errors import CivitaiError, ConfigError
from diffagent.localcivitai.faults import PROFILES, FaultName
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.sources import SOURCES, is_source, open_source

log = logging.getLogger(__name__)

SANDBOX = "sandbox"
_READY = "serving on "


@contextmanager
def embedded_site(
    site: str, faults: FaultName = "none", cache: Path | None = None
) -> Iterator[str]:
    """Yield the address of a Civitai API.

    Args:
        site: an http(s) address (which is yielded as it is), 'sandbox', or a source
            (``diffagent.localcivitai.sources``) such as 'dump:DIR' or 'local:DIR'. All but the
            first start a server as a child process on a free port of the loopback interface.
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
    if site != SANDBOX and not is_source(site):
        kinds = ", ".join(f"'{kind}:DIR'" for kind in SOURCES)
        raise ConfigError(
            f"site {site!r} is neither an http(s) address nor 'sandbox' nor one of {kinds} with a "
            "directory that exists"
        )
    command += ["--while-stdin", "--faults", faults, "--site", site]
    command += ["--cache", str(cache)] if cache else []
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
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
    """The records behind 'sandbox' or a source.

    Raises:
        ConfigError: there is no such source, or it does not hold what it should.
    """
    address = f"dump:{_sandbox_files().materialise()}" if site == SANDBOX else site
    records = open_source(address, cache)
    return Replay.load(records.models, records.images, records.files)


def site_files(site: str) -> list[Path]:
    """The files that the sandbox's site is made of; none of any other site, which may change."""
    return list(_sandbox_files().sources()) if site == SANDBOX else []


def _sandbox_files() -> Any:
    # Only a run on the sandbox pays for it.
    return importlib.import_module("diffagent.sandbox.files")

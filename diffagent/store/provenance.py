"""Facts about this process that a manifest records: peak memory and versions of libraries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import resource
import sys
from pathlib import Path

_LIBRARIES = ("diffagent", "torch", "transformers", "trl", "diffusers", "pyarrow", "polars")


def peak_memory_bytes() -> int:
    """Return the peak resident set of this process so far.

    Linux passes ``ru_maxrss`` on through fork and exec, so that a child of a large parent would
    report the parent's. There the kernel's own mark of this address space is read.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    versions = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions

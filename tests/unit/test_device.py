"""Devices by name, and memory that is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from diffagent.device import resolve_device
from diffagent.errors import ConfigError


def test_devices_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="not a device"):
        resolve_device("abacus")
    with pytest.raises(ConfigError, match=r"has no 'cuda:99'"):
        resolve_device("cuda:99")


FAULTS = """
import resource, sys
import torch
from diffagent.device import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(30):
    torch.ones(2**24)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """Pages of 4 KB that the system has to give: for a few blocks, or for each of thirty."""
    keeps, returns = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how])) for how in ("keep", "not")
    )
    assert returns - keeps > 8 * 2**26 // 2**12

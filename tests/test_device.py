"""Devices by name, and memory that is kept."""

from __future__ import annotations

import platform
import resource
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


KEPT = """
import sys
from pathlib import Path
import torch
from diffagent.device import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
torch.ones(2**25)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """Of a freed block of 128 MB, which glibc itself returns to the system."""
    with_setting, without = (
        int(subprocess.check_output([sys.executable, "-c", KEPT, how])) * resource.getpagesize()
        for how in ("keep", "not")
    )
    assert with_setting > 2**26 > without

"""The device of tensors, and the reuse of their memory."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

from diffagent.errors import ConfigError

if TYPE_CHECKING:
    import torch


#: Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let the C library keep the memory that tensors on the CPU free, for later tensors.

    glibc returns blocks beyond 32 MB to the system at once, so that the next pass waits for as many
    fresh pages. Meant for a process that ends with its work; without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device with this name; 'auto' is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: torch has no such device, or this machine lacks it.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"runtime.device: {name!r} is not a device; "
            "use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        ) from None
    available = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ConfigError(f"runtime.device: this machine has no {name!r}; use 'auto' or 'cpu'")
    return device

"""Where tensors live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffagent.errors import ConfigError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str = "auto") -> torch.device:
    """The device that ``name`` stands for; 'auto' is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: torch does not know the name, or this machine lacks the device.
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
    present = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise ConfigError(f"runtime.device: this machine has no {name!r}; use 'auto' or 'cpu'")
    return device

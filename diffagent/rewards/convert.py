"""A released ``.pt`` or ``.pth`` checkpoint as safetensors, which can hold no code.

    python -m diffagent.rewards.convert HPS_v2_compressed.pt HPS_v2_compressed.safetensors

The scorers read either; the digest of a scorer is that of its numbers and stays the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffagent.rewards.scorer import read_state


def convert(source: Path, target: Path) -> int:
    """Writes the tensors of a checkpoint to a safetensors file; returns their number.

    Raises:
        ConfigError: there is no such checkpoint.
        ScoreError: it holds other things than tensors by name, or wants to run code.
    """
    from safetensors.torch import save_file

    state = {name: tensor.contiguous().clone() for name, tensor in read_state(source).items()}
    save_file(state, target)  # copies, because tensors that share memory are refused
    return len(state)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m diffagent.rewards.convert"
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args(arguments)
    convert(given.source, given.target)


if __name__ == "__main__":
    main()

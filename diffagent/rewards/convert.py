"""Conversion of a released ``.pt`` or ``.pth`` checkpoint to safetensors, which can hold no code.

    python -m diffagent.rewards.convert HPS_v2_compressed.pt HPS_v2_compressed.safetensors

The checkpoint is read with torch's ``weights_only=True``, which refuses one with code. Scorers read
either format; a scorer's digest is the same for both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffagent.rewards.weight_files import read_state


def convert(source: Path, target: Path) -> int:
    """Writes the tensors of a checkpoint to a safetensors file; returns their number.

    Raises:
        ConfigError: there is no such checkpoint.
        ScoreError: it holds other values than tensors by name, such as code.
    """
    from safetensors.torch import save_file

    state = {name: tensor.contiguous().clone() for name, tensor in read_state(source).items()}
    save_file(state, target)  # of copies, because it refuses tensors that share memory
    return len(state)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m diffagent.rewards.convert"
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    convert(options.source, options.target)


if __name__ == "__main__":
    main()

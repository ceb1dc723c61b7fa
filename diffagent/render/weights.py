"""Whether a model file may be loaded: safetensors alone, a header that tells the truth, numbers.

Pickles and archives can run code or unfold into more than the disk holds, so they are refused by
their first bytes and never opened. A header that lies about its tensors can make a reader see
memory that is not the file's. Weights that are not numbers make black pictures.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from diffagent.errors import RenderError

#: The format's own limit, in bytes.
MAX_HEADER = 100_000_000

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
#: Integer type of the same width, and the bits that are all set in NaN and in infinity.
_NOT_FINITE: dict[str, tuple[str, int]] = {
    "F8_E4M3": ("<u1", 0x7F),
    "F8_E5M2": ("<u1", 0x7C),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
#: Buffers of the original Stable Diffusion code that sound checkpoints may hold infinity in: the
#: noise schedule (zero terminal SNR) and the mask of OpenCLIP's encoder. No loader reads them.
_UNREAD = re.compile(
    r"(^|\.)attn_mask$|^(betas|\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|logvar)$"
)
_BLOCK = 1 << 20
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Tensor:
    """An entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


_Span = tuple[int, int, str, Tensor]  # first byte of the data, the one after the last, name


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after a check that they tile its data exactly.

    Raises:
        RenderError: not a safetensors file, or its header lies; reason 'bad-model-file'.
    """
    return {name: tensor for _, _, name, tensor in _spans(path)[1]}


def check_weights(path: Path) -> None:
    """Read a whole safetensors file: the header as in `read_header`, and every weight.

    Raises:
        RenderError: it must not be loaded; reason 'bad-model-file'.
    """
    start, spans = _spans(path)
    with path.open("rb") as stream:
        block = memoryview(bytearray(_BLOCK))
        for begin, end, name, tensor in sorted(spans, key=lambda span: span[:2]):
            form, mask = _NOT_FINITE.get(tensor.dtype, ("", 0))
            if not form or _UNREAD.search(name):
                continue
            stream.seek(start + begin)
            for at in range(begin, end, _BLOCK):
                part = block[: min(_BLOCK, end - at)]
                if stream.readinto(part) != len(part):
                    _refuse(path, f"it ends in the middle of tensor {name!r}")
                if (np.frombuffer(part, form) & mask).max() == mask:
                    _refuse(path, f"tensor {name!r} holds NaN or infinity")


def _spans(path: Path) -> tuple[int, list[_Span]]:
    """Where the data begins, and the tensors in the header's order."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start[:2] == b"PK":
            _refuse(path, "a zip archive or a PyTorch pickle; only safetensors are read")
        if start[:1] == b"\x80" and length > min(MAX_HEADER, size):
            _refuse(path, "a pickle; only safetensors are read")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            _refuse(path, f"a header of {length} bytes in a file of {size}")
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"the header is not JSON ({error})")
    if not isinstance(header, dict):
        _refuse(path, "the header is not an object")
    header.pop("__metadata__", None)
    spans = [_tensor(path, name, entry) for name, entry in header.items()]
    position = 0
    for begin, end, name, _ in sorted(spans, key=lambda span: span[:2]):
        if begin != position:
            _refuse(path, f"tensor {name!r} starts at {begin}, not at {position}")
        position = end
    if position != size - 8 - length:
        _refuse(path, f"tensors of {position} bytes in data of {size - 8 - length}")
    return 8 + length, spans


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _tensor(path: Path, name: str, entry: Any) -> _Span:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            _refuse(path, f"tensor {name!r} has no dtype, shape and offsets")
    if dtype not in _BITS or not all(type(n) is int and n >= 0 for n in shape):
        _refuse(path, f"tensor {name!r} is {dtype!r} of shape {shape!r}")
    if begin < 0 or (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        _refuse(path, f"tensor {name!r} of shape {shape!r} does not fill {begin} to {end}")
    if "/" in name or "\\" in name or _CONTROL.search(name):
        _refuse(path, f"tensor name {name!r} holds a path or control characters")
    return begin, end, name, Tensor(dtype, tuple(shape))


def _refuse(path: Path, problem: str) -> NoReturn:
    raise RenderError(f"{path.name!r} is refused: {problem}", reason="bad-model-file")

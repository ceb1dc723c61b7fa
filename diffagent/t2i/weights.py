"""Decides whether a model file may be loaded: safetensors only, a true header, finite weights.

Pickles and archives can run code or unfold into more than the disk holds, so their first bytes
refuse them and no reader opens them. A header that lies about its tensors can make a reader see
memory that is not the file's. Weights that are not numbers make black pictures.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import safe_open

from diffagent.errors import DiffAgentError, RenderError

#: Bounds on a header, far above real files (SDXL: 0.4 MB, 2,515 tensors, names of 110 characters;
#: trainers' notes of up to some MB). The format allows 100 MB, which take 2.6 GB when parsed.
MAX_HEADER = 16 << 20  # bytes
MAX_TENSORS = 100_000
MAX_NAME = 1_000  # characters
_MAX_RANK = 16

_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
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
_BLOCK = 1 << 20
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_AGAIN = "download it again"
#: First bytes of files that are no safetensors, lower case; what they are; the remedy.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer instead of the file", "run `git lfs pull`"),
    (b"# xet version", "a Xet pointer instead of the file", "download it with the hub's client"),
    (b"<!doctype", "a web page", f"{_AGAIN}, logged in or with a token"),
    (b"<html", "a web page", f"{_AGAIN}, logged in or with a token"),
    (b"<head", "a web page", f"{_AGAIN}, logged in or with a token"),
    (b"<?xml", "an XML answer of a server, such as an expired link's", _AGAIN),
    (b"<error", "an XML answer of a server, such as an expired link's", _AGAIN),
    (b"{", "JSON text, such as a server's error", _AGAIN),
    (b"[", "JSON text, such as a server's error", _AGAIN),
    (b"pk\x03\x04", "a zip archive or a PyTorch pickle", "get the safetensors file"),
    (b"pk\x05\x06", "an empty zip archive", _AGAIN),
    (b"gguf", "a GGUF file", "get the model's safetensors file"),
    (b"ggml", "a GGML file", "get the model's safetensors file"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"rar!", "a RAR archive", "unpack it"),
    (b"bzh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zxz", "an xz archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"\x89png", "a picture", "get the model file"),
    (b"\xff\xd8\xff", "a picture", "get the model file"),
    (b"gif8", "a picture", "get the model file"),
    (b"%pdf", "a PDF document", "get the model file"),
    (b"\x89hdf", "an HDF5 (Keras) file", "get the safetensors file"),
    (b"http/", "a server's raw answer", _AGAIN),
)  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """An entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


_Span = tuple[int, int, str, Tensor]  # first byte of the data, the one after the last, name


@dataclass(frozen=True)
class _Header:
    start: int  # of the data, in bytes
    spans: list[_Span]  # in the header's order
    metadata: dict[str, str]


@contextlib.contextmanager
def reading(name: str, problem: str, reason: str = "bad-model-file") -> Iterator[None]:
    """Turn any exception of a file reader into a RenderError that names the file.

    An untrusted file can make a reader fail in any way; whatever it raises belongs to the pictures
    that need this file and to no other. Errors raised on purpose and full memories pass through.

    Args:
        name: of the file, for messages.
        problem: what failed, such as 'cannot be loaded'.
        reason: of the RenderError.
    """
    try:
        yield
    except (DiffAgentError, MemoryError):
        raise
    except BaseException as error:
        rust = type(error).__module__ == "pyo3_runtime"  # a panic, which is no Exception
        full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if full or not (rust or isinstance(error, Exception)):
            raise
        told = (error.strerror or "") if isinstance(error, OSError) else str(error)
        raise RenderError(
            f"{name!r} {problem}: {type(error).__name__}: {told:.500}", reason=reason
        ) from error


def read_header(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, after a check that they tile its data exactly.

    Raises:
        RenderError: not a safetensors file, or its header lies; reason 'bad-model-file'.
    """
    return {name: tensor for _, _, name, tensor in _read(path).spans}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the notes in a safetensors header, checked as in `read_header`.

    Raises:
        RenderError: see `read_header`.
    """
    return dict(_read(path).metadata)


def check_weights(path: Path) -> None:
    """Read a whole safetensors file: the header as in `read_header`, and every weight.

    Raises:
        RenderError: it must not be loaded; reason 'bad-model-file'.
    """
    header = _read(path)
    with reading(path.name, "cannot be read"), path.open("rb") as stream:
        block = memoryview(bytearray(_BLOCK))
        for begin, end, name, tensor in sorted(header.spans, key=lambda span: span[:2]):
            form, mask = _NOT_FINITE.get(tensor.dtype, ("", 0))
            if not form or _is_unread(name):
                continue
            stream.seek(header.start + begin)
            for at in range(begin, end, _BLOCK):
                part = block[: min(_BLOCK, end - at)]
                if stream.readinto(part) != len(part):
                    _refuse(path, f"it ends in the middle of tensor {name!r}; {_AGAIN}")
                if (np.frombuffer(part, form) & mask).max() == mask:
                    _refuse(path, f"tensor {name!r} holds NaN or infinity")


def _is_unread(name: str) -> bool:
    """Whether no loader reads a tensor, so that it may hold infinity.

    These are buffers of the original Stable Diffusion code that sound checkpoints hold: the noise
    schedule (infinite at zero terminal SNR) and the mask of OpenCLIP's encoder. String methods
    only: a pattern with two repetitions took 23 s for a name of 224 kB.
    """
    schedule = name.startswith("posterior_") or "alphas_cumprod" in name
    return (
        name.rpartition(".")[2] == "attn_mask"
        or name in {"betas", "lvlb_weights", "logvar"}
        or (schedule and "." not in name)
    )


def _read(path: Path) -> _Header:
    with reading(path.name, "cannot be read"):
        status = path.stat()
    return _parse(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=4)
def _parse(path: Path, size: int, *_times: int) -> _Header:
    """Parse a header, once as long as the file's size and times stay."""
    with reading(path.name, "cannot be read"), path.open("rb") as stream:
        start = stream.read(64)
        length = int.from_bytes(start[:8], "little")
        _check_start(path, start, length, size)
        stream.seek(8)
        raw = stream.read(length)
    if len(raw) < length:
        _refuse(path, f"cut off after {size} bytes, inside of its header; {_AGAIN}")
    if raw.count(b"[") + raw.count(b"{") > 6 * MAX_TENSORS:  # a tensor has two lists, an object
        _refuse(path, f"a header of more lists and objects than {MAX_TENSORS} tensors have")
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_Entries().unique)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"the header is not JSON ({error})")
    if not isinstance(entries, dict):
        _refuse(path, "the header is not an object")
    metadata = _metadata(path, entries.pop("__metadata__", None))
    spans = [_tensor(path, name, entry) for name, entry in entries.items()]
    position = 0
    for begin, end, name, _ in sorted(spans, key=lambda span: span[:2]):
        if begin != position:
            _refuse(path, f"tensor {name!r} starts at {begin}, not at {position}")
        position = end
    data = size - 8 - length
    if position > data:
        _refuse(path, f"cut off after {size} of {8 + length + position} bytes; {_AGAIN}")
    if position < data:
        _refuse(path, f"tensors of {position} bytes in data of {data}")
    with reading(path.name, "is refused by the safetensors library"):
        safe_open(path, framework="numpy")  # what else it objects to, it says now
    return _Header(8 + length, spans, metadata)


def _check_start(path: Path, start: bytes, length: int, size: int) -> None:
    """Refuse a file whose first eight bytes are no possible length of a header."""
    if size == 0:
        _refuse(path, f"it is empty: the download did not finish; {_AGAIN}")
    if 2 <= length <= min(MAX_HEADER, size - 8):
        return
    text = start.lstrip(b"\xef\xbb\xbf\r\n\t ").lower()
    for signature, kind, remedy in _SIGNATURES:
        if text.startswith(signature):
            _refuse(path, f"it is {kind}, not safetensors; {remedy}")
    if start[:1] == b"\x80":
        _refuse(path, "it is a pickle, not safetensors; get the safetensors file")
    if not start.strip(b"\0"):
        _refuse(path, f"it begins with zeros: the download did not finish; {_AGAIN}")
    if len(start) >= 8 and re.fullmatch(rb"[\t\n\r -~]+", start):
        _refuse(path, f"it is text, beginning with {start[:40].decode()!r}; {_AGAIN}")
    if size - 8 < length <= MAX_HEADER and start[8:9] in {b"{", b""}:
        _refuse(path, f"cut off after {size} bytes, inside of its header; {_AGAIN}")
    if MAX_HEADER < length <= size - 8 and start[8:9] == b"{":
        _refuse(path, f"its header of {length} bytes is longer than the {MAX_HEADER} that are read")
    _refuse(path, f"it is no safetensors: a header of {length} bytes in a file of {size}")


class _Entries:
    """Counts the objects of a header while it is parsed, so that a bomb ends early."""

    def __init__(self) -> None:
        self._count = 0

    def unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count += 1
        if self._count > MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS} tensors")
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name stands there twice")
        return entries


def _metadata(path: Path, value: Any) -> dict[str, str]:
    """The notes of a header; the format allows texts only, and other readers refuse the rest."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        _refuse(path, f"its __metadata__ is {value!r:.80}, not an object of texts; save it again")
    for key, text in value.items():
        if not isinstance(text, str):
            _refuse(
                path,
                f"its __metadata__ has {text!r:.80} for {key!r:.80}, where the format allows "
                "texts only; save it again",
            )
    return value


def _tensor(path: Path, name: str, entry: Any) -> _Span:
    if len(name) > MAX_NAME:
        _refuse(path, f"a tensor name of {len(name)} characters, {name[:40]!r}...")
    if "/" in name or "\\" in name or _CONTROL.search(name):
        _refuse(path, f"tensor name {name!r:.200} holds a path or control characters")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            _refuse(path, f"tensor {name!r} has no dtype, shape and offsets")
    sound = len(shape) <= _MAX_RANK and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if dtype not in _BITS or not sound:
        _refuse(path, f"tensor {name!r} is {dtype!r:.40} of shape {shape!r:.200}")
    if begin < 0 or (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        _refuse(path, f"tensor {name!r} of shape {shape!r} does not fill {begin} to {end}")
    return begin, end, name, Tensor(dtype, tuple(shape))


def _refuse(path: Path, problem: str) -> NoReturn:
    raise RenderError(f"{path.name!r} is refused: {problem}", reason="bad-model-file")

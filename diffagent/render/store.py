"""Model files on disk, by content.

``DIR/ab/abcd....safetensors`` is a file whose SHA256 is its name: verified when it was fetched,
put there at once by a rename, never changed. Several processes may share the directory. Only
safetensors enter: pickles and archives can run code, and a header that lies about its tensors
can make a reader see memory that is not the file's.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from diffagent.errors import RenderError

log = logging.getLogger(__name__)

#: The format's own limit, in bytes.
MAX_HEADER = 100_000_000

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


class ModelFile(Protocol):
    """What the store has to know of a file: a row of the catalogue."""

    @property
    def model(self) -> str: ...
    @property
    def download_path(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def size_bytes(self) -> int | None: ...


class Downloader(Protocol):
    """The part of the Civitai client that the store uses: it verifies size and SHA256."""

    def download(
        self, url: str, path: Path, *, sha256: str | None = None, size_bytes: int | None = None
    ) -> Any: ...


@dataclass(frozen=True)
class Tensor:
    """An entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


class ModelStore:
    """The cache of model files below ``directory``, filled through ``client``."""

    def __init__(self, directory: Path, client: Downloader) -> None:
        self.directory = directory
        self.client = client

    def path(self, sha256: str) -> Path:
        """Where the file of this hash lies, or will."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise RenderError(f"{sha256!r} is not a SHA256 in lower case", reason="no-hash")
        return self.directory / sha256[:2] / f"{sha256}.safetensors"

    def fetch(self, file: ModelFile) -> Path:
        """The local file of a model, downloaded when it is not there.

        Raises:
            RenderError: not a sound safetensors file ('bad-model-file'), or the catalogue has no
                hash to verify it by ('no-hash').
            CivitaiError: the site does not give it, or gives something else.
        """
        target = self.path((file.sha256 or "").lower())
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                partial = target.with_suffix(".partial")
                self.client.download(
                    file.download_path, partial, sha256=file.sha256, size_bytes=file.size_bytes
                )
                try:
                    read_header(partial)
                except RenderError:
                    partial.unlink()
                    raise
                partial.replace(target)
                log.info("fetched %r: %d bytes", file.model, target.stat().st_size)
        return target


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after a check that they tile its data exactly.

    Raises:
        RenderError: not a safetensors file, or its header lies; reason 'bad-model-file'.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start[:2] == b"PK":
            raise _bad(path, "a zip archive or a PyTorch pickle; only safetensors are read")
        if start[:1] == b"\x80" and length > min(MAX_HEADER, size):
            raise _bad(path, "a pickle; only safetensors are read")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _bad(path, f"a header of {length} bytes in a file of {size}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _bad(path, "the header is not an object")
    header.pop("__metadata__", None)
    spans = [_tensor(path, name, entry) for name, entry in header.items()]
    position = 0
    for begin, end, name, _ in sorted(spans, key=lambda span: span[:2]):
        if begin != position:
            raise _bad(path, f"tensor {name!r} starts at {begin}, not at {position}")
        position = end
    if position != size - 8 - length:
        raise _bad(path, f"tensors of {position} bytes in data of {size - 8 - length}")
    return {name: tensor for _, _, name, tensor in spans}


def _tensor(path: Path, name: str, entry: Any) -> tuple[int, int, str, Tensor]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _bad(path, f"tensor {name!r} has no dtype, shape and offsets")
    if dtype not in _BITS or not all(type(n) is int and n >= 0 for n in shape):
        raise _bad(path, f"tensor {name!r} is {dtype!r} of shape {shape!r}")
    if begin < 0 or (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _bad(path, f"tensor {name!r} of shape {shape!r} does not fill {begin} to {end}")
    if "/" in name or "\\" in name:
        raise _bad(path, f"tensor name {name!r} holds a path")
    return begin, end, name, Tensor(dtype, tuple(shape))


def _bad(path: Path, problem: str) -> RenderError:
    return RenderError(f"{path.name!r} is refused: {problem}", reason="bad-model-file")

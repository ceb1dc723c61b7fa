"""A model file on its way: what has come, what a response may add, and whether it is the one."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from diffagent.civitai.transport import chunks
from diffagent.errors import CivitaiError, ServerError
from diffagent.schemas.printable import printable
from diffagent.store import sha256_file

_SIZE_SLACK = 1024  # sizeKB is rounded
#: The most that is taken where neither the record nor the storage states a size: storages do, so
#: what does not may write for ever.
_UNSTATED_BYTES = 1 << 30
#: Bytes between two looks at the free disk, and what stays free of it: a hundredth, at most 1 GB.
_DISK_STEP = 32 << 20
_DISK_RESERVE = 1 << 30
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEXT_TYPES = ("text/html", "application/json", "application/xml", "text/xml", "text/plain")
#: The first bytes of a page or a JSON error. In a safetensors file the first eight are a length,
#: which as text would be larger than any file; pickles and archives begin with control bytes.
_TEXT = re.compile(rb"[\t\n\r -~]{8,}")


@dataclass
class Transfer:
    """The bytes of one file in ``part``, in as many responses as it takes.

    Args:
        name: of the file, in messages.
        part: where the bytes go.
        sha256: hex digest that the file must have; without, nothing could tell what an earlier
            run has left in ``part``, so the file is begun anew.
        size_bytes: size that it must have, give or take the site's rounding to 1 kB.
        on_bytes: is called with how many more bytes are there.
    """

    name: str
    part: Path
    sha256: str | None
    size_bytes: int | None
    on_bytes: Callable[[int], None]

    def __post_init__(self) -> None:
        self._told = 0
        self._total: int | None = None
        if self.sha256 is None:
            self.part.unlink(missing_ok=True)
        #: Responses that the bytes came from, those of an earlier run counting as one.
        self.pieces = int(self.have > 0)
        self._tell()

    @property
    def have(self) -> int:
        """Bytes that are there."""
        return self.part.stat().st_size if self.part.exists() else 0

    def headers(self) -> dict[str, str]:
        """What to ask for: the bytes that are missing, as they are."""
        headers = {"Accept-Encoding": "identity"}
        if have := self.have:
            headers["Range"] = f"bytes={have}-"
        return headers

    def take(self, response: requests.Response) -> None:
        """Add what a response of 200, 206 or 416 brings.

        Raises:
            ServerError: it brings something else, or the file has changed on the way: ask again.
            CivitaiError: the file is not of the size expected, of no stated size and too large
                (nothing of it is kept), or does not fit on the disk.
        """
        have = self.have
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        start, total = _range(response)
        if response.status_code == 416:  # nothing left, or the part is not of this file
            if total != have:
                self.discard()
                raise ServerError(f"{self.name}: the part of {have} bytes is not of this file")
            self.pieces += 1
            return
        if kind in _TEXT_TYPES:
            raise ServerError(f"{self.name} answered with {kind!r} instead of a file")
        append = response.status_code == 206
        if append and start != have:
            raise ServerError(f"{self.name}: asked for bytes from {have}, got them from {start}")
        if append and total and self._total and total != self._total:
            self.discard()
            raise ServerError(f"{self.name} has changed: {total} bytes, {self._total} before")
        body = chunks(response)
        chunk = next(body, b"")
        if not append and _TEXT.match(chunk):
            raise ServerError(f"{self.name} answered with {chunk[:40]!r} instead of a file")
        self._expect(total)
        self._total = total or self._total
        self.pieces = self.pieces + 1 if append else 1
        size = have if append else 0
        self._check_disk((total or self.size_bytes or size) - size)
        looked = size
        try:
            with self.part.open("ab" if append else "wb") as stream:
                while chunk:
                    stream.write(chunk)
                    size += len(chunk)
                    self._expect(size, at_most=True)
                    self._tell(size)
                    if size - looked >= _DISK_STEP:
                        self._check_disk(0)
                        looked = size
                    chunk = next(body, b"")
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise self._no_room() from None
        if total is None and self.size_bytes and size < self.size_bytes - _SIZE_SLACK:
            raise ServerError(f"{self.name} ended after {size} of {self.size_bytes} bytes")

    def problem(self) -> str:
        """What is wrong with the bytes that are there, or ''."""
        size = self.have
        if self.size_bytes is not None and abs(size - self.size_bytes) > _SIZE_SLACK:
            return f"{size} bytes instead of {self.size_bytes}"
        if self.sha256:
            digest = sha256_file(self.part)
            if digest != self.sha256.lower():
                return f"SHA256 {digest} instead of {self.sha256.lower()}"
        return ""

    def discard(self) -> None:
        """Forget what has come."""
        self.part.unlink(missing_ok=True)
        self.pieces, self._total = 0, None
        self._tell()

    def unexpected(self, problem: str) -> CivitaiError:
        """The error of a file that is not the one expected."""
        return CivitaiError(
            f"the file behind {printable(self.name)} is not the one expected: {problem}; it was "
            "replaced on the site or its record is wrong: crawl again"
        )

    def _expect(self, size: int | None, *, at_most: bool = False) -> None:
        """Stop before the bytes of another file fill the disk."""
        if size is None:
            return
        if self.size_bytes is None:
            if at_most and self._total is None and size > _UNSTATED_BYTES:
                self.discard()
                raise CivitaiError(
                    f"{self.name}: more than {_UNSTATED_BYTES >> 20} MB, and neither its record "
                    "nor the site states a size; nothing of it is kept"
                )
            return
        if size > self.size_bytes + _SIZE_SLACK or (
            size < self.size_bytes - _SIZE_SLACK and not at_most
        ):
            self.discard()
            raise self.unexpected(f"{size} bytes instead of {self.size_bytes}")

    def _check_disk(self, more: int) -> None:
        """Stop before ``more`` bytes take what others on this disk need."""
        usage = shutil.disk_usage(self.part.parent)
        if usage.free < more + min(_DISK_RESERVE, usage.total // 100):
            raise self._no_room(more)

    def _no_room(self, more: int = 0) -> CivitaiError:
        free = shutil.disk_usage(self.part.parent).free
        size = f"{more / 1e6:,.0f} MB more" if more else "the rest of it"
        return CivitaiError(
            f"{self.name}: no room for {size} in {str(self.part.parent)!r}, where "
            f"{free / 1e6:,.0f} MB are free; make room, or choose another disk, and give the same "
            "command again"
        )

    def _tell(self, size: int | None = None) -> None:
        size = self.have if size is None else size
        more, self._told = size - self._told, size
        if more:
            self.on_bytes(more)


def _range(response: requests.Response) -> tuple[int | None, int | None]:
    """The first byte that a response holds and the size of the whole file, where it says so."""
    stated = re.fullmatch(
        r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/(?:([0-9]{1,18})|\*)",
        response.headers.get("Content-Range", "").strip(),
    )
    if stated:
        return (int(stated[1]) if stated[1] else None), (int(stated[2]) if stated[2] else None)
    length = response.headers.get("Content-Length", "")
    plain = response.status_code == 200 and "Content-Encoding" not in response.headers
    whole = re.fullmatch("[0-9]{1,18}", length)
    return None, (int(length) if plain and whole else None)

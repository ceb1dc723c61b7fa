"""A model file during its download: the bytes so far, further responses, and its verification."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import requests

from diffagent.civitai.transport import chunks
from diffagent.errors import CivitaiError, ServerError
from diffagent.schemas.printable import printable
from diffagent.store import sha256_file

_SIZE_SLACK = 1024  # sizeKB is rounded
#: Limit where neither the record nor the storage states a size. Storages do, so a server that does
#: not may send bytes without end.
_UNSTATED_BYTES = 1 << 30
#: Bytes between two checks of the free disk, and the reserve: a hundredth of it, at most 1 GB.
_DISK_STEP = 32 << 20
_DISK_RESERVE = 1 << 30
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_CHUNK = 1 << 20
_TEXT_TYPES = ("text/html", "application/json", "application/xml", "text/xml", "text/plain")
#: The first bytes of a page or a JSON error. In a safetensors file the first eight are a length,
#: which as text would be larger than any file; pickles and archives begin with control bytes.
_TEXT = re.compile(rb"[\t\n\r -~]{8,}")


@dataclass
class PartialDownload:
    """The bytes of one file at ``target`` + '.part', from as many responses as it takes.

    Args:
        name: of the file, in messages.
        target: path of the whole file.
        sha256: hex digest that the file must have. Without it the bytes that an earlier run left
            cannot be verified, so the file starts again.
        size_bytes: size that the file must have, within the site's rounding to 1 kB.
        on_bytes: called with the number of bytes added, negative when the file starts again.
    """

    name: str
    target: Path
    sha256: str | None
    size_bytes: int | None
    on_bytes: Callable[[int], None]

    def __post_init__(self) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path = self.target.with_name(f"{self.target.name}.part")
        self._reported = 0
        self._total: int | None = None
        if self.sha256 is None:
            self.path.unlink(missing_ok=True)
        #: Responses that the bytes came from; those of an earlier run count as one.
        self.pieces = int(self.size > 0)
        self._report()

    def complete(self, fetch: Callable[[], None]) -> Path:
        """Fetch the missing bytes, verify the file, and rename it to ``target``.

        A wrong file that several responses brought is fetched once more: they may have been of two
        files.

        Raises:
            CivitaiError: the size or SHA256 differs.
        """
        for is_last in (False, True):
            fetch()
            problem = self.problem()
            if not problem:
                self.path.replace(self.target)
                return self.target
            is_whole = self.pieces <= 1
            self.discard()
            if is_last or is_whole:
                break
        raise self.unexpected(problem)

    @property
    def size(self) -> int:
        """Number of bytes so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def headers(self) -> dict[str, str]:
        """Return the headers that request the missing bytes, without compression."""
        headers = {"Accept-Encoding": "identity"}
        if size := self.size:
            headers["Range"] = f"bytes={size}-"
        return headers

    def take(self, response: requests.Response) -> None:
        """Add the bytes of a response of 200, 206 or 416.

        Raises:
            ServerError: it is not the file, or the file has changed since: request it again.
            CivitaiError: the file has not the expected size, states no size and is too large
                (nothing of it is kept), or does not fit on the disk.
        """
        size = self.size
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        start, total = _range(response)
        if response.status_code == 416:  # nothing left, or the part is not of this file
            if total != size:
                self.discard()
                raise ServerError(f"{self.name}: the part of {size} bytes is not of this file")
            self.pieces += 1
            return
        if kind in _TEXT_TYPES:
            raise ServerError(f"{self.name} answered with {kind!r} instead of a file")
        append = response.status_code == 206
        if append and start != size:
            raise ServerError(f"{self.name}: requested bytes from {size}, got them from {start}")
        if append and total and self._total and total != self._total:
            self.discard()
            raise ServerError(f"{self.name} has changed: {total} bytes, {self._total} before")
        body = chunks(response)
        chunk = next(body, b"")
        if not append and _TEXT.match(chunk):
            raise ServerError(f"{self.name} answered with {chunk[:40]!r} instead of a file")
        self._write(_chain(chunk, body), total, append=append)

    def copy(self, source: Path) -> None:
        """Take the bytes of a file on this machine, from its beginning.

        Raises:
            CivitaiError: as ``take``, or the file cannot be read.
        """
        try:
            self._write(_read_chunks(source), source.stat().st_size, append=False)
        except FileNotFoundError as error:
            raise CivitaiError(f"{self.name}: {str(source)!r} is gone ({error.strerror})") from None

    def _write(self, body: Iterator[bytes], total: int | None, *, append: bool) -> None:
        """Write a body; ``total`` is the size of the whole file where it is stated."""
        self._expect(total)
        self._total = total or self._total
        self.pieces = self.pieces + 1 if append else 1
        size = self.size if append else 0
        self._check_disk((total or self.size_bytes or size) - size)
        checked = size
        try:
            with self.path.open("ab" if append else "wb") as stream:
                for chunk in body:
                    stream.write(chunk)
                    size += len(chunk)
                    self._expect(size, at_most=True)
                    self._report(size)
                    if size - checked >= _DISK_STEP:
                        self._check_disk(0)
                        checked = size
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise self._no_room() from None
        if total is None and self.size_bytes and size < self.size_bytes - _SIZE_SLACK:
            raise ServerError(f"{self.name} ended after {size} of {self.size_bytes} bytes")

    def problem(self) -> str:
        """Return what is wrong with the bytes, or ''."""
        size = self.size
        if self.size_bytes is not None and abs(size - self.size_bytes) > _SIZE_SLACK:
            return f"{size} bytes instead of {self.size_bytes}"
        if self.sha256:
            digest = sha256_file(self.path)
            if digest != self.sha256.lower():
                return f"SHA256 {digest} instead of {self.sha256.lower()}"
        return ""

    def discard(self) -> None:
        """Delete the bytes."""
        self.path.unlink(missing_ok=True)
        self.pieces, self._total = 0, None
        self._report()

    def unexpected(self, problem: str) -> CivitaiError:
        """Return the error of a file that is not the expected one."""
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
        """Stop before ``more`` bytes take the reserve of the disk."""
        usage = shutil.disk_usage(self.path.parent)
        if usage.free < more + min(_DISK_RESERVE, usage.total // 100):
            raise self._no_room(more)

    def _no_room(self, more: int = 0) -> CivitaiError:
        free = shutil.disk_usage(self.path.parent).free
        size = f"{more / 1e6:,.0f} MB more" if more else "the rest of it"
        return CivitaiError(
            f"{self.name}: no room for {size} in {str(self.path.parent)!r}, where "
            f"{free / 1e6:,.0f} MB are free; make room, or choose another disk, and give the same "
            "command again"
        )

    def _report(self, size: int | None = None) -> None:
        size = self.size if size is None else size
        more, self._reported = size - self._reported, size
        if more:
            self.on_bytes(more)


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _range(response: requests.Response) -> tuple[int | None, int | None]:
    """Return a response's first byte and the size of the whole file, where it states them."""
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

"""Journal of a crawl: one append-only file with all pages so far, which is also its checkpoint.

Each page is one gzip member: a line with the state after the page, then a line an item. A member
is whole or absent, so a page and the state after it are durable together. Every member ends with
its CRC32. When the journal is opened again, the pages before the first torn one (the process was
killed) or damaged one (the disk failed) stay, and the rest is cut off. The bytes after a damaged
page are set aside in a file of their own.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import shutil
import time
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from diffagent.errors import ArtifactError

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_SYNC_SECONDS = 1.0
#: kind ('models', 'images', 'pages'), id, canonical JSON without a newline
Item = tuple[str, int, bytes]


@dataclass(frozen=True)
class JournalEntry:
    """One page: the state of the crawl after it, and its new items."""

    state: dict[str, Any]
    items: Sequence[Item] = ()


class Journal:
    """The journal at ``path``; call ``read`` before the first ``append``.

    Bytes that are cut off after damage go to ``aside`` + '.journal-damaged-N', if set.
    """

    def __init__(self, path: Path, *, aside: Path | None = None) -> None:
        self.path, self._aside = path, aside
        # Unbuffered: close() must not retry a page that does not fit on the disk.
        self._stream = path.open("ab", buffering=0)
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def append(self, state: dict[str, Any], items: Sequence[Item] = ()) -> None:
        """Add a page. A kill loses nothing of it; a power cut loses at most about a second.

        Raises:
            OSError: the page does not fit on the disk; nothing of it stays.
        """
        lines = [orjson.dumps(state)]
        lines += [b"%s\t%d\t%s" % (kind.encode(), ident, data) for kind, ident, data in items]
        self._write(gzip.compress(b"\n".join(lines) + b"\n", compresslevel=1, mtime=0))
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def _write(self, member: bytes) -> None:
        end, rest = self._stream.seek(0, os.SEEK_END), memoryview(member)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError:
            self._stream.truncate(end)
            raise

    def clear(self) -> None:
        """Delete all pages."""
        self._stream.truncate(0)

    def read(self) -> Generator[JournalEntry, None, None]:
        """Yield every whole page, oldest first; cut off the first other one and all behind it.

        Raises:
            ArtifactError: a page with a right checksum was not written by this program.
        """
        size, whole, pages = self.path.stat().st_size, 0, 0
        damage = ""
        with self.path.open("rb") as stream:
            try:
                for member, end in _members(stream):
                    yield self._entry(member)
                    whole, pages = end, pages + 1
            except zlib.error as error:
                damage = str(error)
        if whole == size:
            return
        if damage:
            log.warning(
                "%s is damaged behind byte %d of %d (%s): its first %d pages are good and stay, "
                "the others are fetched again%s",
                *(self.path, whole, size, damage, pages, self._set_aside(whole)),
            )
        else:
            log.info("the last page was not written whole (%d bytes); cut off", size - whole)
        os.truncate(self.path, whole)

    def _set_aside(self, start: int) -> str:
        """Copy the bytes from ``start`` on; return a note that names the copy."""
        if self._aside is None:
            return ""
        numbers = itertools.count(1)
        names = (self._aside.with_name(f"{self._aside.name}.journal-damaged-{n}") for n in numbers)
        target = next(path for path in names if not path.exists())
        with self.path.open("rb") as stream, target.open("wb") as copy:
            stream.seek(start)
            shutil.copyfileobj(stream, copy)
        return f"; a copy of the rest is in {target}"

    def _entry(self, member: bytes) -> JournalEntry:
        try:
            state, *lines = member.rstrip(b"\n").split(b"\n")
            parts = (line.split(b"\t", 2) for line in lines)
            items = [(kind.decode(), int(ident), data) for kind, ident, data in parts]
            return JournalEntry(orjson.loads(state), items)
        except ValueError as error:
            raise ArtifactError(
                f"{str(self.path)!r} is no journal of this program ({error}); move it away: the "
                "crawl then begins again, from the last snapshot when there is one"
            ) from None


def _members(stream: Any) -> Iterator[tuple[bytes, int]]:
    """Yield the contents of each whole gzip member and the offset of its end.

    Raises:
        zlib.error: a member is damaged: its CRC32 differs, or it is no gzip at all.
    """
    end = 0
    rest = b""
    while True:
        decoder, parts, used = zlib.decompressobj(wbits=31), [], 0
        while not decoder.eof:
            data = rest or stream.read(_CHUNK)
            if not data:
                return
            parts.append(decoder.decompress(data))
            rest = decoder.unused_data
            used += len(data) - len(rest)
        end += used
        yield b"".join(parts), end

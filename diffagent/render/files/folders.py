"""Folders of model files that other programs own (A1111, ComfyUI), read in place and by hash."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffagent.crawl.meter import meter
from diffagent.errors import ConfigError, RenderError
from diffagent.localcivitai.sources.local import FileHashes, LocalFile, inspect_file, model_files

log = logging.getLogger(__name__)

#: Sites state sizes in kilobytes, rounded.
_SIZE_SLACK = 1024


class ModelFolders:
    """The safetensors files below some folders. Nothing is written beside them.

    Args:
        folders: of model files at any depth, or whole installations.
        index: file that keeps hashes and verdicts between runs, by path, size and time.

    Raises:
        ConfigError: a folder is not there.
    """

    def __init__(self, folders: Iterable[Path], index: Path | None = None) -> None:
        self.folders = tuple(folders)
        for folder in self.folders:
            if not folder.is_dir():
                why = "is a file, not a folder" if folder.exists() else "is not there"
                raise ConfigError(f"model folder {str(folder)!r} {why}; see runtime.models.folders")
        self._hashes = FileHashes(index)
        self._lock = threading.Lock()
        self._sizes: dict[Path, int] | None = None

    def find(self, sha256: str, size_bytes: int | None = None) -> Path | None:
        """The file with this hash, checked as a downloaded one is; None when there is none.

        Args:
            sha256: in lower case.
            size_bytes: as a site states it. Then only files of that size are hashed.

        Raises:
            RenderError: it is there and must not be loaded; reason 'bad-model-file'.
        """
        if not self.folders:
            return None
        with self._lock:
            found = next((p for p in self._candidates(size_bytes) if self._is(p, sha256)), None)
            flaw = self._hashes.flaw(found) if found else ""
            self._hashes.save()
        if flaw:
            raise RenderError(flaw, reason="bad-model-file")
        return found

    def files(self) -> Iterator[LocalFile]:
        """Every model file, hashed; also those that are refused, with the reason."""
        paths = list(model_files(*self.folders))
        try:
            with meter(lambda *_: None, "model files", len(paths)) as more:
                for path in paths:
                    try:
                        yield inspect_file(path, self._hashes)
                    except OSError as error:
                        log.warning("%r is left out: %s", str(path), error.strerror)
                    more(1)
        finally:
            self._hashes.save()

    def _candidates(self, size_bytes: int | None) -> list[Path]:
        """Files that it may be, those first that need not be read to know."""
        if self._sizes is None:
            self._sizes = {
                path: path.stat().st_size
                for path in model_files(*self.folders)
                if path.suffix.lower() == ".safetensors"
            }
        there = [
            path
            for path, size in self._sizes.items()
            if (size_bytes is None or abs(size - size_bytes) <= _SIZE_SLACK) and path.is_file()
        ]
        return sorted(there, key=lambda path: not self._hashes.has(path))

    def _is(self, path: Path, sha256: str) -> bool:
        try:
            return self._hashes.of(path)["SHA256"].lower() == sha256
        except OSError as error:
            log.warning("%r cannot be read: %s", str(path), error.strerror)
            return False

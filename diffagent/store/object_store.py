"""Artefacts in an object store: any fsspec URI (``s3://...``, ``gs://...``, ``file://...``).

An object store has no rename. What makes an artefact there is its manifest, which goes last::

    STORE/STAGE/NAME/manifest.json    what this request has now
    STORE/STAGE/NAME/FOLDER/...       its files and, once more, its manifest

``FOLDER`` is named after the names and contents of the files. So writers of equal artefacts write
equal objects, writers of different ones never mix, whichever manifest comes last has all of its
files, and an upload that was cut off goes on with the files that are not there yet. Objects
without a manifest were never an artefact; nothing is deleted here.

Credentials and the endpoint are the environment's (``AWS_*`` for S3).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from pydantic import ValidationError

from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.schemas.manifest import FileEntry, Manifest
from diffagent.threads import ContextThreadPool

log = logging.getLogger(__name__)

T = TypeVar("T")

_MANIFEST = "manifest.json"
#: Files that are copied at once.
_THREADS = 8
#: Downloads of a file whose bytes are not its manifest's, before that is called damage.
_DOWNLOADS = 2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Errors that the same call would meet again.
_LASTING = (FileNotFoundError, PermissionError, ImportError, ValueError)


def read_remote(uri: str) -> Manifest | None:
    """The manifest of the artefact at ``uri``; None: there is none.

    Raises:
        ArtifactError: the store cannot be read, or what is there is no manifest.
    """
    with _explained("read", uri):
        files, root = _open(uri)
        try:
            data = files.cat_file(f"{root}/{_MANIFEST}")
        except FileNotFoundError:
            return None
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactError(
                f"'{uri}/{_MANIFEST}' is not a manifest of this version: "
                f"{error.errors()[0]['msg']}; delete it and run the stage again"
            ) from None


def read_pointer(uri: str) -> str:
    """Name of the artefact that the pointer at ``uri`` (``STORE/STAGE/latest``) leads to.

    Raises:
        ArtifactError: there is no such pointer, or the store cannot be read.
    """
    with _explained("read", uri):
        files, path = _open(uri)
        try:
            return str(files.cat_file(path).decode("utf-8", "replace")).strip()
        except FileNotFoundError:
            raise ArtifactError(
                f"no artefact at {uri!r}: nothing was made there yet; give STORE/STAGE/NAME, as "
                "the runs print it"
            ) from None


def list_manifests(store: str) -> dict[tuple[str, str], Manifest]:
    """The manifests of all artefacts of a store, by stage and name.

    Raises:
        ArtifactError: the store cannot be read, or what is there is no manifest.
    """
    with _explained("list", store):
        files, root = _open(store)
        paths = [str(path).split("/")[-3:-1] for path in files.glob(f"{root}/*/*/{_MANIFEST}")]
    manifests: dict[tuple[str, str], Manifest] = {}

    def read(names: tuple[str, str]) -> None:
        if manifest := read_remote(f"{store}/{names[0]}/{names[1]}"):
            manifests[names] = manifest

    _each(read, [(stage, name) for stage, name in paths])
    return manifests


def list_pointers(store: str) -> dict[tuple[str, str], str]:
    """The pointers of a store by stage and name, and the artefacts that they lead to.

    Raises:
        ArtifactError: the store cannot be read.
    """
    with _explained("list", store):
        files, root = _open(store)
        names = [str(path).split("/")[-2:] for path in files.glob(f"{root}/*/latest*")]
    return {(stage, name): read_pointer(f"{store}/{stage}/{name}") for stage, name in names}


def write_pointer(uri: str, name: str) -> None:
    """Let the pointer at ``uri`` lead to the artefact ``name`` of its stage.

    Raises:
        ArtifactError: the store cannot be written.
    """
    with _explained("write", uri):
        files, path = _open(uri)
        files.pipe_file(path, name.encode())


def list_remote(uri: str) -> list[str]:
    """Names of what lies in the folder ``uri``; none when there is no such folder.

    Raises:
        ArtifactError: the store cannot be read.
    """
    with _explained("list", uri):
        files, root = _open(uri)
        try:
            paths = files.ls(root, detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in paths})


def missing_files(uri: str, folder: str, manifest: Manifest) -> list[FileEntry]:
    """The files of ``manifest`` that are not there or not as long as it says (one listing).

    Those for people may be missing.

    Raises:
        ArtifactError: the store cannot be read.
    """
    with _explained("list", uri):
        files, root = _open(uri)
        missing = _missing(files, f"{root}/{folder}", manifest)
        return [entry for entry in missing if not entry.for_people]


def push(directory: Path, manifest: Manifest, uri: str, folder: str) -> None:
    """Copy the artefact in ``directory`` to ``uri``: what is not there yet, the manifest last.

    Raises:
        ArtifactError: the store cannot be written; the artefact is whole in ``directory``.
    """
    with _explained("write", uri):
        files, root = _open(uri)
        target = f"{root}/{folder}"

        def upload(entry: FileEntry) -> None:
            files.put_file(str(directory / entry.path), f"{target}/{entry.path}")

        _each(upload, _missing(files, target, manifest))
        if cut := _missing(files, target, manifest):
            error = ArtifactError(
                f"'{uri}/{folder}/{cut[0].path}' is not {cut[0].size} bytes long after its upload "
                f"({len(cut)} such files); run the same command again: it sends what is missing"
            )
            error.retryable = True
            raise error
        data = (directory / _MANIFEST).read_bytes()
        files.pipe_file(f"{target}/{_MANIFEST}", data)
        files.pipe_file(f"{root}/{_MANIFEST}", data)


def pull(uri: str, folder: str, manifest: Manifest, directory: Path) -> None:
    """Copy the artefact at ``uri`` to ``directory``, every file compared with its SHA256.

    A download that was cut off goes on with the files that it lacks.

    Raises:
        ArtifactError: the store cannot be read, or a file there is not the manifest's.
    """
    incoming = directory.with_name(f".{directory.name}.incoming")
    incoming.mkdir(parents=True, exist_ok=True)
    with _explained("read", uri):
        files, root = _open(uri)
        for entry in manifest.files:
            if not (incoming / entry.path).resolve().is_relative_to(incoming.resolve()):
                raise ValueError(f"file name {entry.path!r} leaves the artefact")

        def download(entry: FileEntry) -> None:
            target = incoming / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_DOWNLOADS):
                if _is_whole(target, entry):
                    return
                try:
                    files.get_file(f"{root}/{folder}/{entry.path}", str(target))
                except FileNotFoundError:
                    if entry.for_people:  # and a person has removed it
                        return
                    raise
            if not _is_whole(target, entry):
                raise DamagedArtifact(
                    f"'{uri}/{folder}/{entry.path}' is damaged (size or SHA256 differ from its "
                    f"manifest); delete it and run the stage {manifest.stage!r} again"
                )

        _each(download, manifest.files)
    (incoming / _MANIFEST).write_bytes(manifest.model_dump_json(indent=1).encode())
    incoming.rename(directory)


def verify_remote(uri: str, folder: str, manifest: Manifest) -> None:
    """Read every byte that the store has of an artefact and compare it with the manifest.

    Raises:
        ArtifactError: a file is missing, or its SHA256 is not the manifest's.
    """
    with _explained("read", uri):
        files, root = _open(uri)
        for entry in (entry for entry in manifest.files if not entry.for_people):
            with files.open(f"{root}/{folder}/{entry.path}", "rb") as stream:
                digest = hashlib.sha256()
                while block := stream.read(2**22):
                    digest.update(block)
            if digest.hexdigest() != entry.sha256:
                raise DamagedArtifact(
                    f"'{uri}/{folder}/{entry.path}' is damaged (SHA256 differs); delete it and run "
                    f"the stage {manifest.stage!r} again"
                )


@functools.lru_cache(maxsize=8)
def check_writable(store: str) -> None:
    """Write a small object into ``store``, once a process: better now than after hours of work.

    Raises:
        ArtifactError: the store cannot be written.
    """
    with _explained("write", store):
        files, root = _open(store)
        files.pipe_file(f"{root}/.diffagent", b"Artefacts of DiffAgent lie here.\n")


def _open(uri: str) -> tuple[Any, str]:
    """The file system of ``uri`` and the path in it. Listings are never remembered."""
    local = {"auto_mkdir": True} if uri.startswith(("file:", "local:")) else {}
    files, root = fsspec.core.url_to_fs(uri, use_listings_cache=False, **local)
    return files, str(root).rstrip("/")


def _missing(files: Any, folder: str, manifest: Manifest) -> list[FileEntry]:
    listing = files.find(folder, detail=True)
    sizes = {name.removeprefix(f"{folder}/"): info["size"] for name, info in listing.items()}
    return [
        entry
        for entry in manifest.files
        if entry.path not in sizes or (sizes[entry.path] != entry.size and not entry.for_people)
    ]


def _is_whole(path: Path, entry: FileEntry) -> bool:
    if not path.is_file():
        return False
    if entry.for_people:
        return True
    if path.stat().st_size != entry.size:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == entry.sha256


def _each(copy: Callable[[T], None], entries: Iterable[T]) -> None:
    """Copy files side by side; the first error ends it."""
    with ContextThreadPool(_THREADS) as pool:
        futures = [pool.submit(copy, entry) for entry in entries]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _explained(doing: str, uri: str) -> Iterator[None]:
    """Turn whatever a file system raises into an error that says where and what to do."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # every fsspec back end has errors of its own
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise
        hint = " (pip install 'diffagent[s3]')" if isinstance(error, ImportError) else ""
        failure = ArtifactError(
            f"cannot {doing} {uri!r}: {error}{hint}; check that the store (runtime.store) exists, "
            "the credentials and the endpoint (AWS_* for S3) and the network, then run the same "
            "command again: it goes on from what was copied"
        )
        failure.retryable = not (
            isinstance(error, _LASTING) or type(error).__name__ == "NoCredentialsError"
        )
        raise failure from error

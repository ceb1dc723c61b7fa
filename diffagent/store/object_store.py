"""Artifacts in an object store: any fsspec URI (``s3://...``, ``gs://...``, ``file://...``).

An object store cannot rename. An artifact exists there when its manifest does, which is written
last::

    STORE/STAGE/NAME/manifest.json    manifest of the present result of this request
    STORE/STAGE/NAME/FOLDER/...       its files and a second copy of its manifest

``FOLDER`` is named after the names and contents of the files. So writers of equal artifacts write
equal objects, writers of different ones never mix, all files of the manifest that is written last
exist, and an upload that was cut off resumes with the files that are missing. Objects without a
manifest do not count as an artifact; nothing is deleted here.

Credentials and the endpoint come from the environment (``AWS_*`` for S3).
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

from pydantic import ValidationError

from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.schemas.manifest import FileEntry, Manifest
from diffagent.store.digests import files_digest, sha256_file
from diffagent.store.manifest_file import MANIFEST
from diffagent.threads import ContextThreadPool

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Files that are copied at the same time.
_THREADS = 8
#: Downloads of a file whose bytes are not its manifest's, before it counts as damaged.
_DOWNLOADS = 2
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Errors that the same call would raise again.
_LASTING = (FileNotFoundError, PermissionError, ImportError, ValueError)


def read_remote(uri: str) -> Manifest | None:
    """Read the manifest of the artifact at ``uri``; None where there is no artifact.

    Raises:
        ArtifactError: the store cannot be read, or the object is not a manifest.
    """
    with _explained("read", uri):
        files, root = _open(uri)
        try:
            data = files.cat_file(f"{root}/{MANIFEST}")
        except FileNotFoundError:
            return None
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactError(
                f"'{uri}/{MANIFEST}' is not a manifest of this version: "
                f"{error.errors()[0]['msg']}; delete it and run the stage again"
            ) from None


def read_expected(uri: str, content_digest: str) -> Manifest:
    """Read the manifest of the artifact at ``uri`` that has this content digest.

    Raises:
        ArtifactError: it is gone or has other content by now, or the store cannot be read.
    """
    manifest = read_remote(uri)
    if manifest is None or manifest.content_digest != content_digest:
        raise ArtifactError(
            f"{uri!r} was removed, or was replaced by an artifact with other content, since this "
            "run began; run the same command again"
        )
    return manifest


def read_pointer(uri: str) -> str:
    """Read the name of the artifact that the pointer ``uri`` (``STORE/STAGE/latest``) leads to.

    Raises:
        ArtifactError: the pointer does not exist, or the store cannot be read.
    """
    with _explained("read", uri):
        files, path = _open(uri)
        try:
            return str(files.cat_file(path).decode("utf-8", "replace")).strip()
        except FileNotFoundError:
            raise ArtifactError(
                f"no artifact at {uri!r}: no run has written one; give STORE/STAGE/NAME, as the "
                "runs print it"
            ) from None


def list_manifests(store: str) -> dict[tuple[str, str], Manifest]:
    """Read the manifests of all artifacts of a store, by stage and name.

    Raises:
        ArtifactError: the store cannot be read, or an object is not a manifest.
    """
    with _explained("list", store):
        files, root = _open(store)
        paths = [str(path).split("/")[-3:-1] for path in files.glob(f"{root}/*/*/{MANIFEST}")]
    manifests: dict[tuple[str, str], Manifest] = {}

    def read(names: tuple[str, str]) -> None:
        if manifest := read_remote(f"{store}/{names[0]}/{names[1]}"):
            manifests[names] = manifest

    _each(read, [(stage, name) for stage, name in paths])
    return manifests


def list_pointers(store: str) -> dict[tuple[str, str], str]:
    """Read the pointers of a store: the name of an artifact by stage and name of the pointer.

    Raises:
        ArtifactError: the store cannot be read.
    """
    with _explained("list", store):
        files, root = _open(store)
        names = [str(path).split("/")[-2:] for path in files.glob(f"{root}/*/latest*")]
    return {(stage, name): read_pointer(f"{store}/{stage}/{name}") for stage, name in names}


def write_pointer(uri: str, name: str) -> None:
    """Let the pointer at ``uri`` lead to the artifact ``name`` of its stage.

    Raises:
        ArtifactError: the store cannot be written.
    """
    with _explained("write", uri):
        files, path = _open(uri)
        files.pipe_file(path, name.encode())


def list_remote(uri: str) -> list[str]:
    """List the names in the folder ``uri``; none when it does not exist.

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


def missing_files(uri: str, manifest: Manifest) -> list[FileEntry]:
    """List the files of ``manifest`` that are missing or have another size (one listing).

    Files for people may be missing.

    Raises:
        ArtifactError: the store cannot be read.
    """
    with _explained("list", uri):
        files, root = _open(uri)
        missing = _missing(files, f"{root}/{_folder(manifest)}", manifest)
        return [entry for entry in missing if not entry.for_people]


def push(directory: Path, manifest: Manifest, uri: str) -> None:
    """Copy the files of an artifact that ``uri`` lacks from ``directory``, the manifest last.

    Raises:
        ArtifactError: the store cannot be written; the artifact is whole in ``directory``.
    """
    with _explained("write", uri):
        files, root = _open(uri)
        folder = _folder(manifest)
        target = f"{root}/{folder}"

        def upload(entry: FileEntry) -> None:
            files.put_file(str(directory / entry.path), f"{target}/{entry.path}")

        _each(upload, _missing(files, target, manifest))
        if missing := _missing(files, target, manifest):
            error = ArtifactError(
                f"'{uri}/{folder}/{missing[0].path}' is not {missing[0].size} bytes long after its "
                f"upload ({len(missing)} such files); run the same command again: it sends the "
                "missing files"
            )
            error.retryable = True
            raise error
        data = (directory / MANIFEST).read_bytes()
        files.pipe_file(f"{target}/{MANIFEST}", data)
        files.pipe_file(f"{root}/{MANIFEST}", data)


def pull(uri: str, manifest: Manifest, directory: Path) -> None:
    """Copy the artifact at ``uri`` to ``directory`` and compare every file with its SHA256.

    A download that was cut off resumes with the files that are missing.

    Raises:
        ArtifactError: the store cannot be read, or one of its files is not the manifest's.
    """
    folder = _folder(manifest)
    incoming = directory.with_name(f".{directory.name}.incoming")
    incoming.mkdir(parents=True, exist_ok=True)
    with _explained("read", uri):
        files, root = _open(uri)
        for entry in manifest.files:
            if not (incoming / entry.path).resolve().is_relative_to(incoming.resolve()):
                raise ValueError(f"file name {entry.path!r} leaves the artifact")

        def download(entry: FileEntry) -> None:
            target = incoming / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_DOWNLOADS):
                if _is_whole(target, entry):
                    return
                try:
                    files.get_file(f"{root}/{folder}/{entry.path}", str(target))
                except FileNotFoundError:
                    if entry.for_people:  # a person has removed it
                        return
                    raise
            if not _is_whole(target, entry):
                raise DamagedArtifact(
                    f"'{uri}/{folder}/{entry.path}' is damaged (size or SHA256 differ from its "
                    f"manifest); delete it and run the stage {manifest.stage!r} again"
                )

        _each(download, manifest.files)
    (incoming / MANIFEST).write_bytes(manifest.model_dump_json(indent=1).encode())
    incoming.rename(directory)


def verify_remote(uri: str, manifest: Manifest) -> None:
    """Read every byte of an artifact in its object store and compare it with the manifest.

    Raises:
        ArtifactError: a file is missing, or its SHA256 is not the manifest's.
    """
    folder = _folder(manifest)
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
    """Write a small object into ``store``, once per process, so that a run fails before its work.

    Raises:
        ArtifactError: the store cannot be written.
    """
    with _explained("write", store):
        files, root = _open(store)
        files.pipe_file(f"{root}/.diffagent", b"Artifacts of DiffAgent.\n")


def _open(uri: str) -> tuple[Any, str]:
    """Return the file system of ``uri`` and the path in it; listings are never cached."""
    import fsspec

    local = {"auto_mkdir": True} if uri.startswith(("file:", "local:")) else {}
    files, root = fsspec.core.url_to_fs(uri, use_listings_cache=False, **local)
    return files, str(root).rstrip("/")


def _folder(manifest: Manifest) -> str:
    """Name the folder of an artifact's files after their names and contents."""
    return files_digest(manifest.files)[:16]


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
    return path.stat().st_size == entry.size and sha256_file(path) == entry.sha256


def _each(copy: Callable[[T], None], entries: Iterable[T]) -> None:
    """Call ``copy`` on entries in several threads; the first error ends it."""
    with ContextThreadPool(_THREADS) as pool:
        futures = [pool.submit(copy, entry) for entry in entries]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _explained(action: str, uri: str) -> Iterator[None]:
    """Turn any exception of a file system into an error with its place and remedy."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # every fsspec backend has its own errors
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise
        hint = " (pip install 'diffagent[s3]')" if isinstance(error, ImportError) else ""
        failure = ArtifactError(
            f"cannot {action} {uri!r}: {error}{hint}; check that the store (runtime.store) exists, "
            "the credentials and the endpoint (AWS_* for S3) and the network, then run the same "
            "command again: it resumes from the files that were copied"
        )
        failure.retryable = not (
            isinstance(error, _LASTING) or type(error).__name__ == "NoCredentialsError"
        )
        raise failure from error

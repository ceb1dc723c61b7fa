"""A second home for artefacts: any fsspec URI (``s3://...``, ``gs://...``, ``file://...``).

Work is always done in the local store; a finished artefact is copied out, and one that is
missing here is copied in. The manifest goes last and is removed first, as on the local disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec

from diffagent.errors import ArtifactError
from schemas.manifest import Manifest

_MANIFEST = "manifest.json"


def push(directory: Path, uri: str) -> None:
    """Copy the artefact in ``directory`` to ``URI/STAGE/NAME`` unless it is there already.

    Raises:
        ArtifactError: the mirror cannot be written; the artefact is whole in the local store.
    """
    names = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
    names.sort(key=lambda name: (name == _MANIFEST, name))
    try:
        files, root = fsspec.core.url_to_fs(_address(directory, uri))
        if files.exists(f"{root}/{_MANIFEST}"):
            if files.cat_file(f"{root}/{_MANIFEST}") == (directory / _MANIFEST).read_bytes():
                return
            files.rm_file(f"{root}/{_MANIFEST}")
        for name in names:
            files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            files.put_file(str(directory / name), f"{root}/{name}")
    except (OSError, ImportError, ValueError) as error:
        raise ArtifactError(
            f"cannot copy {str(directory)!r} to the mirror {uri!r}: {error}; "
            "check runtime.mirror and its credentials, then run the stage again"
        ) from error


def pull(directory: Path, uri: str) -> bool:
    """Copy ``URI/STAGE/NAME`` to ``directory``; False when the mirror has no such artefact.

    Raises:
        ArtifactError: the mirror cannot be read.
    """
    incoming = directory.with_name(f".{directory.name}.incoming")
    try:
        files, root = fsspec.core.url_to_fs(_address(directory, uri))
        if not files.exists(f"{root}/{_MANIFEST}"):
            return False
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        files.get_file(f"{root}/{_MANIFEST}", str(incoming / _MANIFEST))
        manifest = Manifest.model_validate_json((incoming / _MANIFEST).read_bytes())
        for entry in manifest.files:
            target = incoming / entry.path
            if not target.resolve().is_relative_to(incoming.resolve()):
                raise ValueError(f"file name {entry.path!r} leaves the artefact")
            target.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(f"{root}/{entry.path}", str(target))
    except (OSError, ImportError, ValueError) as error:
        raise ArtifactError(
            f"cannot copy {directory.name!r} from the mirror {uri!r}: {error}; "
            "check runtime.mirror and its credentials, or run without it"
        ) from error
    incoming.rename(directory)
    return True


def _address(directory: Path, uri: str) -> str:
    return f"{uri.rstrip('/')}/{directory.parent.name}/{directory.name}"

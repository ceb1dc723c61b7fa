"""A folder of model files as users of A1111 and ComfyUI have it, at any depth.

What a file is comes from the sidecars beside it, and where these say nothing from its header:

* ``NAME.civitai.info`` (Civitai Helper): the answer of /model-versions/by-hash;
* ``NAME.metadata.json`` (ComfyUI-Lora-Manager): ``civitai`` in it is such an answer, and it has a
  name, base model and tags of its own for what Civitai does not know;
* ``NAME.json`` (A1111): description, "sd version", "activation text", notes;
* the header of a safetensors file: kohya's ``ss_*``, ``modelspec.*``, tensor names and shapes.

An answer of the site counts only for the file whose SHA256 it names. What the site does not know
gets ids of its own from that SHA256 (``sources.synthetic_id``). Pictures beside a model
(``NAME.png``, ``NAME.preview.png``, ...) that say how they were made become records of pictures;
nobody has rated them, so they count as PG unless the Lora Manager's notes or the model's nsfw flag
say otherwise.

Files are not trusted: headers are bounded and checked, pickles are hashed and never opened,
symbolic links are not followed. What is refused is listed all the same, with the reason where the
site has the result of its scan and without a way to download it. Nothing is written beside the
files; hashes are kept in a file of the store, by size and time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from diffagent.artifacts import atomic_file
from diffagent.civitai.client import parse_json
from diffagent.civitai.sources import Records, synthetic_id
from diffagent.civitai.sources.architecture import UNKNOWN, Architecture, describe
from diffagent.errors import CivitaiError, ConfigError, RenderError
from diffagent.render.weights import check_weights, read_header
from schemas.civitai import (
    FILE_FIELDS,
    IMAGE_FIELDS,
    MODEL_FIELDS,
    PG,
    VERSION_FIELDS,
    X,
    level_of,
    whole_number,
)

log = logging.getLogger(__name__)

Row = dict[str, Any]
_WEIGHTS = {
    ".safetensors": "SafeTensor",
    ".ckpt": "PickleTensor",
    ".pt": "PickleTensor",
    ".pth": "PickleTensor",
    ".gguf": "GGUF",
}
_PICTURES = tuple(
    f"{mark}.{end}" for end in ("png", "jpg", "jpeg", "webp") for mark in ("", ".preview")
)
_MAX_SIDECAR = 16 << 20
_CHUNK = 1 << 20
_SAVE_SECONDS = 30.0
_SD_VERSIONS = {"SD1": "SD 1.5", "SD2": "SD 2.1", "SDXL": "SDXL 1.0"}
#: A folder with ``models`` and one of these is an installation: A1111, Forge, SD.Next, ComfyUI.
_PROGRAMS = ("webui.py", "launch.py", "main.py")
#: What the folders of A1111 and ComfyUI hold, in lower case: for files whose tensors do not tell.
_TYPES_BY_FOLDER = {
    **dict.fromkeys(("stable-diffusion", "checkpoints", "diffusion_models", "unet"), "Checkpoint"),
    **dict.fromkeys(("lora", "loras"), "LORA"),
    "lycoris": "LoCon",
    "vae": "VAE",
    "embeddings": "TextualInversion",
    **dict.fromkeys(("hypernetworks", "hypernetwork"), "Hypernetwork"),
    "controlnet": "Controlnet",
    **dict.fromkeys(("esrgan", "realesrgan", "upscale_models"), "Upscaler"),
}
_TENSORS_ONLY = "a checked safetensors file holds tensors alone"


@dataclass
class LocalFile:
    """One model file: its hashes, and what its header says or why it is refused."""

    path: Path
    hashes: dict[str, str]
    architecture: Architecture = UNKNOWN
    notes: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def sha256(self) -> str:
        return self.hashes["SHA256"].lower()

    @property
    def stem(self) -> Path:
        """Path without the ending, which sidecars and pictures share."""
        return self.path.with_suffix("")


def open_folder(directory: Path, cache: Path | None = None) -> Records:
    """The models and pictures of a folder.

    Raises:
        ConfigError: there is no model file in it.
    """
    hashes = Hashes(cache)
    models: dict[int, Row] = {}
    images: dict[int, Row] = {}
    files: dict[str, LocalFile] = {}
    for path in model_files(directory):
        try:
            file = look(path, hashes)
        except OSError as error:
            log.warning("%r cannot be read (%s); left out", str(path), error.strerror)
            continue
        if twin := files.get(file.sha256):
            log.warning("%r holds the same as %r; left out", str(path), str(twin.path))
            continue
        files[file.sha256] = file
        model, version = record_of(file)
        _put(models, model, version)
        for image in pictures_of(file, version, model):
            images.setdefault(image["id"], image)
        if file.refused:
            log.warning("%r is listed and not available: %s", str(path), file.refused)
    hashes.save()
    if not models:
        kinds = ", ".join(_WEIGHTS)
        raise ConfigError(f"{str(directory)!r} holds no model file ({kinds}) at any depth")
    served = {sha: file.path for sha, file in files.items() if not file.refused}
    return Records(list(models.values()), list(images.values()), served)


def model_files(directory: Path) -> Iterator[Path]:
    """Model files at any depth in a stable order; of an installation those of its model folders."""
    tops = [directory]
    if (directory / "models").is_dir() and any((directory / name).exists() for name in _PROGRAMS):
        tops = [directory / "embeddings", directory / "models"]
    for folder, folders, names in (step for top in tops for step in os.walk(top)):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() not in _WEIGHTS:
                continue
            if path.is_symlink() or not path.is_file():
                log.warning("%r is a link or no file; give the folder that holds it", str(path))
                continue
            yield path


def _put(models: dict[int, Row], model: Row, version: Row) -> None:
    """Add a version's file to the models that are there already."""
    known = models.setdefault(model["id"], model)
    for other in known["modelVersions"]:
        if other["id"] == version["id"]:
            other["files"] += version["files"]
            return
    known["modelVersions"].append(version)


# --- one file -------------------------------------------------------------------------------


class Hashes:
    """Hashes of files, each computed once as long as its size and time stay.

    Threads may share it, and processes its file: what each has found out is merged.

    Args:
        cache: the file that keeps them; None: they are forgotten.
    """

    def __init__(self, cache: Path | None) -> None:
        self._cache, self._saved, self._changed = cache, time.monotonic(), False
        self._lock = threading.RLock()
        self._known = self._read()

    def of(self, path: Path) -> dict[str, str]:
        """Civitai's hashes of a file, in upper case."""
        return dict(self._entry(path)[2])

    def know(self, path: Path) -> bool:
        """Whether a file need not be read."""
        stat, key = path.stat(), _key(path)
        return self._known.get(key, [])[:2] == [stat.st_size, stat.st_mtime_ns]

    def flaw(self, path: Path) -> str:
        """Why a safetensors file must not be loaded, every weight looked at; '' when it may."""
        with self._lock:
            entry = self._entry(path)
            if len(entry) < 4:
                try:
                    check_weights(path)
                    entry.append("")
                except RenderError as error:
                    entry.append(str(error))
                self._changed = True
            return str(entry[3])

    def save(self) -> None:
        """Keep what is new for the next time."""
        with self._lock:
            self._saved = time.monotonic()
            if not self._cache or not self._changed:
                return
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self._cache}.lock"), atomic_file(self._cache) as file:
                self._known = {**self._read(), **self._known}
                file.write_bytes(orjson.dumps(self._known))
            self._changed = False

    def _read(self) -> dict[str, list[Any]]:
        if self._cache and self._cache.exists():
            try:
                return dict(orjson.loads(self._cache.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s cannot be read (%s): files are hashed again", self._cache, error)
        return {}

    def _entry(self, path: Path) -> list[Any]:
        """[size, time, hashes], and at the end the flaw once it was looked for."""
        with self._lock:
            if not self.know(path):
                stat = path.stat()
                self._known[_key(path)] = [stat.st_size, stat.st_mtime_ns, hash_file(path)]
                self._changed = True
                if time.monotonic() - self._saved > _SAVE_SECONDS:
                    self.save()
            return self._known[_key(path)]


def _key(path: Path) -> str:
    return os.fsencode(path.resolve()).hex()


def hash_file(path: Path) -> dict[str, str]:
    """SHA256, AutoV1, AutoV2, CRC32, and of safetensors AutoV3, in one pass."""
    whole, payload, window, crc, at = hashlib.sha256(), hashlib.sha256(), b"", 0, 0
    start = 0
    with path.open("rb") as stream:
        if path.suffix.lower() == ".safetensors":
            start = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(0)
        while data := stream.read(_CHUNK):
            whole.update(data)
            crc = zlib.crc32(data, crc)
            payload.update(data[max(0, start - at) :])
            if at == 0x100000:
                window = data[:0x10000]
            at += len(data)
    found = {"SHA256": whole.hexdigest(), "AutoV2": whole.hexdigest()[:10], "CRC32": f"{crc:08x}"}
    if start:
        found["AutoV3"] = payload.hexdigest()[:12]
    if window:
        found["AutoV1"] = hashlib.sha256(window).hexdigest()[:8]
    return {name: value.upper() for name, value in found.items()}


def look(path: Path, hashes: Hashes) -> LocalFile:
    """What a file is; the header of a safetensors file is checked, nothing else is opened."""
    file = LocalFile(path, hashes.of(path), Architecture(_type_by_folder(path), None))
    if path.suffix.lower() != ".safetensors":
        file.refused = f"{_WEIGHTS[path.suffix.lower()]}: only safetensors are used"
        return file
    try:
        tensors = read_header(path)
    except RenderError as error:
        file.refused = str(error)
        return file
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    notes = header.get("__metadata__")
    if isinstance(notes, dict):
        file.notes = {k: v for k, v in notes.items() if isinstance(v, str)}
    found = describe(tensors, file.notes)
    told = file.architecture.type if found.type == UNKNOWN.type else found.type
    file.architecture = replace(found, type=told)
    return file


def _type_by_folder(path: Path) -> str:
    """The type of what the nearest known folder holds, in Civitai's words."""
    for name in reversed(path.parent.parts):
        if known := _TYPES_BY_FOLDER.get(name.lower()):
            return known
    return UNKNOWN.type


# --- sidecars -------------------------------------------------------------------------------


def record_of(file: LocalFile) -> tuple[Row, Row]:
    """The model without versions, and its version with this file, in the API's shape."""
    managed = _read_json(Path(f"{file.stem}.metadata.json"))
    for answer in (_read_json(Path(f"{file.stem}.civitai.info")), _dict(managed.get("civitai"))):
        known = _known_file(answer, file)
        if known is not None:
            return _of_answer(answer, known, file)
    return _of_header(file, managed, _read_json(Path(f"{file.stem}.json")))


def _read_json(path: Path) -> Row:
    """A sidecar's object; {} when there is none."""
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_SIDECAR:
            raise CivitaiError(f"larger than {_MAX_SIDECAR} bytes")
        found = parse_json(path.read_bytes(), path.name)
    except (OSError, CivitaiError) as error:
        log.warning("%r is left out: %s", str(path), error)
        return {}
    return found if isinstance(found, dict) else {}


def _known_file(answer: Row, file: LocalFile) -> Row | None:
    """The entry of an answer's ``files`` that is this file; {} when none of them has a hash."""
    if whole_number(answer.get("id")) is None or whole_number(answer.get("modelId")) is None:
        return None  # what a tool writes for a file that the site does not know
    files = [f for f in _list(answer.get("files")) if isinstance(f, dict)]
    hashes = [str(_dict(f.get("hashes")).get("SHA256") or "").lower() for f in files]
    if file.sha256 in hashes:
        return files[hashes.index(file.sha256)]
    if any(hashes):
        log.warning("the sidecar of %r is of another file; left out", str(file.path))
        return None
    return {}


def _of_answer(answer: Row, known: Row, file: LocalFile) -> tuple[Row, Row]:
    about = _typed(_dict(answer.get("model")), MODEL_FIELDS)
    model = {
        **about,
        "id": whole_number(answer["modelId"]),
        "name": about.get("name") or _name(file),
        "type": about.get("type") or file.architecture.type,
        "modelVersions": [],
    }
    if isinstance(answer.get("creator"), dict):
        model["creator"] = answer["creator"]
    ident = whole_number(answer["id"])
    version = _typed(answer, VERSION_FIELDS)
    images = [_typed(i, IMAGE_FIELDS) for i in _list(answer.get("images")) if isinstance(i, dict)]
    version |= {"id": ident, "files": [_file_record(file, ident, known)], "images": images}
    version["downloadUrl"] = version["files"][0].get("downloadUrl")
    return model, version


def _of_header(file: LocalFile, managed: Row, user: Row) -> tuple[Row, Row]:
    """What the site does not know, from the tools' own notes and the file's header."""
    ident, notes = synthetic_id(file.sha256), file.notes
    base = file.architecture.base_model or _text(managed.get("base_model"))
    base = base or _SD_VERSIONS.get(_text(user.get("sd version")), "")
    words = _text(user.get("activation text")) or notes.get("modelspec.trigger_phrase", "")
    model: Row = {
        "id": ident,
        "name": _text(managed.get("model_name")) or _name(file),
        "type": file.architecture.type,
        "nsfw": False,
        "description": _text(managed.get("modelDescription"))
        or _text(user.get("description"))
        or notes.get("modelspec.description", ""),
        "tags": [tag for tag in _list(managed.get("tags")) if isinstance(tag, str)],
        "modelVersions": [],
    }
    if author := notes.get("modelspec.author"):
        model["creator"] = {"username": author}
    version: Row = {
        "id": ident,
        "name": file.hashes["AutoV2"].lower(),
        "baseModelType": file.architecture.form,
        "trainedWords": [word.strip() for word in words.split(",") if word.strip()],
        "files": [_file_record(file, ident, {})],
        "images": [],
    }
    if base:
        version["baseModel"] = base
    version["downloadUrl"] = version["files"][0].get("downloadUrl")
    return model, version


def _file_record(file: LocalFile, version: int | None, known: Row) -> Row:
    """The record of this file; ``known`` is what the site says of it."""
    ident = whole_number(known.get("id")) or synthetic_id(file.sha256)
    form = _WEIGHTS[file.path.suffix.lower()]
    record = {
        "type": "Model",
        "pickleScanResult": "Success",
        "pickleScanMessage": _TENSORS_ONLY,
        "virusScanResult": "Success",
        "virusScanMessage": _TENSORS_ONLY,
        **_typed(known, FILE_FIELDS),
        "id": ident,
        "name": _clean(file.path.name),
        "sizeKB": file.path.stat().st_size / 1024,
        "metadata": {**_dict(known.get("metadata")), "format": form},
        "hashes": {**_dict(known.get("hashes")), **file.hashes},
        "primary": True,
    }
    record.pop("downloadUrl", None)
    if file.refused:
        record |= {"pickleScanResult": "Danger", "pickleScanMessage": file.refused}
    else:
        record["downloadUrl"] = f"/api/download/models/{version}?fileId={ident}"
    return record


def _typed(row: Row, fields: Mapping[str, tuple[type, ...]]) -> Row:
    """What of a record is known to the API and has a type that it has there."""
    return {key: value for key, value in row.items() if type(value) in fields.get(key, ())}


def _name(file: LocalFile) -> str:
    for key in ("modelspec.title", "ss_output_name"):
        if text := file.notes.get(key, "").strip():
            return text
    return _clean(file.path.stem)


def _clean(name: str) -> str:
    """A file's name as text, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "replace")


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: object) -> Row:
    return value if isinstance(value, dict) else {}


# --- pictures -------------------------------------------------------------------------------


def pictures_of(file: LocalFile, version: Row, model: Row) -> Iterator[Row]:
    """Pictures of the version that say how they were made: its sidecar's, and those beside it."""
    base: Row = {"modelVersionIds": [version["id"]], "type": "image"}
    if version.get("baseModel"):
        base["baseModel"] = version["baseModel"]
    if username := _text(_dict(model.get("creator")).get("username")):
        base["username"] = username
    for image in version["images"]:
        if image.get("meta"):
            url = _text(image.get("url"))
            number = whole_number(image.get("id")) or whole_number(Path(url).stem)
            made = number or synthetic_id(hashlib.sha256(url.encode()).hexdigest())
            yield {**base, **image, "id": made}
    rated = _read_json(Path(f"{file.stem}.metadata.json")).get("preview_nsfw_level")
    base["nsfwLevel"] = level_of(rated) or (X if model.get("nsfw") else PG)
    yield from filter(None, (_picture(path, base) for path in _beside(file)))


def _beside(file: LocalFile) -> Iterator[Path]:
    for end in _PICTURES:
        path = Path(f"{file.stem}{end}")
        if path.is_file() and not path.is_symlink():
            yield path


def _picture(path: Path, base: Row) -> Row | None:
    """The record of a picture file; None when that lacks how it was made."""
    from PIL import Image

    from diffagent.dabench.metadata import read_image_metadata, write_parameters

    generation = read_image_metadata(path)
    if not generation.prompt or generation.not_known:
        return None
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
        width, height = image.size
    return {
        **base,
        "id": synthetic_id(digest),
        "url": _clean(path.name),
        "width": width,
        "height": height,
        "meta": {"parameters": write_parameters(generation)},
    }

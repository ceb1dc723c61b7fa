"""A folder of model files as users of A1111 and ComfyUI have it, at any depth.

Sidecars next to a file describe it; its header supplies the facts that they lack:

* ``NAME.civitai.info`` (Civitai Helper): the answer of /model-versions/by-hash;
* ``NAME.metadata.json`` (ComfyUI-Lora-Manager): ``civitai`` in it is such an answer; its own name,
  base model and tags describe files that Civitai does not have;
* ``NAME.cm-info.json`` (StabilityMatrix): the same facts under other names;
* ``NAME.json`` (A1111): description, "sd version", "activation text", notes;
* the header of a safetensors file: kohya's ``ss_*``, ``modelspec.*``, tensor names and shapes.

An answer of the site counts only for the file whose SHA256 it names. A file that the site does not
have gets ids from its SHA256 (``sources.synthetic_id``). Pictures next to a model (``NAME.png``,
``NAME.preview.png``, ...) with generation metadata become records of pictures. They have no rating,
so they count as PG unless the Lora Manager's notes or the model's nsfw flag state another level.

Symbolic links are followed, since A1111 and ComfyUI are set up with them; each file counts once,
and links that lead around the folder or nowhere are skipped with a warning. A ComfyUI's
``extra_model_paths.yaml`` is read. Parts of a diffusers pipeline and shards are no checkpoints.

Files are not trusted: headers are bounded and checked, pickles are hashed and never opened. A
refused file is listed as well, with the reason as the result of its scan and without a download
link. Nothing is written next to the files: the store has a file of their hashes, by size and time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from diffagent.civitai.lenient_json import parse_json
from diffagent.errors import CivitaiError, ConfigError, RenderError
from diffagent.localcivitai.sources import SourceRecords, synthetic_id
from diffagent.localcivitai.sources.architecture import UNKNOWN, Architecture, describe
from diffagent.schemas.payloads import (
    FILE_FIELDS,
    IMAGE_FIELDS,
    MODEL_FIELDS,
    PG,
    VERSION_FIELDS,
    X,
    as_dict,
    as_list,
    json_flaw,
    level_of,
    objects_in,
    whole_number,
)
from diffagent.store import atomic_file
from diffagent.t2i.catalogue import SYNTHETIC
from diffagent.t2i.quantised import check_quantisation
from diffagent.t2i.weights import Tensor, check_weights, read_header, read_metadata, reading

log = logging.getLogger(__name__)

Row = dict[str, Any]
CHECKPOINT = "Checkpoint"  # Civitai's type
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
_EXTRA_PATHS = "extra_model_paths.yaml"
_MAX_EXTRA_PATHS = 1 << 20
_CHUNK = 1 << 20
_SAVE_SECONDS = 30.0
_SD_VERSIONS = {
    "SD1": "SD 1.5", "SD2": "SD 2.1", "SDXL": "SDXL 1.0", "SD3": "SD 3", "Flux": "Flux.1 D",
}  # fmt: skip
#: A folder with ``models`` and one of these is an installation: A1111, Forge, SD.Next, ComfyUI.
_PROGRAMS = ("webui.py", "launch.py", "main.py")
#: Types of the folders of A1111 and ComfyUI, in lower case: for files whose tensors show none.
_TYPES_BY_FOLDER = {
    **dict.fromkeys(("stable-diffusion", "checkpoints", "diffusion_models", "unet"), CHECKPOINT),
    **dict.fromkeys(("lora", "loras"), "LORA"),
    "lycoris": "LoCon",
    "vae": "VAE",
    "embeddings": "TextualInversion",
    **dict.fromkeys(("hypernetworks", "hypernetwork"), "Hypernetwork"),
    "controlnet": "Controlnet",
    **dict.fromkeys(("esrgan", "realesrgan", "upscale_models"), "Upscaler"),
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
#: Names that diffusers and transformers give to the weights of one part of a pipeline.
_PART_NAMES = frozenset({"diffusion_pytorch_model", "pytorch_model", "model"})
#: Beginnings of tensor names in such a part.
_PART_TENSORS = ("down_blocks.", "text_model.", "vision_model.", "transformer_blocks.",
                 "encoder.block.")  # fmt: skip
_TENSORS_ONLY = "a checked safetensors file holds tensors alone"


@dataclass
class LocalFile:
    """One model file.

    Attributes:
        hashes: Civitai's, in upper case.
        notes: metadata of its header.
        refused: why the file is not used; ''.
        undrawable: why a sound file cannot render pictures; '' without a known reason.
    """

    path: Path
    hashes: dict[str, str]
    architecture: Architecture = UNKNOWN
    notes: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""
    undrawable: str = ""

    @property
    def sha256(self) -> str:
        return self.hashes["SHA256"].lower()

    @property
    def stem(self) -> Path:
        """Path without the ending, which sidecars and pictures share."""
        return self.path.with_suffix("")


def open_folder(directory: Path, cache: Path | None = None) -> SourceRecords:
    """Read the models and pictures of a folder.

    Raises:
        ConfigError: it holds no model file.
    """
    hashes = FileHashes(cache)
    models: dict[int, Row] = {}
    images: dict[int, Row] = {}
    files: dict[str, LocalFile] = {}
    for path in model_files(directory):
        try:
            file = inspect_file(path, hashes)
            if twin := files.get(file.sha256):
                log.warning("%r has the same content as %r; left out", str(path), str(twin.path))
                continue
            model, version = record_of(file)
            pictures = list(pictures_of(file, version, model))
        except Exception as error:  # no file stops the others
            kind = type(error).__name__
            log.warning("%r cannot be read (%s: %s); left out", str(path), kind, error)
            continue
        files[file.sha256] = file
        _put(models, model, version)
        for image in pictures:
            images.setdefault(image["id"], image)
        if file.refused:
            log.warning("%r is listed and not available: %s", str(path), file.refused)
    hashes.save()
    if not models:
        kinds = ", ".join(_WEIGHTS)
        raise ConfigError(f"{str(directory)!r} holds no model file ({kinds}) at any depth")
    served = {sha: file.path for sha, file in files.items() if not file.refused}
    return SourceRecords(list(models.values()), list(images.values()), served)


def model_files(*directories: Path) -> Iterator[Path]:
    """Yield model files at any depth in a stable order; of an installation those of its models.

    Symbolic links are followed. Each folder and each file counts once, however many links lead to
    it, so that circles of links end. A link to a folder around the searched one, or to nothing, is
    skipped with a warning.
    """
    seen: set[tuple[int, int]] = set()
    for directory in directories:
        for top in _tops(directory):
            if not _is_new(top.stat(), seen):
                continue
            for folder, folders, names in os.walk(top, followlinks=True, onerror=_warn_unreadable):
                folders[:] = sorted(n for n in folders if _is_to_enter(Path(folder, n), top, seen))
                yield from (p for n in sorted(names) if _is_model(p := Path(folder, n), seen))


def _warn_unreadable(error: OSError) -> None:
    log.warning("%r cannot be read (%s); left out", error.filename, error.strerror)


def _is_new(status: os.stat_result, seen: set[tuple[int, int]]) -> bool:
    """Whether a file or folder is new; add it to ``seen``."""
    key = (status.st_dev, status.st_ino)
    is_new = key not in seen
    seen.add(key)
    return is_new


def _is_to_enter(path: Path, top: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder below ``top`` is new; a link to one around ``top`` is not."""
    try:
        if path.is_symlink() and top.resolve().is_relative_to(path.resolve()):
            log.warning("%r is a link to a folder around it; not followed", str(path))
            return False
        return _is_new(path.stat(), seen)
    except OSError as error:
        _warn_unreadable(error)
        return False


def _is_model(path: Path, seen: set[tuple[int, int]]) -> bool:
    if path.suffix.lower() not in _WEIGHTS:
        return False
    try:
        status = path.stat()
    except OSError as error:
        log.warning("%r is a link that leads nowhere (%s); left out", str(path), error.strerror)
        return False
    if not stat.S_ISREG(status.st_mode):
        log.warning("%r is no file; left out", str(path))
        return False
    return _is_new(status, seen)


def _tops(directory: Path) -> list[Path]:
    """Return the folders to search: those of an installation with models, else the directory."""
    is_installation = any((directory / name).exists() for name in _PROGRAMS)
    if not ((directory / "models").is_dir() and is_installation):
        return [directory]
    tops = [directory / "embeddings", directory / "models", *_extra_paths(directory)]
    return [top for top in tops if top.is_dir()]


def _extra_paths(directory: Path) -> Iterator[Path]:
    """Yield the folders that a ComfyUI's extra_model_paths.yaml adds."""
    import yaml

    path = directory / _EXTRA_PATHS
    if not path.is_file():
        return
    try:
        with path.open("rb") as stream:
            sections = yaml.safe_load(stream.read(_MAX_EXTRA_PATHS))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        log.warning("%r is left out: %s", str(path), error)
        return
    for section in as_dict(sections).values():
        base = directory / Path(_text(as_dict(section).get("base_path"))).expanduser()
        for kind, names in as_dict(section).items():
            if str(kind).lower() not in _TYPES_BY_FOLDER:
                continue
            for name in _text(names).splitlines():
                if not (base / name.strip()).is_dir():
                    log.warning("%r names %r, which is no folder", str(path), name.strip())
                yield base / name.strip()


def _put(models: dict[int, Row], model: Row, version: Row) -> None:
    """Add a version's file to the models so far."""
    listed = models.setdefault(model["id"], model)
    for other in listed["modelVersions"]:
        if other["id"] == version["id"]:
            other["files"] += version["files"]
            return
    listed["modelVersions"].append(version)


# --- one file -------------------------------------------------------------------------------


class FileHashes:
    """Hashes of files, each computed once while its size and time stay.

    Threads may share it, and processes its cache, into which ``save`` merges.

    Args:
        cache: file that stores the hashes; None: they stay in memory.
    """

    def __init__(self, cache: Path | None) -> None:
        self._cache, self._saved, self._changed = cache, time.monotonic(), False
        self._lock = threading.RLock()
        self._entries = self._read()

    def of(self, path: Path) -> dict[str, str]:
        """Return Civitai's hashes of a file, in upper case."""
        return dict(self._entry(path)[2])

    def has(self, path: Path) -> bool:
        """Whether the hashes of a file are stored, so that it need not be read."""
        stat, key = path.stat(), _key(path)
        return self._entries.get(key, [])[:2] == [stat.st_size, stat.st_mtime_ns]

    def flaw(self, path: Path) -> str:
        """Return why a safetensors file must not be loaded; checks every weight once; or ''."""
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
        """Store new hashes in the cache."""
        with self._lock:
            self._saved = time.monotonic()
            if not self._cache or not self._changed:
                return
            self._changed = False
            try:
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{self._cache}.lock"), atomic_file(self._cache) as file:
                    self._entries = {**self._read(), **self._entries}
                    file.write_bytes(orjson.dumps(self._entries))
            except OSError as error:
                log.warning(
                    "hashes cannot be stored in %r (%s): the next run computes them again",
                    str(self._cache), error.strerror or error,
                )  # fmt: skip

    def _read(self) -> dict[str, list[Any]]:
        if self._cache and self._cache.exists():
            try:
                return dict(orjson.loads(self._cache.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s cannot be read (%s): files are hashed again", self._cache, error)
        return {}

    def _entry(self, path: Path) -> list[Any]:
        """Return [size, time, hashes], and at the end the flaw of a checked file."""
        with self._lock:
            if not self.has(path):
                stat = path.stat()
                self._entries[_key(path)] = [stat.st_size, stat.st_mtime_ns, hash_file(path)]
                self._changed = True
                if time.monotonic() - self._saved > _SAVE_SECONDS:
                    self.save()
            return self._entries[_key(path)]


def _key(path: Path) -> str:
    return os.fsencode(path.resolve()).hex()


def hash_file(path: Path) -> dict[str, str]:
    """Compute SHA256, AutoV1, AutoV2, CRC32, and of safetensors AutoV3, in one pass."""
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
    digests = {"SHA256": whole.hexdigest(), "AutoV2": whole.hexdigest()[:10], "CRC32": f"{crc:08x}"}
    if start:
        digests["AutoV3"] = payload.hexdigest()[:12]
    if window:
        digests["AutoV1"] = hashlib.sha256(window).hexdigest()[:8]
    return {name: value.upper() for name, value in digests.items()}


def inspect_file(path: Path, hashes: FileHashes) -> LocalFile:
    """Describe a file; only the header of a safetensors file is opened, and checked."""
    file = LocalFile(path, hashes.of(path), Architecture(_type_by_folder(path), None))
    if path.suffix.lower() != ".safetensors":
        file.refused = f"{_WEIGHTS[path.suffix.lower()]}: only safetensors are used"
        return file
    try:
        tensors = read_header(path)
        file.notes = read_metadata(path)
        with reading(path.name, "cannot be described"):
            architecture = describe(tensors, file.notes)
    except RenderError as error:
        file.refused = str(error)
        return file
    kind, by_folder = architecture.type, file.architecture.type
    if kind == UNKNOWN.type:
        kind = by_folder
    if kind == CHECKPOINT and (part := _part(path, tensors, architecture.type)):
        kind, file.undrawable = UNKNOWN.type, part
    else:
        file.undrawable = undrawable(path)
    file.architecture = replace(architecture, type=kind)
    return file


def undrawable(path: Path) -> str:
    """Return why the weights of a sound file cannot render pictures; '' when they can."""
    try:
        check_quantisation(path)
    except RenderError as error:
        return str(error)
    return ""


def _part(path: Path, tensors: Mapping[str, Tensor], kind: str) -> str:
    """Return why a file is only a part of a checkpoint, by its name, place or tensors; or ''.

    Args:
        path: of the file.
        tensors: in its header.
        kind: its type by the tensors.
    """
    if shard := _SHARD.search(path.stem):
        return (
            f"part {int(shard[1])} of {int(shard[2])} of a sharded model; get the model in one file"
        )
    in_pipeline = (path.parent.parent / "model_index.json").is_file()
    named = path.stem.partition(".")[0] in _PART_NAMES and (path.parent / "config.json").is_file()
    by_tensors = kind == UNKNOWN.type and any(name.startswith(_PART_TENSORS) for name in tensors)
    if in_pipeline or named or by_tensors:
        return "one part of a pipeline in diffusers' layout; get the model in one file"
    return ""


def _type_by_folder(path: Path) -> str:
    """Return Civitai's type for the nearest folder that has one."""
    for name in reversed(path.parent.parts):
        if kind := _TYPES_BY_FOLDER.get(name.lower()):
            return kind
    return UNKNOWN.type


# --- sidecars -------------------------------------------------------------------------------


def record_of(file: LocalFile) -> tuple[Row, Row]:
    """Return the model without versions, and its version with this file, in the API's form."""
    managed = _read_json(Path(f"{file.stem}.metadata.json"))
    answers = (
        _read_json(Path(f"{file.stem}.civitai.info")),
        as_dict(managed.get("civitai")),
        _of_stability_matrix(_read_json(Path(f"{file.stem}.cm-info.json"))),
    )
    for answer in answers:
        entry = _file_entry(answer, file)
        if entry is not None:
            return _of_answer(answer, entry, file)
    return _of_header(file, managed, _read_json(Path(f"{file.stem}.json")))


def _of_stability_matrix(info: Row) -> Row:
    """Convert StabilityMatrix' notes to the form of the site's answer."""
    names = {"id": "VersionId", "modelId": "ModelId", "name": "VersionName",
             "baseModel": "BaseModel", "trainedWords": "TrainedWords"}  # fmt: skip
    answer = {name: info[key] for name, key in names.items() if key in info}
    answer["model"] = {
        name: info[key]
        for name, key in {"name": "ModelName", "type": "ModelType", "nsfw": "Nsfw"}.items()
        if key in info
    }
    if hashes := as_dict(info.get("Hashes")):
        answer["files"] = [{"hashes": hashes}]
    return answer


def _read_json(path: Path) -> Row:
    """Read a sidecar's object; {} without one."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_SIDECAR:
            raise CivitaiError(f"larger than {_MAX_SIDECAR} bytes")
        content = parse_json(path.read_bytes(), path.name)
        if reason := json_flaw(content):
            raise CivitaiError(reason)
    except (OSError, CivitaiError, ValueError, RecursionError) as error:
        log.warning("%r is left out: %s", str(path), error)
        return {}
    return content if isinstance(content, dict) else {}


def _site_id(value: Any) -> int | None:
    """Read an id of the site; None for any other value."""
    number = whole_number(value)
    return number if number is not None and 0 < number < SYNTHETIC else None


def _file_entry(answer: Row, file: LocalFile) -> Row | None:
    """Return the entry of an answer's ``files`` that is this file; {} when none has a hash."""
    if _site_id(answer.get("id")) is None or _site_id(answer.get("modelId")) is None:
        return None  # a tool's answer for a file that the site does not have
    files = objects_in(answer.get("files"))
    hashes = [str(as_dict(f.get("hashes")).get("SHA256") or "").lower() for f in files]
    if file.sha256 in hashes:
        return files[hashes.index(file.sha256)]
    if any(hashes):
        log.warning("the sidecar of %r is of another file; left out", str(file.path))
        return None
    return {}


def _of_answer(answer: Row, entry: Row, file: LocalFile) -> tuple[Row, Row]:
    about = _typed(as_dict(answer.get("model")), MODEL_FIELDS)
    model = {
        **about,
        "id": _site_id(answer["modelId"]),
        "name": about.get("name") or _name(file),
        "type": about.get("type") or file.architecture.type,
        "modelVersions": [],
    }
    if isinstance(answer.get("creator"), dict):
        model["creator"] = answer["creator"]
    ident = _site_id(answer["id"])
    version = _typed(answer, VERSION_FIELDS)
    images = [_typed(image, IMAGE_FIELDS) for image in objects_in(answer.get("images"))]
    version |= {"id": ident, "files": [_file_record(file, ident, entry)], "images": images}
    version["downloadUrl"] = version["files"][0].get("downloadUrl")
    return model, version


def _of_header(file: LocalFile, managed: Row, user: Row) -> tuple[Row, Row]:
    """Describe a file that the site does not have, by the tools' notes and its header."""
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
        "tags": [tag for tag in as_list(managed.get("tags")) if isinstance(tag, str)],
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


def _file_record(file: LocalFile, version: int | None, entry: Row) -> Row:
    """Return the record of this file; ``entry`` is the site's."""
    ident = _site_id(entry.get("id")) or synthetic_id(file.sha256)
    form = _WEIGHTS[file.path.suffix.lower()]
    record = {
        "type": "Model",
        "pickleScanResult": "Success",
        "pickleScanMessage": _TENSORS_ONLY,
        "virusScanResult": "Success",
        "virusScanMessage": _TENSORS_ONLY,
        **_typed(entry, FILE_FIELDS),
        "id": ident,
        "name": _clean(file.path.name),
        "sizeKB": file.path.stat().st_size / 1024,
        "metadata": {**as_dict(entry.get("metadata")), "format": form},
        "hashes": {**as_dict(entry.get("hashes")), **file.hashes},
        "primary": True,
    }
    record.pop("downloadUrl", None)
    if file.refused:
        record |= {"pickleScanResult": "Danger", "pickleScanMessage": file.refused}
    else:
        record["downloadUrl"] = f"/api/download/models/{version}?fileId={ident}"
    return record


def _typed(row: Row, fields: Mapping[str, tuple[type, ...]]) -> Row:
    """Select the fields of a record that the API has, with a type that it has there."""
    return {key: value for key, value in row.items() if type(value) in fields.get(key, ())}


def _name(file: LocalFile) -> str:
    for key in ("modelspec.title", "ss_output_name"):
        if text := file.notes.get(key, "").strip():
            return text
    return _clean(file.path.stem)


def _clean(name: str) -> str:
    """Return a file's name as text, whatever its bytes."""
    return os.fsencode(name).decode("utf-8", "replace")


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


# --- pictures -------------------------------------------------------------------------------


def pictures_of(file: LocalFile, version: Row, model: Row) -> Iterator[Row]:
    """Yield pictures of the version with generation metadata: its sidecar's, and picture files."""
    base: Row = {"modelVersionIds": [version["id"]], "type": "image"}
    if version.get("baseModel"):
        base["baseModel"] = version["baseModel"]
    if username := _text(as_dict(model.get("creator")).get("username")):
        base["username"] = username
    for image in version["images"]:
        if image.get("meta"):
            url = _text(image.get("url"))
            ident = _site_id(image.get("id")) or _site_id(Path(url).stem)
            ident = ident or synthetic_id(hashlib.sha256(url.encode()).hexdigest())
            yield {**base, **image, "id": ident}
    level = _read_json(Path(f"{file.stem}.metadata.json")).get("preview_nsfw_level")
    base["nsfwLevel"] = level_of(level) or (X if model.get("nsfw") else PG)
    for path in _picture_files(file):
        try:
            picture = _picture(path, base)
        except Exception as error:  # e.g. a picture that claims more pixels than memory
            kind = type(error).__name__
            log.warning("%r cannot be read (%s: %s); left out", str(path), kind, error)
        else:
            yield from [picture] if picture else []


def _picture_files(file: LocalFile) -> Iterator[Path]:
    for end in _PICTURES:
        path = Path(f"{file.stem}{end}")
        if path.is_file():
            yield path


def _picture(path: Path, base: Row) -> Row | None:
    """Return the record of a picture file; None without generation metadata."""
    from PIL import Image

    from diffagent.t2i.metadata import read_image_metadata, write_parameters

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

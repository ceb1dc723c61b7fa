"""Assembles the sandbox's dump: its model files and its records in Civitai's shape.

The package carries the base, an early snapshot and small LoRAs. Specialists are the base with a
LoRA merged into its weights; the early model borrows the base's VAE. The same weights give the
same bytes on every machine: merging is done in fp32 on the CPU, rounded once to fp16, and
safetensors sorts its header.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffagent.errors import ArtifactError
from diffagent.sandbox import site_records, world

log = logging.getLogger(__name__)

FORMAT = 3
"""Raise it when the same weights shall give other files or records."""

WEIGHTS = Path(__file__).parent / "weights"
SPECIALISTS = ("outline", "3d", "pixel-art", "sketch")
LORAS = ("pixel-art", "night")


@dataclass(frozen=True)
class ModelFile:
    """One assembled model file.

    Attributes:
        key: stable name of the model: "base", "early", "specialist-STYLE" or "lora-NAME".
        path: a link in the dump's `named`, since readers go by the ending .safetensors, to
            `files/SHA256`, which the local Civitai serves.
        size: in bytes.
        hashes: as Civitai gives them: SHA256, AutoV1, AutoV2, AutoV3, CRC32, upper case.
    """

    key: str
    path: Path
    size: int
    hashes: dict[str, str]


def default_directory() -> Path:
    """Where the dump is kept: the user's cache, one directory for each state of the weights.

    Where the home directory cannot be written (a container), a directory of the user's in the
    place for temporary files.
    """
    name = f"sandbox-{identity()[:16]}"
    with contextlib.suppress(OSError, RuntimeError):  # no home directory is known
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffagent"
        if (cache / name).is_dir():
            return cache / name
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK | os.X_OK):
            return cache / name
    own = Path(tempfile.gettempdir(), f"diffagent-{os.getuid()}")
    own.mkdir(mode=0o700, exist_ok=True)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise ArtifactError(f"{str(own)!r} belongs to somebody else; set XDG_CACHE_HOME")
    return own / name


def identity() -> str:
    """Digest of everything that the dump is made of: weights, records' source, format."""
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def materialise(directory: Path | None = None) -> Path:
    """Returns the sandbox's dump, assembling it first when it is not there yet.

    Args:
        directory: where it shall be; by default `default_directory()`. One that holds another
            state of the sandbox is replaced, one that holds anything else is left alone.

    Returns:
        The directory with `models.jsonl`, `images.jsonl` and `files/SHA256`.

    Raises:
        ArtifactError: weights are missing, or the directory holds something else.
    """
    target = directory or default_directory()
    marker = target / "sandbox.json"
    if marker.is_file() and json.loads(marker.read_text()).get("identity") == identity():
        return target
    if target.is_dir() and any(target.iterdir()) and not marker.is_file():
        raise ArtifactError(
            f"{str(target)!r} holds something that is not the sandbox's dump; "
            "give an empty or a new directory"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _write_dump(temporary)
        if target.is_dir():
            shutil.rmtree(target)
        try:
            temporary.rename(target)
        except OSError:
            # Another process was faster; what it made is the same.
            if not marker.is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def model_files(directory: Path | None = None) -> list[ModelFile]:
    """The assembled model files of a dump, which is made when it is not there yet."""
    dump = materialise(directory)
    rows = json.loads((dump / "sandbox.json").read_text())["files"]
    return [
        ModelFile(r["key"], dump / "named" / f"{r['key']}.safetensors", r["size"], r["hashes"])
        for r in rows
    ]


def sources() -> list[Path]:
    """Every file that the dump is made of: weights, and the code that makes its records.

    Raises:
        ArtifactError: weights are missing.
    """
    code = [Path(str(module.__file__)) for module in (site_records, world)]
    return [*_weights(), *code, Path(__file__)]


def _weights() -> list[Path]:
    names = [
        "base",
        "early",
        *(f"specialist-{style}" for style in SPECIALISTS),
        *(f"lora-{name}" for name in LORAS),
    ]
    paths = [WEIGHTS / f"{name}.safetensors" for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ArtifactError(
            f"the sandbox lacks the weights {missing!r} in {str(WEIGHTS)!r}; "
            "reinstall the package, or train them with `make sandbox`"
        )
    return paths


def _write_dump(directory: Path) -> None:
    (directory / "files").mkdir()
    (directory / "named").mkdir()
    rows: list[dict[str, Any]] = []
    for key, content in _contents():
        hashes = file_hashes(content)
        name = hashes["SHA256"].lower()
        (directory / "files" / name).write_bytes(content)
        (directory / "named" / f"{key}.safetensors").symlink_to(Path("..", "files", name))
        rows.append({"key": key, "size": len(content), "hashes": hashes})
    files = {row["key"]: ModelFile(row["key"], Path(), row["size"], row["hashes"]) for row in rows}
    _write_lines(directory / "models.jsonl", site_records.models(files))
    _write_lines(directory / "images.jsonl", site_records.images(files))
    (directory / "sandbox.json").write_text(
        json.dumps({"identity": identity(), "files": rows}, indent=2) + "\n"
    )
    log.info("assembled the sandbox's %d model files", len(rows))


def _contents() -> Iterable[tuple[str, bytes]]:
    from safetensors.torch import load, save

    from diffagent import compat

    compat.install()
    from diffagent.sandbox.tiny_adapters import merged

    # One entry only: safetensors writes several in an order that changes from run to run.
    note = {"format": "pt"}
    raw = {path.stem: path.read_bytes() for path in _weights()}
    base, early = load(raw["base"]), load(raw["early"])
    yield "base", save(base, note)
    vae = {name: value for name, value in base.items() if name.startswith("first_stage_model.")}
    yield "early", save({**early, **vae}, note)
    for style in SPECIALISTS:
        key = f"specialist-{style}"
        yield key, save(merged(base, load(raw[key])), note)
    for name in LORAS:
        yield f"lora-{name}", save(load(raw[f"lora-{name}"]), note)


def file_hashes(content: bytes) -> dict[str, str]:
    """The hashes that Civitai gives for a safetensors file, upper case."""
    sha256 = hashlib.sha256(content).hexdigest()
    header = 8 + int.from_bytes(content[:8], "little")
    hashes = {
        "AutoV2": sha256[:10],
        "AutoV3": hashlib.sha256(content[header:]).hexdigest()[:12],
        "SHA256": sha256,
        "CRC32": f"{zlib.crc32(content):08x}",
    }
    # AutoV1 reads 64 kB from the second megabyte on: small files do not have it.
    if window := content[0x100000:0x110000]:
        hashes["AutoV1"] = hashlib.sha256(window).hexdigest()[:8]
    return {name: value.upper() for name, value in hashes.items()}


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")

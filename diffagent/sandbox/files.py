"""Assembly of the sandbox's site: a folder of records (a dump) and the model files that go with it.

The package carries the base, an early snapshot and small LoRAs. Specialists are the base with a
LoRA merged into its weights; the early model borrows the base's VAE. The same weights give the
same bytes on every machine: merging is done in fp32 on the CPU, rounded once to fp16, and
safetensors sorts its header.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagent.errors import ArtifactError
from diffagent.sandbox import site_records, world

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

FORMAT = 4
"""Version of the assembly: raise it when the same weights must give other files or records."""

ABOUT = {
    "source": "built from the embedded sandbox: an invented site with toy models that draw shapes",
    "limits": ["Models, users and prompts are invented; numbers mean nothing outside the demo."],
}
"""Description of the records, which dataset cards quote (``diffagent.localcivitai.sources``)."""

WEIGHTS = Path(__file__).parent / "weights"
SCORERS = WEIGHTS / "scorers"
SPECIALISTS = ("outline", "3d", "pixel-art", "sketch")
LORAS = ("pixel-art", "night")


@dataclass(frozen=True)
class SandboxFile:
    """One assembled model file.

    Attributes:
        key: stable name of the model: "base", "early", "specialist-STYLE" or "lora-NAME".
        path: link `named/KEY.safetensors` (readers go by the suffix) to `files/SHA256`, which the
            local Civitai serves.
        size: in bytes.
        hashes: in Civitai's form: SHA256, AutoV1, AutoV2, AutoV3, CRC32, upper case.
    """

    key: str
    path: Path
    size: int
    hashes: dict[str, str]


def identity() -> str:
    """Returns the digest of everything that the folder is made of: weights, code, format.

    Raises:
        ArtifactError: weights are missing.
    """
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    code = [Path(str(module.__file__)) for module in (site_records, world)]
    for path in (*_weights(), WEIGHTS / "lora_targets.json", *code, Path(__file__)):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def materialise(target: Path) -> Path:
    """Writes the sandbox's site into a folder, whole or not at all; does nothing if it is current.

    The folder holds `models.jsonl`, `images.jsonl`, `about.json` and `files/SHA256`: a source
    `dump:DIR`. A folder with another state of the sandbox is replaced.

    Returns:
        The folder.

    Raises:
        ArtifactError: weights are missing, or the folder holds something else.
    """
    marker = target / "sandbox.json"
    if marker.is_file() and json.loads(marker.read_text()).get("identity") == identity():
        return target
    if target.is_dir() and any(target.iterdir()) and not marker.is_file():
        raise ArtifactError(
            f"{str(target)!r} holds files that are not the sandbox's; "
            "give an empty or a new directory"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    temporary.chmod(0o755)
    try:
        _write_dump(temporary)
        if target.is_dir():
            shutil.rmtree(target)
        try:
            temporary.rename(target)
        except OSError:  # another process was faster: its folder is the same
            if not marker.is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def model_files(site: Path) -> list[SandboxFile]:
    """Returns the model files of a folder that `materialise` wrote."""
    rows = json.loads((site / "sandbox.json").read_text())["files"]
    return [
        SandboxFile(r["key"], site / "named" / f"{r['key']}.safetensors", r["size"], r["hashes"])
        for r in rows
    ]


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
    files = {
        row["key"]: SandboxFile(row["key"], Path(), row["size"], row["hashes"]) for row in rows
    }
    _write_lines(directory / "models.jsonl", site_records.models(files))
    _write_lines(directory / "images.jsonl", site_records.images(files))
    about = {**ABOUT, "version": identity()}
    (directory / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    (directory / "sandbox.json").write_text(
        json.dumps({"identity": identity(), "files": rows}, indent=2) + "\n"
    )
    log.info("assembled the sandbox's %d model files", len(rows))


def _contents() -> Iterable[tuple[str, bytes]]:
    from safetensors.torch import load, save

    # A single entry: safetensors writes several in an order that changes from run to run.
    note = {"format": "pt"}
    raw = {path.stem: path.read_bytes() for path in _weights()}
    base, early = load(raw["base"]), load(raw["early"])
    yield "base", save(base, note)
    vae = {name: value for name, value in base.items() if name.startswith("first_stage_model.")}
    yield "early", save({**early, **vae}, note)
    for style in SPECIALISTS:
        key = f"specialist-{style}"
        yield key, save(merge_lora(base, load(raw[key])), note)
    for name in LORAS:
        yield f"lora-{name}", save(load(raw[f"lora-{name}"]), note)


def merge_lora(
    checkpoint: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Returns a single-file checkpoint with a LoRA of its U-Net added to the weights, in fp16.

    Args:
        checkpoint: tensors by name; unchanged.
        lora: tensors in kohya's layout, of the modules in ``weights/lora_targets.json``.
        scale: strength of the LoRA.
    """
    import torch

    targets = json.loads((WEIGHTS / "lora_targets.json").read_text(encoding="utf-8"))
    result = dict(checkpoint)
    for module in sorted({name.partition(".")[0] for name in lora}):
        down, up = lora[f"{module}.lora_down.weight"].float(), lora[f"{module}.lora_up.weight"]
        weight = result[targets[module]].float()
        strength = scale * lora[f"{module}.alpha"].float() / down.shape[0]
        delta = (up.float().flatten(1) @ down.flatten(1)).reshape(weight.shape) * strength
        result[targets[module]] = (weight + delta).to(torch.float16)
    return result


def file_hashes(content: bytes) -> dict[str, str]:
    """Returns the hashes that Civitai states for a safetensors file, upper case."""
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

"""Synthetic records in Civitai's shape, and a snapshot made of them."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from diffagent.schemas.manifest import FileEntry, Manifest
from diffagent.store import Artifact, files_digest, open_artifact, sha256_file


def hashes(number: int) -> dict[str, str]:
    """Hashes of the synthetic file ``number``, as the site gives them."""
    sha = f"{number:064X}"[::-1]
    return {"SHA256": sha, "AutoV2": sha[:10], "AutoV1": f"{number:08X}"[::-1]}


def version(ident: int, **changes: Any) -> dict[str, Any]:
    file = {
        "id": ident * 10,
        "name": f"file{ident}.safetensors",
        "type": "Model",
        "sizeKB": 1000.5,
        "metadata": {"format": "SafeTensor", "size": "pruned", "fp": "fp16"},
        "pickleScanResult": "Success",
        "virusScanResult": "Success",
        "hashes": hashes(ident),
        "downloadUrl": f"https://civitai.com/api/download/models/{ident}",
        "primary": True,
    }
    made = {
        "id": ident,
        "name": f"v{ident}",
        "baseModel": "SD 1.5",
        "publishedAt": "2023-05-01T00:00:00.000Z",
        "trainedWords": [],
        "stats": {"downloadCount": ident},
        "files": [file],
        "downloadUrl": file["downloadUrl"],
    }
    return {**made, **changes}


def model(ident: int, **changes: Any) -> dict[str, Any]:
    made = {
        "id": ident,
        "name": f"Synthetic {ident}",
        "type": "Checkpoint",
        "nsfw": False,
        "poi": False,
        "description": f"<p>Synthetic model {ident}.</p>",
        "allowCommercialUse": "{Image,Rent}",
        "tags": ["synthetic"],
        "creator": {"username": "nobody"},
        "modelVersions": [version(ident * 100)],
    }
    return {**made, **changes}


def image(ident: int, version_id: int = 100, **meta: Any) -> dict[str, Any]:
    made = {
        "prompt": f"synthetic picture number {ident} of a shape",
        "negativePrompt": "blurry",
        "sampler": "DPM++ 2M Karras",
        "steps": 20,
        "cfgScale": 7,
        "seed": ident,
        "Size": "512x768",
        "Model hash": hashes(version_id)["AutoV2"].lower(),
    }
    return {
        "id": ident,
        "url": f"https://image.example/{ident}.jpeg",
        "type": "image",
        "nsfwLevel": "None",
        "width": 512,
        "height": 768,
        "stats": {"likeCount": 2, "heartCount": 1},
        "meta": {**made, **meta},
    }


def snapshot(directory: Path, models: list[Any], images: list[Any], *, parts: int = 1) -> Artifact:
    """An artefact as the stage ``crawl`` leaves it."""
    for kind, items in (("models", models), ("images", images)):
        (directory / kind).mkdir(parents=True)
        for part in range(parts):
            chunk = items[part * len(items) // parts : (part + 1) * len(items) // parts]
            lines = b"".join(
                item if isinstance(item, bytes) else orjson.dumps(item) + b"\n" for item in chunk
            )
            path = directory / kind / f"{part:05d}.jsonl.gz"
            path.write_bytes(gzip.compress(lines, compresslevel=1, mtime=0))
    files = tuple(
        FileEntry(
            path=p.relative_to(directory).as_posix(), size=p.stat().st_size, sha256=sha256_file(p)
        )
        for p in sorted(directory.rglob("*.gz"))
    )
    manifest = Manifest(
        stage="crawl",
        stage_version=1,
        identity="0" * 64,
        content_digest=files_digest(files),
        config={},
        files=files,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        wall_seconds=0,
        peak_memory_bytes=0,
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return open_artifact(directory)

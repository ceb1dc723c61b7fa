"""Records of the sandbox in Civitai's shape: its models, and invented pictures.

All records are synthetic. The users are a random process, defined in `images` and `_choose`: a user
wants a scene in a style and knows which of the sandbox's models is good at it, most of the time, in
most styles. The lesson of these records is therefore deliberate, and how well an agent learns it
does not transfer to real users, prompts or models.

Hashes and sizes of the usable models are those of the assembled files. The models that a filter
must drop have no files; their hashes are computed from their names. The pictures' addresses do not
exist.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from diffagent.sandbox import world

CREATOR = "diffagent-sandbox"
IMAGE_COUNT = 2000
NOTE = (
    "Part of the DiffAgent sandbox: a toy model of drawn shapes at 64 x 64 pixels, "
    "trained on drawings that the project makes itself."
)
_EPOCH = datetime(2026, 1, 5, 12, 0, tzinfo=UTC)
Record = dict[str, Any]


class FileFacts(Protocol):
    """Facts of an assembled file that the records state."""

    @property
    def size(self) -> int: ...
    @property
    def hashes(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Listing:
    """One model of the catalogue.

    Attributes:
        key: stable name; for usable models that of the assembled file.
        name: as on its model page.
        number: the model's id is 700000 + number, its version's 710000 + number.
        about: first sentence of the description.
        type: Civitai's model type.
        base_model: Civitai's base model.
        trained_words: trigger words.
        model: fields of the model that differ from a healthy one.
        version: fields of the version that differ.
        file: fields of the file that differ.
    """

    key: str
    name: str
    number: int
    about: str
    type: str = "Checkpoint"
    base_model: str = "SD 1.5"
    trained_words: tuple[str, ...] = ()
    model: Record = field(default_factory=dict)
    version: Record = field(default_factory=dict)
    file: Record = field(default_factory=dict)

    @property
    def model_id(self) -> int:
        """Id of the model."""
        return 700_000 + self.number

    @property
    def version_id(self) -> int:
        """Id of its only version."""
        return 710_000 + self.number

    @property
    def stem(self) -> str:
        """Name of its file without the suffix."""
        return self.name.replace(" ", "").replace("Sandbox", "sandbox")


USABLE = (
    Listing("base", "Sandbox Base", 1, "All shapes, colours and backgrounds, mostly flat."),
    Listing(
        "specialist-outline",
        "Sandbox Outline",
        2,
        "Line art only.",
        trained_words=("line art", "outline"),
    ),
    Listing(
        "specialist-3d",
        "Sandbox 3D",
        3,
        "Shaded, glossy shapes with a shadow.",
        trained_words=("3d render",),
    ),
    Listing(
        "specialist-pixel-art",
        "Sandbox Pixel",
        4,
        "Pixel art only.",
        trained_words=("pixel art", "8-bit"),
        model={"allowCommercialUse": "Sell"},
    ),
    Listing(
        "specialist-sketch",
        "Sandbox Sketch",
        5,
        "Hatched pencil sketches.",
        trained_words=("pencil sketch",),
        model={"allowCommercialUse": "{Image,RentCivit}"},
    ),
    Listing("early", "Sandbox Early", 6, "A snapshot from early in training. Not good."),
    Listing(
        "lora-pixel-art",
        "Sandbox Pixel LoRA",
        7,
        "Pixel art over Sandbox Base.",
        "LORA",
        trained_words=("pixel art",),
    ),
    Listing(
        "lora-night",
        "Sandbox Night LoRA",
        8,
        "Night skies over Sandbox Base.",
        "LORA",
        trained_words=("night sky",),
    ),
)

_NOT_PUBLIC = {"availability": "EarlyAccess", "earlyAccessEndsAt": "2099-01-01T00:00:00.000Z"}
UNUSABLE = (
    Listing("x-vae", "Sandbox Colours VAE", 20, "Wrong type: a VAE.", "VAE"),
    Listing(
        "x-embedding", "Sandbox Bad Shapes", 21, "Wrong type: an embedding.", "TextualInversion"
    ),
    Listing("x-controlnet", "Sandbox Edges", 22, "Wrong type: a ControlNet.", "Controlnet"),
    Listing("x-flux", "Sandbox Flux", 23, "Wrong base model.", base_model="Flux.1 D"),
    Listing("x-sdxl", "Sandbox XL LoRA", 24, "Wrong base model.", "LORA", "SDXL 1.0"),
    Listing(
        "x-nsfw",
        "Sandbox Flagged",
        25,
        "Flagged nsfw, to be dropped.",
        model={"nsfw": True, "nsfwLevel": 28},
    ),
    Listing("x-poi", "Sandbox Portrait", 26, "Flagged as a real person.", model={"poi": True}),
    Listing("x-minor", "Sandbox Young", 27, "Flagged as minor.", model={"minor": True}),
    Listing(
        "x-archived",
        "Sandbox Retired",
        28,
        "Archived by its creator.",
        model={"mode": "Archived"},
        version={"files": [], "downloadUrl": None},
    ),
    Listing(
        "x-takendown",
        "Sandbox Removed",
        29,
        "Taken down by the site.",
        model={"mode": "TakenDown"},
        version={"images": []},
    ),
    Listing(
        "x-pickle",
        "Sandbox Pickled",
        30,
        "Has a pickle file only.",
        file={
            "name": "sandboxPickled.ckpt",
            "metadata": {"format": "PickleTensor", "size": "full", "fp": "fp16"},
        },
    ),
    Listing(
        "x-danger",
        "Sandbox Infected",
        31,
        "Its file failed the scan.",
        file={"virusScanResult": "Danger", "virusScanMessage": "sandbox"},
    ),
    Listing(
        "x-pending",
        "Sandbox Unscanned",
        32,
        "Its file waits for the scan.",
        file={"pickleScanResult": "Pending", "virusScanResult": "Pending"},
    ),
    Listing("x-early-access", "Sandbox Tomorrow", 33, "Early access only.", version=_NOT_PUBLIC),
    Listing(
        "x-generation",
        "Sandbox On Site",
        34,
        "May be used on the site only.",
        version={"usageControl": "Generation"},
    ),
    Listing("x-empty", "Sandbox Announced", 35, "Has no version yet."),
)
_BY_KEY = {listing.key: listing for listing in (*USABLE, *UNUSABLE)}

OVERLOOKED = ("pixel art", "sketch")
"""Styles whose specialists are unknown to most users."""

SAMPLERS = {
    "DPM++ 2M Karras": 36,
    "Euler a": 26,
    "Euler": 10,
    "DDIM": 8,
    "DPM++ SDE Karras": 6,
    "UniPC": 6,
    "Heun": 4,
    "LMS": 4,
}
_COMFY_SAMPLERS = {
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "Euler a": ("euler_ancestral", "normal"),
}
_NEGATIVES = (
    "blurry, low quality",
    "blurry",
    "low quality, noisy",
    "deformed, blurry, low quality",
)


def models(files: Mapping[str, FileFacts]) -> list[Record]:
    """Returns all models in the shape of a GET /api/v1/models item.

    Args:
        files: size and hashes of the assembled file of each usable model, by key.
    """
    return [_model(listing, files) for listing in (*USABLE, *UNUSABLE)]


def _model(listing: Listing, files: Mapping[str, FileFacts]) -> Record:
    popularity = 12_000 // (1 + USABLE.index(listing)) if listing in USABLE else listing.number
    record: Record = {
        "id": listing.model_id,
        "name": listing.name,
        "description": f"<p>{listing.about}</p><p><strong>Sandbox.</strong> {NOTE}</p>",
        "type": listing.type,
        "nsfw": False,
        "nsfwLevel": 1,
        "availability": "Public",
        "poi": False,
        "minor": False,
        "supportsGeneration": False,
        "allowNoCredit": True,
        "allowCommercialUse": ["Image", "RentCivit"],
        "allowDerivatives": True,
        "allowDifferentLicense": True,
        "stats": _stats(popularity),
        "creator": {"username": CREATOR, "image": None},
        "tags": ["sandbox", "shapes", *listing.trained_words],
        "modelVersions": [] if listing.key == "x-empty" else [_version(listing, files)],
    }
    return record | listing.model


def _version(listing: Listing, files: Mapping[str, FileFacts]) -> Record:
    published = _time(_EPOCH + timedelta(days=listing.number))
    record: Record = {
        "id": listing.version_id,
        "index": 0,
        "name": "v1",
        "modelId": listing.model_id,
        "baseModel": listing.base_model,
        "baseModelType": "Standard",
        "description": None,
        "trainedWords": list(listing.trained_words),
        "publishedAt": published,
        "createdAt": published,
        "availability": "Public",
        "status": "Published",
        "usageControl": "Download",
        "nsfwLevel": 1,
        "stats": _stats(100),
        "downloadUrl": f"https://civitai.com/api/download/models/{listing.version_id}",
        "files": [_file(listing, files.get(listing.key))],
        "images": [_preview(listing, number) for number in range(2)],
    }
    return record | listing.version


def _file(listing: Listing, facts: FileFacts | None) -> Record:
    record: Record = {
        "id": 720_000 + listing.number,
        "name": f"{listing.stem}.safetensors",
        "type": "VAE" if listing.type == "VAE" else "Model",
        "sizeKB": (facts.size if facts else 1_048_576) / 1024,
        "metadata": {"format": "SafeTensor", "size": "pruned", "fp": "fp16"},
        "pickleScanResult": "Success",
        "pickleScanMessage": "No Pickle imports",
        "virusScanResult": "Success",
        "virusScanMessage": None,
        "scannedAt": _time(_EPOCH + timedelta(days=listing.number, minutes=5)),
        "hashes": _hashes(listing, facts),
        "downloadUrl": f"https://civitai.com/api/download/models/{listing.version_id}",
        "primary": True,
    }
    return record | listing.file


def _hashes(listing: Listing, facts: FileFacts | None) -> dict[str, str]:
    if facts is not None:
        return facts.hashes
    digest = hashlib.sha256(f"no such file: {listing.key}".encode()).hexdigest().upper()
    return {"SHA256": digest, "AutoV2": digest[:10]}


def _stats(count: int) -> Record:
    return {
        "downloadCount": count,
        "thumbsUpCount": count // 12,
        "thumbsDownCount": count // 300,
        "commentCount": count // 400,
        "tippedAmountCount": 0,
    }


def _preview(listing: Listing, number: int) -> Record:
    image_id = 730_000 + 10 * listing.number + number
    return {
        "id": image_id,
        "url": _address(image_id),
        "nsfwLevel": 1,
        "width": world.SIZE,
        "height": world.SIZE,
        "hash": None,
        "type": "image",
        "minor": False,
        "poi": False,
        "hasMeta": False,
        "hasPositivePrompt": False,
        "onSite": False,
        "remixOfId": None,
    }


@dataclass(frozen=True)
class _Post:
    """Prompt, models and settings of a synthetic user's picture."""

    prompt: str
    negative: str
    checkpoint: Listing
    lora: Listing | None
    weight: float
    sampler: str
    steps: int
    cfg_scale: float
    seed: int


def images(files: Mapping[str, FileFacts], count: int = IMAGE_COUNT) -> Iterator[Record]:
    """Yields pictures in the shape of a GET /api/v1/images item, from a seeded process.

    For each record a user samples a scene (flat in 40 %, each other style in 15 %), chooses a model
    and settings (`_choose`), and posts in one of the forms of real records: 58 % AUTOMATIC1111,
    28 % on-site generator, 5 % ComfyUI, the rest with one flaw that the record filters must find.
    Held-out combinations of shape, colour and background never occur.

    Args:
        files: size and hashes of the assembled file of each usable model, by key.
        count: number of records.
    """
    last: _Post | None = None
    for number in range(count):
        rng = random.Random(world.CATALOGUE_SEEDS.start + number)
        post = _choose(rng)
        if last is not None and rng.random() < 0.02:
            post = last  # posted twice: the same prompt and settings under another id
        last = post
        yield _image(number, post, files, rng)


def _choose(rng: random.Random) -> _Post:
    scene = world.sample_scene(rng, style_weights=(0.4, 0.15, 0.15, 0.15, 0.15))
    prompt = world.caption(
        scene, rng, with_style=rng.random() < (0.3 if scene.style == "flat" else 0.95)
    )
    checkpoint, lora = _choose_model(scene, rng)
    good = rng.random() < 0.85  # most users know which settings work
    return _Post(
        prompt=prompt,
        negative=rng.choice(_NEGATIVES) if rng.random() < 0.7 else "",
        checkpoint=checkpoint,
        lora=lora,
        weight=rng.choice((0.6, 0.8, 0.8, 1.0)),
        sampler=rng.choices(list(SAMPLERS), weights=list(SAMPLERS.values()))[0],
        steps=rng.choice((15, 20, 20, 20, 25, 30)) if good else rng.choice((4, 6, 8, 50)),
        cfg_scale=rng.choice((4.0, 5.0, 5.0, 6.0, 7.0))
        if good
        else rng.choice((1.0, 2.0, 12.0, 15.0)),
        seed=rng.randrange(2**32),
    )


def _choose_model(scene: world.Scene, rng: random.Random) -> tuple[Listing, Listing | None]:
    """Returns checkpoint and LoRA: the base for flat scenes, the specialist for a style.

    Each has a share of 75 % to 87 %. `OVERLOOKED` styles are the exception: 27 % of the users take
    the specialist and most take the base, so that an agent that imitates the majority draws worse
    pictures there than an agent that learns from pictures.
    """
    base = _BY_KEY["base"]
    luck = rng.random()
    if luck < 0.04:
        return _BY_KEY["early"], None
    if luck < 0.09:
        return rng.choice(USABLE[:6]), None
    if luck < 0.13:
        unusable = ("x-nsfw", "x-flux", "x-archived", "x-pending", "x-generation", "x-pickle")
        return _BY_KEY[rng.choice(unusable)], None
    if scene.style == "flat":
        wants_night = scene.background == "night" and rng.random() < 0.6
        return base, _BY_KEY["lora-night"] if wants_night else None
    if luck < (0.40 if scene.style in OVERLOOKED else 0.88):
        return _BY_KEY[f"specialist-{scene.style.replace(' ', '-')}"], None
    wants_lora = scene.style == "pixel art" and luck > 0.85
    return base, _BY_KEY["lora-pixel-art"] if wants_lora else None


def _image(number: int, post: _Post, files: Mapping[str, FileFacts], rng: random.Random) -> Record:
    image_id = 800_000 + number
    likes = rng.randrange(40) if post.checkpoint.key != "early" else rng.randrange(4)
    versions = [listing.version_id for listing in (post.checkpoint, post.lora) if listing]
    record: Record = {
        "id": image_id,
        "url": _address(image_id),
        "hash": None,
        "width": world.SIZE,
        "height": world.SIZE,
        "type": "image",
        "nsfw": False,
        "nsfwLevel": "None",
        "browsingLevel": 1,
        "createdAt": _time(_EPOCH + timedelta(days=40, minutes=17 * number)),
        "postId": 900_000 + number // 3,
        "username": f"sandbox-user-{rng.randrange(60)}",
        "baseModel": post.checkpoint.base_model,
        "modelVersionIds": versions,
        "stats": {
            "cryCount": 0,
            "laughCount": likes // 9,
            "likeCount": likes,
            "dislikeCount": 0,
            "heartCount": likes // 3,
            "commentCount": likes // 20,
        },
        "meta": None,
    }
    kind = rng.choices(("a1111", "on-site", "comfy", "flawed"), weights=(58, 28, 5, 9))[0]
    if kind == "on-site":
        return record | {"meta": _on_site(post, rng)}
    if kind == "comfy" and post.sampler in _COMFY_SAMPLERS:
        return record | {"meta": _comfy(post, files)}
    meta = _a1111(post, files, rng)
    return _flawed(record, meta, rng) if kind == "flawed" else record | {"meta": meta}


def _settings(post: _Post) -> Record:
    return {
        "prompt": post.prompt,
        "negativePrompt": post.negative,
        "sampler": post.sampler,
        "steps": post.steps,
        "cfgScale": post.cfg_scale,
        "seed": post.seed,
    }


def _auto_v2(listing: Listing, files: Mapping[str, FileFacts]) -> str:
    return _hashes(listing, files.get(listing.key))["AutoV2"].lower()


def _a1111(post: _Post, files: Mapping[str, FileFacts], rng: random.Random) -> Record:
    model_hash = _auto_v2(post.checkpoint, files)
    name = post.checkpoint.stem
    resources: list[Record] = [{"type": "model", "name": name, "hash": model_hash}]
    hashes = {"model": model_hash}
    meta = _settings(post)
    if post.lora is not None:
        stem, lora_hash = post.lora.stem, _auto_v2(post.lora, files)
        meta["prompt"] += f" <lora:{stem}:{post.weight:g}>"
        resources.append({"type": "lora", "name": stem, "hash": lora_hash, "weight": post.weight})
        hashes[f"lora:{stem}"] = lora_hash
    meta |= {"Size": f"{world.SIZE}x{world.SIZE}", "Model": name, "Model hash": model_hash}
    meta["Version"] = "v1.7.0"
    if rng.random() < 0.5:
        meta |= {"resources": resources, "hashes": hashes}
    elif post.lora is not None:
        meta["hashes"] = hashes
    if rng.random() < 0.2:
        meta["Clip skip"] = "1"
    return meta


def _on_site(post: _Post, rng: random.Random) -> Record:
    resources = [
        {
            "type": "checkpoint",
            "modelVersionId": post.checkpoint.version_id,
            "modelVersionName": "v1",
        }
    ]
    if post.lora is not None:
        resources.append(
            {
                "type": "lora",
                "weight": post.weight,
                "modelVersionId": post.lora.version_id,
                "modelVersionName": "v1",
            }
        )
    meta = _settings(post)
    if rng.random() < 0.5:
        meta |= {"width": world.SIZE, "height": world.SIZE}
    else:
        meta["Size"] = f"{world.SIZE}x{world.SIZE}"
    return meta | {
        "clipSkip": 1,
        "Created Date": "2026-02-14T1200:00.0000000Z",
        "civitaiResources": resources,
    }


def _comfy(post: _Post, files: Mapping[str, FileFacts]) -> Record:
    sampler, schedule = _COMFY_SAMPLERS[post.sampler]
    graph = {
        "1": {
            "class_type": "CheckpointLoaderSimple",
            "inputs": {"ckpt_name": f"{post.checkpoint.stem}.safetensors"},
        },
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": post.prompt, "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": post.negative, "clip": ["1", 1]}},
        "4": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": world.SIZE, "height": world.SIZE, "batch_size": 1},
        },
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "seed": post.seed,
                "steps": post.steps,
                "cfg": post.cfg_scale,
                "sampler_name": sampler,
                "scheduler": schedule,
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
            },
        },
    }
    return {
        **_settings(post),
        "sampler": sampler,
        "scheduler": schedule,
        "denoise": 1,
        "width": world.SIZE,
        "height": world.SIZE,
        "models": [f"{post.checkpoint.stem}.safetensors"],
        "versionIds": [post.checkpoint.version_id],
        "hashes": {"model": _auto_v2(post.checkpoint, files)},
        "comfy": json.dumps({"prompt": graph, "workflow": {}}),
    }


def _flawed(record: Record, meta: Record, rng: random.Random) -> Record:
    """Returns the record with one flaw, or an odd but valid form, that the filters must handle."""
    kind = rng.randrange(10)
    if kind == 0:
        return record  # the uploader hides the metadata
    if kind == 1:
        return record | {"meta": {"id": record["id"], "meta": meta}}  # the nested form is valid
    if kind == 2:
        return record | {"meta": {k: v for k, v in meta.items() if k != "prompt"}}
    if kind in (3, 4):
        level, bit = (("Mature", 4), ("X", 16))[kind - 3]
        return record | {"nsfw": True, "nsfwLevel": level, "browsingLevel": bit, "meta": meta}
    if kind == 5:
        return record | {"type": "video", "meta": meta}
    if kind == 6:
        return record | {"meta": {k: v for k, v in meta.items() if k != "steps"}}
    if kind == 7:
        return record | {"meta": meta | {"sampler": "Sandbox Unknown Sampler"}}
    if kind == 8:
        return record | {"meta": meta | {"steps": 4000}}
    unknown = f"{rng.getrandbits(40):010x}"  # a checkpoint that the site does not know
    rest = {k: v for k, v in meta.items() if k not in ("resources", "hashes")}
    return record | {"modelVersionIds": [], "meta": rest | {"Model hash": unknown}}


def _address(image_id: int) -> str:
    return f"https://image.civitai.com/sandbox/{image_id}/original=true/{image_id}.jpeg"


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")

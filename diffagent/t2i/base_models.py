"""The site's base models: which weights fit together, what they make, and under which licence.

Names and licences are those of the site's own list (civitai/civitai, ``basemodel.constants.ts``,
August 2026). ``baseModel`` is free text that grows, so a name that is missing here is taken for a
text-to-image family of its own, of unknown licence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

Media = Literal["image", "video", "audio", "none"]

#: In ``filters.base_models``: every family that makes pictures from text.
ALL = "all"

RAIL_M, RAIL_PP_M, APACHE = "CreativeML Open RAIL-M", "CreativeML Open RAIL++-M", "Apache 2.0"
_STABILITY = "Stability AI Community License Agreement"
_FLUX_DEV, _FLUX2_DEV = "FLUX.1 [dev] Non-Commercial License", "FLUX.2 [dev] Non-Commercial License"
_WAN = "Alibaba Wan / Tongyi Wanxiang Terms of Service"
_KLEIN_9B = "FLUX.2 Klein 9B Non-Commercial License"

#: Licences that forbid commercial use of the weights, whatever a model's own page allows.
NON_COMMERCIAL = frozenset(
    {
        "SDXL 0.9 research license",
        "Stability AI Non-Commercial Research Community License",
        "SAI NC RC",
        _FLUX_DEV,
        _FLUX2_DEV,
        _KLEIN_9B,
        "CircleStone Labs Non-Commercial License v1.0",
        "Ideogram Non-Commercial Model Agreement",
    }
)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What is known of a base model by its name."""

    ecosystem: str  # as AIRs name it; weights of one ecosystem fit together
    media: Media
    licence: str | None


#: ecosystem, media, licence, names. The first ecosystems are roots: Pony, Illustrious and NoobAI
#: are trained from SDXL, and LoRAs pass between them.
_TABLE: tuple[tuple[str, Media, str | None, tuple[str, ...]], ...] = (
    ("sd1", "image", RAIL_M, ("SD 1.4", "SD 1.5", "SD 1.5 LCM", "SD 1.5 Hyper")),
    ("sd2", "image", RAIL_PP_M, ("SD 2.0", "SD 2.0 768", "SD 2.1", "SD 2.1 768", "SD 2.1 Unclip")),
    ("sd3", "image", _STABILITY, ("SD 3", "SD 3.5", "SD 3.5 Large", "SD 3.5 Large Turbo")),
    ("sd3", "image", _STABILITY, ("SD 3.5 Medium",)),
    ("sdxl", "image", RAIL_PP_M, ("SDXL 1.0", "SDXL 1.0 LCM", "SDXL Lightning", "SDXL Hyper")),
    ("sdxl", "image", RAIL_PP_M, ("SDXL Distilled",)),
    ("sdxl", "image", "SDXL 0.9 research license", ("SDXL 0.9",)),
    ("sdxl", "image", "Stability AI Non-Commercial Research Community License", ("SDXL Turbo",)),
    ("sdxl", "image", RAIL_M, ("Pony",)),
    ("sdxl", "image", "Illustrious License", ("Illustrious",)),
    ("sdxl", "image", "NoobAI License", ("NoobAI",)),
    ("auraflow", "image", "Pony", ("Pony V7",)),
    ("auraflow", "image", APACHE, ("AuraFlow",)),
    ("flux1", "image", APACHE, ("Flux.1 S",)),
    ("flux1", "image", _FLUX_DEV, ("Flux.1 D", "Flux.1 Krea", "Flux.1 Kontext")),
    ("flux2", "image", _FLUX2_DEV, ("Flux.2 D",)),
    ("flux2", "image", _KLEIN_9B, ("Flux.2 Klein 9B", "Flux.2 Klein 9B-base")),
    ("flux2", "image", APACHE, ("Flux.2 Klein 4B", "Flux.2 Klein 4B-base")),
    ("chroma", "image", APACHE, ("Chroma",)),
    ("hidream", "image", "MIT", ("HiDream",)),
    ("hidreamo1", "image", "MIT", ("HiDream-O1",)),
    ("hydit1", "image", "Tencent Hunyuan Community License Agreement", ("Hunyuan 1",)),
    ("kolors", "image", "Kolors License", ("Kolors",)),
    ("lumina", "image", APACHE, ("Lumina",)),
    ("pixarta", "image", RAIL_PP_M, ("PixArt a",)),
    ("pixarte", "image", RAIL_PP_M, ("PixArt E",)),
    ("playgroundv2", "image", "Playground v2 Community License", ("Playground v2",)),
    ("scascade", "image", "SAI NC RC", ("Stable Cascade",)),
    ("qwen", "image", APACHE, ("Qwen",)),
    ("qwen2", "image", APACHE, ("Qwen 2",)),
    ("zimageturbo", "image", APACHE, ("ZImageTurbo",)),
    ("zimagebase", "image", APACHE, ("ZImageBase",)),
    ("anima", "image", "CircleStone Labs Non-Commercial License v1.0", ("Anima",)),
    ("ernie", "image", APACHE, ("Ernie",)),
    ("ideogram", "image", "Ideogram Non-Commercial Model Agreement", ("Ideogram 4.0",)),
    ("krea2", "image", "Krea AI Terms of Service", ("Krea 2",)),
    ("lens", "image", None, ("Lens",)),
    ("mai", "image", "Microsoft AI Terms of Use", ("MAI",)),
    ("odor", "image", None, ("ODOR",)),
    ("grok", "image", "Grok", ("Grok",)),
    ("openai", "image", "OpenAI", ("OpenAI",)),
    ("imagen4", "image", "Imagen4", ("Imagen4",)),
    ("nanobanana", "image", "Imagen4", ("Nano Banana",)),
    ("seedream", "image", "Seedream", ("Seedream",)),
    ("wanimage27", "image", _WAN, ("Wan Image 2.7",)),
    ("wanvideo", "video", APACHE, ("Wan Video", "Wan Video 1.3B t2v", "Wan Video 14B t2v")),
    ("wanvideo", "video", APACHE, ("Wan Video 14B i2v 480p", "Wan Video 14B i2v 720p")),
    ("wanvideo", "video", APACHE, ("Wan Video 2.2 TI2V-5B", "Wan Video 2.2 I2V-A14B")),
    ("wanvideo", "video", APACHE, ("Wan Video 2.2 T2V-A14B",)),
    ("wanvideo", "video", _WAN, ("Wan Video 2.5 T2V", "Wan Video 2.5 I2V", "Wan Video 2.7")),
    ("svd", "video", "Stable Video Diffusion Community License", ("SVD", "SVD XT")),
    ("hyv1", "video", "Tencent Hunyuan Video License Agreement", ("Hunyuan Video",)),
    ("cogvideox", "video", "CogVideoX License", ("CogVideoX",)),
    ("mochi", "video", APACHE, ("Mochi",)),
    ("ltxv", "video", "LTX Video License", ("LTXV", "LTXV2")),
    ("ltxv", "video", "LTX-2 Community License Agreement", ("LTXV 2.3",)),
    ("happyhorse", "video", "HappyHorse", ("HappyHorse",)),
    ("sora2", "video", "OpenAI", ("Sora 2",)),
    ("veo3", "video", "Veo 3", ("Veo 3",)),
    ("vidu", "video", "ShengShu Vidu Terms of Service", ("Vidu Q1",)),
    ("minimax", "video", "MiniMax Hailuo AI Terms of Service", ("Hailuo by MiniMax",)),
    ("kling", "video", "Kuaishou Kling AI Terms of Service", ("Kling",)),
    ("seedance", "video", "Seedream", ("Seedance",)),
    ("ace", "audio", APACHE, ("ACE Audio",)),
    ("upscaler", "none", None, ("Upscaler",)),
    ("other", "none", None, ("Other",)),
)
_KNOWN = {
    name: BaseModel(ecosystem, media, licence)
    for ecosystem, media, licence, names in _TABLE
    for name in names
}
#: What a name that the table lacks begins with: the site adds variants of a family all the time.
_PREFIXES: tuple[tuple[str, BaseModel], ...] = (
    ("wan video", BaseModel("wanvideo", "video", None)),
    ("hunyuan video", BaseModel("hyv1", "video", None)),
    ("ltxv", BaseModel("ltxv", "video", None)),
    ("sd 1", BaseModel("sd1", "image", RAIL_M)),
    ("sd 2", BaseModel("sd2", "image", RAIL_PP_M)),
    ("sd 3", BaseModel("sd3", "image", None)),
    ("sdxl", BaseModel("sdxl", "image", None)),
    ("pony v7", BaseModel("auraflow", "image", None)),
    ("pony", BaseModel("sdxl", "image", None)),
    ("illustrious", BaseModel("sdxl", "image", None)),
    ("noobai", BaseModel("sdxl", "image", None)),
    ("flux.1", BaseModel("flux1", "image", None)),
    ("flux.2", BaseModel("flux2", "image", None)),
)


@cache
def base_model_of(name: str) -> BaseModel:
    """What is known of the base model ``name``, as the site spells it."""
    if known := _KNOWN.get(name):
        return known
    lower = name.lower()
    for prefix, known in _PREFIXES:
        if lower.startswith(prefix):
            return known
    root = re.sub(r"[^a-z0-9]", "", lower)
    return BaseModel(root, "image", None) if root else BaseModel("other", "none", None)


def ecosystem(name: str) -> str:
    """Root ecosystem of a base model, as AIRs name it: ``SD 1.5`` and ``SD 1.4`` are ``sd1``.

    Weights of one ecosystem fit together (a LoRA and its checkpoint).
    """
    return base_model_of(name).ecosystem


def wanted(name: str, choice: Iterable[str]) -> bool:
    """Whether ``choice`` takes a base model: by its name, by its ecosystem, or all of them.

    An ecosystem and ``ALL`` take only what makes pictures.
    """
    known = base_model_of(name)
    names = frozenset(choice)
    return name in names or (known.media == "image" and (known.ecosystem in names or ALL in names))


def families() -> Iterator[tuple[str, Media, tuple[str, ...]]]:
    """(ecosystem, media, the names that the site has now) of every family, in a fixed order."""
    made: dict[tuple[str, Media], list[str]] = {}
    for ecosystem_name, media, _, names in _TABLE:
        made.setdefault((ecosystem_name, media), []).extend(names)
    for (ecosystem_name, media), all_names in made.items():
        yield ecosystem_name, media, tuple(all_names)

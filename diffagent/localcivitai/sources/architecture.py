"""Architecture of a safetensors file, from the names and shapes of its tensors and its header.

Names of base models are Civitai's. Tensors show an architecture, not a lineage: a model trained
from Pony or Illustrious counts as "SDXL 1.0", and any SD 1.x as "SD 1.5".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from diffagent.t2i.weights import Tensor

#: Width of the text encoder that the U-Net's cross-attention reads -> base model.
_BY_CONTEXT = {768: "SD 1.5", 1024: "SD 2.1", 2048: "SDXL 1.0"}
#: Input channels of the U-Net -> its task; 4 is text to image.
_FORMS = {9: "Inpainting", 8: "Pix2Pix"}
_CONTEXT = re.compile(
    r"attn2[._]to_k\.(?:weight|lora_down\.weight|lora_A(?:\.default)?\.weight|lora\.down\.weight"
    r"|hada_w1_b)$"
)
#: Beginnings of ``ss_base_model_version`` (kohya's scripts) and ``modelspec.architecture``
#: (Stability's specification), the longest first.
_STATED = (
    ("sd_v2_768", "SD 2.1 768"),
    ("sd_v1", "SD 1.5"),
    ("sd_v2", "SD 2.1"),
    ("sdxl_base", "SDXL 1.0"),
    ("sd3", "SD 3"),
    ("flux1-schnell", "Flux.1 S"),
    ("flux1", "Flux.1 D"),
    ("stable-diffusion-v1", "SD 1.5"),
    ("stable-diffusion-v2-768", "SD 2.1 768"),
    ("stable-diffusion-v2", "SD 2.1"),
    ("stable-diffusion-xl-v1", "SDXL 1.0"),
    ("stable-diffusion-3", "SD 3"),
    ("flux-1-schnell", "Flux.1 S"),
    ("flux-1", "Flux.1 D"),
)
_NETWORKS = (
    ("DoRA", re.compile(r"dora_scale")),
    ("LoCon", re.compile(r"hada_w|lokr_w|lora_mid")),
    ("LORA", re.compile(r"lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up")),
)


@dataclass(frozen=True)
class Architecture:
    """Type and base model in Civitai's names; ``base_model`` is None when the file shows none."""

    type: str
    base_model: str | None
    form: str = "Standard"


UNKNOWN = Architecture("Other", None)


def describe(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> Architecture:
    """Return the architecture of a file; tensors outweigh the notes of its header."""
    kind = _kind(tensors)
    base = _base_model(tensors, kind) or stated_base_model(notes)
    channels = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    form = _FORMS.get(channels.shape[1]) if channels and len(channels.shape) > 1 else None
    if base == "SDXL 1.0" and _is_refiner(tensors):
        form = "Refiner"
    return Architecture(kind, base, form or "Standard")


def stated_base_model(notes: Mapping[str, str]) -> str | None:
    """Return the base model that the notes of a header name."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        text = notes.get(key, "").lower()
        for start, name in _STATED:
            if text.startswith(start):
                return name
    return None


def _kind(tensors: Mapping[str, Tensor]) -> str:
    for kind, pattern in _NETWORKS:
        if any(pattern.search(name) for name in tensors):
            # Civitai calls a LoRA of convolutions wider than a pixel LoCon.
            down = (t.shape for name, t in tensors.items() if "lora_down" in name)
            wide = kind == "LORA" and any(max(shape[2:], default=1) > 1 for shape in down)
            return "LoCon" if wide else kind
    if any(n.startswith("control_model.") or "input_hint_block" in n for n in tensors):
        return "Controlnet"
    if len(tensors) <= 4 and {"emb_params", "clip_l", "clip_g", "string_to_param"} & set(tensors):
        return "TextualInversion"
    if any(
        name.startswith("model.diffusion_model.")
        or "double_blocks." in name
        or "joint_blocks." in name
        for name in tensors
    ):
        return "Checkpoint"
    if "decoder.conv_in.weight" in tensors:
        return "VAE"
    return "Other"


def _base_model(tensors: Mapping[str, Tensor], kind: str) -> str | None:
    names = " ".join(tensors) if kind != "TextualInversion" else ""
    if "double_blocks" in names or "single_transformer_blocks" in names:
        distilled = kind == "Checkpoint" and "guidance_in." not in names
        return "Flux.1 S" if distilled else "Flux.1 D"
    if "joint_blocks." in names or "joint_transformer_blocks" in names:
        return "SD 3.5" if "attn.ln_k" in names or "attn.ln_q" in names else "SD 3"
    if "conditioner.embedders." in names or "lora_te2_" in names or "clip_g" in tensors:
        return "SDXL 1.0"
    widths = (t.shape[-1] for n, t in tensors.items() if t.shape and _CONTEXT.search(n))
    if kind == "TextualInversion":
        widths = (t.shape[-1] for t in tensors.values() if t.shape)
    return next((_BY_CONTEXT[width] for width in widths if width in _BY_CONTEXT), None)


def _is_refiner(tensors: Mapping[str, Tensor]) -> bool:
    first = any(name.startswith("conditioner.embedders.0.model.") for name in tensors)
    return first and not any(name.startswith("conditioner.embedders.1.") for name in tensors)

"""What a model file is, from tensor names and shapes and from the notes in its header."""

from __future__ import annotations

import pytest

from diffagent.localcivitai.sources.architecture import Architecture, describe
from diffagent.t2i.weights import Tensor

UNET = "model.diffusion_model."
ATTENTION = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
STEM = f"{UNET}input_blocks.0.0.weight"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PEFT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
Shapes = dict[str, tuple[int, ...]]


def seen(shapes: Shapes, **notes: str) -> tuple[str, str | None, str]:
    named = {key.replace("__", "."): value for key, value in notes.items()}
    found = describe({name: Tensor("F16", shape) for name, shape in shapes.items()}, named)
    assert isinstance(found, Architecture)
    return found.type, found.base_model, found.form


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({ATTENTION: (320, 768), STEM: (320, 4, 3, 3)}, ("Checkpoint", "SD 1.5", "Standard")),
        ({ATTENTION: (320, 768), STEM: (320, 9, 3, 3)}, ("Checkpoint", "SD 1.5", "Inpainting")),
        ({ATTENTION: (320, 768), STEM: (320, 8, 3, 3)}, ("Checkpoint", "SD 1.5", "Pix2Pix")),
        ({ATTENTION: (320, 1024)}, ("Checkpoint", "SD 2.1", "Standard")),
        ({ATTENTION: (640, 2048)}, ("Checkpoint", "SDXL 1.0", "Standard")),
        (
            {ATTENTION: (640, 2048), "conditioner.embedders.1.model.x": (1,)},
            ("Checkpoint", "SDXL 1.0", "Standard"),
        ),
        (
            {f"{UNET}x": (1,), "conditioner.embedders.0.model.x": (1,)},
            ("Checkpoint", "SDXL 1.0", "Refiner"),
        ),
        ({f"{UNET}double_blocks.0.x": (1,)}, ("Checkpoint", "Flux.1 S", "Standard")),
        (
            {"double_blocks.0.x": (1,), "guidance_in.in_layer.weight": (1,)},
            ("Checkpoint", "Flux.1 D", "Standard"),
        ),
        ({f"{UNET}joint_blocks.0.x": (1,)}, ("Checkpoint", "SD 3", "Standard")),
        (
            {f"{UNET}joint_blocks.0.x_block.attn.ln_k.weight": (1,)},
            ("Checkpoint", "SD 3.5", "Standard"),
        ),
        ({f"{KOHYA}.lora_down.weight": (8, 768)}, ("LORA", "SD 1.5", "Standard")),
        ({f"{PEFT}.lora_A.weight": (8, 2048)}, ("LORA", "SDXL 1.0", "Standard")),
        ({"lora_te2_text_model_x.lora_down.weight": (8, 5)}, ("LORA", "SDXL 1.0", "Standard")),
        ({"lora_unet_double_blocks_0.lora_up.weight": (8, 5)}, ("LORA", "Flux.1 D", "Standard")),
        ({f"{KOHYA}.hada_w1_b": (8, 768)}, ("LoCon", "SD 1.5", "Standard")),
        ({"lora_unet_conv.lora_down.weight": (8, 4, 3, 3)}, ("LoCon", None, "Standard")),
        ({"lora_unet_conv.lora_down.weight": (8, 4, 1, 1)}, ("LORA", None, "Standard")),
        ({f"{KOHYA}.dora_scale": (1, 768)}, ("DoRA", None, "Standard")),
        ({"emb_params": (4, 768)}, ("TextualInversion", "SD 1.5", "Standard")),
        (
            {"clip_l": (4, 768), "clip_g": (4, 1280)},
            ("TextualInversion", "SDXL 1.0", "Standard"),
        ),
        ({"decoder.conv_in.weight": (1,)}, ("VAE", None, "Standard")),
        ({"control_model.input_hint_block.0.weight": (1,)}, ("Controlnet", None, "Standard")),
        ({"what": (1,)}, ("Other", None, "Standard")),
        ({}, ("Other", None, "Standard")),
    ],
)
def test_tensors_tell(shapes: Shapes, expected: tuple[str, str | None, str]) -> None:
    assert seen(shapes) == expected


@pytest.mark.parametrize(
    ("notes", "base"),
    [
        ({"ss_base_model_version": "sd_v1"}, "SD 1.5"),
        ({"ss_base_model_version": "sd_v2_768_v"}, "SD 2.1 768"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL 1.0"),
        ({"ss_base_model_version": "flux1"}, "Flux.1 D"),
        ({"modelspec__architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL 1.0"),
        ({"modelspec__architecture": "Flux-1-dev/lora"}, "Flux.1 D"),
        ({"modelspec__architecture": "something-new"}, None),
    ],
)
def test_notes_tell_what_tensors_do_not(notes: dict[str, str], base: str | None) -> None:
    assert seen({"x.lora_up.weight": (8, 8)}, **notes) == ("LORA", base, "Standard")


def test_tensors_count_for_more_than_notes() -> None:
    shapes: Shapes = {f"{KOHYA}.lora_down.weight": (8, 768)}
    assert seen(shapes, ss_base_model_version="sdxl_base_v1-0")[1] == "SD 1.5"

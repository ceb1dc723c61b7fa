"""Settings of the sandbox's LoRAs, their kohya file layout, and the weights that they change.

A specialist is a LoRA over all convolutions and projections of the base's U-Net; the assembly of
the site merges it into a full checkpoint. The standalone LoRAs change only the transformer blocks,
like most LoRAs on Civitai.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from diffagent.sandbox import world
from tools.sandbox import tiny_networks
from tools.sandbox.single_file import Tensors, unet_name

ATTENTION = (
    r".*(attn[12]\.to_[qkv]|attn[12]\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"  # transformer blocks
)
EVERYWHERE = (
    r".*(attn[12]\.to_[qkv]|attn[12]\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2"
    r"|proj_in|proj_out|conv1|conv2|conv_shortcut|time_emb_proj)"
)


@dataclass(frozen=True)
class Adapter:
    """Settings of one LoRA.

    Attributes:
        name: stem of its weight file.
        attribute: "style" or "background".
        value: of that attribute in all of its training drawings.
        seed: of its initial weights, noise and captions.
        rank: of the low-rank matrices; alpha has the same value.
        targets: regular expression over the U-Net's module names.
    """

    name: str
    attribute: str
    value: str
    seed: int
    rank: int
    targets: str

    def fits(self, scene: world.Scene) -> bool:
        """Returns whether the LoRA learns from drawings of this scene."""
        return bool(getattr(scene, self.attribute) == self.value)


SPECIALISTS = tuple(
    Adapter(f"specialist-{style.replace(' ', '-')}", "style", style, 41 + number, 16, EVERYWHERE)
    for number, style in enumerate(world.STYLES[1:])
)
LORAS = (
    Adapter("lora-pixel-art", "style", "pixel art", 51, 16, ATTENTION),
    Adapter("lora-night", "background", "night", 52, 16, ATTENTION),
)
ADAPTERS = (*SPECIALISTS, *LORAS)


def kohya_tensors(state: Tensors, rank: int) -> Tensors:
    """Returns the LoRA of a peft-wrapped U-Net's state dict, in kohya's layout and fp16.

    Keys are `lora_unet_<module path with underscores>` followed by `.lora_down.weight`,
    `.lora_up.weight` and `.alpha`.
    """
    tensors: Tensors = {}
    for name, value in state.items():
        for ours, theirs in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
            marker = f".{ours}.default.weight"
            if name.endswith(marker):
                stem = "lora_unet_" + name.removesuffix(marker).replace(".", "_")
                tensors[f"{stem}.{theirs}.weight"] = value.detach().to(torch.float16).contiguous()
                tensors[f"{stem}.alpha"] = torch.tensor(float(rank), dtype=torch.float16)
    return tensors


def lora_targets() -> dict[str, str]:
    """Returns the single-file name of the weight that each kohya LoRA module changes."""
    unet = tiny_networks.build_unet()
    slots = {
        i: 2 if "CrossAttn" in kind else 1 for i, kind in enumerate(unet.config.up_block_types)
    }
    layers = unet.config.layers_per_block
    return {
        "lora_unet_" + name.replace(".", "_"): "model.diffusion_model."
        + unet_name(f"{name}.weight", layers, slots)
        for name, _ in unet.named_modules()
        if re.fullmatch(EVERYWHERE, name)
    }

"""Conversion of diffusers modules to the single-file layout of Stable Diffusion checkpoints.

It reverses `from_single_file` of the pipelines of Stable Diffusion 1.x, 2.x and XL: names are those
of the original latent-diffusion code (`model.diffusion_model.input_blocks.1.0...`) and, for the
text encoders of 2.x and XL, of open_clip. It works for any number of blocks and layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def single_file_tensors(
    unet: Any, vae: Any, text_encoder: Any, text_encoder_2: Any = None
) -> Tensors:
    """Returns all weights of a pipeline under their single-file names, in fp16.

    Args:
        unet: a UNet2DConditionModel.
        vae: an AutoencoderKL.
        text_encoder: a CLIPTextModel, OpenAI's (quick_gelu) or OpenCLIP's of Stable Diffusion 2.
        text_encoder_2: the CLIPTextModelWithProjection of SDXL.
    """
    layers = unet.config.layers_per_block
    upsampler_slots = {
        i: 2 if "CrossAttn" in kind else 1 for i, kind in enumerate(unet.config.up_block_types)
    }
    blocks = len(vae.config.block_out_channels)
    tensors: Tensors = {}
    for name, value in unet.state_dict().items():
        new = unet_name(name, layers, upsampler_slots)
        tensors[f"model.diffusion_model.{new}"] = value
    for name, value in vae.state_dict().items():
        new = vae_name(name, blocks)
        is_linear = ".attn_1." in new and new.endswith("weight") and value.ndim == 2
        tensors[f"first_stage_model.{new}"] = value[:, :, None, None] if is_linear else value
    if text_encoder_2 is not None:
        parts = {
            "conditioner.embedders.0.transformer.text_model.": text_tensors(text_encoder),
            "conditioner.embedders.1.model.": open_clip_tensors(text_encoder_2),
        }
    elif text_encoder.config.hidden_act == "gelu":
        parts = {"cond_stage_model.model.": open_clip_tensors(text_encoder)}
    else:
        parts = {"cond_stage_model.transformer.text_model.": text_tensors(text_encoder)}
    for prefix, part in parts.items():
        tensors |= {prefix + name: value for name, value in part.items()}
    return {name: value.to(torch.float16).contiguous() for name, value in tensors.items()}


def text_tensors(text_encoder: Any) -> Tensors:
    """Returns the weights of a CLIPTextModel without the prefix of some transformers versions."""
    state: Mapping[str, torch.Tensor] = text_encoder.state_dict()
    return {
        name.removeprefix("text_model."): value
        for name, value in state.items()
        if not name.endswith("position_ids")
    }


def open_clip_tensors(text_encoder: Any) -> Tensors:
    """Returns the weights of a CLIP text encoder under open_clip's names."""
    tensors = text_tensors(text_encoder)
    # Released files of Stable Diffusion 2 hold an unused projection, too.
    projection = tensors.pop("text_projection.weight", None)
    width = text_encoder.config.hidden_size
    renamed: Tensors = {
        "positional_embedding": tensors.pop("embeddings.position_embedding.weight"),
        "text_projection": torch.eye(width) if projection is None else projection.T,
    }
    for name in [name for name in tensors if "self_attn.q_proj" in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        layer, leaf = name.split(".")[2], name.rpartition(".")[2]
        renamed[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(parts)
    for name, value in tensors.items():
        new = name
        for ours, theirs in _OPEN_CLIP.items():
            new = new.replace(ours, theirs)
        renamed[new] = value
    return renamed


def unet_name(name: str, layers: int, upsampler_slots: Mapping[int, int]) -> str:
    """Returns the single-file name of a U-Net tensor, without `model.diffusion_model.`."""
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, number, rest = match[1], int(match[2]), match[3]
        if kind == "attentions":
            return f"middle_block.1.{rest}"
        return f"middle_block.{2 * number}.{_resnet(rest)}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"no single-file name for the U-Net tensor {name!r}")
    block, kind, layer, rest = int(match[2]), match[3], int(match[4]), match[5]
    if match[1] == "down":
        prefix, index = "input_blocks", (layers + 1) * block + layer + 1
    else:
        prefix, index = "output_blocks", (layers + 1) * block + layer
    if kind == "resnets":
        return f"{prefix}.{index}.0.{_resnet(rest)}"
    if kind == "attentions":
        return f"{prefix}.{index}.1.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    return f"output_blocks.{(layers + 1) * block + layers}.{upsampler_slots[block]}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """Returns the single-file name of a VAE tensor, without `first_stage_model.`."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        head, rest = name.split("mid_block.attentions.0.")
        for ours, theirs in _VAE_ATTENTION.items():
            if rest.startswith(ours + "."):
                return f"{head}mid.attn_1.{theirs}{rest.removeprefix(ours)}"
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    reverse = re.compile(r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)")
    kinds = {"resnets": "block", "upsamplers.0": "upsample"}
    return reverse.sub(lambda m: f"up.{blocks - 1 - int(m[1])}.{kinds[m[2]]}", name)


def _resnet(rest: str) -> str:
    part, tail = rest.split(".", 1)
    return f"{_RESNET[part]}.{tail}"

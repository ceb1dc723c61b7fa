"""A Stable Diffusion of 0.2 M random parameters, saved in the single-file layout of SD 1.5."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from diffagent import compat

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip
TOP = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def build(folder: Path, seed: int = 0) -> Any:
    """A StableDiffusionPipeline for 64 x 64 pixels; its configuration is saved in ``folder``."""
    compat.install()
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae, text, tokenizer(folder), unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return pipeline


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer out of open_clip's vocabulary."""
    from transformers import CLIPTokenizer

    package = importlib.util.find_spec("open_clip")
    assert package and package.origin
    with gzip.open(Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz", "rt") as lines:
        merges = lines.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(c + "</w>" for c in letters), *("".join(m.split()) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    target = folder / "vocabulary"
    target.mkdir(parents=True, exist_ok=True)
    (target / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (target / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    result = CLIPTokenizer.from_pretrained(target, model_max_length=77)
    shutil.rmtree(target)
    return result


def save_single_file(pipeline: Any, path: Path) -> None:
    """Write the pipeline's weights in the layout of SD 1.5."""
    from safetensors.torch import save_file

    tensors = {
        f"cond_stage_model.transformer.{_text_name(name)}": value
        for name, value in pipeline.text_encoder.state_dict().items()
    }
    for name, value in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet(name)}"] = value
    for name, value in pipeline.vae.state_dict().items():
        linear = "attentions" in name and value.ndim == 2
        tensors[f"first_stage_model.{_vae(name)}"] = value[..., None, None] if linear else value
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def _text_name(name: str) -> str:
    """transformers 5 has no ``text_model`` level any more; the file formats do."""
    return f"text_model.{name.removeprefix('text_model.')}"


def _swap(name: str, table: dict[str, str]) -> str:
    for ldm, hf in table.items():
        stem, dot, leaf = name.rpartition(".")
        if stem == hf:
            return f"{ldm}{dot}{leaf}"
    return name


def _unet(name: str) -> str:
    parts = name.split(".")
    if parts[0] not in ("down_blocks", "up_blocks", "mid_block"):
        return _swap(name, TOP)
    if parts[0] == "mid_block":
        kind, index, rest = parts[1], int(parts[2]), ".".join(parts[3:])
        place = f"middle_block.{2 * index if kind == 'resnets' else 1}"
    else:
        block, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
        place, rest = _place(parts[0], block, kind, index, rest)
    return f"{place}.{_swap(rest, RESNET) if kind == 'resnets' else rest}"


def _place(side: str, block: int, kind: str, index: int, rest: str) -> tuple[str, str]:
    """Number of the LDM block; one layer a block (two on the way up)."""
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{2 * block + 2}.0", rest.replace("conv", "op")
        return f"input_blocks.{2 * block + 1 + index}.{int(kind == 'attentions')}", rest
    if kind == "upsamplers":
        return f"output_blocks.{2 * block + 1}.1", rest
    return f"output_blocks.{2 * block + index}.{int(kind == 'attentions')}", rest


def _vae(name: str) -> str:
    parts = name.split(".")
    if "mid_block" in parts:
        side, kind, index, rest = parts[0], parts[2], int(parts[3]), ".".join(parts[4:])
        if kind == "attentions":
            return f"{side}.mid.attn_1.{_swap(rest, VAE_ATTENTION)}"
        return f"{side}.mid.block_{index + 1}.{rest}"
    if "down_blocks" in parts or "up_blocks" in parts:
        side, direction, block, kind, index = (*parts[:2], int(parts[2]), parts[3], parts[4])
        rest = ".".join(parts[5:]).replace("conv_shortcut", "nin_shortcut")
        place = f"down.{block}" if direction == "down_blocks" else f"up.{3 - block}"
        if kind == "resnets":
            return f"{side}.{place}.block.{index}.{rest}"
        return f"{side}.{place}.{'downsample' if 'down' in kind else 'upsample'}.{rest}"
    return name.replace("conv_norm_out", "norm_out")


def save_kohya_lora(pipeline: Any, path: Path, seed: int = 0, rank: int = 2) -> None:
    """A random LoRA on the cross-attention and on the text encoder, in kohya's names."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for model, prefix, leaf in (
        (pipeline.unet, "lora_unet", "attn2.to_k"),
        (pipeline.text_encoder, "lora_te", "_proj"),
    ):
        for name, module in model.named_modules():
            if name.endswith(leaf):
                out_features, in_features = module.weight.shape
                path_in_model = name if prefix == "lora_unet" else _text_name(name)
                key = f"{prefix}_{path_in_model.replace('.', '_')}"
                tensors[f"{key}.lora_down.weight"] = torch.randn(
                    rank, in_features, generator=generator
                )
                tensors[f"{key}.lora_up.weight"] = torch.randn(
                    out_features, rank, generator=generator
                )
                tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    assert tensors
    save_file(tensors, path)

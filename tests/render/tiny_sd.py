"""Stable Diffusions of 0.2 M random parameters and more, saved in their single-file layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagent import compat, sandbox
from tools.sandbox.single_file import single_file_tensors

if TYPE_CHECKING:
    import torch

TOKENIZER = Path(sandbox.__file__).parent / "config" / "sd15-tiny" / "tokenizer"


def build(folder: Path, seed: int = 0) -> Any:
    """A StableDiffusionPipeline for 64 x 64 pixels; its configuration is saved in ``folder``."""
    compat.install()
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
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
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    # A single file of the sandbox holds fp16: what is saved is what this pipeline draws with.
    pipeline.to(torch.float16).to(torch.float32)
    pipeline.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return pipeline


#: What makes the released architectures small; their blocks stay.
_SMALL: dict[str, dict[str, Any]] = {
    "unet": {"norm_num_groups": 8, "sample_size": 8},
    "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "projection_dim": 32},
}  # fmt: skip
# The loader tells SDXL's two encoders apart by their widths.
_SMALL["text_encoder_2"] = {**_SMALL["text_encoder"], "hidden_size": 48, "projection_dim": 48}
_SMALL_UNET: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": [16, 32, 32, 32], "cross_attention_dim": 32},
    "sd2": {"block_out_channels": [16, 32, 32, 32], "cross_attention_dim": 32,
            "attention_head_dim": [1, 2, 4, 4]},
    "sdxl": {"block_out_channels": [16, 32, 64], "cross_attention_dim": 80,
             "attention_head_dim": [1, 2, 4], "transformer_layers_per_block": [1, 1, 2],
             "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 96},
}  # fmt: skip


def build_like(released: Path, folder: Path, seed: int = 0) -> Any:
    """A small random pipeline with the blocks of a released one; its configuration in ``folder``.

    Args:
        released: a configuration of the package: 'sd1', 'sd2' or 'sdxl'.
        folder: gets the configuration, with CLIP's own vocabulary left out.
        seed: of the weights.
    """
    compat.install()
    import diffusers
    import torch
    import transformers

    from diffagent.render.diffusers.checkpoints import _tokenizers

    torch.manual_seed(seed)
    index = json.loads((released / "model_index.json").read_text())
    parts: dict[str, Any] = _tokenizers(released)
    for file in released.rglob("*.json"):
        target = folder / file.relative_to(released)
        target.parent.mkdir(parents=True, exist_ok=True)
        told = json.loads(file.read_text())
        name = file.parent.name
        told |= _SMALL.get(name, {}) | (_SMALL_UNET[released.name] if name == "unet" else {})
        target.write_text(json.dumps(told))
        if name in {"unet", "vae"}:
            kind = getattr(diffusers, told["_class_name"])
            parts[name] = kind.from_config(kind.load_config(target.parent))
        elif name.startswith("text_encoder"):
            kind = getattr(transformers, index[name][1])
            parts[name] = kind(transformers.CLIPTextConfig.from_pretrained(target.parent))
        elif name == "scheduler":
            parts[name] = getattr(diffusers, told["_class_name"]).from_pretrained(target.parent)
    if released.name != "sdxl":
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    pipeline = getattr(diffusers, index["_class_name"])(**parts)
    return pipeline.to(torch.float16).to(torch.float32)


def save_single_file(pipeline: Any, path: Path, dtype: torch.dtype | None = None) -> None:
    """Write the pipeline's weights in the layout of its family; fp16 unless told otherwise."""
    from safetensors.torch import save_file

    tensors = single_file_tensors(
        pipeline.unet,
        pipeline.vae,
        pipeline.text_encoder,
        getattr(pipeline, "text_encoder_2", None),
    )
    save_file({name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}, path)


def save_kohya_lora(pipeline: Any, path: Path, seed: int = 0, rank: int = 2) -> None:
    """A random LoRA on the cross-attention and on the text encoder, in kohya's names."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for model, prefix, leaf in (
        (pipeline.unet, "lora_unet_", "attn2.to_k"),
        (pipeline.text_encoder, "lora_te_text_model_", "_proj"),
    ):
        for name, module in model.named_modules():
            if name.endswith(leaf):
                # transformers 5 has no `text_model` level any more; the file format does.
                key = prefix + name.removeprefix("text_model.").replace(".", "_")
                up, down = (module.weight.shape[0], rank), (rank, module.weight.shape[1])
                tensors[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator)
                tensors[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator)
                tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    assert tensors
    save_file(tensors, path)

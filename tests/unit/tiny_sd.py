"""A Stable Diffusion of 0.2 M random parameters, saved in the single-file layout of SD 1.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffagent import compat, sandbox
from diffagent.sandbox.single_file import single_file_tensors

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


def save_single_file(pipeline: Any, path: Path) -> None:
    """Write the pipeline's weights in the layout of SD 1.5."""
    from safetensors.torch import save_file

    save_file(single_file_tensors(pipeline.unet, pipeline.vae, pipeline.text_encoder), path)


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

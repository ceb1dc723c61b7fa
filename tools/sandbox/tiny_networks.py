"""Networks of the sandbox's generator: Stable Diffusion 1.5 at a few million parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffagent.sandbox.world import SIZE
from tools.sandbox.caption_tokenizer import MAX_LENGTH

_SANDBOX = Path(__file__).parents[2] / "diffagent" / "sandbox"
CONFIG_DIR = _SANDBOX / "config" / "sd15-tiny"
"""Pipeline directory of diffusers without weights, for `from_single_file(config=...)`."""

WEIGHTS_DIR = _SANDBOX / "weights"
"""Committed weights, fp16 safetensors."""

LATENT_CHANNELS, LATENT_SIZE = 4, SIZE // 8
TEXT_WIDTH = 128
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_vae(scaling_factor: float = 1.0) -> Any:
    """Returns an AutoencoderKL of 1 M parameters: f8, four latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
        scaling_factor=scaling_factor,
    )


def build_text_encoder(tokenizer: Any) -> Any:
    """Returns a CLIPTextModel of two layers for the sandbox's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> Any:
    """Returns a UNet2DConditionModel over 8 x 8 x 4 latents, attention at the full latent size."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(80, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers uses it as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> Any:
    """Returns the noise schedule of Stable Diffusion 1.5."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        **BETAS,
        num_train_timesteps=1000,
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )


def assemble(unet: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> Any:
    """Returns a StableDiffusionPipeline of its parts."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_config(pipeline: Any) -> None:
    """Writes the pipeline's configuration and tokenizer, without weights, to `CONFIG_DIR`."""
    pipeline.save_config(CONFIG_DIR)
    pipeline.scheduler.save_pretrained(CONFIG_DIR / "scheduler")
    for name in ("unet", "vae"):
        getattr(pipeline, name).save_config(CONFIG_DIR / name)
    pipeline.text_encoder.config.save_pretrained(CONFIG_DIR / "text_encoder")


def build_pipeline(path: Path) -> Any:
    """Loads a single-file sandbox checkpoint as a StableDiffusionPipeline, without downloads."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_single_file(
        str(path), config=str(CONFIG_DIR), local_files_only=True, safety_checker=None
    )

"""The renderer on diffusers: checkpoints, adapters, prompts, denoising."""

"""Configuration of the stage ``sft``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffagent.train.training_config import CHECKPOINTING, TrainingConfig


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on (prompt, API) pairs."""

    model: str = Field(
        default="tiny-llama",
        description="any causal LM by path or by name, NAME@REVISION to pin it; 'tiny-llama' "
        "is built from config, 'smollm2-135m' is in a package (extra smollm2)",
    )
    hidden_size: int = Field(default=128, ge=16, description="tiny-llama only")
    num_hidden_layers: int = Field(default=4, ge=1, description="tiny-llama only")
    vocab_size: int = Field(default=2048, ge=300, description="tiny-llama only: byte-level BPE")
    gradient_checkpointing: float = Field(default=0, ge=0, le=1, description=CHECKPOINTING)
    per_device_train_batch_size: int = Field(default=16, ge=1, description="rows of a batch")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of AdamW")
    batching: Literal["random", "by_length", "packed"] = Field(
        default="random",
        description="'by_length': rows of a batch have about the same length; 'packed': a row "
        "holds as many examples as fit into max_length, and no example attends to another",
    )
    eval_prompts: int = Field(
        default=1000,
        ge=1,
        description="with eval_steps: prompts of the validation split, drawn by the seed",
    )

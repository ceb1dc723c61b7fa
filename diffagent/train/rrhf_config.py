"""Configuration of the stage ``rrhf``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffagent.train.training_config import CHECKPOINTING, TrainingConfig


class RRHFConfig(TrainingConfig):
    """Training on ranked candidates: RRHF, equations 1 to 4 of arXiv 2304.05302, and others."""

    loss: Literal["rrhf", "dpo", "simpo", "gspo"] = Field(
        default="rrhf",
        description="ranking term (diffagent.train.losses.ranking_loss); to use the other three as "
        "published, set pairs: mean and sft_weight: 0",
    )
    formulation: Literal["packed", "padded"] = Field(
        default="packed",
        description="'packed': the candidates of a prompt share one pass over it, where the model "
        "can; 'padded': one row a candidate. The loss is the same",
    )
    gradient_checkpointing: float = Field(default=0.3, ge=0, le=1, description=CHECKPOINTING)
    per_device_train_batch_size: int = Field(default=4, ge=1, description="prompts per batch")
    eval_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="with eval_steps: share of the ranked prompts to hold out for evaluation",
    )
    rank_weight: float = Field(default=1.0, ge=0, description="weight of the ranking term")
    sft_weight: float = Field(
        default=1.0, ge=0, description="weight of the fine-tuning term (L_ft)"
    )
    length_normalization: bool = Field(
        default=True, description="'rrhf': equation 1 divides by |y|; 'simpo' always does"
    )
    pairs: Literal["sum", "mean"] = Field(
        default="sum",
        description="reduction of equation 2 over the pairs of a prompt; the paper's is 'sum'",
    )
    margin: float = Field(
        default=0.0, ge=0, description="margin of a pair, 0 in the paper; gamma of 'simpo'"
    )
    beta: float = Field(default=0.1, gt=0, description="beta of 'dpo' and 'simpo'; SimPO uses 2")
    clip: float = Field(default=0.2, gt=0, description="'gspo': limit of the likelihood ratio")

"""Settings of training that the stages ``sft`` and ``rrhf`` share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from diffagent.schemas.section import Section

_BF16 = (
    "matrix products in bfloat16 (autocast), weights in float32; null: on a GPU that supports it. "
    "A CPU with AMX gains, too"
)
CHECKPOINTING = (
    "share of the layers, from the first on, whose activations are recomputed in the backward "
    "pass: less memory for more time; 1: all layers"
)


LRScheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]


class TrainingConfig(Section):
    """Settings that SFT and RRHF share; names as in transformers and PEFT."""

    lora_rank: int = Field(
        default=0, ge=0, le=512, description="rank of LoRA adapters; 0 trains all parameters"
    )
    lora_alpha: float | None = Field(
        default=None, gt=0, description="an adapter is scaled by alpha / rank; null: twice the rank"
    )
    lora_dropout: float = Field(default=0, ge=0, lt=1, description="dropout of an adapter's input")
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="modules with an adapter, e.g. [q_proj, v_proj]"
    )
    bf16: bool | None = Field(default=None, description=_BF16)
    num_train_epochs: float = Field(default=3, gt=0, description="passes over the training data")
    max_steps: int = Field(
        default=-1, ge=-1, description="optimizer steps; -1: num_train_epochs decides"
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="batches per optimizer step"
    )
    learning_rate: float = Field(
        default=2e-5, gt=0, description="highest learning rate, after the warm-up"
    )
    lr_scheduler_type: LRScheduler = Field(
        default="linear", description="schedule of the learning rate after the warm-up"
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="warm-up as a share of the steps"
    )
    max_length: int = Field(
        default=512, ge=32, description="tokens of prompt and response together"
    )
    save_steps: int = Field(
        default=200,
        ge=1,
        description="steps between checkpoints to resume from; with eval_steps they are written "
        "after each evaluation",
    )
    eval_steps: int = Field(
        default=0,
        ge=0,
        description="steps between evaluations of the loss on held-out prompts; the last step is "
        "evaluated too; 0: none",
    )
    load_best_model_at_end: bool = Field(
        default=True,
        description="with eval_steps: keep the checkpoint with the lowest evaluation loss; false: "
        "the last one",
    )
    seed: int = Field(
        default=0, ge=0, description="seed of initial weights, order of the data and dropout"
    )

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        adapter = ("lora_alpha", "lora_dropout", "lora_target_modules")
        fields = type(self).model_fields
        idle = [n for n in adapter if getattr(self, n) != fields[n].default]
        if idle and not self.lora_rank:
            raise ValueError(f"{', '.join(idle)}: only for adapters; set a lora_rank above 0")
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules names no module; leave it out for all-linear")
        return self

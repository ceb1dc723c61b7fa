"""Settings of training that the stages ``sft`` and ``rrhf`` share."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from diffagent.schemas.section import Section

_BF16 = (
    "products of matrices in bfloat16 (autocast), weights in float32; null: on a GPU that has it. "
    "Worth its while on a CPU with AMX, too"
)
CHECKPOINTING = (
    "share of the layers, the first ones, whose activations are made again in the backward pass: "
    "less memory for more time; true: all"
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

    lora_rank: int = Field(default=0, ge=0, le=512, description="0 trains all parameters")
    lora_alpha: float | None = Field(
        default=None, gt=0, description="scale of an adapter is alpha / rank; null: twice the rank"
    )
    lora_dropout: float = Field(default=0, ge=0, lt=1, description="of an adapter's input")
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="modules that get an adapter: [q_proj, v_proj], ..."
    )
    bf16: bool | None = Field(default=None, description=_BF16)
    num_train_epochs: float = Field(default=3, gt=0)
    max_steps: int = Field(default=-1, ge=-1, description="-1: by epochs")
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    lr_scheduler_type: LRScheduler = Field(
        default="linear", description="course of the learning rate after the warm-up"
    )
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of the steps")
    max_length: int = Field(default=512, ge=32, description="tokens of prompt + response")
    save_steps: int = Field(
        default=200,
        ge=1,
        description="steps between checkpoints to resume from; with eval_steps they are written "
        "after each evaluation",
    )
    eval_steps: int = Field(
        default=0,
        ge=0,
        description="steps between measurements of the loss on prompts that are not trained on; "
        "the last step is measured too; 0: none",
    )
    load_best_model_at_end: bool = Field(
        default=True,
        description="with eval_steps: the agent is the checkpoint with the lowest loss there, "
        "else the last",
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        adapter = ("lora_alpha", "lora_dropout", "lora_target_modules")
        fields = type(self).model_fields
        idle = [n for n in adapter if getattr(self, n) != fields[n].default]
        if idle and not self.lora_rank:
            raise ValueError(f"{', '.join(idle)}: of adapters, which need a lora_rank above 0")
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules names no module; leave it out for all-linear")
        return self

"""What both stages of training share: arguments, adapters, and a run that survives a kill."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from diffagent.agent.llm import hide_progress_bars
from diffagent.errors import TrainingError
from schemas.config import RRHFConfig, SFTConfig

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LOGGING_STEPS = 20


def training_arguments(
    config: SFTConfig | RRHFConfig, out: Path, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of ``transformers.TrainingArguments`` and its subclasses."""
    bf16 = config.bf16
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return {
        "output_dir": str(out / CHECKPOINTS),
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_ratio,  # below 1 it is a fraction of all steps
        "lr_scheduler_type": "linear",
        "weight_decay": getattr(config, "weight_decay", 0.0),
        "activation_checkpointing": False,  # `prepare` does it; TRL would, of all layers
        "bf16": bf16,
        "use_cpu": device.type == "cpu",
        "seed": config.seed,
        "save_steps": config.save_steps,
        "save_total_limit": 1,
        "logging_steps": LOGGING_STEPS,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": not sys.stderr.isatty(),
    }


def enable_checkpointing(model: Any, share: float) -> None:
    """Make the activations of a share of the layers again in the backward pass.

    These are the first ones: their turn comes when the memory of the others is free. To keep
    nothing of some layers costs less time than to keep a part of all.
    """
    if not share:
        return
    model.activation_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[math.ceil(share * len(layers)) :]:
        layer.gradient_checkpointing = False


def weights_dtype(lora_rank: int, device: torch.device) -> torch.dtype:
    """float32, but bfloat16 for the frozen base of an adapter on CUDA."""
    return torch.bfloat16 if lora_rank and device.type == "cuda" else torch.float32


def prepare(model: Any, config: SFTConfig | RRHFConfig) -> Any:
    """``model`` with adapters on all linear layers and checkpointing, where asked for."""
    if not config.lora_rank:
        enable_checkpointing(model, config.gradient_checkpointing)
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = get_peft_model(model, lora)
    enable_checkpointing(model, config.gradient_checkpointing)
    return model


def merged(model: Any) -> Any:
    """The plain model: adapters are folded into its weights, so every agent loads alike."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def fit(trainer: Trainer) -> dict[str, float | int]:
    """Train, from the last whole checkpoint of an interrupted run when there is one.

    The continuation is the one that the undisturbed run would have made: data order, optimizer,
    schedule and random state come from the checkpoint.

    Returns:
        Steps, resumed step, first and last logged loss.

    Raises:
        TrainingError: the loss is not finite.
    """
    hide_progress_bars()
    trainer.remove_callback(PrinterCallback)  # the library prints nothing
    trainer.add_callback(_LogCallback())
    checkpoint = last_checkpoint(Path(str(trainer.args.output_dir)))
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics: dict[str, float | int] = {"steps": trainer.state.global_step}
    if checkpoint is not None:
        metrics["resumed_at_step"] = int(checkpoint.name.rpartition("-")[2])
    if losses:
        metrics |= {"first_loss": losses[0], "last_loss": losses[-1]}
    return metrics


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end; broken ones are removed.

    Trainer writes its state last, so a checkpoint with a readable state is whole.
    """
    found = sorted(
        directory.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True
    )
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            log.warning("%s was not written to its end; it is removed", checkpoint)
            shutil.rmtree(checkpoint)
        else:
            return checkpoint
    return None


def discard_checkpoints(out: Path) -> None:
    """Remove the checkpoints of a finished run.

    Renamed first: half-removed ones must not be taken for whole ones after a kill.
    """
    discarded = out / f".{CHECKPOINTS}.discarded"
    shutil.rmtree(discarded, ignore_errors=True)
    if (out / CHECKPOINTS).exists():
        (out / CHECKPOINTS).rename(discarded)
        shutil.rmtree(discarded)


class _LogCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Logs what Trainer would print, and stops when the loss is no number."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"the loss is {logs['loss']} at step {state.global_step}: training has diverged; "
                "lower learning_rate"
            )
        told = {k: v for k, v in logs.items() if isinstance(v, int | float)}
        told.pop("num_tokens", None)  # TRL counts one row of a packed batch
        numbers = " ".join(f"{name} {value:.4g}" for name, value in told.items())
        log.info("step %d of %d: %s", state.global_step, state.max_steps, numbers)

"""The parts that both stages of training share: arguments, adapters, resumption.

Every step is logged, so that the log of a resumed run is that of an undisturbed one; people are
shown every `LOGGING_STEPS`-th.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from diffagent.agent.lm.llm import hide_progress_bars
from diffagent.errors import TrainingError
from diffagent.store import atomic_file
from diffagent.train.report_to import ReportTo
from diffagent.train.rrhf_config import RRHFConfig
from diffagent.train.sft_config import SFTConfig

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LOGGING_STEPS = 20
#: Fields of a step in the stored log: nothing in it depends on the clock or the machine's load.
LOGGED = (
    "epoch",
    "learning_rate",
    "loss",
    "rank_loss",
    "sft_loss",
    "grad_norm",
    "mean_token_accuracy",
    "eval_loss",
    "eval_mean_token_accuracy",
)


def training_arguments(
    config: SFTConfig | RRHFConfig, out: Path, device: torch.device
) -> dict[str, Any]:
    """Keyword arguments of ``transformers.TrainingArguments`` and its subclasses.

    They name no device but the CPU: see `place`.
    """
    evaluates = config.eval_steps > 0
    best = evaluates and config.load_best_model_at_end
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
        "lr_scheduler_type": config.lr_scheduler_type,
        "weight_decay": getattr(config, "weight_decay", 0.0),
        "activation_checkpointing": False,  # `prepare` does it; TRL would, of all layers
        "bf16": bf16,
        "use_cpu": device.type == "cpu",
        "seed": config.seed,
        "save_steps": config.eval_steps or config.save_steps,
        "save_total_limit": 2 if best else 1,  # the last one and the best one
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps or None,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "prediction_loss_only": True,
        "load_best_model_at_end": best,
        "metric_for_best_model": "eval_loss" if best else None,
        "greater_is_better": False if best else None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "disable_tqdm": not sys.stderr.isatty(),
    }


def place(args: TrainingArguments, device: torch.device | None = None) -> None:
    """Let one process train on one device.

    Left alone, transformers takes the first GPU whatever was asked for, and wraps the model in
    ``DataParallel`` when there are more, which the packed pass evades. Several GPUs are for several
    processes (torchrun), each of which has its own.

    Args:
        args: of the run; changed.
        device: where to train; None for the device of ``args``.
    """
    if args.world_size > 1:
        return
    if device is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        args.__dict__["_setup_devices"] = device  # what `args.device` has cached
        args.distributed_state.device = device  # where accelerate puts batches
    if args.n_gpu > 1:
        log.info("training on %s, one of %d GPUs; torchrun uses several", args.device, args.n_gpu)
        args._n_gpu = 1


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
    """``model`` with adapters and checkpointing, where asked for.

    Raises:
        TrainingError: the model has none of ``lora_target_modules``.
    """
    if not config.lora_rank:
        enable_checkpointing(model, config.gradient_checkpointing)
        return model
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            model = get_peft_model(model, lora)
        except ValueError as error:
            raise TrainingError(f"lora_target_modules: {error}") from error
    enable_checkpointing(model, config.gradient_checkpointing)
    return model


def merged(model: Any) -> Any:
    """The plain model: adapters are folded into its weights, so every agent loads alike."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@dataclass(frozen=True)
class Fit:
    """The results of a run of training.

    Attributes:
        metrics: steps; step that it was resumed at; mean loss of the first and of the last
            `LOGGING_STEPS` steps; where measured, the last loss on held-out prompts, the lowest,
            and the step of the weights that were kept.
        history: a row a step with what there is of `LOGGED`, and ``step``.
    """

    metrics: dict[str, float | int]
    history: list[dict[str, float | int]]


def fit(trainer: Trainer, report_to: ReportTo | None = None) -> Fit:
    """Train, from the last whole checkpoint of an interrupted run when there is one.

    The continuation is the one that the undisturbed run would have made: data order, optimizer,
    schedule, random state and best checkpoint come from the checkpoint.

    Args:
        trainer: of either stage.
        report_to: who else gets each step's numbers.

    Raises:
        TrainingError: the loss is not finite.
    """
    hide_progress_bars()
    trainer.remove_callback(PrinterCallback)  # the library prints nothing
    trainer.add_callback(_LogCallback())
    for callback in report_to.callbacks() if report_to else ():
        trainer.add_callback(callback)
    checkpoint = last_checkpoint(Path(str(trainer.args.output_dir)))
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint.name)
        _name_best_checkpoint(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    metrics: dict[str, float | int] = {"steps": state.global_step}
    if checkpoint is not None:
        metrics["resumed_at_step"] = int(checkpoint.name.rpartition("-")[2])
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    if losses:
        for name, part in (("first", losses[:LOGGING_STEPS]), ("last", losses[-LOGGING_STEPS:])):
            metrics[f"{name}_loss"] = sum(part) / len(part)
    evaluated = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    if evaluated:
        metrics |= {"eval_loss": evaluated[-1], "best_eval_loss": min(evaluated)}
        best = state.best_global_step if trainer.args.load_best_model_at_end else None
        metrics["kept_step"] = best or state.global_step
    return Fit(metrics, _history(state.log_history))


def _history(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float | int]]:
    rows: dict[int, dict[str, float | int]] = {}
    for entry in log_history:
        values = {n: entry[n] for n in LOGGED if n in entry and math.isfinite(entry[n])}
        if "loss" in entry or "eval_loss" in entry:
            rows.setdefault(entry["step"], {"step": entry["step"]}).update(values)
    return [rows[step] for step in sorted(rows)]


def _name_best_checkpoint(checkpoint: Path) -> None:
    """Correct the path of the best checkpoint, which is where the store was when it was written."""
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_bytes())
    if best := state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = str(checkpoint.with_name(Path(best).name))
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


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
        if not logs or not logs.keys() & {"loss", "eval_loss"}:
            return
        loss = logs.get("loss", logs.get("eval_loss", 0))
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}: training has diverged; "
                "lower learning_rate"
            )
        if state.global_step % LOGGING_STEPS and "eval_loss" not in logs:
            return
        numbers = " ".join(f"{name} {logs[name]:.4g}" for name in LOGGED if name in logs)
        log.info("step %d of %d: %s", state.global_step, state.max_steps, numbers)

"""SFTA, stage 1: supervised fine-tuning on (prompt, API) pairs, loss on the response only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig as TRLConfig
from trl import SFTTrainer, pack_dataset

from diffagent.agent.lm.format import Example, encode_example, response_text
from diffagent.agent.lm.llm import AgentInfo, align_special_tokens, save_agent
from diffagent.agent.lm.smollm2 import SMOLLM2, load_smollm2
from diffagent.agent.prompts import draw, read_split
from diffagent.device import resolve_device
from diffagent.errors import TrainingError
from diffagent.pretrained import load_model, load_tokenizer
from diffagent.store import StageContext, StageResult
from diffagent.train import fit
from diffagent.train.agent_card import TrainingFacts, write_card
from diffagent.train.collate import PackCollator
from diffagent.train.report_to import ReportTo
from diffagent.train.sft_config import SFTConfig
from diffagent.train.tiny_llama import build_model, build_tokenizer

log = logging.getLogger(__name__)

TINY_LLAMA = "tiny-llama"


class EpochLengthSampler(LengthGroupedSampler):  # type: ignore[misc]  # transformers is untyped
    """Batches of equal lengths whose order depends on (seed, epoch) alone.

    transformers' own draws from the global generator, so that a run that is resumed in a later
    epoch would go on in another order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class ResponseTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """TRL's SFTTrainer without its telemetry and its model card, and with batches by length.

    One process trains on one device.
    """

    def __init__(self, *, args: TRLConfig, **options: Any) -> None:
        fit.place(args)
        super().__init__(args=args, **options)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        args, rows = self.args, train_dataset or self.train_dataset
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = args.train_batch_size * args.gradient_accumulation_steps
        return EpochLengthSampler(batch, [len(ids) for ids in rows["input_ids"]], args.seed)

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """An agent directory has agent.json."""


def train(config: SFTConfig, context: StageContext) -> StageResult:
    """DABench's train split -> agent directory."""
    dabench = context.one("dabench")
    device = resolve_device(context.runtime.device)
    train = read_split(dabench.path, "train")
    pairs = [(pair.prompt, response_text(pair.api)) for pair in train]
    report_to = ReportTo.of(context, "sft")
    model, tokenizer = load_base(config, pairs, fit.weights_dtype(config.lora_rank, device))
    examples, counts = encode_pairs(tokenizer, pairs, config.max_length)
    held_out: list[Example] = []
    if config.eval_steps:
        held_out, _ = encode_pairs(tokenizer, _validation(config, dabench.path), config.max_length)
    trainer = build_trainer(
        config, model, tokenizer, examples, out=context.out, device=device, held_out=held_out
    )
    fitted = fit.fit(trainer, report_to)
    info = AgentInfo(
        # A path would name this machine; its last part says enough.
        base_model=Path(config.model).name if Path(config.model).exists() else config.model,
        trained_by=("sft",),
        max_length=config.max_length,
    )
    save_agent(context.out, fit.merged(trainer.model), tokenizer, info, dabench.path)
    counts |= {"eval_examples": len(held_out)} if held_out else {}
    counts["parameters"] = model.num_parameters()
    metrics = {k: v for k, v in fitted.metrics.items() if k != "resumed_at_step"} | counts
    facts = TrainingFacts("sft", info, config, dabench, metrics, fitted.history)
    write_card(context.out, facts)
    fit.discard_checkpoints(context.out)
    return StageResult(
        rows={"pairs": len(pairs), "examples": len(examples)}, metrics=fitted.metrics | metrics
    )


def _validation(config: SFTConfig, dabench: Path) -> list[tuple[str, str]]:
    """The pairs of the validation split whose loss is measured."""
    drawn = draw(read_split(dabench, "validation"), config.eval_prompts, config.seed)
    return [(pair.prompt, response_text(pair.api)) for pair in drawn]


def build_trainer(
    config: SFTConfig,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    out: Path,
    device: torch.device,
    held_out: Sequence[Example] = (),
) -> ResponseTrainer:
    """The trainer of a run, whose batches are made as ``config.batching`` says.

    Args:
        config: of the stage.
        model: to train.
        tokenizer: of the model.
        examples: to train on.
        out: directory of the run.
        device: where to train.
        held_out: examples whose loss is measured, where ``config.eval_steps`` says so.
    """
    batching = config.batching
    if batching == "packed" and not keeps_packs_apart(model, examples):
        log.warning("%s cannot read packed rows; batching by length", type(model).__name__)
        batching = "by_length"
    args = TRLConfig(
        **fit.training_arguments(config, out, device),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=config.max_length,
        train_sampling_strategy="group_by_length" if batching == "by_length" else "random",
    )
    fit.place(args, device)

    def rows(chosen: Sequence[Example]) -> Dataset:
        columns = ("input_ids", "labels")
        table = Dataset.from_dict({name: [getattr(e, name) for e in chosen] for name in columns})
        return pack_dataset(table, config.max_length, "bfd") if batching == "packed" else table

    return ResponseTrainer(
        model=fit.prepare(model, config),
        args=args,
        data_collator=PackCollator(tokenizer.pad_token_id) if batching == "packed" else None,
        train_dataset=rows(examples),
        eval_dataset=rows(held_out) if held_out else None,
        processing_class=tokenizer,
    )


def keeps_packs_apart(model: Any, examples: Sequence[Example]) -> bool:
    """Whether an example's logits stay the same behind another one, tried on two short ones."""
    first, *rest = sorted(examples, key=lambda example: len(example.input_ids))
    second = rest[0] if rest else first
    row = {"input_ids": first.input_ids + second.input_ids, "labels": first.labels + second.labels}
    lengths = [len(first.input_ids), len(second.input_ids)]
    batch = PackCollator(0)([{**row, "seq_lengths": lengths}])
    alone = torch.tensor([second.input_ids], device=model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = model(
                input_ids=batch["input_ids"].to(model.device),
                position_ids=batch["position_ids"].to(model.device),
                use_cache=False,
            ).logits[:, lengths[0] :]
            expected = model(input_ids=alone, use_cache=False).logits
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        log.warning("%s cannot take positions: %s", type(model).__name__, error)
        return False
    finally:
        model.train(training)
    tolerance = 5e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool((packed - expected).abs().max() < tolerance * expected.abs().max().clamp(min=1))


def load_base(
    config: SFTConfig, pairs: list[tuple[str, str]], dtype: torch.dtype
) -> tuple[Any, Any]:
    """Model and tokenizer to start from: a model of ours by its name, or any causal LM.

    Raises:
        TrainingError: the model cannot be loaded.
    """
    if config.model == TINY_LLAMA:
        tokenizer = build_tokenizer((text for pair in pairs for text in pair), config.vocab_size)
        model = build_model(
            tokenizer,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            seed=config.seed,
        )
    elif config.model == SMOLLM2:
        model, tokenizer = load_smollm2(dtype)
    else:
        from transformers import AutoModelForCausalLM

        try:
            tokenizer = load_tokenizer(config.model)
            model = load_model(AutoModelForCausalLM, config.model, dtype=dtype)
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"sft.model: cannot load {config.model!r}: {error}; give the name of a causal LM "
                "on the Hugging Face hub (or NAME@REVISION), a local directory with safetensors, "
                "'smollm2-135m' or 'tiny-llama'"
            ) from error
    align_special_tokens(model, tokenizer)
    return model, tokenizer


def encode_pairs(
    tokenizer: Any, pairs: list[tuple[str, str]], max_length: int
) -> tuple[list[Example], dict[str, int]]:
    """Examples, and how many prompts were cut and how many pairs did not fit at all.

    Raises:
        TrainingError: no pair fits.
    """
    encoded = [encode_example(tokenizer, prompt, text, max_length) for prompt, text in pairs]
    examples = [example for example in encoded if example is not None]
    counts = {
        "responses_too_long": len(encoded) - len(examples),
        "prompts_cut": sum(example.prompt_tokens_cut > 0 for example in examples),
        "longest_example": max((len(example.input_ids) for example in examples), default=0),
    }
    if not examples:
        raise TrainingError(f"no response fits into max_length {max_length}; raise it")
    if counts["responses_too_long"] or counts["prompts_cut"]:
        log.warning("max_length %d: %s", max_length, counts)
    return examples, counts

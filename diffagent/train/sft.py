"""SFTA, stage 1: supervised fine-tuning on (prompt, API) pairs, loss on the response only.

``python -m diffagent.train.sft RUN.json`` runs the stage by hand (see diffagent.run_stage).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig as TRLConfig
from trl import SFTTrainer

from diffagent.agent.format import Example, encode_example, response_text
from diffagent.agent.llm import AgentInfo, align_special_tokens, save_agent
from diffagent.agent.prompts import read_split
from diffagent.artifacts import StageContext, StageResult, named_files, stage
from diffagent.device import resolve_device
from diffagent.errors import TrainingError
from diffagent.train import fit
from diffagent.train.sandbox_llama import build_model, build_tokenizer
from diffagent.train.smollm2 import SMOLLM2, load_smollm2
from schemas.config import SFTConfig

log = logging.getLogger(__name__)

SANDBOX_MODEL = "sandbox-llama"


class ResponseTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """TRL's SFTTrainer without its telemetry and its model card."""

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """An agent directory has agent.json."""


@stage("sft", version=2, config=SFTConfig, files=lambda config: named_files(config.model))
def train_sft(config: SFTConfig, context: StageContext) -> StageResult:
    """DABench's train split -> agent directory."""
    dabench = context.one("dabench")
    device = resolve_device(context.runtime.device)
    train = read_split(dabench.path, "train")
    pairs = [(pair.prompt, response_text(pair.api)) for pair in train]
    model, tokenizer = load_base(config, pairs, fit.weights_dtype(config.lora_rank, device))
    examples, counts = encode_pairs(tokenizer, pairs, config.max_length)
    trainer = ResponseTrainer(
        model=fit.add_lora(model, config),
        args=TRLConfig(
            **fit.training_arguments(config, context.out, device),
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=config.max_length,
        ),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [example.input_ids for example in examples],
                "labels": [example.labels for example in examples],
            }
        ),
        processing_class=tokenizer,
    )
    metrics = fit.fit(trainer)
    info = AgentInfo(
        # A path would name this machine; its last part says enough.
        base_model=Path(config.model).name if Path(config.model).exists() else config.model,
        trained_by=("sft",),
        max_length=config.max_length,
    )
    save_agent(context.out, fit.merged(trainer.model), tokenizer, info, dabench.path)
    fit.discard_checkpoints(context.out)
    return StageResult(
        rows={"pairs": len(pairs), "examples": len(examples)},
        metrics={**metrics, **counts, "parameters": model.num_parameters()},
    )


def load_base(
    config: SFTConfig, pairs: list[tuple[str, str]], dtype: torch.dtype
) -> tuple[Any, Any]:
    """Model and tokenizer to start from: a model of ours by its name, or any causal LM.

    Raises:
        TrainingError: the model cannot be loaded.
    """
    if config.model == SANDBOX_MODEL:
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
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(config.model)
            model = AutoModelForCausalLM.from_pretrained(
                config.model, dtype=dtype, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"sft.model: cannot load {config.model!r}: {error}; give the name of a causal LM "
                "on the Hugging Face hub, a local directory with safetensors, 'smollm2-135m' or "
                "'sandbox-llama'"
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


if __name__ == "__main__":
    import sys

    from diffagent.run_stage import main

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main(sys.argv[1])

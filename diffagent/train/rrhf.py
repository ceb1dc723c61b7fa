"""SFTA, stage 2: RRHF on candidates ranked by the unified reward of their pictures."""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from diffagent.agent.lm.format import encode_responses
from diffagent.agent.lm.llm import (
    AgentInfo,
    align_special_tokens,
    load_causal_lm,
    read_info,
    save_agent,
)
from diffagent.agent.prompts import draw_ids
from diffagent.device import resolve_device
from diffagent.errors import ArtifactError, TrainingError
from diffagent.rewards.scores import read_scores
from diffagent.schemas.tables import TRUNCATED
from diffagent.store import Artifact, StageContext, StageResult
from diffagent.train import fit
from diffagent.train.agent_card import TrainingFacts, write_card
from diffagent.train.collate import RankedPrompt, RRHFCollator
from diffagent.train.losses import INVALID_REWARD, RankingLoss, ranking_loss
from diffagent.train.passes import packs, response_logps
from diffagent.train.report_to import ReportTo
from diffagent.train.rrhf_config import RRHFConfig

log = logging.getLogger(__name__)

_KEY = ["prompt_id", "source", "candidate"]


class RankedPrompts(Dataset[RankedPrompt]):
    """Ranked prompts as a torch dataset."""

    def __init__(self, prompts: Sequence[RankedPrompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> RankedPrompt:
        return self.prompts[index]


class RRHFTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """transformers' Trainer with the losses of ``ranking_loss``.

    A batch is what ``RRHFCollator`` makes, ``per_device_train_batch_size`` counts prompts, and
    the loss is a mean over prompts. The two terms are logged as ``rank_loss`` and ``sft_loss``.
    Prompts are packed when the options say so and the model can; ``packed`` tells.

    Args:
        model: a causal LM.
        args: arguments of the run; ``remove_unused_columns`` must be False.
        rrhf: options of the loss.
        train_dataset: ranked prompts.
        processing_class: the model's tokenizer.
        eval_dataset: ranked prompts whose loss is measured and not trained on.
    """

    #: ``compute_loss`` divides by the prompts of all batches that make one step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        rrhf: RRHFConfig,
        train_dataset: RankedPrompts,
        processing_class: Any,
        *,
        eval_dataset: RankedPrompts | None = None,
    ) -> None:
        fit.place(args)
        model, pad_token_id = model.to(args.device), processing_class.pad_token_id
        # With several processes gradients are gathered by a wrapper, which the packed pass evades.
        self.packed = (
            rrhf.formulation == "packed"
            and args.world_size == 1
            and packs(model, train_dataset.prompts, pad_token_id)
        )
        if rrhf.formulation == "packed" and not self.packed:
            log.warning("training with one padded row a candidate, which is slower")
        collator = RRHFCollator(pad_token_id, self.packed)
        if rrhf.loss in ("dpo", "gspo"):
            train_dataset = RankedPrompts(with_reference(model, train_dataset.prompts, collator))
            if eval_dataset is not None:
                eval_dataset = RankedPrompts(with_reference(model, eval_dataset.prompts, collator))
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        self.rrhf = rrhf
        self._terms: defaultdict[str, float] = defaultdict(float)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of one optimizer step, and how many prompts all processes have in theirs."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        prompts = torch.tensor(sum(len(batch["rewards"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(prompts).sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch; as outputs, log-probabilities and lengths (P, K).

        With ``num_items_in_batch``, the prompts of one step, it is this batch's share of their
        mean, so that a batch of one prompt counts as one, also in a short last window.
        """
        with self.accelerator.autocast():
            logps, lengths = response_logps(model, inputs)
        loss = batch_loss(logps, lengths, inputs, self.rrhf)
        total, prompts = loss.total, len(inputs["rewards"])
        if num_items_in_batch is not None:
            share = prompts * self.accelerator.num_processes / num_items_in_batch
            total = total * share  # DDP averages over the processes
            self._terms["prompts"] += prompts
            self._terms["rank_loss"] += prompts * loss.rank.item()
            self._terms["sft_loss"] += prompts * loss.sft.item()
        return (total, {"logps": logps, "lengths": lengths}) if return_outputs else total

    def prediction_step(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        """The loss of one batch of held-out prompts, a mean over them; no outputs."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log; with a training loss the two terms, averaged over prompts since then."""
        if "loss" in logs and (prompts := self._terms.pop("prompts", 0)):
            logs = logs | {name: value / prompts for name, value in self._terms.items()}
            self._terms.clear()
        super().log(logs, start_time)


def batch_loss(
    logps: Tensor, lengths: Tensor, batch: dict[str, Tensor], config: RRHFConfig
) -> RankingLoss:
    """The loss of a collated batch given ``logps`` (P, K) and ``lengths`` (P, K)."""
    return ranking_loss(
        logps,
        lengths,
        batch["rewards"],
        batch["mask"],
        loss=config.loss,
        reference_logps=batch["reference_logps"],
        length_normalization=config.length_normalization,
        pairs=config.pairs,
        margin=config.margin,
        beta=config.beta,
        clip=config.clip,
        rank_weight=config.rank_weight,
        sft_weight=config.sft_weight,
    )


def with_reference(
    model: Any, prompts: Sequence[RankedPrompt], collator: RRHFCollator
) -> list[RankedPrompt]:
    """The prompts with the log-probabilities that ``model`` gives their candidates now."""
    result, training = [], model.training
    model.eval()
    for prompt in prompts:
        batch = {name: value.to(model.device) for name, value in collator([prompt]).items()}
        with torch.no_grad():
            logps, _ = response_logps(model, batch)
        result.append(replace(prompt, reference_logps=tuple(logps[0].tolist())))
    model.train(training)
    return result


def train(config: RRHFConfig, context: StageContext) -> StageResult:
    """SFT agent, candidates and their scores -> aligned agent directory."""
    agent = context.one("agent")
    device = resolve_device(context.runtime.device)
    info = read_info(agent.path)
    model, tokenizer = load_causal_lm(agent.path, fit.weights_dtype(config.lora_rank, device))
    align_special_tokens(model, tokenizer)
    report_to = ReportTo.of(context, "rrhf")
    ranked = rank(context.many("candidates"), context.many("scores"))
    ranked, held_out = hold_out(ranked, config)
    prompts, counts = encode_ranked(tokenizer, ranked, config.max_length, info.prompt_template)
    measured = None
    if held_out.height:
        measured = RankedPrompts(
            encode_ranked(tokenizer, held_out, config.max_length, info.prompt_template)[0]
        )
        counts["eval_prompts"] = len(measured)
    args = TrainingArguments(**fit.training_arguments(config, context.out, device))
    fit.place(args, device)
    trainer = RRHFTrainer(
        model=fit.prepare(model, config),
        args=args,
        rrhf=config,
        train_dataset=RankedPrompts(prompts),
        processing_class=tokenizer,
        eval_dataset=measured,
    )
    fitted = fit.fit(trainer, report_to)
    aligned = AgentInfo(
        base_model=info.base_model,
        trained_by=(*info.trained_by, "rrhf"),
        prompt_template=info.prompt_template,
        max_length=max(info.max_length, config.max_length),
    )
    dabench = context.one("dabench")
    save_agent(context.out, fit.merged(trainer.model), tokenizer, aligned, dabench.path)
    metrics = {k: v for k, v in fitted.metrics.items() if k != "resumed_at_step"} | counts
    write_card(
        context.out,
        TrainingFacts("rrhf", aligned, config, dabench, metrics, history=fitted.history),
    )
    fit.discard_checkpoints(context.out)
    return StageResult(rows={"prompts": len(prompts)}, metrics=fitted.metrics | metrics)


def hold_out(ranked: pl.DataFrame, config: RRHFConfig) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of prompts to train on, and those of prompts whose loss is measured.

    The latter are ``eval_fraction`` of all prompts, at least one, drawn by the seed; none without
    ``eval_steps``.

    Raises:
        TrainingError: there is only one prompt.
    """
    ids = draw_ids(ranked["prompt_id"].unique(), config.seed) if config.eval_steps else []
    if len(ids) == 1:
        raise TrainingError("there is one prompt, and none to measure; set rrhf.eval_steps to 0")
    chosen = pl.col("prompt_id").is_in(ids[: math.ceil(config.eval_fraction * len(ids))])
    return ranked.filter(~chosen), ranked.filter(chosen)


def rank(candidates: Sequence[Artifact], scores: Sequence[Artifact]) -> pl.DataFrame:
    """Every candidate with its reward.

    The reward is the mean unified score over the seeds that were rendered, INVALID_REWARD for a
    hallucination, and null where the answer was truncated or every render failed.

    Returns:
        Columns prompt_id, prompt, source, candidate, text, truncated, reward; the dataset's own
        response first within a prompt, then by source and candidate.

    Raises:
        ArtifactError: a candidate has no score, so the shards do not belong together.
        ScoreError: the scores are of different scorers, or unified in different ways.
    """
    answers = pl.concat([pl.read_parquet(a.file("candidates.parquet")) for a in candidates])
    judged = read_scores(scores)
    rewards = judged.group_by(_KEY).agg(
        pl.col("unified").filter(pl.col("status") == "ok").mean().alias("mean"),
        pl.len().alias("seeds"),
    )
    joined = answers.join(rewards, on=_KEY, how="left")
    unknown = joined.filter(pl.col("seeds").is_null())
    if len(unknown):
        raise ArtifactError(
            f"{len(unknown)} candidates have no score, the first of prompt "
            f"{unknown['prompt_id'][0]}; candidates and scores are of different runs"
        )
    truncated = (pl.col("reason") == TRUNCATED).fill_null(False)
    invalid = (pl.col("status") == "invalid") & ~truncated
    return joined.select(
        *_KEY[:1],
        "prompt",
        *_KEY[1:],
        "text",
        truncated.alias("truncated"),
        pl.when(invalid).then(INVALID_REWARD).otherwise(pl.col("mean")).alias("reward"),
    ).sort("prompt_id", pl.col("source") != "dabench", "source", "candidate")


def encode_ranked(
    tokenizer: Any, ranked: pl.DataFrame, max_length: int, template: str
) -> tuple[list[RankedPrompt], dict[str, int]]:
    """Ranked prompts for the trainer, and counts of what was left out and why.

    A candidate is left out when it was truncated, when its render failed, or when its text does
    not fit into ``max_length``; a prompt when no valid candidate is left. All candidates of a
    prompt follow the same tokens: see `encode_responses`.

    Raises:
        TrainingError: nothing is left to learn from.
    """
    names = ("truncated", "render_failed", "too_long", "invalid", "prompts_dropped", "prompts_cut")
    counts = {"candidates": len(ranked), **dict.fromkeys((*names, "pairs"), 0)}
    prompts = []
    for group in ranked.partition_by("prompt_id", maintain_order=True):
        judged = group.filter(pl.col("reward").is_not_null())
        truncated = int(group["truncated"].sum())
        counts["truncated"] += truncated
        counts["render_failed"] += group.height - judged.height - truncated
        texts = judged["text"].to_list()
        encoded = encode_responses(tokenizer, group["prompt"][0], texts, max_length, template)
        examples, rewards = [], []
        for example, reward in zip(encoded, judged["reward"].to_list(), strict=True):
            if example is None:
                counts["too_long"] += 1
                continue
            counts["invalid"] += reward == INVALID_REWARD
            examples.append(example)
            rewards.append(float(reward))
        if all(reward == INVALID_REWARD for reward in rewards):
            counts["prompts_dropped"] += 1
            continue
        counts["prompts_cut"] += examples[0].prompt_tokens_cut > 0
        counts["pairs"] += sum(a < b for a in rewards for b in rewards)
        prompts.append(RankedPrompt(tuple(examples), tuple(rewards)))
    if not prompts:
        raise TrainingError(
            f"no prompt has a valid, rendered candidate that fits into {max_length} tokens: "
            f"{counts}; look at the renders' reasons and at rrhf.max_length"
        )
    log.info("%d prompts to rank: %s", len(prompts), counts)
    return prompts, counts

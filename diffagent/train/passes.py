"""From a batch of ranked candidates to the log-probability of each: two ways, one result.

``packed_logps`` reads the prompt once for all its candidates and makes logits for response tokens
alone. ``padded_logps`` is the plain formulation, one padded row a candidate and all logits: it
works with every causal LM, and it is what the other is tested and measured against.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffagent.agent.lm.likelihood import sequence_logps
from diffagent.train.collate import RankedPrompt, RRHFCollator, block_mask
from diffagent.train.losses import token_logps

log = logging.getLogger(__name__)


def response_logps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of log-probabilities (P, K) and numbers of response tokens (P, K) of a batch.

    Args:
        model: a causal LM, perhaps with adapters.
        batch: what ``RRHFCollator`` makes, of either layout.
    """
    return (packed_logps if "segments" in batch else padded_logps)(model, batch)


def packed_logps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The fast formulation: T is the prompt's length and those of its responses, once each."""
    causal_lm = model.get_base_model() if hasattr(model, "peft_config") else model
    mask = block_mask(batch["segments"])
    if causal_lm.config._attn_implementation == "eager":  # adds its mask to the scores
        dtype = causal_lm.dtype
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    hidden = causal_lm.base_model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    head = causal_lm.get_output_embeddings()
    rows = hidden.flatten(0, 1)[batch["rows"]]
    logps = token_logps(rows, head.weight, head.bias, batch["targets"])
    grid, owners = batch["mask"], batch["owners"]
    sums = logps.new_zeros(grid.numel()).index_add(0, owners, logps)
    return sums.view(grid.shape), owners.bincount(minlength=grid.numel()).view(grid.shape)


def padded_logps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The plain formulation: logits (N, T, V) of one row a candidate."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    sums, counts = sequence_logps(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), batch["labels"]
    )
    mask = batch["mask"]
    lengths = torch.zeros_like(mask, dtype=counts.dtype).masked_scatter(mask, counts)
    return sums.new_zeros(mask.shape).masked_scatter(mask, sums), lengths


def packs(model: Any, prompts: Sequence[RankedPrompt], pad_token_id: int) -> bool:
    """Whether ``model`` gives the same log-probabilities packed, tried on the longest prompt.

    It does not where attention is no function of a mask and of ``position_ids`` (ALiBi in some
    models, recurrent layers, flash attention, a sliding window shorter than a candidate), or
    where logits are more than a product with the output embedding (soft caps, scales).
    """
    longest = max(prompts, key=lambda prompt: max(len(c.input_ids) for c in prompt.candidates))
    candidates = sorted(longest.candidates, key=lambda c: len(c.input_ids))[-2:]
    tried = [RankedPrompt(tuple(candidates), (0.0,) * len(candidates))]
    training = model.training
    model.eval()
    means = []
    try:
        for packed in (True, False):
            batch = RRHFCollator(pad_token_id, packed)(tried)
            batch = {name: value.to(model.device) for name, value in batch.items()}
            with torch.no_grad():
                sums, lengths = response_logps(model, batch)
            means.append(sums / lengths)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        log.warning("%s cannot take packed prompts: %s", type(model).__name__, error)
        return False
    finally:
        model.train(training)
    difference = (means[0] - means[1]).abs().max().item()
    # Rounding differs by much less, a wrong mask or position by much more.
    if difference < (5e-2 if model.dtype in (torch.bfloat16, torch.float16) else 3e-5):
        return True
    log.warning(
        "%s answers otherwise when prompts are packed (by %.2g a token)",
        type(model).__name__,
        difference,
    )
    return False

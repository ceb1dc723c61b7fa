"""How the next token is chosen, as logits processors for ``model.generate(do_sample=False)``.

Each leaves one finite score a row, so that one greedy loop with a key-value cache serves all of
them. Rows of one prompt lie next to each other: row = prompt * num_candidates + candidate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Decoding(Protocol):
    """A way to write ``num_candidates`` answers to each prompt."""

    @property
    def num_candidates(self) -> int:
        """Answers a prompt."""
        ...

    def processor(
        self, prompts: Sequence[str], prompt_length: int, max_new_tokens: int, eos_token_id: int
    ) -> Processor | None:
        """What chooses tokens for one batch; None for greedy."""
        ...


class Processor(Protocol):
    """The call that transformers makes at each step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Tokens so far (B, T) and logits (B, V) to scores (B, V)."""
        ...


@dataclass(frozen=True)
class Greedy:
    """The most probable token, always."""

    num_candidates: int = 1

    def processor(
        self, prompts: Sequence[str], prompt_length: int, max_new_tokens: int, eos_token_id: int
    ) -> None:
        """Nothing to change."""
        return None


@dataclass(frozen=True)
class TopP:
    """Temperature and nucleus sampling (arXiv 1904.09751).

    The random numbers of an answer depend on (seed, prompt, candidate) and on nothing else, so
    the company that a prompt has in its batch does not change its candidates.
    """

    num_candidates: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def processor(
        self, prompts: Sequence[str], prompt_length: int, max_new_tokens: int, eos_token_id: int
    ) -> Processor:
        """One uniform number a row and step picks from the nucleus by its inverse CDF."""
        draws = torch.stack(
            [
                torch.rand(max_new_tokens, generator=self._generator(prompt, candidate))
                for prompt in prompts
                for candidate in range(self.num_candidates)
            ]
        )

        def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
            probs, order = (scores.float() / self.temperature).softmax(-1).sort(-1, descending=True)
            cdf = probs.cumsum(-1)
            # The nucleus is the shortest prefix of the sorted tokens with mass >= top_p.
            last = (cdf < self.top_p).sum(-1, keepdim=True).clamp(max=cdf.shape[1] - 1)
            step = input_ids.shape[1] - prompt_length
            target = draws[:, step : step + 1].to(cdf.device) * cdf.gather(1, last)
            rank = torch.searchsorted(cdf, target, right=True).minimum(last)
            return _only(order.gather(1, rank), scores)

        return choose

    def _generator(self, prompt: str, candidate: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{candidate}/{prompt}".encode(errors="replace"))
        return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "big"))


@dataclass(frozen=True)
class DiverseBeams:
    """Diverse beam search (arXiv 1610.02424) with one beam a group, as RRHF's authors used it.

    Groups choose one after the other at each step; a token that earlier groups of the prompt
    have just chosen costs ``diversity_penalty`` each time. The first group is greedy decoding.
    transformers 5 no longer has group beam search; with one beam a group this is all of it.
    """

    num_candidates: int
    diversity_penalty: float = 1.0
    temperature: float = 1.0

    def processor(
        self, prompts: Sequence[str], prompt_length: int, max_new_tokens: int, eos_token_id: int
    ) -> Processor:
        """Groups that have ended penalise nobody."""

        def choose(input_ids: Tensor, scores: Tensor) -> Tensor:
            logps = (scores.float() / self.temperature).log_softmax(-1)
            logps = logps.view(len(prompts), self.num_candidates, -1)
            running = ~(input_ids[:, prompt_length:] == eos_token_id).any(1)
            running = running.view(len(prompts), self.num_candidates)
            used = torch.zeros_like(logps[:, 0])
            tokens = []
            for group in range(self.num_candidates):
                token = (logps[:, group] - self.diversity_penalty * used).argmax(-1, keepdim=True)
                used.scatter_add_(1, token, running[:, group, None].to(used.dtype))
                tokens.append(token)
            return _only(torch.cat(tokens, 1).view(-1, 1), scores)

        return choose


def _only(tokens: Tensor, scores: Tensor) -> Tensor:
    """Scores that leave each row (B, V) the one token of ``tokens`` (B, 1)."""
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)

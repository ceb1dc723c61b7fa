"""Answers that are valid by construction: a model chooses among what a `Grammar` allows.

Between two choices everything is forced, and the tokens of a forced run are read in one forward
pass together with the choice before them; what is forced at the end is not read at all. With a
draft (how the checkpoint was mostly called in training) several choices share a pass: the model
reads the draft and keeps it up to the first token that it would not have chosen itself, which is
speculative decoding (arXiv 2211.17192) without a second model and changes no answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffagent.agent.decoding.grammar import Grammar, State
from diffagent.agent.decoding.strategies import Processor
from diffagent.agent.lm.key_values import KeyValues


@dataclass
class Counts:
    """What decoding took.

    Attributes:
        passes: forward passes, that over the prompts included.
        chosen: tokens that were chosen among several.
        forced: tokens that were not.
        drafted: choices that were read ahead, and ``accepted`` of them.
    """

    passes: int = 0
    chosen: int = 0
    forced: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class Row:
    """An answer under way.

    ``pending`` is what the model has not yet read of it, ``budget`` how much it may read in all.
    """

    prompt: int
    state: State
    budget: int
    pending: list[int] = field(default_factory=list)
    used: int = 0
    logprob: float = 0.0
    probability: float | None = None
    text: str = ""

    def choose(self, token: int, counts: Counts) -> None:
        """Append a token and what it forces; the answer is finished at the end of the budget."""
        state = self.state.step(token)
        assert state is not None, "a token that the state itself gave"
        forced, self.state = state.forced()
        self.pending = [*self.pending, token, *forced]
        counts.chosen, counts.forced = counts.chosen + 1, counts.forced + len(forced)
        self.settle()

    def settle(self) -> None:
        """Finish the answer if it is complete, or if reading it would exceed the budget."""
        if self.state.answer is not None or self.used + len(self.pending) > self.budget:
            self.text = self.state.answer or self.state.finish()
            self.pending = []


@dataclass
class Decoder:
    """Constrained decoding of one batch of prompts.

    Args:
        model: a causal language model of transformers.
        grammar: what may be answered.
        device: where the model is.
        budget: tokens of an answer that the model may read; after them an answer is finished
            without it (lists end, a free text is closed). None: what ``max_length`` leaves.
        draft_tokens: tokens that a pass may read ahead; 0 for none.
        max_length: tokens of prompt and answer together.
    """

    model: Any
    grammar: Grammar
    device: torch.device
    budget: int | None = None
    draft_tokens: int = 16
    max_length: int = 512
    counts: Counts = field(default_factory=Counts)

    def choose(
        self, prompts: Sequence[Sequence[int]], processor: Processor, eos: int, copies: int
    ) -> list[str]:
        """``copies`` answers a prompt; ``processor`` picks from allowed tokens alone.

        It sees the choices of each row as its tokens, and ``eos`` once a row has ended.
        """
        keys, rows, logits = self._start(prompts, copies)
        chosen = torch.zeros(len(rows), 0, dtype=torch.int64, device=self.device)
        while any(not row.text for row in rows):
            scores = torch.full_like(logits, -math.inf)
            for i, row in enumerate(rows):
                allowed = [eos] if row.text else row.state.tokens()
                ids = torch.as_tensor(allowed, device=self.device)
                scores[i, ids] = logits[i, ids] if not row.text else 0.0
            picked = processor(chosen, scores).argmax(1, keepdim=True)
            chosen = torch.cat([chosen, picked], 1)
            for row, token in zip(rows, picked[:, 0].tolist(), strict=True):
                if not row.text:
                    row.choose(token, self.counts)
            if any(row.pending for row in rows):
                logits = self._read(keys, rows, logits)
        self.counts.passes += keys.passes
        return [row.text for row in rows]

    def rank(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        beams: int,
        temperature: float = 1.0,
    ) -> list[list[Row]]:
        """The ``n`` likeliest checkpoints a prompt with how each is called greedily.

        Beam search over the trie of names by untempered likelihoods; see `LLM` for what
        ``probability`` is.

        Returns:
            Rows with text, probability and logprob (of the name), likeliest first.
        """
        keys, rows, logits = self._start(prompts, 1)
        missed = [-math.inf] * len(prompts)
        while True:
            logprobs = logits.log_softmax(-1)
            found = [
                self._extend([i for i, row in enumerate(rows) if row.prompt == p], rows, logprobs)
                for p in range(len(prompts))
            ]
            kept: list[tuple[float, int, int | None]] = []
            for p, candidates in enumerate(found):
                candidates.sort(key=lambda item: -item[0])
                kept += candidates[:beams]
                dropped = (logprob / temperature for logprob, _, _ in candidates[beams:])
                missed[p] = _logsumexp([missed[p], *dropped])
            if all(token is None for _, _, token in kept):
                break
            rows, logits = self._advance(keys, rows, logits, kept)
        ranked = self._ranked(rows, missed, n, temperature)
        order = [(i, row) for found_rows in ranked for i, row in found_rows]
        keys.select([i for i, _ in order])
        self._walk(keys, [row for _, row in order], logits[[i for i, _ in order]])
        return [[row for _, row in found_rows] for found_rows in ranked]

    def _start(
        self, prompts: Sequence[Sequence[int]], copies: int
    ) -> tuple[KeyValues, list[Row], Tensor]:
        """Read each prompt once, with what every answer begins with."""
        keys = KeyValues(self.model, self.device)
        forced, state = self.grammar.start().forced()
        budgets = [
            max(0, self.max_length - len(prompt)) if self.budget is None else self.budget
            for prompt in prompts
        ]
        ids = [[*prompt, *forced[:budget]] for prompt, budget in zip(prompts, budgets, strict=True)]
        logits = torch.cat(keys.feed(ids, [[len(row) - 1] for row in ids]))
        read = [min(len(forced), budget) for budget in budgets]
        self.counts.forced += sum(read)
        owners = [p for p in range(len(prompts)) for _ in range(copies)]
        keys.select(owners)
        rows = [Row(p, state, budgets[p], used=read[p]) for p in owners]
        for row in rows:
            row.settle()
        return keys, rows, logits[owners]

    def _read(self, keys: KeyValues, rows: Sequence[Row], logits: Tensor) -> Tensor:
        """Read what is pending; logits after it, or those of before for rows without."""
        ends = [[len(row.pending) - 1] if row.pending else [] for row in rows]
        after = keys.feed([row.pending for row in rows], ends)
        for row in rows:
            row.used += len(row.pending)
            row.pending = []
        return torch.stack([new[-1] if len(new) else logits[i] for i, new in enumerate(after)])

    # Greedy, with drafts.

    def _walk(self, keys: KeyValues, rows: Sequence[Row], logits: Tensor) -> None:
        """Finish rows greedily; ``logits`` (rows, V) are those of their next tokens."""
        live = list(range(len(rows)))
        now = {i: logits[i] for i in live}
        while True:
            for i in live:
                if not rows[i].text:
                    rows[i].choose(_best(rows[i].state, now[i]), self.counts)
            still = [i for i in live if not rows[i].text]
            if not still:
                break
            keys.select([live.index(i) for i in still])
            live = still
            now = self._read_ahead(keys, rows, live)
        self.counts.passes += keys.passes

    def _read_ahead(
        self, keys: KeyValues, rows: Sequence[Row], live: Sequence[int]
    ) -> dict[int, Tensor]:
        """Read pending tokens and drafts; keep of a draft what the model chooses too."""
        drafts = {i: self._draft(rows[i]) for i in live}
        chunks = [rows[i].pending + [token for token, _ in drafts[i]] for i in live]
        wanted = []
        for i, chunk in zip(live, chunks, strict=True):
            first = len(rows[i].pending)
            choices = [first + k - 1 for k, (_, state) in enumerate(drafts[i]) if state]
            wanted.append([*choices, len(chunk) - 1])
        found = keys.feed(chunks, wanted)
        now, forgotten = {}, []
        for i, chunk, logits in zip(live, chunks, found, strict=True):
            row, read = rows[i], len(rows[i].pending)
            row.used, row.pending = row.used + read, []
            now[i], kept = self._accept(row, drafts[i], logits)
            forgotten.append(len(chunk) - read - kept)
        keys.forget(forgotten)
        return now

    def _accept(
        self, row: Row, draft: Sequence[tuple[int, State | None]], logits: Tensor
    ) -> tuple[Tensor, int]:
        """Go along a draft as far as the model does: its next logits, and the tokens kept."""
        kept = choice = 0
        while kept < len(draft):
            token, state = draft[kept]
            assert state is not None, "a draft goes on with a choice after what it forces"
            if _best(state, logits[choice]) != token:
                break
            self.counts.accepted += 1
            before = row.used
            row.choose(token, self.counts)
            read = len(row.pending)
            row.used, row.pending = before + read, []
            kept, choice = kept + read, choice + 1
        return logits[choice], kept

    def _draft(self, row: Row) -> list[tuple[int, State | None]]:
        """Tokens on the way to the usual call, each choice with the state that it is made in."""
        draft: list[tuple[int, State | None]] = []
        entry, state = row.state.entry, row.state
        usual = self.grammar.usual(entry) if entry and self.draft_tokens else {}
        room = min(self.draft_tokens, row.budget - row.used - len(row.pending))
        while usual and (token := state.towards(usual)) is not None:
            following = state.step(token)
            assert following is not None, "a token of the state's own tries"
            forced, after = following.forced()
            if after.written or len(row.pending) + len(draft) + 1 + len(forced) > room:
                break  # what completes the answer need not be read
            draft += [(token, state), *((t, None) for t in forced)]
            state = after
            self.counts.drafted += 1
        return draft

    # Beams over names.

    def _extend(
        self, own: Sequence[int], rows: Sequence[Row], logprobs: Tensor
    ) -> list[tuple[float, int, int | None]]:
        """(log-probability, row, next token) of what the rows of a prompt may become.

        A row whose name is complete stays as it is: no token.
        """
        found: list[tuple[float, int, int | None]] = []
        for i in own:
            row = rows[i]
            if row.text or row.state.entry is not None:
                found.append((row.logprob, i, None))
                continue
            allowed = row.state.tokens().tolist()
            values = (row.logprob + logprobs[i, allowed].double()).tolist()
            found += [(value, i, token) for value, token in zip(values, allowed, strict=True)]
        return found

    def _advance(
        self,
        keys: KeyValues,
        rows: Sequence[Row],
        logits: Tensor,
        kept: Sequence[tuple[float, int, int | None]],
    ) -> tuple[list[Row], Tensor]:
        """Read the tokens that were kept and what they force; add the latter's probability."""
        following = []
        for logprob, parent, token in kept:
            old = rows[parent]
            row = Row(
                old.prompt, old.state, old.budget, used=old.used, logprob=logprob, text=old.text
            )
            if token is not None:
                row.choose(token, self.counts)
            following.append(row)
        parents = [parent for _, parent, _ in kept]
        keys.select(parents)
        logits = logits[parents]
        if not any(row.pending for row in following):  # none fits the budget: nothing to read
            return following, logits
        every = [range(len(row.pending)) for row in following]
        found = keys.feed([row.pending for row in following], every)
        ends = []
        for i, (row, after) in enumerate(zip(following, found, strict=True)):
            forced = torch.tensor(row.pending[1:], device=self.device, dtype=torch.int64)
            steps = after[:-1].log_softmax(-1).gather(1, forced[:, None])
            row.logprob += float(steps.double().sum())
            row.used, row.pending = row.used + len(row.pending), []
            ends.append(after[-1] if len(after) else logits[i])
        return following, torch.stack(ends)

    @staticmethod
    def _ranked(
        rows: Sequence[Row], missed: Sequence[float], n: int, temperature: float
    ) -> list[list[tuple[int, Row]]]:
        """The best rows of each prompt, with their tempered shares of all names that were seen.

        ``missed``: log of the sum of p^(1/temperature) over the beginnings that were dropped.
        """
        ranked = []
        for prompt, rest in enumerate(missed):
            own = [(i, row) for i, row in enumerate(rows) if row.prompt == prompt]
            own.sort(key=lambda item: -item[1].logprob)
            total = _logsumexp([rest, *(row.logprob / temperature for _, row in own)])
            for _, row in own:
                row.probability = math.exp(row.logprob / temperature - total)
            ranked.append(own[:n])
        return ranked


def _best(state: State, logits: Tensor) -> int:
    """The allowed token with the highest of ``logits`` (V,)."""
    allowed = state.tokens()
    ids = torch.as_tensor(allowed, device=logits.device)
    return int(allowed[int(logits[ids].argmax())])


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(value - top) for value in values))

"""Selectors without a language model. Each sees the train split and the catalogue, nothing else."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from diffagent.agent.lm.format import response_text
from diffagent.agent.prompts import Pair
from diffagent.agent.selector import Choice
from diffagent.agent.verify import verify
from diffagent.schemas.api import T2IAPI
from diffagent.t2i.catalogue import Catalogue, Entry


class Usage:
    """How the train split calls the catalogue's checkpoints."""

    def __init__(self, pairs: Iterable[Pair], catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._calls: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self._params: dict[str, Counter[str]] = defaultdict(Counter)
        for pair in pairs:
            text = response_text(pair.api)
            self._calls[pair.api.model, pair.api.version][text] += 1
            plain = pair.api.params.model_copy(update={"seed": None}).model_dump_json()
            self._params[pair.api.base_model][plain] += 1

    @cached_property
    def ranking(self) -> list[tuple[str, float]]:
        """(most frequent call, share of the pairs) of each checkpoint, most used first."""
        total = sum(calls.total() for calls in self._calls.values())
        ranked = sorted(self._calls.items(), key=lambda item: (-item[1].total(), item[0]))
        return [(_mode(calls), calls.total() / total) for _, calls in ranked]

    def call(self, entry: Entry) -> str:
        """How a checkpoint is mostly called; parameters of its base model if it never is."""
        if calls := self._calls.get((entry.model, entry.version)):
            return _mode(calls)
        params = self._params.get(entry.base_model) or sum(self._params.values(), Counter())
        api = T2IAPI.model_validate(
            {
                "model": entry.model,
                "version": entry.version,
                "base_model": entry.base_model,
                "params": json.loads(_mode(params)),
            }
        )
        return response_text(api)


@dataclass(frozen=True)
class Popular:
    """The same answer to everybody; probabilities are shares of the train split."""

    usage: Usage

    @property
    def catalogue(self) -> Catalogue:
        """See `Selector`."""
        return self.usage.catalogue

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`."""
        choices = [
            Choice(text, verify(text, self.usage.catalogue), share)
            for text, share in self.usage.ranking[:n]
        ]
        return [choices for _ in prompts]


@dataclass(frozen=True)
class Random:
    """A uniform draw that depends on (seed, prompt) alone."""

    usage: Usage
    seed: int = 0

    @property
    def catalogue(self) -> Catalogue:
        """See `Selector`."""
        return self.usage.catalogue

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`."""
        return [self._draw(prompt, n) for prompt in prompts]

    def _draw(self, prompt: str, n: int) -> list[Choice]:
        entries = self.usage.catalogue.checkpoints
        digest = hashlib.sha256(f"{self.seed}/{prompt}".encode(errors="replace")).digest()
        drawn = random.Random(digest).sample(entries, min(n, len(entries)))
        texts = [self.usage.call(entry) for entry in drawn]
        catalogue = self.usage.catalogue
        return [Choice(text, verify(text, catalogue), 1 / len(entries)) for text in texts]


class Nearest:
    """Copies the API of the most similar training prompt: TF-IDF of words and word pairs.

    Equal similarities: the training prompt with the lowest id. A prompt without a known word
    gets the first training prompt's API. Cosines are no probabilities, so there is none.
    """

    def __init__(self, pairs: Sequence[Pair], catalogue: Catalogue) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.catalogue = catalogue
        self._texts = [response_text(pair.api) for pair in pairs]
        # Single characters count as words: "3d" and "a" are, and so are most CJK prompts' parts.
        self._vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+", dtype=np.float32
        )
        self._train = self._vectorizer.fit_transform([pair.prompt for pair in pairs]).T.tocsr()

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`."""
        queries = self._vectorizer.transform(prompts)
        return [self._nearest(queries[i], n) for i in range(len(prompts))]

    def _nearest(self, query: Any, n: int) -> list[Choice]:
        similarity = (query @ self._train).toarray()[0]
        texts: dict[str, None] = {}
        for row in np.argsort(-similarity, kind="stable"):
            texts.setdefault(self._texts[row])
            if len(texts) == n:
                break
        return [Choice(text, verify(text, self.catalogue)) for text in texts]


def _mode(counts: Counter[str]) -> str:
    """The most frequent text; of equally frequent ones the first in order."""
    return min(counts, key=lambda text: (-counts[text], text))

"""What speaks for a model, given a prompt: each expert scores all models of the catalogue.

Scores are log-probabilities up to a factor and a constant; `diffagent.agent.retrieval.mixture`
weighs and calibrates them. An expert is fitted on the train split alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from diffagent.agent.retrieval.terms import Floats, Index, Terms
from diffagent.agent.retrieval.training_calls import Calls
from diffagent.t2i.catalogue import Catalogue

Arrays = Mapping[str, npt.NDArray[Any]]


class Encoder(Protocol):
    """Texts to vectors: see `diffagent.agent.retrieval.encoder`."""

    def encode(self, texts: Sequence[str]) -> Floats:
        """(texts, d) float32 of unit length."""
        ...


@dataclass(frozen=True)
class Memory:
    """What experts look things up in.

    Attributes:
        calls: of the train split.
        indexes: of the training prompts ('tokens', 'words', 'bm25') and of the cards ('cards').
        encoder: None when there is none.
        prompts: (rows, d) float32 of the encoder, cards: (models, d); None without one.
    """

    calls: Calls
    indexes: Mapping[str, Index]
    pairs: Terms | None = None
    encoder: Encoder | None = None
    prompts: Floats | None = None
    cards: Floats | None = None


class Evidence:
    """What is known of some prompts; looked up once, for all experts."""

    def __init__(
        self, memory: Memory, prompts: Sequence[str], vectors: Floats | None = None
    ) -> None:
        self.memory = memory
        self.prompts = prompts
        self._vectors = vectors
        self._similarity: dict[str, Floats] = {}

    def similarity(self, name: str) -> Floats:
        """(prompts, texts of the index) from 0 to 1; 'embeddings' is an index too."""
        if name not in self._similarity:
            if name == "embeddings":
                assert self.memory.prompts is not None
                found = np.maximum(self.vectors @ self.memory.prompts.T, 0)
            else:
                index = self.memory.indexes[name]
                found = index.similarity(index.terms.counts(self.prompts))
            self._similarity[name] = found
        return self._similarity[name]

    @cached_property
    def vectors(self) -> Floats:
        """(prompts, d) of the encoder."""
        if self._vectors is not None:
            return self._vectors
        assert self.memory.encoder is not None
        return self.memory.encoder.encode(self.prompts)

    @cached_property
    def pairs(self) -> Any:
        """(prompts, terms) sparse counts of single tokens and pairs."""
        assert self.memory.pairs is not None
        return self.memory.pairs.counts(self.prompts)


class Expert(Protocol):
    """Scores models. ``arrays`` is all that it has learnt."""

    @property
    def arrays(self) -> Arrays:
        """To be saved."""
        ...

    def scores(self, evidence: Evidence) -> Floats:
        """(prompts, models) float32."""
        ...


@dataclass(frozen=True)
class Prior:
    """How often a model is called, whatever the prompt."""

    arrays: Arrays

    def scores(self, evidence: Evidence) -> Floats:
        """See `Expert`."""
        prior = np.log(evidence.memory.calls.prior)
        return np.broadcast_to(prior, (len(evidence.prompts), len(prior))).astype(np.float32)


@dataclass(frozen=True)
class Votes:
    """Training prompts vote for their models, each with a power of its similarity.

    A high power lets the nearest decide, a low one hears many. What the votes leave open (few or
    weak ones) goes to the models by their prior.
    """

    index: str
    power: int
    doubt: float
    arrays: Arrays

    def scores(self, evidence: Evidence) -> Floats:
        """See `Expert`."""
        calls = evidence.memory.calls
        votes = evidence.similarity(self.index) ** self.power @ calls.one_hot
        total = votes.sum(axis=1, keepdims=True)
        shares = (votes + self.doubt * calls.prior) / (total + self.doubt)
        scores: Floats = np.log(shares).astype(np.float32)
        return scores


@dataclass(frozen=True)
class Cards:
    """How alike the prompt and a model's card are."""

    embedded: bool
    arrays: Arrays

    def scores(self, evidence: Evidence) -> Floats:
        """See `Expert`."""
        if not self.embedded:
            return 10 * evidence.similarity("cards")
        assert evidence.memory.cards is not None
        return 10 * (evidence.vectors @ evidence.memory.cards.T)


class Bayes:
    """Multinomial naive Bayes over tokens and pairs of them, each counted once a prompt.

    The sum of log-likelihoods is divided by the root of the number of terms, as words of a prompt
    say the same thing many times over.
    """

    def __init__(self, arrays: Arrays, shape: tuple[int, int]) -> None:
        from scipy import sparse

        self.arrays = arrays
        self._base = arrays["base"]
        parts = arrays["data"], arrays["indices"], arrays["indptr"]
        self._found = sparse.csr_array(parts, shape=shape)

    @classmethod
    def fit(cls, calls: Calls, counts: Any, alpha: float = 0.01) -> Bayes:
        """From `Evidence.pairs` of the training prompts."""
        from scipy import sparse

        present = counts.copy()
        present.data = np.ones_like(present.data)
        votes = (np.ones_like(calls.weight), calls.model, np.arange(len(calls.model) + 1))
        members = sparse.csr_array(votes, shape=(len(calls.model), len(calls.models)))
        found = (present.T @ members).tocsr()
        totals = np.asarray(found.sum(axis=0)).ravel()
        found.data = np.log1p(found.data / alpha)
        base = np.log(alpha / (totals + alpha * counts.shape[1]))
        learnt = {"base": base, "data": found.data}
        arrays: dict[str, npt.NDArray[Any]] = {n: a.astype(np.float32) for n, a in learnt.items()}
        arrays |= {"indices": found.indices.astype(np.int32), "indptr": found.indptr}
        return cls(arrays, found.shape)

    def scores(self, evidence: Evidence) -> Floats:
        """See `Expert`."""
        query = evidence.pairs.copy()
        query.data = np.ones_like(query.data)
        terms = np.diff(query.indptr)[:, None].astype(np.float32)
        likelihood = (query @ self._found).toarray() + terms * self._base
        likelihood += np.log(evidence.memory.calls.prior)
        called = evidence.memory.calls.called
        likelihood[:, ~called] = likelihood[:, called].mean(axis=1, keepdims=True)  # nothing known
        likelihood -= likelihood.max(axis=1, keepdims=True)
        scores: Floats = (likelihood / np.sqrt(terms + 1)).astype(np.float32)
        return scores


@dataclass(frozen=True)
class Bag:
    """A softmax over models of the sum of learnt embeddings of n-grams (Joulin et al. 2016)."""

    arrays: Arrays  # terms: (terms, d) float16, models: (models, d), bias: (models,)

    @cached_property
    def _terms(self) -> Floats:
        return self.arrays["terms"].astype(np.float32)

    def scores(self, evidence: Evidence) -> Floats:
        """See `Expert`."""
        pairs = evidence.memory.pairs
        assert pairs is not None
        hidden = pairs.tfidf(evidence.pairs) @ self._terms
        return log_softmax(hidden @ self.arrays["models"].T + self.arrays["bias"])


@dataclass(frozen=True)
class ModelToken:
    """One output embedding a model on a frozen encoder (ChatGen-Evo's stage 2, arXiv 2411.17176).

    Only the embeddings (and a bias that starts as the prior) are trained, by cross-entropy; they
    start as the encoder's vectors of the models' cards.
    """

    arrays: Arrays  # models: (models, d), bias: (models,)

    def scores(self, evidence: Evidence) -> Floats:
        """See `Expert`."""
        return log_softmax(evidence.vectors @ self.arrays["models"].T + self.arrays["bias"])


def log_softmax(logits: npt.NDArray[Any]) -> Floats:
    """Along the last axis."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    total = np.exp(logits).sum(axis=-1, keepdims=True)
    probabilities: Floats = (logits - np.log(total)).astype(np.float32)
    return probabilities


def card_texts(catalogue: Catalogue, models: Sequence[str]) -> list[str]:
    """Name, tags, trained words and description of each model, of its version most downloaded."""
    best = {}
    for entry in sorted(catalogue.checkpoints, key=lambda e: (e.downloads, e.version_id)):
        best[entry.model] = entry
    return [
        ". ".join([name, ", ".join(best[name].tags), ", ".join(best[name].trained_words)])
        + f". {best[name].description}"
        for name in models
    ]

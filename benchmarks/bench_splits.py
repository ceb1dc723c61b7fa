"""What a random split hides: a nearest neighbour on held-out prompts, under both kinds of split.

    python benchmarks/bench_splits.py [DIR]

DIR is a DABench (an artefact of the stage 'shard'); without it, one is built of the sandbox's
records. For each kind of split the answer to a test prompt is the API of the most similar train
prompt (cosine of TF-IDF over words and pairs of words): accuracy@1 of the model version and of the
model, over all test prompts and over those whose nearest train prompt is less alike than 0.6 and
0.3. One JSON line each, with 95 % intervals: a bootstrap over groups, as the pictures of one group
stand and fall together. ``guess`` is the share of the most frequent version (model) of train.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.shard_stage import build_dabench
from diffagent.dabench.dataset import open_dataset
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.sandbox.files import materialise
from diffagent.schemas.runtime import RuntimeConfig

COLUMNS = ("prompt", "version_id", "model_id", "group", "random_split")
LIMITS = (None, 0.6, 0.3)
MAX_TEST = 10_000
RESAMPLES = 1000
_BLOCK = 256


def nearest(train: list[str], test: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each test prompt the most similar train prompt, and their cosine."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    known = vectorizer.fit_transform(train).T.tocsc()
    asked = vectorizer.transform(test)
    best, cosine = [], []
    for begin in range(0, len(test), _BLOCK):
        found = (asked[begin : begin + _BLOCK] @ known).toarray()
        best.append(found.argmax(axis=1))
        cosine.append(found.max(axis=1))
    return np.concatenate(best), np.concatenate(cosine)


def interval(right: np.ndarray, groups: np.ndarray) -> list[float]:
    """95 % interval of the mean by a bootstrap over groups."""
    _, places = np.unique(groups, return_inverse=True)
    hits, sizes = np.bincount(places, weights=right), np.bincount(places)
    draws = np.random.default_rng(0).integers(len(sizes), size=(RESAMPLES, len(sizes)))
    means = hits[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    return [round(float(value), 3) for value in np.percentile(means, [2.5, 97.5])]


def measure(rows: dict[str, np.ndarray], kind: str) -> None:
    train = np.flatnonzero(rows[kind] == "train")
    test = np.flatnonzero(rows[kind] == "test")
    if len(test) > MAX_TEST:
        test = np.sort(np.random.default_rng(0).choice(test, MAX_TEST, replace=False))
    found, cosine = nearest(rows["prompt"][train].tolist(), rows["prompt"][test].tolist())
    for limit in LIMITS:
        asked = cosine < (limit or np.inf)
        line = {"benchmark": "splits", "split": kind, "cosine_below": limit}
        line |= {"train": len(train), "test": int(asked.sum())}
        for name in ("version_id", "model_id") if asked.any() else ():
            truth, known = rows[name][test][asked], rows[name][train]
            right = truth == known[found[asked]]
            common = Counter(known.tolist()).most_common(1)[0][0]
            line[name.removesuffix("_id")] = {
                "accuracy": round(float(right.mean()), 3),
                "interval": interval(right, rows["group"][test][asked]),
                "guess": round(float((truth == common).mean()), 3),
            }
        print(json.dumps(line), flush=True)


def main(directory: Path) -> None:
    columns: dict[str, list[object]] = {name: [] for name in (*COLUMNS, "split")}
    for batch in open_dataset(directory).batches(COLUMNS):
        for name in COLUMNS:
            columns[name] += batch.data[name].to_pylist()
        columns["split"] += [batch.split] * len(batch.data)
    rows = {name: np.array(values) for name, values in columns.items()}
    rows["leak-free"], rows["random"] = rows.pop("split"), rows.pop("random_split")
    for kind in ("random", "leak-free"):
        measure(rows, kind)


def sandbox_dabench(folder: Path) -> Path:
    """A dataset of the sandbox's records."""
    runtime = RuntimeConfig(store=str(folder), site={"requests_per_second": 1000})
    site = f"dump:{materialise(Path('build/sandbox'))}"
    snapshot = crawl.run(CrawlConfig(site=site), {}, runtime, site_url=site)
    filtered = filter_records.run(FilterConfig(), {"snapshot": [snapshot]}, runtime)
    config = DABenchConfig(
        near_duplicate_jaccard=0.7, series_jaccard=0.6
    )  # of configs/sandbox.yaml
    return build_dabench.run(config, {"filtered": [filtered]}, runtime).path


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(sandbox_dabench(Path(folder)))

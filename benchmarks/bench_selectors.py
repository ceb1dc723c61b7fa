"""Every selector on held-out prompts of a DABench: accuracy, parameters, calibration, time, size.

    python benchmarks/bench_selectors.py DIR [--encoder minilm] [--vectors FILE] [--seeds 3]
    python benchmarks/bench_selectors.py DIR --selectors agent reranked --agent A --splits leak-free
    python benchmarks/bench_selectors.py --catalogue 75000
    python benchmarks/bench_selectors.py DIR --hostile 10000

One JSON line a selector and stratum (all test prompts; those whose nearest train prompt is under
0.6, or 0.3, in cosine of TF-IDF, as bench_splits.py has it; those at 0.6 and above), on the
leak-free split and on the random one. Intervals are of 95 %, by a bootstrap over groups.
``over_nearest`` is the paired difference in accuracy to bench_splits.py's nearest neighbour. Fitted
selectors see train and validation alone; those that draw at random are fitted once a seed, and
their values are means over seeds. Encoding all prompts takes minutes: FILE keeps the vectors for
the next time. ``--catalogue`` measures the latency of retrieval over a synthetic catalogue;
``--hostile`` counts what `combined` answers to hostile prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from bench_splits import nearest
from hostile import hostile_prompts
from safetensors.numpy import load_file, save_file

from diffagent.agent.baselines import Nearest, Popular, Random, Usage
from diffagent.agent.llm_selector import LLM
from diffagent.agent.lm.llm import Quantization, load_agent
from diffagent.agent.prompts import Pair
from diffagent.agent.retrieval.encoder import TransformerEncoder
from diffagent.agent.retrieval.experts import card_texts
from diffagent.agent.retrieval.fit_config import FitConfig
from diffagent.agent.retrieval.fitting import RECIPES, Vectors, fit, load_selector, save_selector
from diffagent.agent.retrieval.rerank_config import RerankConfig
from diffagent.agent.retrieval.reranked import Reranked, fit_reranked
from diffagent.agent.retrieval.training_calls import model_names, read_rows
from diffagent.agent.selector import Choice
from diffagent.evaluation.metrics import agreement
from diffagent.evaluation.selection import (
    clustered_intervals,
    expected_calibration_error,
    ranking_metrics,
    reliability,
)
from diffagent.schemas.api import parse_api
from diffagent.t2i.catalogue import Catalogue, Entry

STRATA = {"all": (-1, 2), "<0.6": (-1, 0.6), "<0.3": (-1, 0.3), ">=0.6": (0.6, 2)}
COLUMNS = {"leak-free": "split", "random": "random_split"}
LATENCY_PROMPTS = 100
BASELINES = ("popular", "random", "nearest")
SEEDED = ("model-token", "combined")
SHOWN = ("model@1", "model@5", "model@10", "model_mrr", "version@1", "version@5", "version@10")


def latencies(selector: Any, prompts: list[str]) -> dict[str, float]:
    """Of one prompt at a time, warm; cpu: of this process alone, whatever else the machine does."""
    seconds = []
    for prompt in prompts[: LATENCY_PROMPTS + 5]:
        wall, cpu = time.perf_counter(), time.process_time()
        selector.select([prompt])
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    (p50, cpu50), (p95, _) = np.percentile(seconds[5:], [50, 95], axis=0) * 1000
    names = ("p50_ms", "p95_ms", "cpu_p50_ms")
    return dict(zip(names, (round(float(x), 1) for x in (p50, p95, cpu50)), strict=True))


def drawn(rows: pl.DataFrame, kind: str, count: int | None) -> pl.DataFrame:
    """``rows`` with so many test prompts; None: all."""
    if count is None:
        return rows
    is_test = pl.col(COLUMNS[kind]) == "test"
    return pl.concat([rows.filter(~is_test), rows.filter(is_test).sample(count, seed=0)])


class Bench:
    """One way of splitting a data set."""

    def __init__(self, rows: pl.DataFrame, kind: str, catalogue: Catalogue) -> None:
        column = COLUMNS[kind]
        self.kind, self.catalogue, self.column = kind, catalogue, rows[column].to_numpy()
        self.train, self.validation, self.test = (
            rows.filter(pl.col(column) == split) for split in ("train", "validation", "test")
        )
        self.prompts = self.test["prompt"].to_list()
        self.truth = [parse_api(api) for api in self.test["api"]]
        found, self.cosine = nearest(self.train["prompt"].to_list(), self.prompts)
        copied = self.train["api"].gather(found)
        pairs = zip(copied, self.truth, strict=True)
        self.reference = np.array([parse_api(api).model == truth.model for api, truth in pairs])

    def baseline(self, name: str) -> Any:
        columns = self.train.select("id", "prompt", "api")
        pairs = [Pair(i, prompt, parse_api(api)) for i, prompt, api in columns.iter_rows()]
        if name == "nearest":
            return Nearest(pairs, self.catalogue)
        usage = Usage(pairs, self.catalogue)
        return Popular(usage) if name == "popular" else Random(usage)

    def judge(self, answers: list[list[Choice]]) -> dict[str, np.ndarray]:
        """Each measure of each prompt; ``p``: of the model answered, NaN if not said."""
        rows = []
        for choices, truth in zip(answers, self.truth, strict=True):
            row = ranking_metrics(choices, truth)
            best = agreement(choices[0].verdict.api, truth)
            row |= {n: best[n] for n in best if n not in ("model", "model_version")}
            row["invalid"] = float(any(c.verdict.api is None for c in choices))
            chance = choices[0].probability
            rows.append(row | {"p": np.nan if chance is None else chance})
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def report(self, name: str, runs: list[dict[str, np.ndarray]], facts: dict[str, Any]) -> None:
        mean = {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}
        keys = [key for key in mean if key != "p"]
        groups = self.test["group"].to_numpy()
        for stratum, (low, high) in STRATA.items():
            asked = (self.cosine >= low) & (self.cosine < high)
            if not asked.any():
                continue
            columns = [mean[key][asked] for key in keys]
            columns.append((mean["model@1"] - self.reference)[asked])
            intervals = clustered_intervals(np.stack(columns, axis=1), groups[asked])
            said = dict(zip([*keys, "over_nearest"], intervals, strict=True))
            line: dict[str, Any] = {"benchmark": "selectors", "split": self.kind, "selector": name}
            line |= {"stratum": stratum, "n": int(asked.sum())}
            for key in (*SHOWN, "over_nearest"):
                found = said[key]
                line[key] = [round(x, 3) for x in (found.mean, found.low, found.high)]
            rest = [key for key in keys if "@" not in key and not key.endswith("_mrr")]
            line["agreement"] = {key: round(said[key].mean, 3) for key in rest if key != "invalid"}
            line["invalid"] = round(said["invalid"].mean * said["invalid"].n)
            if not np.isnan(runs[0]["p"]).any():
                right = [(run["p"][asked], run["model@1"][asked]) for run in runs]
                errors = [expected_calibration_error(p, hit) for p, hit in right]
                line["ece"] = round(float(np.mean(errors)), 3)
                if stratum == "all":
                    curve = reliability(*right[0])
                    line["reliability"] = [
                        [round(b.predicted, 2), round(b.right, 2)] for b in curve
                    ]
            if len(runs) > 1:
                spread = np.std([run["model@1"][asked].mean() for run in runs], ddof=1)
                line["seeds"], line["model@1_sd"] = len(runs), round(float(spread), 4)
            print(json.dumps(line | (facts if stratum == "all" else {})), flush=True)

    def run(self, name: str, make: Callable[[], Any]) -> None:
        started = time.perf_counter()
        selector = make()
        facts: dict[str, Any] = {"fit_seconds": round(time.perf_counter() - started, 1)}
        answers = selector.select(self.prompts, 10)
        self.report(name, [self.judge(answers)], facts | latencies(selector, self.prompts))

    def run_fitted(
        self, name: Any, seeds: int, encoder: Any = None, known: dict[str, Any] | None = None
    ) -> None:
        vectors = asked = None
        if known is not None:
            train, validation, asked = (
                known["prompts"][self.column == split] for split in ("train", "validation", "test")
            )
            vectors = Vectors(train, validation, known["cards"])
        runs = []
        for seed in range(seeds if name in SEEDED else 1):
            kind = encoder.name if encoder is not None else ""
            config = FitConfig(selector=name, encoder=kind, seed=seed)
            started = time.perf_counter()
            fitted = fit(
                config, self.train, self.validation, self.catalogue, encoded=(encoder, vectors)
            )
            seconds = time.perf_counter() - started
            runs.append(self.judge(list(fitted.choices(self.prompts, 10, asked))))
        facts = {"fit_seconds": round(seconds, 1), **_size(fitted, config)}
        facts |= latencies(fitted, self.prompts)
        label = f"{name} + {encoder.name}" if encoder is not None and RECIPES[name][0] else name
        self.report(label, runs, facts)

    def reranked(self, agent: Path) -> Reranked:
        """As the stage ``rerank`` does it by default."""
        config = RerankConfig()
        wanted = FitConfig(selector=config.retrieval)
        retrieval = fit(wanted, self.train, self.validation, self.catalogue)
        count = min(config.num_prompts, self.validation.height)
        rows = self.validation.sample(count, seed=config.seed, shuffle=True)
        chosen = [parse_api(api).model for api in rows["api"]]
        asked = rows["prompt"].to_list()
        judge = load_agent(agent, generates=False)
        return fit_reranked(retrieval, judge, asked, chosen, config.candidates)[0]


def load_llm(directory: Path, quantization: Quantization = "none") -> LLM:
    return LLM(load_agent(directory, quantization=quantization, generates=False))


def hostile(rows: pl.DataFrame, catalogue: Catalogue, count: int) -> None:
    train, validation = (rows.filter(split=split) for split in ("train", "validation"))
    fitted = fit(FitConfig(selector="combined"), train, validation, catalogue)
    choices = itertools.chain.from_iterable(fitted.choices(hostile_prompts(count), 2))
    counts = Counter(choice.verdict.status for choice in choices)
    print(json.dumps({"benchmark": "selectors", "hostile": count, "answers": counts}))


def _size(fitted: Any, config: FitConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        save_selector(fitted, config, out)
        size = sum(path.stat().st_size for path in out.iterdir())
        started = time.perf_counter()
        load_selector(out)
        return {"bytes": size, "load_seconds": round(time.perf_counter() - started, 2)}


def all_vectors(
    encoder: TransformerEncoder, rows: pl.DataFrame, catalogue: Catalogue, kept: Path | None
) -> dict[str, np.ndarray]:
    """Vectors of all prompts and cards, from a file or into it."""
    if kept is not None and kept.exists():
        return dict(load_file(kept))
    started = time.perf_counter()
    cards = encoder.encode(card_texts(catalogue, model_names(catalogue)))
    found = {"prompts": encoder.encode(rows["prompt"].to_list()), "cards": cards}
    seconds = round(time.perf_counter() - started, 1)
    line = {"benchmark": "selectors", "encoder": encoder.name, "encode_seconds": seconds}
    print(json.dumps(line | {"texts": len(rows) + len(cards)}), flush=True)
    if kept is not None:
        save_file(found, kept)
    return found


def synthetic(models: int, calls: int = 25_000) -> None:
    """Latency over a catalogue of made-up names and prompts of made-up words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9)))
             for _ in range(20_000)]  # fmt: skip
    shares = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))

    def text(length: int) -> str:
        return ", ".join(
            " ".join(rng.choices(words, cum_weights=shares, k=3)) for _ in range(length)
        )

    catalogue = Catalogue([_entry(number, text) for number in range(1, models + 1)])
    names = [entry.model for entry in catalogue.checkpoints]
    params = {"sampler": "Euler a", "steps": 20, "cfg_scale": 7, "width": 512, "height": 512}
    rest = {"version": "v1", "type": "Checkpoint", "base_model": "SD 1.5", "loras": []}
    api = {**rest, "params": {**params, "clip_skip": 1}, "negative_prompt": ""}
    rows = pl.DataFrame(
        {
            "id": range(calls),
            "prompt": [text(rng.randint(5, 20)) for _ in range(calls)],
            "api": [json.dumps({**api, "model": rng.choice(names)}) for _ in range(calls)],
            "group": range(calls),
        }
    )
    asked = rows["prompt"].tail(200).to_list()
    for name in ("neighbours", "bm25", "cards"):
        started = time.perf_counter()
        config = FitConfig(selector=name)  # type: ignore[arg-type]
        fitted = fit(config, rows.head(calls - 300), rows.slice(calls - 300, 100), catalogue)
        line: dict[str, Any] = {"benchmark": "selectors", "catalogue": "synthetic"}
        line |= {"models": models, "calls": calls, "selector": name}
        line["fit_seconds"] = round(time.perf_counter() - started, 1)
        print(json.dumps(line | latencies(fitted, asked)), flush=True)


def _entry(number: int, text: Any) -> Entry:
    return Entry(
        model=f"{text(1)} {number}",
        version="v1",
        type="Checkpoint",
        base_model="SD 1.5",
        model_id=number,
        version_id=number,
        air=f"urn:air:sd1:checkpoint:civitai:{number}@{number}",
        file_name="synthetic.safetensors",
        description=text(8),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--encoder", default="", help="'minilm', a directory, a name; '' for none")
    parser.add_argument("--bf16", action="store_true", help="the encoder's products in bfloat16")
    parser.add_argument("--vectors", type=Path, help="file that keeps the encoder's vectors")
    parser.add_argument(
        "--agent",
        type=Path,
        help="a trained agent: the selectors 'agent', 'agent-int8', 'reranked'",
    )
    parser.add_argument("--prompts", type=int, help="of the test split, drawn; no --encoder then")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--selectors", nargs="*", default=[*BASELINES, *RECIPES])
    parser.add_argument("--splits", nargs="*", default=["leak-free", "random"])
    parser.add_argument("--catalogue", type=int, help="models of a synthetic catalogue")
    parser.add_argument("--hostile", type=int, help="prompts that attack, in place of the rest")
    args = parser.parse_args()
    if args.prompts and args.encoder:
        parser.error("--prompts draws from rows that the encoder's vectors would no longer fit")
    if args.catalogue:
        synthetic(args.catalogue)
    if args.directory is None:
        return
    rows, catalogue = read_rows(args.directory), Catalogue.load(args.directory)
    if args.hostile:
        hostile(rows, catalogue, args.hostile)
        return
    encoder = TransformerEncoder(args.encoder, bf16=args.bf16) if args.encoder else None
    known = all_vectors(encoder, rows, catalogue, args.vectors) if encoder else {}
    for kind in args.splits:
        bench = Bench(drawn(rows, kind, args.prompts), kind, catalogue)
        for name in args.selectors:
            if name not in RECIPES:
                by_agent = {
                    "agent": load_llm,
                    "agent-int8": partial(load_llm, quantization="int8"),
                    "reranked": bench.reranked,
                }
                make = by_agent.get(name)
                bench.run(
                    name, partial(make, args.agent) if make else partial(bench.baseline, name)
                )
                continue
            plain, embedded = RECIPES[name]
            if plain:
                bench.run_fitted(name, args.seeds)
            if embedded and encoder is not None:
                bench.run_fitted(name, args.seeds, encoder, known)


if __name__ == "__main__":
    main()

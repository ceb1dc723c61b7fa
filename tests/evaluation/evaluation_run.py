"""A run that ends where ``evaluate`` starts: artefacts with drawn pictures and made-up scores."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from diffagent.agent.select_config import SelectConfig
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.render.render_config import RenderConfig
from diffagent.rewards.score_config import RewardsConfig
from diffagent.schemas.api import T2IAPI, LoRA, Params
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import CANDIDATES, DABENCH, RENDERS, SCORES
from diffagent.store import Artifact, StageContext, StageResult, stage
from diffagent.train.sft_config import SFTConfig
from tests.agent.agent_world import blank

COLOURS = ("firebrick", "seagreen", "steelblue", "goldenrod", "orchid", "slategray")
SHAPES = ("ellipse", "rectangle")
SAMPLERS = ("Euler a", "DPM++ 2M Karras", "DDIM")
SKILL = {"popular": 0.2, "random": 0.0, "nearest": 0.6, "combined": 0.65, "sft": 0.7, "rrhf": 0.9}


def make_api(rng: random.Random, model: int | None = None) -> T2IAPI:
    number = rng.randrange(6) if model is None else model
    return T2IAPI(
        model=f"Sandbox {COLOURS[number].title()} Mix",
        version="v1.0",
        base_model="SD 1.5",
        loras=(LoRA(model="Thick Outlines", version="v2", weight=0.8),) * (rng.random() < 0.2),
        params=Params(
            sampler=rng.choice(SAMPLERS),
            steps=rng.choice((20, 25, 30)),
            cfg_scale=rng.choice((5, 7, 7.5)),
            width=64,
            height=64,
            clip_skip=rng.choice((1, 2)),
        ),
        negative_prompt=rng.choice(("", "blurry, noise", "lowres, bad anatomy")),
    )


def draw(path: Path, colour: str, shape: str, rng: random.Random, size: int = 64) -> None:
    image = Image.new("RGB", (size, size), rng.choice(("white", "black", "lightgray")))
    box = [rng.uniform(0.05, 0.3) * size] * 2 + [rng.uniform(0.6, 0.95) * size] * 2
    getattr(ImageDraw.Draw(image), shape)(box, fill=colour)
    path.parent.mkdir(exist_ok=True)
    image.save(path)


class Run:
    """Artefacts of ``num_prompts`` prompts and the selectors of ``config``, in ``store``."""

    def __init__(
        self,
        store: Path,
        config: EvaluationConfig,
        *,
        agent: str = "gpt2",
    ) -> None:
        self.config = config
        self.runtime = RuntimeConfig(store=str(store))
        self.truth = self._prompts()
        crawl = self._stage("crawl", CrawlConfig(), {}, lambda out: None)
        self.dabench = self._stage(
            "shard", DABenchConfig(), {"filtered": [crawl]}, self._write_dabench
        )
        self.inputs: dict[str, list[Artifact]] = {
            "dabench": [self.dabench],
            "candidates": [],
            "renders": [],
            "scores": [],
        }
        trained = {"dabench": [self.dabench]}
        self.agent = [self._stage("sft", SFTConfig(model=agent), trained, lambda out: None)]
        for name in config.selectors:
            self._add_selector(name)

    def _prompts(self) -> dict[int, tuple[str, T2IAPI]]:
        rng = random.Random(1)
        prompts = {}
        for i in range(self.config.num_prompts):
            colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
            text = f"a {colour} {shape} on a plain background, thick outlines, best quality"
            prompts[1000 + i] = (text, make_api(rng))
        hostile = '<script>alert("x")</script> ' + "very long hostile prompt, " * 30
        prompts[1000] = (hostile, prompts[1000][1])
        return prompts

    def _stage(self, name: str, config: Any, inputs: Any, write: Any, **result: Any) -> Artifact:
        def body(config: Any, context: StageContext) -> StageResult:
            write(context.out)
            return StageResult(**result)

        made = stage(name, version=1, config=type(config))(body)
        artifact: Artifact = made.run(config, inputs, self.runtime)
        return artifact

    def _write_dabench(self, out: Path) -> None:
        (out / "data").mkdir(exist_ok=True)
        rows = [
            {
                "id": prompt,
                "prompt": text,
                "api": api.to_json(),
                "model": api.model,
                "version": api.version,
                "base_model": api.base_model,
            }
            for prompt, (text, api) in self.truth.items()
        ]
        write_rows(out / "data" / "test-00000-of-00001.parquet", rows, DABENCH)

    def _add_selector(self, name: str) -> None:
        rng = random.Random(name)
        rows = [self._answer(name, prompt, rng) for prompt in self.truth]
        renders, scores = self._judge(name, rows, rng)
        config = SelectConfig(selector=name, num_prompts=self.config.num_prompts)
        select = self._stage(
            "select",
            config,
            {"dabench": [self.dabench], **({"agent": self.agent} if name == "sft" else {})},
            lambda out: write_rows(out / "candidates.parquet", rows, CANDIDATES),
            metrics={"latency_seconds": {"mean": 0.01 + rng.random(), "p95": 1 + rng.random()}},
        )
        inputs = {"candidates": [select], "dabench": [self.dabench]}

        def write_renders(out: Path) -> None:
            write_rows(out / "renders.parquet", renders, RENDERS)
            for row in renders:
                if row["status"] == "ok":
                    path = out / "images" / f"{row['recipe']}.png"
                    draw(path, rng.choice(COLOURS), rng.choice(SHAPES), rng)

        render = self._stage("render", RenderConfig(seeds=(0, 1)), inputs, write_renders)
        scorers = [{"name": n, "model": "somewhere"} for n in ("clip", "image_reward", "hps_v2")]
        score = self._stage(
            "score",
            RewardsConfig.model_validate({"scorers": scorers, "reference": "reference.json"}),
            {"renders": [render]},
            lambda out: write_rows(out / "scores.parquet", scores, SCORES),
        )
        for kind, artifact in (("candidates", select), ("renders", render), ("scores", score)):
            self.inputs[kind].append(artifact)

    def _answer(self, name: str, prompt: int, rng: random.Random) -> dict[str, Any]:
        text, truth = self.truth[prompt]
        api: T2IAPI | None = truth if rng.random() < SKILL[name] else make_api(rng)
        reason = None
        if name in ("sft", "rrhf") and rng.random() < (0.15 if name == "sft" else 0.05):
            api, reason = None, rng.choice(("unknown_model", "unparsable"))
        return {
            "prompt_id": prompt,
            "prompt": text,
            "candidate": 0,
            "source": name,
            "text": api.response().to_json() if api else '{"model":"<b>Dreamy</b> v9","vers',
            "api": api.to_json() if api else None,
            "status": "valid" if api else "invalid",
            "reason": reason,
            "logprob": None,
        }

    def _judge(
        self, name: str, rows: list[dict[str, Any]], rng: random.Random
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        renders, scores = [], []
        for row in rows:
            for seed in (0, 1):
                recipe = f"{row['prompt_id']:032x}{seed:032x}" if row["api"] else None
                failed = recipe is not None and rng.random() < 0.02
                status = "failed" if failed else "ok" if recipe else "invalid"
                base = {
                    "prompt_id": row["prompt_id"],
                    "source": name,
                    "candidate": 0,
                    "seed": seed,
                    "recipe": recipe,
                    "status": status,
                    "reason": "out-of-memory" if failed else row["reason"],
                }
                reward = rng.gauss(SKILL[name], 0.5)
                unified = {"ok": reward, "failed": None, "invalid": -10.0}[status]
                ok = status == "ok"
                rewards = {
                    "clip": 0.2 + reward / 20 if ok else None,
                    "image_reward": reward if ok else None,
                    "hps_v2": 0.25 + reward / 50 if ok else None,
                }
                renders.append({**base, "prompt": row["prompt"]})
                scores.append({**base, **rewards, "unified": unified})
        return renders, scores


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows; columns that nobody here reads get an empty value of their type."""
    empty = {field.name: blank(field) for field in schema}
    rows = [{**{k: v for k, v in empty.items() if k not in row}, **row} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)

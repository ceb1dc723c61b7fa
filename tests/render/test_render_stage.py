"""The stages ``render`` and ``score``: every row accounted for, resumable, loads counted."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffagent.errors import Forbidden, RenderError, ServerError
from diffagent.render import render_stage
from diffagent.render.pnginfo import read_png
from diffagent.render.recipe import Recipe
from diffagent.render.render_config import RenderConfig
from diffagent.render.render_stage import REASONS, render
from diffagent.render.renderer import Files
from diffagent.rewards import score_stage
from diffagent.rewards.image_batches import Preparation
from diffagent.rewards.score_config import RewardsConfig, ScorerConfig
from diffagent.rewards.score_stage import score
from diffagent.rewards.unified import MetricReference
from diffagent.schemas.api import T2IAPI, LoRA, Params
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import CANDIDATES, RENDERS, SCORES
from diffagent.store import Artifact, sha256_file
from diffagent.t2i.catalogue import Catalogue, Entry
from tests.conftest import ROOT, sealed
from tests.render import tiny_sd
from tests.render.test_recipe import ENTRY

NOWHERE = "http://127.0.0.1:9"  # nothing listens: all files are in the cache


class World:
    """A catalogue with its files in the model cache, and answers that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = RuntimeConfig(
            store=str(folder / "store"), models={"directory": str(folder / "models")}, device="cpu"
        )
        self.entries: list[Entry] = []
        self.rows: list[dict[str, Any]] = []
        (folder / "dabench").mkdir(parents=True)
        (folder / "candidates").mkdir()

    def add_model(self, name: str, file: Path | None = None, **fields: Any) -> None:
        """Put a model into the catalogue and its file into the cache."""
        number = len(self.entries) + 1
        content = file.read_bytes() if file else f"{number}: read by no renderer here".encode()
        sha256 = hashlib.sha256(content).hexdigest()
        target = self.folder / "models" / sha256[:2] / f"{sha256}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        if fields.pop("cached", True):
            target.write_bytes(content)
        self.entries.append(
            replace(ENTRY, **{"model": name, "version_id": number, "sha256": sha256, **fields})
        )

    def answer(self, model: str, *loras: str, status: str = "valid", **fields: Any) -> None:
        """Add a candidate to a prompt (``prompt_id`` 0 unless told)."""
        params = {"sampler": "Euler a", "steps": 2, "cfg_scale": 7, "width": 64, "height": 64}
        names = set(Params.model_fields)
        params |= {name: fields.pop(name) for name in list(fields) if name in names}
        api = T2IAPI(
            model=model,
            version="8",
            base_model="SD 1.5",
            loras=tuple(LoRA(model=lora, version="8", weight=1) for lora in loras),
            params=Params.model_validate(params),
        )
        row = {
            "prompt_id": 0,
            "prompt": "a red circle",
            "source": "sft",
            "text": api.to_json(),
            "api": api.to_json() if status == "valid" else None,
            "status": status,
            "reason": None if status == "valid" else "unknown-model",
            **fields,
        }
        same = [
            r
            for r in self.rows
            if (r["prompt_id"], r["source"]) == (row["prompt_id"], row["source"])
        ]
        self.rows.append({"candidate": len(same), **row})

    def inputs(self) -> dict[str, list[Artifact]]:
        table = Catalogue(self.entries).to_table()
        pq.write_table(table, self.folder / "dabench" / "catalogue.parquet")
        candidates = pa.Table.from_pylist(self.rows, schema=CANDIDATES)
        pq.write_table(candidates, self.folder / "candidates" / "candidates.parquet")
        return {name: [sealed(name, self.folder / name)] for name in ("dabench", "candidates")}

    def render(self, store: str = "store", **config: Any) -> Artifact:
        runtime = self.runtime.model_copy(update={"store": str(self.folder / store)})
        return render.run(
            RenderConfig(**{"max_failed_fraction": 1, **config}),
            self.inputs(),
            runtime,
            site_url=NOWHERE,
        )


class Painter:
    """A renderer that paints one colour a recipe; models that are called 'broken' fail."""

    name, version, reads_files = "painter", "1", True

    def __init__(self, *_: Any) -> None:
        self.loads = 0

    def check(self, recipe: Recipe, files: Files) -> None:
        pass

    def preload(self, files: Files) -> None:
        pass

    def prepare(self, files: Files) -> None:
        self.loads += 1

    def render(self, recipes: Sequence[Recipe]) -> Iterator[Image.Image | RenderError]:
        for recipe in recipes:
            if recipe.prompt == "darkness":
                yield RenderError("black", reason="black")
            else:
                yield Image.new("RGB", (8, 8), f"#{recipe.digest[:6]}")

    def close(self) -> None:
        pass


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(render_stage, "open_renderer", Painter)
    world = World(tmp_path)
    world.add_model("A")
    world.add_model("B")
    world.add_model("ink", type="LORA")
    return world


def rows(artifact: Artifact, name: str = "renders") -> list[dict[str, Any]]:
    return pq.read_table(artifact.file(f"{name}.parquet")).to_pylist()


def test_a_damaged_file_is_never_drawn_from(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader(Painter):
        def prepare(self, files: Files) -> None:
            assert files.checkpoint.path
            assert sha256_file(files.checkpoint.path) == files.checkpoint.sha256

    def download(_: Any, url: str, path: Path, *, sha256: str, **__: Any) -> None:
        calls.append(sha256)
        path.write_bytes(good)

    calls: list[str] = []
    world.answer("A")
    path = (
        world.folder / f"models/{world.entries[0].sha256[:2]}/{world.entries[0].sha256}.safetensors"
    )
    good = path.read_bytes()
    monkeypatch.setattr(render_stage, "open_renderer", Reader)
    monkeypatch.setattr("diffagent.civitai.client.CivitaiClient.download", download)
    monkeypatch.setattr("diffagent.render.files.model_store.check_weights", lambda path: None)
    world.entries[0] = replace(world.entries[0], download_path="/api/download/models/1")
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    (row,) = rows(world.render())
    assert (row["status"], calls) == ("ok", [world.entries[0].sha256])
    assert path.read_bytes() == good


def test_equal_answers_share_a_picture(world: World) -> None:
    world.answer("B", seed=5)
    world.answer("A")
    world.answer("A", "ink")
    world.answer("A", source="dabench")
    world.answer("A", prompt_id=1)  # the same text for another id
    world.answer("A", prompt_id=2, prompt="a blue square")
    artifact = world.render(seeds=(7, 3))
    table = pq.read_table(artifact.file("renders.parquet"))
    assert table.schema.equals(RENDERS)
    renders = table.to_pylist()
    keys = [(r["prompt_id"], r["source"], r["candidate"], r["seed"]) for r in renders]
    assert keys == sorted(keys)
    assert len(set(keys)) == 12
    assert {r["status"] for r in renders} == {"ok"}
    recipes = {r["recipe"] for r in renders}
    assert len(recipes) == 8
    assert {path.stem for path in artifact.glob("images/*")} == recipes
    for row in renders:
        recipe, text = read_png(artifact.file(f"images/{row['recipe']}.png"))
        assert (recipe.prompt, recipe.seed) == (row["prompt"], row["seed"])
        assert f"Seed: {row['seed']}" in text
    assert artifact.manifest.metrics["pictures_drawn"] == 8
    assert artifact.manifest.metrics["checkpoint_loads"] == 3  # a load a group with this painter


def test_every_failure_is_a_row_with_its_reason(world: World, monkeypatch: Any) -> None:
    world.add_model("Flux", base_model="Flux.1 D")
    world.add_model("unhashed", sha256=None)
    world.add_model("locked", cached=False)
    world.add_model("xl ink", type="LORA", base_model="SDXL 1.0")
    world.answer("A")
    world.answer("A", status="invalid")
    world.answer("A", prompt="darkness")
    world.answer("nobody")
    world.answer("A", "nobody")
    world.answer("A", "xl ink")
    world.answer("Flux")
    world.answer("unhashed")
    world.answer("locked")
    world.answer("A", sampler="DPM adaptive")
    world.answer("A", width=1024, height=2048)
    world.answer("A", api='{"model":"A"}')

    def fetch(store: Any, file: Entry) -> Path:
        if file.model == "locked":
            raise Forbidden("401: early access")
        return store.path(file.sha256)

    monkeypatch.setattr(render_stage.ModelStore, "fetch", fetch)
    artifact = world.render()
    renders = rows(artifact)
    told = [(row["status"], row["reason"], row["recipe"] is None) for row in renders]
    assert [bool(row["problem"]) for row in renders] == [s == "failed" for s, *_ in told]
    assert "401: early access" in renders[8]["problem"]
    assert told == [
        ("ok", None, False),
        ("invalid", "unknown-model", True),
        ("failed", "black", True),
        ("failed", "unknown-model", True),
        ("failed", "unknown-lora", True),
        ("failed", "lora-base-mismatch", True),
        ("failed", "unsupported-base-model", True),
        ("failed", "no-hash", True),
        ("failed", "download", True),
        ("failed", "unsupported-sampler", True),
        ("failed", "too-large", True),
        ("failed", "unreadable-api", True),
    ]
    assert {reason for status, reason, _ in told if status == "failed"} <= set(REASONS)
    (funnel,) = artifact.manifest.funnels
    assert (funnel.seen, funnel.kept) == (12, 1)

    with pytest.raises(RenderError, match=r"10 of 11 valid answers.*render.max_failed_fraction"):
        world.render(max_failed_fraction=0.9)
    world.render(max_failed_fraction=0.91)


@pytest.mark.parametrize("backend", ["diffusers", "a1111", "comfyui"])
def test_pictures_say_how_they_differ_from_what_is_meant(
    world: World, monkeypatch: Any, backend: str
) -> None:
    monkeypatch.setattr(Painter, "name", backend)
    edited = "[a|b] AND c BREAK d"
    world.answer("A")
    world.answer("A", sampler="DPM++ 2M SDE Karras")
    world.answer("A", sampler="LCM", steps=60)
    world.answer("A", prompt="a __colour__ {red|blue} ball")
    world.answer("A", prompt=edited)
    artifact = world.render()
    plain, noise, distilled, replaced, text = [row["note"] for row in rows(artifact)]
    assert plain is None
    assert (noise is None, distilled is None) == (backend != "diffusers",) * 2
    if backend == "diffusers":
        assert "Brownian" in noise
        assert "50 steps" in distilled
    assert "wildcards like __colour__" in replaced
    assert "choices like {red|blue}" in replaced
    assert ("unless an extension" in replaced) == (backend == "a1111")
    assert (text is None) == (backend != "comfyui")
    if backend == "comfyui":
        assert all(word in text for word in ("[a|b]", "AND", "BREAK"))
    noted = sum(row["note"] is not None for row in rows(artifact))
    assert artifact.manifest.metrics["renders_noted"] == noted


def test_trouble_of_the_site_is_not_a_failed_row(world: World, monkeypatch: Any) -> None:
    world.answer("A")

    def fetch(store: Any, file: Entry) -> Path:
        raise ServerError("503")

    with monkeypatch.context() as patch, pytest.raises(ServerError):
        patch.setattr(render_stage.ModelStore, "fetch", fetch)
        world.render()
    assert [row["status"] for row in rows(world.render())] == ["ok"]


def test_nothing_valid_is_no_failure(world: World) -> None:
    world.answer("A", status="invalid")
    artifact = world.render(max_failed_fraction=0)
    assert [row["status"] for row in rows(artifact)] == ["invalid"]
    assert not artifact.glob("images/*")


KILLED = """
import os, pathlib, signal, sys
from diffagent.store import Artifact
from diffagent.store import sha256_file
from diffagent.render import render_stage as stage
from diffagent.render.render_config import RenderConfig
from diffagent.schemas.runtime import RuntimeConfig
from tests.render.test_render_stage import Painter

written = 0
write_bytes = pathlib.Path.write_bytes

def die_in_the_fourth_picture(path, data):
    global written
    written += ".png" in path.name
    write_bytes(path, data if written < 4 else data[: len(data) // 2])
    if written == 4:
        os.kill(os.getpid(), signal.SIGKILL)

stage.open_renderer = Painter
pathlib.Path.write_bytes = die_in_the_fourth_picture
dabench, candidates = (Artifact.model_validate_json(text) for text in sys.argv[1:3])
stage.render.run(
    RenderConfig(max_failed_fraction=1),
    {"dabench": [dabench], "candidates": [candidates]},
    RuntimeConfig.model_validate_json(sys.argv[3]),
    site_url="http://127.0.0.1:9",
)
"""


def test_a_killed_run_goes_on_after_its_last_whole_picture(world: World) -> None:
    for number in range(10):
        world.answer("AB"[number % 2], prompt_id=number, prompt=f"picture {number}")
    inputs = world.inputs()
    arguments = [inputs[name][0].model_dump_json() for name in ("dabench", "candidates")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, world.runtime.model_dump_json()],
        cwd=ROOT,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (partial,) = (world.folder / "store" / "render").glob(".*.partial")
    assert len(list(partial.glob("images/*"))) == 2
    first, second = (world.folder / "store" / "pictures").rglob("*.png")
    first.write_bytes(first.read_bytes()[:-40])  # damaged: it is drawn again
    (partial / "images" / f"{'0' * 64}.png").write_bytes(b"of another run")

    artifact = world.render()
    undisturbed = world.render(store="other")
    assert artifact.content_digest == undisturbed.content_digest
    assert artifact.manifest.files == undisturbed.manifest.files
    assert artifact.manifest.metrics["pictures_cached"] == 1
    assert artifact.manifest.metrics["pictures_drawn"] == 9
    assert read_png(first)[0] != read_png(second)[0]

    world.answer("B", prompt_id=11, prompt="picture 1", source="dabench")
    world.answer("B", prompt_id=11, prompt="another picture", source="dabench")
    wider = world.render()  # another run that wants the same pictures and one more
    assert wider.identity != artifact.identity
    assert wider.manifest.metrics["pictures_cached"] == 10
    assert wider.manifest.metrics["pictures_drawn"] == 1


def test_real_pictures_load_each_checkpoint_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    config = tmp_path / "models" / "configs" / "tiny"
    for seed in (0, 1):
        pipeline = tiny_sd.build(config, seed)
        tiny_sd.save_single_file(pipeline, tmp_path / "checkpoint.safetensors")
        world.add_model(f"checkpoint {seed}", tmp_path / "checkpoint.safetensors")
        tiny_sd.save_kohya_lora(pipeline, tmp_path / "lora.safetensors", seed)
        world.add_model(f"lora {seed}", tmp_path / "lora.safetensors", type="LORA")
    tiny_sd.save_kohya_lora(pipeline, tmp_path / "lora.safetensors", seed=2)
    world.add_model("no checkpoint", tmp_path / "lora.safetensors")
    for prompt in range(2):
        for name in ("checkpoint 1", "checkpoint 0", "no checkpoint"):
            for loras in ((), ("lora 0",), ("lora 0", "lora 1")):
                world.answer(name, *loras, prompt_id=prompt, prompt=f"circle {prompt}")
    artifact = world.render()
    assert artifact.manifest.metrics["checkpoint_loads"] == 2
    renders = rows(artifact)
    reasons = Counter(row["reason"] for row in renders)
    assert reasons == {None: 12, "bad-model-file": 6}
    failed = {row["problem"] for row in renders if row["reason"]}
    assert failed == {
        "'no checkpoint' is not a Stable Diffusion checkpoint in the single-file layout"
    }
    digests = {path.stem: path.read_bytes() for path in artifact.glob("images/*")}
    assert len(set(digests.values())) == 12

    # One row alone, in another store: the same bytes.
    world.rows = world.rows[1:2]
    (alone,) = world.render(store="alone").glob("images/*")
    assert digests[alone.stem] == alone.read_bytes()


class Brightness:
    """A scorer: mean of a picture and length of its prompt; 'a red circle' breaks ``clip``."""

    version, digest, device = "test-1", "0" * 64, "cpu"
    preparation = Preparation((64, 64), "squash")

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: Counter[tuple[str, bytes]] = Counter()

    def score_pixels(self, prompts: Any, pixels: Any) -> Any:
        self.seen.update((p, i.numpy().tobytes()) for p, i in zip(prompts, pixels, strict=True))
        values = [
            np.nan if self.name == "clip" and p == "broken" else float(i.float().mean()) + len(p)
            for p, i in zip(prompts, pixels, strict=True)
        ]
        return torch.tensor(values), np.array([len(p) > 12 for p in prompts])


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> list[Brightness]:
    scorers = [Brightness(name) for name in ("clip", "image_reward", "hps_v2")]
    monkeypatch.setattr(score_stage, "load_scorers", lambda config, **runtime: scorers)
    return scorers


def rewards(folder: Path) -> RewardsConfig:
    reference = {
        name: vars(MetricReference(100.0, 10.0, "0" * 64))
        for name in ("clip", "image_reward", "hps_v2")
    }
    (folder / "reference.json").write_text(json.dumps({"metrics": reference}))
    return RewardsConfig(
        scorers=tuple(
            ScorerConfig(name=name, model="test")
            for name in ("clip", "image_reward", "hps_v2")
        ),
        reference=str(folder / "reference.json"),
        invalid_floor=-50,
        batch_size=2,
    )  # fmt: skip


def test_render_and_score_show_how_far_they_are(world: World, scorers: list[Brightness]) -> None:
    for prompt in ("a red circle", "a blue star", "a ring"):
        world.answer("A", prompt=prompt)
    shown: list[tuple[float | None, str]] = []
    options: dict[str, Any] = {"progress": lambda fraction, text: shown.append((fraction, text))}
    runtime = world.runtime.model_copy(update={"store": str(world.folder / "store")})
    renders = render.run(RenderConfig(), world.inputs(), runtime, site_url=NOWHERE, **options)
    assert shown == [(n / 3, f"{n} of 3 pictures") for n in (1, 2, 3)]
    shown.clear()
    score.run(rewards(world.folder), {"renders": [renders]}, runtime, **options)
    assert shown[-1] == (1, "3 of 3 pictures")


def test_scores_follow_the_rows(world: World, scorers: list[Brightness]) -> None:
    world.answer("A")
    world.answer("A", status="invalid")
    world.answer("A", prompt="darkness")
    world.answer("B", prompt="broken")
    world.answer("B", prompt="a long red circle")
    world.answer("A", source="dabench")
    renders = world.render()
    artifact = score.run(rewards(world.folder), {"renders": [renders]}, world.runtime)
    table = pq.read_table(artifact.file("scores.parquet"))
    assert table.schema.equals(SCORES)
    scores = table.to_pylist()
    kept = ("prompt_id", "source", "candidate", "seed", "recipe")
    assert [[r[k] for k in kept] for r in scores] == [[r[k] for k in kept] for r in rows(renders)]
    assert [(r["source"], r["status"], r["reason"]) for r in scores] == [
        ("dabench", "ok", None),
        ("sft", "ok", None),
        ("sft", "invalid", "unknown-model"),
        ("sft", "failed", "black"),
        ("sft", "failed", "score-not-finite"),
        ("sft", "ok", None),
    ]
    for row in scores:
        values = [row[name] for name in ("clip", "image_reward", "hps_v2")]
        if row["status"] == "ok":
            assert row["unified"] == pytest.approx((values[0] - 100) / 10)
            assert values[0] == values[1] == values[2]
        else:
            assert values == [None] * 3
            assert row["unified"] == (-50 if row["status"] == "invalid" else None)
    assert {key: scores[0][key] for key in ("clip", "unified")} == {
        key: scores[1][key] for key in ("clip", "unified")
    }
    for scorer in scorers:  # each picture once
        assert len(scorer.seen) == 3
        assert set(scorer.seen.values()) == {1}
    told = artifact.manifest.metrics["scorers"]["hps_v2"]
    assert (told["version"], told["digest"], told["truncated_prompts"]) == ("test-1", "0" * 64, 1)
    assert artifact.manifest.metrics["unified"]["invalid_floor"] == -50
    assert (artifact.manifest.funnels[0].seen, artifact.manifest.funnels[0].kept) == (6, 3)


def test_no_picture_no_scores(world: World, scorers: list[Brightness]) -> None:
    world.answer("A", status="invalid")
    artifact = score.run(rewards(world.folder), {"renders": [world.render()]}, world.runtime)
    assert [row["unified"] for row in rows(artifact, "scores")] == [-50]
    assert not scorers[0].seen

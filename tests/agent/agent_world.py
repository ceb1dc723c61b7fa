"""A small DABench for tests of agents: captions of drawings, and a checkpoint for each style."""

from __future__ import annotations

import random
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from diffagent.sandbox.world import STYLES, caption, sample_scene
from diffagent.schemas.api import T2IAPI, LoRA, Params
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import DABENCH
from diffagent.store import Artifact, StageContext, StageResult, stage
from diffagent.t2i.catalogue import Catalogue, Entry

SAMPLERS = ("Euler a", "DPM++ 2M Karras", "DDIM", "UniPC")
NAMES = {"flat": "Flatland", "outline": "Inkline", "3d": "Solid 3D", "pixel art": "Pixel Forge"}
NAMES |= {"sketch": "Graphite"}
GENERALISTS = ("Sandbox Base", "Toybox Mix", "Crayon Dream")


def entry(number: int, model: str, version: str, kind: str, base_model: str = "SD 1.5") -> Entry:
    air_type = "checkpoint" if kind == "Checkpoint" else "lora"
    return Entry(
        model=model,
        version=version,
        type=kind,
        base_model=base_model,
        model_id=number,
        version_id=100 + number,
        air=f"urn:air:sd1:{air_type}:civitai:{number}@{100 + number}",
        file_name=f"{number}.safetensors",
        file_id=number,
        size_bytes=1000,
        sha256=f"{number:064x}",
        download_path=f"/api/download/models/{100 + number}",
        description=f"Test model {model}.",
        tags=("test",),
        trained_words=(),
        downloads=number,
        creator="tester",
        allow_commercial_use=None,
        allow_derivatives=None,
        allow_no_credit=None,
    )


def make_catalogue() -> Catalogue:
    checkpoints = [*NAMES.values(), *GENERALISTS]
    entries = [entry(i, name, "v1.0", "Checkpoint") for i, name in enumerate(checkpoints, 1)]
    entries.append(entry(20, "Flatland", "v2.0", "Checkpoint"))
    entries.append(entry(30, "Thick Outlines", "v1", "LORA"))
    entries.append(entry(31, "Soft Light", "v1.2", "LORA"))
    entries.append(entry(40, "Wide Base", "v1.0", "Checkpoint", "SDXL 1.0"))
    entries.append(entry(41, "Wide Lines", "v1", "LORA", "SDXL 1.0"))
    entries.append(entry(50, "Bad Shapes", "v1", "TextualInversion"))
    entries.append(entry(51, "Wide Fog", "v1", "TextualInversion", "SDXL 1.0"))
    return Catalogue(entries, SAMPLERS)


def make_api(style: str, rng: random.Random, faithful: float = 0.75) -> T2IAPI:
    """The call of a user: mostly the specialist of the style, with habits that go with it."""
    position = STYLES.index(style)
    others = [*NAMES.values(), *GENERALISTS]
    model = NAMES[style] if rng.random() < faithful else rng.choice(others)
    loras: tuple[LoRA, ...] = ()
    if style == "outline" and rng.random() < 0.4:
        loras = (LoRA(model="Thick Outlines", version="v1", weight=rng.choice((0.6, 0.8, 1))),)
    elif rng.random() < 0.1:
        loras = (LoRA(model="Soft Light", version="v1.2", weight=0.5),)
    return T2IAPI(
        model=model,
        version="v1.0",
        base_model="SD 1.5",
        loras=loras,
        params=Params(
            sampler=SAMPLERS[position % 4] if rng.random() < 0.7 else rng.choice(SAMPLERS),
            steps=rng.choice((20, 25, 30)),
            cfg_scale=rng.choice((3, 5, 7, 7.5)),
            width=64,
            height=64,
            seed=rng.randrange(2**32),
        ),
        negative_prompt=rng.choice(("", "blurry", "blurry, low quality", "noisy, deformed")),
    )


def make_rows(count: int, seed: int, faithful: float = 0.75) -> list[dict[str, object]]:
    """``count`` rows of DABENCH; ids are seed * 1,000,000 and up."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        scene = sample_scene(rng)
        prompt = caption(scene, rng, with_style=rng.random() < 0.8)
        api = make_api(scene.style, rng, faithful)
        row: dict[str, object] = {
            "id": seed * 1_000_000 + number,
            "prompt": prompt,
            "api": api.to_json(),
            "model": api.model,
            "version": api.version,
            "base_model": api.base_model,
        }
        rows.append({name: row.get(name, blank(DABENCH.field(name))) for name in DABENCH.names})
    return rows


def blank(field: pa.Field) -> object:
    """A value for a column that a test does not look at."""
    if field.nullable:
        return None
    if pa.types.is_list(field.type):
        return []
    if pa.types.is_struct(field.type):
        return {}
    return {pa.string(): "", pa.bool_(): False}.get(field.type, 0)


class WorldConfig(BaseModel):
    """How many pairs a test needs."""

    train: int = 64
    test: int = 16
    validation: int = 0
    faithful: float = 0.75


@stage("shard", version=1, config=WorldConfig)
def build_world(config: WorldConfig, context: StageContext) -> StageResult:
    catalogue = make_catalogue()
    pq.write_table(catalogue.to_table(), context.out / "catalogue.parquet")
    (context.out / "mapping").mkdir(exist_ok=True)
    (context.out / "data").mkdir(exist_ok=True)
    samplers = {name: {} for name in sorted(catalogue.samplers)}
    (context.out / "mapping" / "samplers.json").write_bytes(orjson.dumps(samplers))
    for seed, split in enumerate(("train", "test", "validation"), 1):
        count = getattr(config, split)
        if not count:
            continue
        table = pa.Table.from_pylist(make_rows(count, seed, config.faithful), schema=DABENCH)
        pq.write_table(table, context.out / "data" / f"{split}-00000-of-00001.parquet")
    return StageResult()


def make_world(store: Path, **sizes: float) -> Artifact:
    """A DABench artefact in ``store``."""
    runtime = RuntimeConfig(store=str(store), device="cpu")
    return build_world.run(WorldConfig.model_validate(sizes), {}, runtime)

"""Measurement of the sandbox's models with the attribute classifier; prints one JSON object.

    python -m tools.sandbox.evaluate_generator --pictures 64

Prompts are captions of combinations that no model saw in training. A checkpoint's figures are the
shares of pictures in which the classifier finds the requested colour, shape, both, background and
style. The classifier was trained on drawings of its own and names one of its shapes for any
picture.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from diffagent import compat
from diffagent.sandbox import files, world
from tools.sandbox import attributes, tiny_networks

SETTINGS = {"num_inference_steps": 20, "guidance_scale": 5.0}
NEGATIVE = "blurry, low quality"


def paint(path: Path, prompts: list[str], *, first_seed: int = 0) -> list[Any]:
    """Returns pictures of a checkpoint with DPM++ 2M Karras, one seed per prompt."""
    from diffusers import DPMSolverMultistepScheduler

    pipeline = tiny_networks.build_pipeline(path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=True
    )
    pictures: list[Any] = []
    for start in range(0, len(prompts), 16):
        batch = prompts[start : start + 16]
        seeds = range(first_seed + start, first_seed + start + len(batch))
        pictures += pipeline(
            batch,
            negative_prompt=[NEGATIVE] * len(batch),
            height=world.SIZE,
            width=world.SIZE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **SETTINGS,
        ).images
    return pictures


def scenes_for(style: str, count: int, *, named: bool) -> tuple[list[world.Scene], list[str]]:
    """Returns held-out scenes of one style and their captions."""
    first = world.EVALUATION_SEEDS.start + 5_000_000 + 10_000 * world.STYLES.index(style)
    rngs = [random.Random(first + number) for number in range(count)]
    scenes = [world.sample_scene(rng, styles=[style], held_out=True) for rng in rngs]
    pairs = zip(scenes, rngs, strict=True)
    return scenes, [world.caption(scene, rng, with_style=named) for scene, rng in pairs]


def shares(scenes: list[world.Scene], pictures: list[Any]) -> dict[str, float]:
    """Returns the shares, 0..1, of pictures that show the requested attributes."""
    readings = attributes.recognise(attributes.load_classifier(), pictures)
    rows = [
        {name: reading[name] == getattr(scene, name) for name in attributes.HEADS}
        for scene, reading in zip(scenes, readings, strict=True)
    ]
    result = {name: sum(row[name] for row in rows) / len(rows) for name in attributes.HEADS}
    result["colour_and_shape"] = sum(r["colour"] and r["shape"] for r in rows) / len(rows)
    return {name: round(value, 3) for name, value in result.items()}


def evaluate(count: int, site: Path) -> dict[str, Any]:
    """Returns the figures of all checkpoints of the sandbox's site, each over `count` pictures."""
    paths = {file.key: file.path for file in files.model_files(files.materialise(site))}
    scenes, prompts = scenes_for("flat", count, named=False)
    result: dict[str, Any] = {
        "pictures": count,
        "settings": {**SETTINGS, "sampler": "DPM++ 2M Karras", "negative_prompt": NEGATIVE},
        "classifier_on_drawings": attributes.accuracy(),
        "base": shares(scenes, paint(paths["base"], prompts)),
        "early": shares(scenes, paint(paths["early"], prompts)),
    }
    for style in world.STYLES[1:]:
        key = f"specialist-{style.replace(' ', '-')}"
        scenes, prompts = scenes_for(style, count, named=True)
        result[key] = {
            "specialist": shares(scenes, paint(paths[key], prompts)),
            "base": shares(scenes, paint(paths["base"], prompts)),
        }
    return result


def main() -> None:
    """Prints the figures as JSON."""
    compat.install()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--site", type=Path, default=Path("build/sandbox"), help="its folder")
    arguments = parser.parse_args()
    print(json.dumps(evaluate(arguments.pictures, arguments.site), indent=2))


if __name__ == "__main__":
    main()

"""Small classifier of shape, colour, background and style of a sandbox picture.

It learns from drawings of its own seeds, blurred and softened at random so that it also reads the
generator's pictures. It only measures the generator; no scorer and no agent uses it.

    python -m tools.sandbox.attributes train
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import nn

from diffagent.errors import ArtifactError
from diffagent.sandbox import world
from tools.sandbox import drawings

SEED = 31
WEIGHTS = Path(__file__).parent / "attributes.safetensors"
HEADS: dict[str, tuple[str, ...]] = {
    "shape": world.SHAPES,
    "colour": world.COLOURS,
    "background": world.BACKGROUNDS,
    "style": world.STYLES,
}


class AttributeClassifier(nn.Module):
    """Four convolutions and one linear head per attribute; 0.2 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(widths[-1] * 16, 64)
        self.heads = nn.ModuleDict({name: nn.Linear(64, len(v)) for name, v in HEADS.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the logits of each head.

        Args:
            pictures: (B, 3, 64, 64) float in -1..1.

        Returns:
            attribute -> (B, number of its values).
        """
        hidden = F.silu(self.hidden(self.features(pictures).flatten(1)))
        return {name: head(hidden) for name, head in self.heads.items()}


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Returns pictures, resized to the sandbox's size, as (B, 3, 64, 64) float in -1..1."""
    sized = [picture.convert("RGB").resize((world.SIZE, world.SIZE)) for picture in pictures]
    pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in sized])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def load_classifier(path: Path = WEIGHTS) -> AttributeClassifier:
    """Loads the committed classifier in evaluation mode.

    Raises:
        ArtifactError: it has not been trained.
    """
    if not path.is_file():
        raise ArtifactError(
            f"no attribute classifier at {str(path)!r}; "
            "run `python -m tools.sandbox.attributes train`"
        )
    model = AttributeClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


def recognise(model: AttributeClassifier, pictures: list[Image.Image]) -> list[dict[str, str]]:
    """Returns the most likely value of each attribute, one dict per picture."""
    with torch.no_grad():
        logits = model(to_tensor(pictures))
    chosen = {name: values.argmax(dim=1).tolist() for name, values in logits.items()}
    return [
        {name: HEADS[name][chosen[name][row]] for name in HEADS} for row in range(len(pictures))
    ]


def _softened(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Softens half of the drawings like a small VAE, some at half the size."""
    kind = rng.random()
    if kind < 0.3:
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6)))
    if kind < 0.5:
        half = picture.resize((world.SIZE // 2, world.SIZE // 2), Image.Resampling.BOX)
        return half.resize((world.SIZE, world.SIZE), Image.Resampling.BICUBIC)
    return picture


def _batch(seeds: range) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    pictures, scenes = [], []
    for seed in seeds:
        rng = random.Random(seed)
        scene = world.sample_scene(rng, held_out=rng.random() < 0.1)
        pictures.append(_softened(drawings.draw(scene, rng), rng))
        scenes.append(scene)
    labels = {
        name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
        for name, values in HEADS.items()
    }
    return to_tensor(pictures), labels


def train(steps: int, batch: int = 64) -> dict[str, Any]:
    """Trains the classifier and saves it; returns its accuracy on unseen drawings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AttributeClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    first = world.ATTRIBUTE_SEEDS.start
    for step in range(steps):
        pictures, labels = _batch(range(first + step * batch, first + (step + 1) * batch))
        logits = model(pictures)
        loss = torch.stack([F.cross_entropy(logits[name], labels[name]) for name in HEADS]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.float16) for k, v in model.state_dict().items()}, WEIGHTS)
    return {"seed": SEED, "steps": steps, "loss": loss.item(), "accuracy": accuracy()}


def accuracy(count: int = 1000) -> dict[str, float]:
    """Returns the share of evaluation drawings that are read correctly, per attribute."""
    start = world.EVALUATION_SEEDS.start
    pictures, labels = _batch(range(start, start + count))
    with torch.no_grad():
        logits = load_classifier()(pictures)
    return {name: (logits[name].argmax(1) == labels[name]).float().mean().item() for name in HEADS}


def main() -> None:
    """Trains the classifier, or prints its accuracy, as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["train", "accuracy"])
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    result = train(arguments.steps) if arguments.command == "train" else accuracy()
    print(json.dumps(result))


if __name__ == "__main__":
    main()

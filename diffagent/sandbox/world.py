"""Scenes of the sandbox and their captions: a coloured shape on a background, in a style.

The generator, the scorers and the attribute classifier all learn from drawings of these scenes
(``tools/sandbox/drawings.py``), so they agree about a toy world only. Two rules keep comparisons
honest: every purpose has its own range of seeds, and about a tenth of the combinations of shape,
colour and background is held out of all training (`is_held_out`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

SIZE = 64
"""Side of a drawing in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = ("white", "black", "stripes", "checkerboard", "sky", "night", "meadow")
STYLES = ("flat", "outline", "3d", "pixel art", "sketch")

GENERATOR_SEEDS = range(0, 10_000_000)
"""Drawings that VAE, U-Net and specialists learn from."""
SCORER_SEEDS = range(10_000_000, 20_000_000)
"""Drawings that the three scorers learn from."""
ATTRIBUTE_SEEDS = range(20_000_000, 30_000_000)
"""Drawings that the attribute classifier learns from."""
EVALUATION_SEEDS = range(30_000_000, 40_000_000)
"""Drawings and captions for evaluation only."""
CATALOGUE_SEEDS = range(40_000_000, 50_000_000)
"""Synthetic users whose pictures fill the sandbox's catalogue."""

_BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "white": ("on a white background", "on white"),
    "black": ("on a black background", "on black"),
    "stripes": ("on grey stripes", "on a striped background"),
    "checkerboard": ("on a checkerboard", "on a checkered background"),
    "sky": ("in a blue sky", "in the sky with clouds"),
    "night": ("in the night sky", "at night with stars around"),
    "meadow": ("in a meadow", "in a green meadow"),
}
_STYLE_PHRASES: dict[str, tuple[str, ...]] = {
    "flat": ("flat", "flat design"),
    "outline": ("outline", "line art"),
    "3d": ("3d", "3d render"),
    "pixel art": ("pixel art", "8-bit pixel art"),
    "sketch": ("sketch", "pencil sketch"),
}
_TEMPLATES = (
    "a {colour} {shape} {background}",
    "{colour} {shape} {background}",
    "a picture of a {colour} {shape} {background}",
    "one big {colour} {shape} {background}",
)
_STYLED_TEMPLATES = (
    "a {colour} {shape} {background}, {style} style",
    "{style} of a {colour} {shape} {background}",
    "{style}, {colour} {shape} {background}",
    "a {style} picture of a {colour} {shape} {background}",
)

FLAWS = ("blurry", "low quality", "noisy", "deformed")
"""Words for the flaws of a spoiled drawing, in captions and negative prompts."""


@dataclass(frozen=True)
class Scene:
    """Content of a drawing.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`, the colour of the shape.
        background: one of `BACKGROUNDS`.
        style: one of `STYLES`.
    """

    shape: str
    colour: str
    background: str
    style: str = "flat"

    def __post_init__(self) -> None:
        for value, allowed in (
            (self.shape, SHAPES),
            (self.colour, COLOURS),
            (self.background, BACKGROUNDS),
            (self.style, STYLES),
        ):
            if value not in allowed:
                raise ValueError(f"a scene cannot have {value!r}; choose one of {allowed}")


def is_held_out(scene: Scene) -> bool:
    """Returns whether the scene's shape, colour and background never occur together in training.

    Every shape, every colour and every pair of them still occurs. The style plays no part.
    """
    shape, colour = SHAPES.index(scene.shape), COLOURS.index(scene.colour)
    return (3 * shape + 5 * colour + 7 * BACKGROUNDS.index(scene.background)) % 10 == 7


def sample_scene(
    rng: random.Random,
    *,
    styles: Sequence[str] = STYLES,
    style_weights: Sequence[float] | None = None,
    held_out: bool = False,
) -> Scene:
    """Samples a scene uniformly (styles by weight) from the held-out or from the other scenes."""
    style = rng.choices(styles, weights=style_weights)[0]
    while True:
        scene = Scene(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(BACKGROUNDS), style)
        if is_held_out(scene) == held_out:
            return scene


def caption(scene: Scene, rng: random.Random, *, with_style: bool | None = None) -> str:
    """Describes a scene in one of eight sentence forms.

    Args:
        scene: the scene.
        rng: chooses the wording.
        with_style: name the drawing style; None names it in half of the captions.
    """
    if with_style is None:
        with_style = rng.random() < 0.5
    text = rng.choice(_STYLED_TEMPLATES if with_style else _TEMPLATES).format(
        colour=scene.colour,
        shape=scene.shape,
        background=rng.choice(_BACKGROUND_PHRASES[scene.background]),
        style=rng.choice(_STYLE_PHRASES[scene.style]),
    )
    # Plain templates yield "a orange" and "a outline picture".
    for vowel_word in ("orange", "outline", "8-bit"):
        text = text.replace(f"a {vowel_word}", f"an {vowel_word}")
    return text


def words() -> list[str]:
    """Returns every word that captions can hold, sorted."""
    phrases = [*SHAPES, *COLOURS, *_TEMPLATES, *_STYLED_TEMPLATES, *FLAWS, "an", "style"]
    phrases += [text for texts in _BACKGROUND_PHRASES.values() for text in texts]
    phrases += [text for texts in _STYLE_PHRASES.values() for text in texts]
    plain = [re.sub(r"\{\w+\}", " ", phrase) for phrase in phrases]
    return sorted({word for phrase in plain for word in re.findall(r"[a-z]+|[0-9]", phrase)})

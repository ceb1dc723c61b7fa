"""Drawings of the sandbox's scenes, from which its models learn."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from diffagent.sandbox.world import FLAWS, SIZE, Scene, caption, sample_scene

_RGB: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (243, 128, 18),
    "yellow": (246, 214, 22),
    "green": (26, 142, 52),
    "cyan": (12, 194, 206),
    "blue": (32, 72, 208),
    "purple": (122, 38, 160),
    "pink": (244, 112, 182),
}
_SCALE = 4  # draw four times larger, then average: anti-aliasing
_GRID = 16  # cells a side in pixel art
_PAPER = (238, 232, 216)
_GRAPHITE = (58, 56, 60)

FloatArray = npt.NDArray[np.float32]
Point = tuple[float, float]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draws a scene at a random position, size and rotation.

    Returns:
        An RGB picture of `SIZE` x `SIZE` pixels, anti-aliased but for pixel art.
    """
    background = _background(scene.background, rng)
    shape = _Placed.sample(scene.shape, rng)
    painters: dict[str, Callable[[FloatArray, _Placed, FloatArray], FloatArray]] = {
        "flat": _paint_flat,
        "outline": _paint_outline,
        "3d": _paint_3d,
        "pixel art": _paint_pixel_art,
        "sketch": partial(_paint_sketch, rng=rng),
    }
    pixels = painters[scene.style](background, shape, _jittered(_RGB[scene.colour], rng))
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8), mode="RGB")


def spoil(picture: Image.Image, text: str, rng: random.Random) -> tuple[Image.Image, str]:
    """Blurs and dirties a drawing and names it in the caption, so that negative prompts mean it."""
    soft = picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 4.0)))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(
        0, rng.uniform(5, 30), (SIZE, SIZE, 3)
    )
    dirty = np.clip(np.asarray(soft, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
    named = ", ".join(rng.sample(FLAWS, rng.randint(1, len(FLAWS))))
    return Image.fromarray(dirty), named if rng.random() < 0.5 else f"{named}, {text}"


def drawing(seed: int, **sampling: object) -> tuple[Image.Image, str, Scene]:
    """Draws the picture of a seed: a sampled scene, its drawing and a caption.

    Args:
        seed: a number of one of the seed ranges in `diffagent.sandbox.world`.
        sampling: passed to `sample_scene`.
    """
    rng = random.Random(seed)
    scene = sample_scene(rng, **sampling)  # type: ignore[arg-type]
    return draw(scene, rng), caption(scene, rng), scene


@dataclass(frozen=True)
class _Placed:
    """A shape at its place: centre and radius in pixels, angle in radians."""

    shape: str
    x: float
    y: float
    radius: float
    angle: float

    @classmethod
    def sample(cls, shape: str, rng: random.Random) -> _Placed:
        # Half a latent cell either way: a tiny generator learns it in an hour on one core.
        return cls(
            shape,
            SIZE / 2 + rng.uniform(-4, 4),
            SIZE / 2 + rng.uniform(-4, 4),
            rng.uniform(19, 24),
            math.radians(rng.uniform(-10, 10)),
        )

    def outlines(self) -> list[list[Point]]:
        """Closed outlines in pixels: the outer one, then holes."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return [
            [
                (
                    self.x + self.radius * (cos * u - sin * v),
                    self.y + self.radius * (sin * u + cos * v),
                )
                for u, v in outline
            ]
            for outline in _unit_outlines(self.shape)
        ]

    def mask(self, scale: int = _SCALE, size: int = SIZE) -> FloatArray:
        """Coverage of each pixel, (size, size) in 0..1."""
        canvas = Image.new("L", (size * scale, size * scale), 0)
        pen = ImageDraw.Draw(canvas)
        factor = scale * size / SIZE
        for number, outline in enumerate(self.outlines()):
            points = [(x * factor, y * factor) for x, y in outline]
            pen.polygon(points, fill=255 if number == 0 else 0)
        return _averaged(canvas, size)

    def stroke(self, width: float, wobble: random.Random | None = None) -> FloatArray:
        """Coverage of the outlines drawn `width` pixels wide, (SIZE, SIZE) in 0..1."""
        canvas = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE), 0)
        pen = ImageDraw.Draw(canvas)
        for outline in self.outlines():
            if wobble is not None:
                rough = [
                    (x + wobble.uniform(-0.7, 0.7), y + wobble.uniform(-0.7, 0.7))
                    for x, y in outline[:: 1 if len(outline) < 20 else 3]
                ]
            else:
                rough = outline
            points = [(x * _SCALE, y * _SCALE) for x, y in [*rough, *rough[:2]]]
            pen.line(points, fill=255, width=round(width * _SCALE), joint="curve")
        return _averaged(canvas, SIZE)


def _unit_outlines(shape: str) -> list[list[Point]]:
    if shape == "circle":
        return [_arc(0, 0, 0.95)]
    if shape == "ring":
        return [_arc(0, 0, 1.0), _arc(0, 0, 0.5)]
    if shape == "square":
        return [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]]
    if shape == "triangle":
        return [[(0, -1.0), (0.95, 0.8), (-0.95, 0.8)]]
    if shape == "cross":
        a, b = 0.33, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return [[*corners, *((-x, -y) for x, y in corners)]]
    if shape == "star":
        radii = (1.08, 0.46)
        angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
        return [
            [(radii[k % 2] * math.cos(t), radii[k % 2] * math.sin(t)) for k, t in enumerate(angles)]
        ]
    if shape == "heart":
        steps = [2 * math.pi * k / 48 for k in range(48)]
        return [
            [
                (
                    math.sin(t) ** 3,
                    -(
                        13 * math.cos(t)
                        - 5 * math.cos(2 * t)
                        - 2 * math.cos(3 * t)
                        - math.cos(4 * t)
                    )
                    / 15.5,
                )
                for t in steps
            ]
        ]
    return [_crescent()]


def _arc(
    x: float, y: float, radius: float, start: float = 0, end: float = 2 * math.pi
) -> list[Point]:
    count = 48
    angles = [start + (end - start) * k / count for k in range(count)]
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in angles]


def _crescent() -> list[Point]:
    # A disc of radius 1 minus a disc of radius 0.85 shifted right by 0.55; tips where they cross.
    shift, bite = 0.55, 0.85
    tip_x = (1 - bite**2 + shift**2) / (2 * shift)
    outer = math.acos(tip_x)
    inner = math.acos((tip_x - shift) / bite)
    back = _arc(shift, 0, bite, inner, 2 * math.pi - inner)
    return [(x + 0.2, y) for x, y in [*_arc(0, 0, 1.0, outer, 2 * math.pi - outer), *back[::-1]]]


def _averaged(canvas: Image.Image, size: int) -> FloatArray:
    small = canvas.resize((size, size), Image.Resampling.BOX)
    coverage: FloatArray = np.asarray(small, dtype=np.float32) / np.float32(255)
    return coverage


def _jittered(colour: tuple[int, int, int], rng: random.Random) -> FloatArray:
    return np.array([channel + rng.uniform(-10, 10) for channel in colour], dtype=np.float32)


def _background(name: str, rng: random.Random) -> FloatArray:
    """A background, (SIZE, SIZE, 3) in 0..255."""
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    if name in ("white", "black"):
        level = rng.uniform(243, 255) if name == "white" else rng.uniform(4, 22)
        return np.full((SIZE, SIZE, 3), level, dtype=np.float32)
    if name == "stripes":
        # A period of two latent cells and only two phases: a tiny generator can learn it.
        wave = np.sin((xs + ys) * (2 * math.pi / 16) + rng.choice((0.0, math.pi)))
        return _blend(np.clip(wave * 4, -1, 1) / 2 + 0.5, (140, 140, 144), (202, 202, 206))
    if name == "checkerboard":
        board = (xs // 16 + ys // 16 + rng.randrange(2)) % 2
        return _blend(board, (88, 78, 72), (226, 216, 200))
    if name == "sky":
        return _sky(ys, rng)
    if name == "night":
        night = _blend(ys / SIZE, (8, 10, 38), (34, 30, 82))
        for _ in range(rng.randrange(14, 22)):
            x, y = rng.randrange(SIZE - 1), rng.randrange(SIZE - 1)
            night[y : y + 2, x : x + 2] = rng.uniform(170, 250)
        return night
    horizon = rng.uniform(26, 38)
    hills = horizon + 3 * np.sin(xs / rng.uniform(7, 12) + rng.uniform(0, 6))
    below = np.clip(ys - hills, 0, 1)[..., None]
    field = _blend(ys / SIZE, (150, 196, 112), (108, 160, 80))
    haze = np.array((206, 228, 240), dtype=np.float32)
    meadow: FloatArray = (1 - below) * haze + below * field
    return meadow


def _sky(ys: FloatArray, rng: random.Random) -> FloatArray:
    sky = _blend(ys / np.float32(SIZE), (140, 190, 236), (206, 228, 246))
    canvas = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE), 0)
    pen = ImageDraw.Draw(canvas)
    for _ in range(3):
        x, y = rng.uniform(0, SIZE), rng.uniform(4, SIZE - 4)
        for dx, dy, r in ((-6, 1, 4), (0, 0, 6), (7, 1, 4.5)):
            box = [x + dx - r, y + dy - r * 0.7, x + dx + r, y + dy + r * 0.7]
            pen.ellipse([value * _SCALE for value in box], fill=255)
    cloud = _averaged(canvas, SIZE)[..., None] * 0.9
    clouded: FloatArray = (1 - cloud) * sky + cloud * 250
    return clouded


def _blend(amount: FloatArray, low: tuple[int, ...], high: tuple[int, ...]) -> FloatArray:
    a = np.asarray(amount, dtype=np.float32)[..., None]
    mixed: FloatArray = (1 - a) * np.array(low, np.float32) + a * np.array(high, np.float32)
    return mixed


def _over(background: FloatArray, colour: FloatArray | float, coverage: FloatArray) -> FloatArray:
    alpha = coverage[..., None]
    mixed: FloatArray = (1 - alpha) * background + alpha * colour
    return mixed


def _paint_flat(background: FloatArray, shape: _Placed, colour: FloatArray) -> FloatArray:
    return _over(background, colour, shape.mask())


def _paint_outline(background: FloatArray, shape: _Placed, colour: FloatArray) -> FloatArray:
    return _over(background, colour, shape.stroke(4.0))


def _paint_3d(background: FloatArray, shape: _Placed, colour: FloatArray) -> FloatArray:
    mask = shape.mask()
    shadow = np.zeros_like(mask)
    shadow[5:, 5:] = mask[:-5, :-5]
    pixels = _over(background, 0.0, 0.55 * shadow)
    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    # Light from the upper left: shade falls along the diagonal, one glossy spot on the lit side.
    along = ((xs - shape.x) + (ys - shape.y)) / (2 * shape.radius)
    lit = colour * np.clip(1.0 - 0.62 * (along + 0.45), 0.3, 1.0)[..., None]
    gloss_x, gloss_y = shape.x - 0.38 * shape.radius, shape.y - 0.38 * shape.radius
    distance = ((xs - gloss_x) ** 2 + (ys - gloss_y) ** 2) / (0.3 * shape.radius) ** 2
    glossy = _over(lit, 255.0, 0.9 * np.exp(-distance))
    return _over(pixels, glossy, mask)


def _paint_pixel_art(background: FloatArray, shape: _Placed, colour: FloatArray) -> FloatArray:
    cell = SIZE // _GRID
    coarse = background.reshape(_GRID, cell, _GRID, cell, 3).mean(axis=(1, 3))
    inside = shape.mask(scale=8, size=_GRID) > 0.5
    edge = inside & ~(
        np.roll(inside, 1, 0)
        & np.roll(inside, -1, 0)
        & np.roll(inside, 1, 1)
        & np.roll(inside, -1, 1)
    )
    coarse = np.where(inside[..., None], colour, coarse)
    coarse = np.where(edge[..., None], colour * 0.55, coarse)
    return coarse.repeat(cell, axis=0).repeat(cell, axis=1).astype(np.float32)


def _paint_sketch(
    background: FloatArray, shape: _Placed, colour: FloatArray, rng: random.Random
) -> FloatArray:
    paper = 0.45 * background + 0.55 * np.array(_PAPER, dtype=np.float32)
    canvas = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE), 0)
    pen = ImageDraw.Draw(canvas)
    for start in range(-SIZE, SIZE, 4):
        x = start + rng.uniform(-0.6, 0.6)
        ends = [(x * _SCALE, 0), ((x + SIZE + rng.uniform(-3, 3)) * _SCALE, SIZE * _SCALE)]
        pen.line(ends, fill=255, width=round(2.2 * _SCALE))
    hatched = shape.mask() * _averaged(canvas, SIZE)
    pixels = _over(paper, colour, 0.95 * hatched)
    return _over(pixels, np.array(_GRAPHITE, np.float32), 0.9 * shape.stroke(1.5, wobble=rng))

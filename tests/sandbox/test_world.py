"""The drawings: deterministic, well described, and with combinations held out."""

import itertools
import random

import numpy as np
import pytest

from diffagent.sandbox import world
from tools.sandbox import drawings


def all_scenes() -> list[world.Scene]:
    return [
        world.Scene(*values)
        for values in itertools.product(world.SHAPES, world.COLOURS, world.BACKGROUNDS)
    ]


def test_a_seed_gives_one_picture_and_caption() -> None:
    first, second = drawings.drawing(7), drawings.drawing(7)
    assert first[1:] == second[1:]
    assert np.array_equal(np.asarray(first[0]), np.asarray(second[0]))
    assert not np.array_equal(np.asarray(first[0]), np.asarray(drawings.drawing(8)[0]))


@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_the_shape_is_drawn_in_its_colour(shape: str, style: str) -> None:
    scenes = [world.Scene(shape, colour, "white", style) for colour in ("red", "blue")]
    red, blue = (
        np.asarray(drawings.draw(s, random.Random(3)), dtype=float).mean((0, 1)) for s in scenes
    )
    assert red[0] - red[2] > 3
    assert blue[2] - blue[0] > 3


def test_a_caption_names_what_is_drawn() -> None:
    for number, scene in enumerate(all_scenes()):
        text = world.caption(scene, random.Random(number), with_style=False)
        assert scene.shape in text
        assert scene.colour in text
    styled = {
        world.caption(world.Scene("star", "red", "sky", "sketch"), random.Random(n))
        for n in range(99)
    }
    assert len(styled) > 8
    assert any("sketch" in text for text in styled)
    assert any("sketch" not in text for text in styled)


def test_about_a_tenth_of_the_combinations_is_held_out_and_every_pair_still_occurs() -> None:
    scenes = all_scenes()
    trained = [scene for scene in scenes if not world.is_held_out(scene)]
    assert 0.05 < 1 - len(trained) / len(scenes) < 0.15
    assert len({(s.shape, s.colour) for s in trained}) == 64
    assert len({(s.shape, s.background) for s in trained}) == 56
    rng = random.Random(0)
    assert all(world.is_held_out(world.sample_scene(rng, held_out=True)) for _ in range(50))
    assert not any(world.is_held_out(world.sample_scene(rng)) for _ in range(50))


def test_purposes_draw_from_disjoint_seeds() -> None:
    ranges = [
        world.GENERATOR_SEEDS,
        world.SCORER_SEEDS,
        world.ATTRIBUTE_SEEDS,
        world.EVALUATION_SEEDS,
        world.CATALOGUE_SEEDS,
    ]
    for first, second in itertools.combinations(ranges, 2):
        assert first.stop <= second.start or second.stop <= first.start


def test_a_scene_refuses_unknown_values() -> None:
    with pytest.raises(ValueError, match="'brown'"):
        world.Scene("star", "brown", "sky")


def test_spoiling_blurs_and_names_the_flaw() -> None:
    picture, text, _ = drawings.drawing(5)
    spoiled, flaw = drawings.spoil(picture, text, random.Random(1))
    assert any(word in flaw for word in world.FLAWS)
    assert not np.array_equal(np.asarray(spoiled), np.asarray(picture))

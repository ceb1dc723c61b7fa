"""How the sandbox's scorers are trained: losses in closed form, data that keeps its promises."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffagent.rewards.clip import ClipScorer
from diffagent.rewards.image_reward import build_model
from diffagent.sandbox import world
from tools.sandbox import drawings
from tools.sandbox import train_scorers as training


def test_contrastive_loss_is_log_b_without_information_and_nought_when_certain():
    same = torch.ones(4, 3)
    loss, _ = training.contrastive_loss(same, same, torch.tensor(10.0), torch.eye(4))
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    loss, accuracy = training.contrastive_loss(
        torch.eye(4), torch.eye(4), torch.tensor(100.0), torch.eye(4)
    )
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert accuracy == 1.0


def test_two_captions_of_one_scene_share_the_target():
    matches = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    loss, _ = training.contrastive_loss(features, features, torch.tensor(100.0), matches)
    assert loss.item() == pytest.approx(2 / 3 * math.log(2), abs=1e-6)


def test_ranking_loss_is_minus_log_sigmoid_of_the_difference():
    loss, accuracy = training.ranking_loss(
        torch.tensor([2.0, 1.0, 3.0]), torch.tensor([[0, 1], [0, 2]])
    )
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert accuracy == 0.5


def test_training_pictures_come_from_the_scorers_seeds_and_show_no_held_out_scene():
    seeds = {training.stream(name, 0).random() for name in training._STREAMS}
    assert len(seeds) == len(training._STREAMS)
    last = training._FIRST + len(training._STREAMS) * training._STREAM_LENGTH
    assert training._FIRST in world.SCORER_SEEDS and last - 1 in world.SCORER_SEEDS
    _, scenes, images = training.family_batch(random.Random(0), families=30)
    assert not any(world.is_held_out(scene) for scene in scenes)
    assert len(images) == 120
    for base in range(0, 120, 4):
        for other in scenes[base + 1 : base + 4]:
            changed = [
                a for a in training.ATTRIBUTES if getattr(other, a) != getattr(scenes[base], a)
            ]
            assert len(changed) == 1


def test_a_caption_without_a_style_matches_every_style():
    scene = world.Scene("star", "red", "sky", "sketch")
    flat = world.Scene("star", "red", "sky", "flat")
    blue = world.Scene("star", "blue", "sky", "sketch")
    assert training.Prompt("a red star in the sky", scene, styled=False).matches(flat)
    assert not training.Prompt("sketch of a red star", scene, styled=True).matches(flat)
    assert not training.Prompt("a red star in the sky", scene, styled=False).matches(blue)


@pytest.mark.parametrize("kind", training.DEGRADATIONS)
def test_degradations_keep_the_size_and_grow_with_strength(kind):
    image, _, _ = drawings.drawing(world.EVALUATION_SEEDS.start)
    original = np.asarray(image, dtype=np.float32)
    change = [
        np.abs(np.asarray(training.degrade(image, kind, s, random.Random(0))) - original).mean()
        for s in (0.0, 1.0)
    ]
    assert 0 < change[0] < change[1]


def test_pixels_are_what_the_scorers_preprocessing_makes():
    scorer = ClipScorer.load(str(training.SCORERS / "clip"))
    image, _, _ = drawings.drawing(world.EVALUATION_SEEDS.start)
    prepared = torch.tensor(scorer.preparation(image))[None]
    torch.testing.assert_close(training.as_pixels([image]), scorer.normalise(prepared))


def test_blips_encoder_started_from_clip_gives_nearly_the_same_features():
    config = training.IMAGE_REWARD_CONFIG
    model = build_model(replace(config, text={**config.text, "vocab_size": 50}))
    clip = ClipScorer.load(str(training.SCORERS / "clip")).model.visual
    training.start_from_clip(model.blip.visual_encoder, clip)
    seeds = world.EVALUATION_SEEDS[:8]
    pixels = training.as_pixels([drawings.drawing(seed)[0] for seed in seeds])
    with torch.no_grad():
        ours = model.blip.visual_encoder(pixels)[:, 0] @ clip.proj
        theirs = clip(pixels)
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.9

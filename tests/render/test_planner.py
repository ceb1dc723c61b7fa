"""The order of work: loads, failures, and files that come ahead."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from diffagent.errors import Forbidden, RenderError, ServerError
from diffagent.render.planner import draw, plan
from diffagent.render.recipe import LoRAUse, Recipe
from diffagent.render.renderer import Files, ModelRef, Renderer
from tests.render.diffusers.test_pipelines import RECIPE


def recipe(checkpoint: str, seed: int = 0, *, loras: str = "", size: int = 64) -> Recipe:
    uses = tuple(LoRAUse(sha256=name, weight=1) for name in loras)
    changes = {"checkpoint": checkpoint, "seed": seed, "loras": uses, "width": size}
    return RECIPE.model_copy(update=changes)


def files_of(wanted: Recipe) -> Files:
    base = "SDXL 1.0" if wanted.checkpoint.startswith("xl") else "SD 1.5"
    checkpoint = ModelRef(wanted.checkpoint, wanted.checkpoint, base)
    return Files(checkpoint, loras=tuple(ModelRef(u.sha256, u.sha256) for u in wanted.loras))


class Sketcher:
    """A renderer that notes what is asked of it; checkpoints called 'bad' do not load."""

    name, version = "sketcher", "1"

    def __init__(self, reads_files: bool = True) -> None:
        self.reads_files = reads_files
        self.loads = 0
        self.groups: list[Files] = []
        self.ahead: list[str] = []
        self.threads: set[str] = set()

    def check(self, recipe: Recipe, files: Files) -> None:
        assert all(ref.path is None for ref in files.all)
        if recipe.seed < 0:
            raise RenderError("a seed below 0", reason="unsupported-seed")

    def preload(self, files: Files) -> None:
        self.ahead.append(files.checkpoint.sha256)
        self.threads.add(threading.current_thread().name)

    def prepare(self, files: Files) -> None:
        assert all((ref.path is not None) == self.reads_files for ref in files.all)
        if files.checkpoint.sha256 == "bad":
            raise RenderError("broken", reason="bad-model-file")
        if not self.groups or self.groups[-1].checkpoint != files.checkpoint:
            self.loads += 1
        self.groups.append(files)

    def render(self, recipes: Sequence[Recipe]) -> Iterator[Image.Image | RenderError]:
        for wanted in recipes:
            yield Image.new("RGB", (8, 8), (wanted.seed % 256, 0, 0))

    def close(self) -> None:
        pass


def fetch(ref: ModelRef) -> Path:
    return Path("/nowhere", ref.sha256)


def test_the_protocol_is_what_backends_implement() -> None:
    sketcher: Renderer = Sketcher()
    assert sketcher.name == "sketcher"


def test_each_checkpoint_is_loaded_once_and_the_order_is_that_of_the_set() -> None:
    recipes = [
        recipe(checkpoint, seed, loras=loras, size=size)
        for checkpoint in ("one", "two", "xl-one")
        for loras in ("", "a", "ab")
        for size in (64, 128)
        for seed in range(2)
    ]
    orders = []
    for number in range(3):
        random.Random(number).shuffle(recipes)
        sketcher = Sketcher()
        drawn = dict(draw([*recipes, recipes[0]], sketcher, files_of, fetch))
        assert len(drawn) == len(recipes)
        assert all(image.getpixel((0, 0))[0] == r.seed for r, image in drawn.items())
        assert sketcher.loads == 3
        assert len(sketcher.groups) == 3 * 3 * 2
        bases = [files.checkpoint.base_model for files in sketcher.groups]
        assert bases == sorted(bases)
        orders.append(sketcher.groups)
        assert sketcher.ahead == [files.checkpoint.sha256 for files in sketcher.groups[1:]]
        assert all(name.startswith("prefetch") for name in sketcher.threads)
    assert orders[0] == orders[1] == orders[2]
    assert [len(group.recipes) for group in plan(recipes, files_of)] == [2] * 18


def test_failures_are_a_group_s_or_a_picture_s_and_the_rest_goes_on() -> None:
    asked: list[str] = []

    def some(ref: ModelRef) -> Path:
        asked.append(ref.sha256)
        if ref.sha256 == "locked":
            raise Forbidden("401: early access")
        return fetch(ref)

    recipes = [
        *(recipe(name, seed) for name in ("bad", "good", "locked") for seed in (0, 1)),
        recipe("locked", 2, loras="a"),
        recipe("good", -1),
        recipe("good", 3, loras="a"),
    ]
    told = {
        (r.checkpoint, r.seed): getattr(outcome, "reason", None)
        for r, outcome in draw(recipes, Sketcher(), files_of, some)
    }
    assert told == {
        ("bad", 0): "bad-model-file",
        ("bad", 1): "bad-model-file",
        ("good", 0): None,
        ("good", 1): None,
        ("good", -1): "unsupported-seed",
        ("good", 3): None,
        ("locked", 0): "download",
        ("locked", 1): "download",
        ("locked", 2): "download",
    }
    assert sorted(asked) == ["a", "bad", "good", "locked"]  # each once


def test_files_are_given_back_after_the_last_group_that_needs_them() -> None:
    held: set[str] = set()
    most = 0

    def take(ref: ModelRef) -> Path:
        nonlocal most
        assert ref.sha256 not in held
        if ref.sha256 == "locked":
            raise Forbidden("401: early access")
        held.add(ref.sha256)
        most = max(most, len(held))
        return fetch(ref)

    recipes = [recipe(f"{number}", loras="a") for number in range(9)]
    recipes += [recipe("bad", loras="b"), recipe("locked", loras="c"), recipe("5")]
    for wanted, _ in draw(recipes, Sketcher(), files_of, take, lambda ref: held.remove(ref.sha256)):
        assert wanted.checkpoint in (*held, "bad", "locked")
    assert not held
    assert most <= 5  # two checkpoints, this one and the next, and what is laid over them


def test_trouble_that_may_pass_ends_the_run() -> None:
    def away(ref: ModelRef) -> Path:
        if ref.sha256 == "two":
            raise ServerError("503")
        return fetch(ref)

    drawn = []
    with pytest.raises(ServerError):
        for wanted, _ in draw([recipe("one"), recipe("two")], Sketcher(), files_of, away):
            drawn.append(wanted.checkpoint)
    assert drawn == ["one"]


def test_a_backend_that_reads_no_files_gets_none() -> None:
    def never(ref: ModelRef) -> Path:
        raise AssertionError(ref)

    drawn = list(draw([recipe("one"), recipe("two")], Sketcher(False), files_of, never))
    assert len(drawn) == 2
    assert list(draw([], Sketcher(), files_of, never)) == []

"""Tiny random checkpoints in the single-file layout through the diffusers backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffagent.errors import RenderError
from diffagent.render.pipelines import DiffusersRenderer, find_config
from diffagent.render.recipe import EmbeddingUse, LoRAUse, Recipe
from tests.unit import tiny_sd

RECIPE = Recipe(
    prompt="a red circle",
    negative_prompt="",
    checkpoint="a" * 64,
    sampler="Euler a",
    steps=3,
    cfg_scale=7,
    width=64,
    height=64,
    clip_skip=1,
    seed=1,
)
LORA = LoRAUse(sha256="b" * 64, weight=1.0)


class World:
    """Two checkpoints and two LoRAs on disk."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "config"
        self.files: dict[str, Path] = {}
        for seed, name in enumerate(("one", "two")):
            self.pipeline = tiny_sd.build(self.config, seed)
            self.files[name] = folder / f"{name}.safetensors"
            tiny_sd.save_single_file(self.pipeline, self.files[name])
            self.files[f"lora-{name}"] = folder / f"lora-{name}.safetensors"
            tiny_sd.save_kohya_lora(self.pipeline, self.files[f"lora-{name}"], seed)

    def renderer(self) -> DiffusersRenderer:
        return DiffusersRenderer(torch.device("cpu"), [self.config])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def pixels(renderer: DiffusersRenderer, **changes: Any) -> np.ndarray[Any, Any]:
    return np.asarray(renderer.render(RECIPE.model_copy(update=changes)))


def test_a_single_file_draws_what_its_pipeline_draws(world: World) -> None:
    renderer = world.renderer()
    renderer.use(world.files["two"], {})
    from diffusers import DDIMScheduler

    pipeline = world.pipeline  # the one that "two" was saved from
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red circle",
        num_inference_steps=3,
        guidance_scale=7,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images[0]
    drawn = pixels(renderer, sampler="DDIM")
    assert drawn.std() > 5
    # The renderer's memory layout sums in another order: one grey level at most.
    assert np.abs(drawn - expected * 255).max() < 1


def test_a_picture_depends_on_its_recipe_alone(world: World) -> None:
    renderer = world.renderer()
    renderer.use(world.files["one"], {})
    first = pixels(renderer)
    for change in (
        {"seed": 2},
        {"prompt": "a blue square"},
        {"negative_prompt": "blurred"},
        {"cfg_scale": 3.0},
        {"steps": 4},
        {"sampler": "DPM++ 2M Karras"},
        {"clip_skip": 2},
    ):
        assert (pixels(renderer, **change) != first).any(), change
    assert pixels(renderer, width=128).shape == (64, 128, 3)
    renderer.use(world.files["two"], {})
    assert (pixels(renderer) != first).any()
    renderer.use(world.files["one"], {})
    assert (pixels(renderer) == first).all()
    assert renderer.loads == 3
    again = world.renderer()
    again.use(world.files["one"], {})
    assert (pixels(again) == first).all()


def test_a_lora_changes_the_picture_and_leaves_no_trace(world: World) -> None:
    renderer = world.renderer()
    lora = {LORA.sha256: world.files["lora-one"]}
    renderer.use(world.files["one"], {})
    plain = pixels(renderer)
    renderer.use(world.files["one"], lora)
    full = pixels(renderer, loras=(LORA,))
    half = pixels(renderer, loras=(LoRAUse(sha256=LORA.sha256, weight=0.5),))
    assert len({picture.tobytes() for picture in (plain, full, half)}) == 3
    assert (pixels(renderer, loras=(LORA,)) == full).all()
    two = {**lora, "c" * 64: world.files["lora-two"]}
    renderer.use(world.files["one"], two)
    uses = tuple(LoRAUse(sha256=sha, weight=1.0) for sha in two)
    assert (pixels(renderer, loras=uses) != full).any()
    renderer.use(world.files["one"], {})
    assert (pixels(renderer) == plain).all()
    assert renderer.loads == 1


def test_an_embedding_changes_the_picture_and_leaves_no_trace(world: World, tmp_path: Path) -> None:
    renderer = world.renderer()
    renderer.use(world.files["one"], {})
    plain = pixels(renderer)
    files = {sha: tmp_path / f"{sha[0]}.safetensors" for sha in ("e" * 64, "f" * 64)}
    width = world.pipeline.text_encoder.config.hidden_size
    for number, path in enumerate(files.values(), 1):  # of one vector, and of two
        noise = torch.randn(number, width, generator=torch.Generator().manual_seed(number))
        save_file({"emb_params": noise}, path)
    renderer.use(world.files["one"], {}, files)
    assert (pixels(renderer) == plain).all()  # nothing in the prompt names it
    seen = {plain.tobytes()}
    for sha256 in files:
        for negative in (False, True):
            use = (EmbeddingUse(sha256=sha256, weight=1, negative=negative),)
            seen.add(pixels(renderer, embeddings=use).tobytes())
    assert len(seen) == 5
    with pytest.raises(RenderError) as refused:
        pixels(renderer, embeddings=(EmbeddingUse(sha256="e" * 64, weight=1.2, negative=False),))
    assert refused.value.reason == "embedding-weight"
    save_file({"emb_params": torch.zeros(1, width + 1)}, tmp_path / "wide.safetensors")
    with pytest.raises(RenderError) as refused:
        renderer.use(world.files["one"], {}, {"d" * 64: tmp_path / "wide.safetensors"})
    assert refused.value.reason == "bad-embedding"
    renderer.use(world.files["one"], {})
    assert (pixels(renderer) == plain).all()
    assert renderer.loads == 1


def test_a_bad_lora_is_refused_and_leaves_no_trace(world: World, tmp_path: Path) -> None:
    renderer = world.renderer()
    renderer.use(world.files["one"], {})
    plain = pixels(renderer)
    tensors = load_file(world.files["lora-one"])
    wide = {name: value.repeat_interleave(2, -1) if value.ndim == 2 else value
            for name, value in tensors.items()}  # fmt: skip
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(RenderError) as refused:
        renderer.use(world.files["one"], {LORA.sha256: tmp_path / "wide.safetensors"})
    assert refused.value.reason == "bad-lora"
    save_file({"nothing": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(RenderError) as refused:
        renderer.use(world.files["one"], {LORA.sha256: tmp_path / "foreign.safetensors"})
    assert refused.value.reason == "bad-lora"
    renderer.use(world.files["one"], {})
    assert (pixels(renderer) == plain).all()


def test_failures_have_reasons(world: World, tmp_path: Path) -> None:
    renderer = world.renderer()
    renderer.use(world.files["one"], {})
    for reason, change in (
        ("clip-skip", {"clip_skip": 3}),
        ("unsupported-sampler", {"sampler": "DPM adaptive"}),
        ("render-error", {"width": 68}),
    ):
        with pytest.raises(RenderError) as refused:
            pixels(renderer, **change)
        assert refused.value.reason == reason

    tensors = load_file(world.files["one"])
    decoder_end = "first_stage_model.decoder.conv_out.bias"
    for reason, value in (("nan", float("nan")), ("black", -1e6)):
        broken = tmp_path / f"{reason}.safetensors"
        save_file({**tensors, decoder_end: torch.full((3,), value)}, broken)
        renderer.use(broken, {})
        with pytest.raises(RenderError) as refused:
            pixels(renderer)
        assert refused.value.reason == reason

    del tensors["model.diffusion_model.input_blocks.0.0.weight"]
    save_file(tensors, tmp_path / "headless.safetensors")
    with pytest.raises(RenderError) as refused:
        renderer.use(tmp_path / "headless.safetensors", {})
    assert refused.value.reason == "bad-model-file"


def test_prompts_beyond_77_tokens_are_counted(world: World) -> None:
    renderer = world.renderer()
    renderer.use(world.files["one"], {})
    pixels(renderer, prompt="red " * 100)
    pixels(renderer, prompt="red " * 10)
    assert renderer.truncated == 1


def test_the_configuration_is_found_by_shapes(world: World, tmp_path: Path) -> None:
    checkpoint = world.files["one"]
    assert find_config(checkpoint, [world.config]) == world.config
    assert find_config(checkpoint, []) is None
    tensors = load_file(checkpoint)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**tensors, name: torch.zeros(320, 4, 3, 3)}, tmp_path / "full.safetensors")
    assert find_config(tmp_path / "full.safetensors", [world.config]) is None

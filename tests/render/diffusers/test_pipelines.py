"""Tiny random checkpoints in the single-file layout through the diffusers backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from safetensors.torch import load_file, save_file

from diffagent.errors import RenderError
from diffagent.render.diffusers.checkpoints import load_checkpoint
from diffagent.render.diffusers.pipelines import DiffusersRenderer
from diffagent.render.recipe import EmbeddingUse, LoRAUse, Recipe
from diffagent.render.renderer import Files, ModelRef
from tests.render import tiny_sd

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

    def renderer(self, **options: Any) -> DiffusersRenderer:
        return DiffusersRenderer(torch.device("cpu"), [self.config], **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def use(
    renderer: DiffusersRenderer,
    checkpoint: Path,
    loras: dict[str, Path] | None = None,
    embeddings: dict[str, Path] | None = None,
    vae: Path | None = None,
) -> None:
    """Prepare files that are told apart by their paths."""

    def ref(path: Path, sha256: str | None = None) -> ModelRef:
        return ModelRef(sha256 or str(path), path.name, path=path)

    renderer.prepare(
        Files(
            ref(checkpoint),
            ref(vae) if vae else None,
            tuple(ref(path, sha256) for sha256, path in (loras or {}).items()),
            tuple(ref(path, sha256) for sha256, path in (embeddings or {}).items()),
        )
    )


def outcome(renderer: DiffusersRenderer, **changes: Any) -> Image | RenderError:
    (drawn,) = renderer.render([RECIPE.model_copy(update=changes)])
    return drawn


def pixels(renderer: DiffusersRenderer, **changes: Any) -> np.ndarray[Any, Any]:
    drawn = outcome(renderer, **changes)
    assert not isinstance(drawn, RenderError), drawn
    return np.asarray(drawn)


def test_a_single_file_draws_what_its_pipeline_draws(world: World) -> None:
    renderer = world.renderer()
    use(renderer, world.files["two"])
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
    # Another memory layout and size of batch sum in another order: one grey level at most.
    assert np.abs(drawn - expected * 255).max() < 1


def test_a_picture_depends_on_its_recipe_alone(world: World) -> None:
    renderer = world.renderer()
    use(renderer, world.files["one"])
    first = pixels(renderer)
    for change in (
        {"seed": 2},
        {"prompt": "a blue square"},
        {"prompt": "a (red:1.4) circle"},
        {"prompt": "a red circle BREAK a blue square"},
        {"prompt": "a red circle " * 40},
        {"negative_prompt": "blurred"},
        {"cfg_scale": 3.0},
        {"steps": 4},
        {"sampler": "DPM++ 2M Karras"},
        {"clip_skip": 2},
    ):
        assert (pixels(renderer, **change) != first).any(), change
    assert pixels(renderer, width=128).shape == (64, 128, 3)
    use(renderer, world.files["two"])
    assert (pixels(renderer) != first).any()
    use(renderer, world.files["one"])
    assert (pixels(renderer) == first).all()
    assert renderer.loads == 2  # the first is still in memory
    again = world.renderer()
    use(again, world.files["one"])
    assert (pixels(again) == first).all()


PROMPTS = (
    *("a red circle", "a (blue:1.3) box", "box, " * 60, "a [red:blue:0.5] circle", "[a|b] box"),
    *("a red circle AND a blue box :0.5", "a AND b AND c AND d AND e AND [f:g:2]"),
)


def test_any_batch_in_any_order_gives_the_same_pictures_to_the_bit(world: World) -> None:
    """Samplers, steps, guidance, prompts of all lengths and LoRA weights, shuffled and cut."""
    generator = np.random.default_rng(0)
    samplers = ["Euler a", "DDIM", "DPM++ SDE Karras", "Heun", "PLMS"]
    recipes = [
        RECIPE.model_copy(
            update={
                "seed": seed,
                "prompt": generator.choice(PROMPTS),
                "sampler": generator.choice(samplers),
                "steps": int(generator.integers(2, 5)),
                "cfg_scale": float(generator.choice([1.0, 4.0, 7.5])),
                "loras": (LoRAUse(sha256=LORA.sha256, weight=float(generator.choice([0.5, 1]))),),
            }
        )
        for seed in range(12)
    ]  # fmt: skip
    renderer = world.renderer()
    use(renderer, world.files["one"], {LORA.sha256: world.files["lora-one"]})
    alone = {recipe.digest: bytes_of(next(renderer.render([recipe]))) for recipe in recipes}
    assert len(set(alone.values())) == 12
    for _ in range(3):
        shuffled = [recipes[number] for number in generator.permutation(12)]
        cut = int(generator.integers(1, 11))
        for part in (shuffled[:cut], shuffled[cut:]):
            drawn = list(renderer.render(part))
            assert [bytes_of(image) for image in drawn] == [alone[r.digest] for r in part]


def test_a_prompt_is_edited_at_the_step_that_it_names(world: World) -> None:
    """As in the WebUI: `when` counts evaluations from 0, so the first text is drawn once more."""
    renderer = world.renderer()
    use(renderer, world.files["one"])
    texts = shown_at_each_evaluation(renderer, steps=4, sampler="Euler")
    for prompt, at_each in (
        ("a [red:blue:0.5] circle", "rrrb"),
        ("a [red:blue:2] circle", "rrrb"),
        ("a [red:blue:1] circle", "rrbb"),
        ("a [red:blue:0] circle", "bbbb"),
        ("a [red:blue:1.0] circle", "rrrr"),
        ("a [red|blue] circle", "rrbr"),
    ):
        assert texts(prompt) == at_each, prompt
        assert texts("a box", negative_prompt=prompt) == at_each, prompt
    # Solvers of the second order are asked twice a step, and twice the steps count.
    twice = shown_at_each_evaluation(renderer, steps=4, sampler="Heun")
    assert twice("a [red:blue:0.5] circle") == "rrrrrbb"
    plain = pixels(renderer, prompt="a red circle")
    assert (pixels(renderer, prompt="a [red:blue:1.0] circle") == plain).all()
    assert (pixels(renderer, prompt="a [red:blue:1] circle") != plain).any()
    assert (pixels(renderer, prompt="a [red|blue] circle") != plain).any()
    assert (pixels(renderer, prompt=r"a \[red|blue\] circle") != plain).any()


def shown_at_each_evaluation(renderer: DiffusersRenderer, **changes: Any) -> Any:
    """Which of "a red circle" and "a blue circle" the U-Net is shown, by the first letters."""
    ready = renderer._current
    assert ready is not None

    @torch.inference_mode()
    def texts(prompt: str, negative_prompt: str = "") -> str:
        recipe = RECIPE.model_copy(
            update={**changes, "prompt": prompt, "negative_prompt": negative_prompt}
        )
        contexts = {
            color[0]: ready._encoder.encode(f"a {color} circle", 1).context
            for color in ("red", "blue")
        }
        sampling, shown = ready.begin(recipe, renderer.device), ""
        while not sampling.done:
            rows = sampling.rows()
            asked = rows[-1 if negative_prompt else 0].said.context
            shown += next(color for color, item in contexts.items() if torch.equal(asked, item))
            sampling.advance([torch.tanh(row.latents) for row in rows])
        return shown

    return texts


def test_parts_between_and_are_summed_with_their_weights(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = world.renderer()
    use(renderer, world.files["one"])
    plain = pixels(renderer, prompt="a red circle")
    composed = pixels(renderer, prompt="a red circle AND a blue box")
    assert (composed != plain).any()
    # The same part twice with half the weight each is that part; with no weight it is left out.
    for prompt in ("a red circle :0.5 AND a red circle :0.5", "a red circle AND a blue box :0"):
        difference = pixels(renderer, prompt=prompt).astype(int) - plain
        assert np.abs(difference).max() <= 1, prompt
    assert (pixels(renderer, prompt="a red circle AND a blue box :0.3") != composed).any()

    ready = renderer._current
    assert ready is not None
    recipe = RECIPE.model_copy(update={"prompt": "a AND b :-0.5", "cfg_scale": 3.0})
    with torch.inference_mode():
        sampling = ready.begin(recipe, renderer.device)
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(sampling._solver, "advance", taken.append)
    first, second, negative = (torch.full((1, 4, 8, 8), value) for value in (1.0, 2.0, 5.0))
    assert sampling.width == len(sampling.rows()) == 3
    sampling.advance([first, second, negative])
    assert taken[0].unique().item() == pytest.approx(5 + 3 * (1 - 5) + 3 * -0.5 * (2 - 5))


def test_guidance_below_one_is_the_webui_s(world: World) -> None:
    """At 1 the negative prompt has no say; between 0 and 1 it has."""
    renderer = world.renderer()
    use(renderer, world.files["one"])
    for scale, same in ((1.0, True), (0.5, False)):
        drawn = [
            pixels(renderer, cfg_scale=scale, negative_prompt=text) for text in ("", "a blue box")
        ]
        assert (drawn[0] == drawn[1]).all() == same


def test_more_parts_than_a_pass_has_rows(world: World) -> None:
    renderer = world.renderer(rows=2)
    use(renderer, world.files["one"])
    prompt = " AND ".join("abcdefghijklmnop")
    drawn = list(renderer.render([RECIPE.model_copy(update={"prompt": prompt}), RECIPE]))
    assert not [outcome for outcome in drawn if isinstance(outcome, RenderError)]
    assert bytes_of(drawn[1]) == bytes_of(next(renderer.render([RECIPE])))


def bytes_of(drawn: Image | RenderError) -> bytes:
    assert not isinstance(drawn, RenderError), drawn
    return drawn.tobytes()


def test_batches_of_two_sizes_differ_by_one_grey_level_at_most(world: World) -> None:
    drawn = []
    for rows in (2, 8):
        renderer = world.renderer(rows=rows)
        use(renderer, world.files["one"])
        drawn.append(pixels(renderer).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert world.renderer(rows=2).version != world.renderer(rows=8).version


def test_no_pass_lacks_rows_while_there_is_work(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = world.renderer(rows=8)
    use(renderer, world.files["one"])
    unet, passes = renderer._loaded[str(world.files["one"])].pipeline.unet, []
    forward = unet.forward

    def counted(sample: torch.Tensor, *args: Any, **options: Any) -> Any:
        passes.append(len(sample))
        return forward(sample, *args, **options)

    monkeypatch.setattr(unet, "forward", counted)
    steps = (4, 4, 4, 4, 4, 4, 3, 1)
    recipes = [
        RECIPE.model_copy(update={"seed": seed, "steps": number, "sampler": "Euler"})
        for seed, number in enumerate(steps)
    ]
    assert not [d for d in renderer.render(recipes) if isinstance(d, RenderError)]
    assert passes == [8] * (sum(steps) * 2 // 8)


def test_out_of_memory_halves_the_batch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = world.renderer()
    use(renderer, world.files["one"])
    whole = [bytes_of(drawn) for drawn in renderer.render([RECIPE])]
    unet = renderer._loaded[str(world.files["one"])].pipeline.unet
    forward, room, seen = unet.forward, 3, []

    def small(sample: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(len(sample))
        if len(sample) > room:
            raise torch.OutOfMemoryError("full")
        return forward(sample, *args, **options)

    monkeypatch.setattr(unet, "forward", small)
    halved = list(renderer.render([RECIPE, RECIPE.model_copy(update={"seed": 2})]))
    # The first step is tried with 8, 4 and 2 rows; two pictures of three steps need six passes.
    assert seen == [8, 4, *[2] * 6]
    difference = np.asarray(halved[0]).astype(int).ravel() - np.frombuffer(whole[0], np.uint8)
    assert np.abs(difference).max() <= 1
    seen.clear()
    list(renderer.render([RECIPE]))
    assert seen == [2] * 3  # remembered

    room = 0
    failed = outcome(renderer)
    assert isinstance(failed, RenderError)
    assert failed.reason == "out-of-memory"
    monkeypatch.undo()
    assert pixels(renderer).shape == (64, 64, 3)


def test_a_lora_changes_the_picture_and_leaves_no_trace(world: World) -> None:
    renderer = world.renderer()
    lora = {LORA.sha256: world.files["lora-one"]}
    use(renderer, world.files["one"])
    plain = pixels(renderer)
    use(renderer, world.files["one"], lora)
    full = pixels(renderer, loras=(LORA,))
    half = pixels(renderer, loras=(LoRAUse(sha256=LORA.sha256, weight=0.5),))
    assert len({picture.tobytes() for picture in (plain, full, half)}) == 3
    assert (pixels(renderer, loras=(LORA,)) == full).all()
    two = {**lora, "c" * 64: world.files["lora-two"]}
    use(renderer, world.files["one"], two)
    uses = tuple(LoRAUse(sha256=sha, weight=1.0) for sha in two)
    assert (pixels(renderer, loras=uses) != full).any()
    use(renderer, world.files["one"])
    assert (pixels(renderer) == plain).all()
    assert renderer.loads == 1


def test_an_embedding_changes_the_picture_and_leaves_no_trace(world: World, tmp_path: Path) -> None:
    renderer = world.renderer()
    use(renderer, world.files["one"])
    plain = pixels(renderer)
    files = {sha: tmp_path / f"{sha[0]}.safetensors" for sha in ("e" * 64, "f" * 64)}
    width = world.pipeline.text_encoder.config.hidden_size
    for number, path in enumerate(files.values(), 1):  # of one vector, and of two
        noise = torch.randn(number, width, generator=torch.Generator().manual_seed(number))
        save_file({"emb_params": noise}, path)
    use(renderer, world.files["one"], {}, files)
    assert (pixels(renderer) == plain).all()  # nothing in the prompt names it
    seen = {plain.tobytes()}
    for sha256 in files:
        for negative in (False, True):
            for weight in (1, 1.3):
                item = EmbeddingUse(sha256=sha256, weight=weight, negative=negative)
                seen.add(pixels(renderer, embeddings=(item,)).tobytes())
    assert len(seen) == 9
    save_file({"emb_params": torch.zeros(1, width + 1)}, tmp_path / "wide.safetensors")
    with pytest.raises(RenderError) as refused:
        use(renderer, world.files["one"], {}, {"d" * 64: tmp_path / "wide.safetensors"})
    assert refused.value.reason == "bad-embedding"
    use(renderer, world.files["one"])
    assert (pixels(renderer) == plain).all()
    assert renderer.loads == 1


def test_another_vae_decodes_and_leaves_no_trace(world: World, tmp_path: Path) -> None:
    renderer = world.renderer()
    use(renderer, world.files["one"])
    plain = pixels(renderer)
    prefix = "first_stage_model."
    other = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(world.files["two"]).items()
        if name.startswith(prefix)
    }
    save_file(other, tmp_path / "vae.safetensors")
    use(renderer, world.files["one"], vae=tmp_path / "vae.safetensors")
    assert (pixels(renderer) != plain).any()
    with pytest.raises(RenderError) as refused:
        use(renderer, world.files["one"], vae=world.files["lora-one"])
    assert refused.value.reason == "bad-vae"
    use(renderer, world.files["one"])
    assert (pixels(renderer) == plain).all()


def test_a_bad_lora_is_refused_and_leaves_no_trace(world: World, tmp_path: Path) -> None:
    renderer = world.renderer()
    use(renderer, world.files["one"])
    plain = pixels(renderer)
    tensors = load_file(world.files["lora-one"])
    stem = next(name for name in tensors if name.endswith(".alpha")).removesuffix(".alpha")
    wide = {name: value.repeat_interleave(2, -1) if value.ndim == 2 else value
            for name, value in tensors.items()}  # fmt: skip
    for name, bad, told in (
        ("wide", wide, "does not fit"),
        ("foreign", {"nothing": torch.zeros(2)}, "holds no LoRA layer, but 'nothing'"),
        ("dora", {**tensors, f"{stem}.dora_scale": torch.ones(1, 32)}, "DoRA"),
        ("loha", {f"{stem}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
    ):
        save_file(bad, tmp_path / f"{name}.safetensors")
        with pytest.raises(RenderError, match=told) as refused:
            use(renderer, world.files["one"], {LORA.sha256: tmp_path / f"{name}.safetensors"})
        assert refused.value.reason == "bad-lora"
    use(renderer, world.files["one"])
    assert (pixels(renderer) == plain).all()


def test_failures_have_reasons(world: World, tmp_path: Path) -> None:
    renderer = world.renderer()
    use(renderer, world.files["one"])
    failed = outcome(renderer, clip_skip=3)
    assert isinstance(failed, RenderError)
    assert failed.reason == "clip-skip"
    for prompt in ("a BREAK " * 100, "😀" * 9_000):  # few characters, many windows of tokens
        failed = outcome(renderer, prompt=prompt)
        assert isinstance(failed, RenderError)
        assert failed.reason == "prompt-too-long"
    good = RECIPE.model_copy(update={"seed": 3})
    mixed = list(renderer.render([RECIPE.model_copy(update={"clip_skip": 3}), good]))
    assert [isinstance(drawn, RenderError) for drawn in mixed] == [True, False]

    tensors = load_file(world.files["one"])
    decoder_end = "first_stage_model.decoder.conv_out.bias"
    for reason, value in (("nan", float("nan")), ("black", -1e6)):
        broken = tmp_path / f"{reason}.safetensors"
        save_file({**tensors, decoder_end: torch.full((3,), value)}, broken)
        use(renderer, broken)
        failed = outcome(renderer)
        assert isinstance(failed, RenderError)
        assert failed.reason == reason

    del tensors["model.diffusion_model.input_blocks.0.0.weight"]
    save_file(tensors, tmp_path / "headless.safetensors")
    with pytest.raises(RenderError) as refused:
        use(renderer, tmp_path / "headless.safetensors")
    assert refused.value.reason == "bad-model-file"


def test_what_cannot_be_drawn_is_told_before_anything_is_loaded(world: World) -> None:
    renderer = world.renderer()
    sd1, sdxl, flux = (ModelRef("a" * 64, b, b) for b in ("SD 1.5", "Illustrious", "Flux.1 D"))
    unknown = ModelRef("c" * 64, "mine")
    for reason, files, change in (
        ("unsupported-sampler", Files(sd1), {"sampler": "DPM adaptive"}),
        ("unsupported-size", Files(sd1), {"width": 68}),
        ("prompt-too-long", Files(sd1), {"prompt": "(" * 20_000}),
        ("prompt-too-long", Files(sd1), {"negative_prompt": "ugly, " * 200_000}),
        ("unsupported-base-model", Files(flux), {}),
        ("lora-base-mismatch", Files(sd1, loras=(sdxl,)), {}),
        ("embedding-base-mismatch", Files(sd1, embeddings=(sdxl,)), {}),
        ("vae-base-mismatch", Files(sdxl, vae=sd1), {}),
    ):
        with pytest.raises(RenderError) as refused:
            renderer.check(RECIPE.model_copy(update=change), files)
        assert refused.value.reason == reason
    renderer.check(RECIPE, Files(unknown, vae=sd1, loras=(sdxl, unknown)))
    assert renderer.loads == 0


def test_memory_for_checkpoints_is_bounded(world: World) -> None:
    renderer = world.renderer(cache_bytes=0)
    one, two = (Files(ModelRef(n, n, path=world.files[n])) for n in ("one", "two"))
    renderer.prepare(one)
    first = pixels(renderer)
    renderer.preload(two)  # no room: not read ahead
    assert renderer.loads == 1
    renderer.prepare(two)
    renderer.prepare(one)
    assert renderer.loads == 3
    assert (pixels(renderer) == first).all()

    roomy = world.renderer()
    roomy.prepare(one)
    roomy.preload(two)
    roomy.prepare(two)
    roomy.prepare(one)
    assert roomy.loads == 2
    assert (pixels(roomy) == first).all()
    roomy.close()
    assert not roomy._loaded


def test_reading_ahead_makes_no_second_team_of_threads(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = torch.get_num_threads()
    renderer = world.renderer()
    used = []

    def load(*parts: Any) -> Any:
        used.append(torch.get_num_threads())
        return load_checkpoint(*parts)

    monkeypatch.setattr("diffagent.render.diffusers.pipelines.load_checkpoint", load)
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as ahead:
            ahead.submit(renderer.preload, Files(ModelRef("1", "one", path=world.files["one"])))
        assert used == [1]
        assert torch.get_num_threads() == 2
        use(renderer, world.files["two"])
        assert used == [1, 2]
    finally:
        torch.set_num_threads(number)

"""Single-file layouts of Stable Diffusion 1.x, 2.x and XL: small random ones, and full-size ones.

A full-size file of zeros takes no room on the disk: its header is written and the rest is a hole.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffagent.errors import RenderError
from diffagent.render.diffusers.checkpoints import (
    find_config,
    load_checkpoint,
    quiet_diffusers,
    scheduler_overrides,
    shipped_configs,
)
from diffagent.render.diffusers.pipelines import DiffusersRenderer
from diffagent.render.recipe import LoRAUse, Recipe
from diffagent.render.renderer import Files, ModelRef
from diffagent.t2i.weights import read_header
from tests.render import tiny_sd
from tools.sandbox.single_file import Tensors, single_file_tensors

FAMILIES = ("sd1", "sd2", "sdxl")
#: Parameters of the released models, in the order U-Net, VAE, text encoder(s).
PARAMETERS = {
    "sd1": (859_520_964, 83_653_863, 123_060_480),
    "sd2": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
}
RECIPE = Recipe(
    prompt="a red circle",
    negative_prompt="",
    checkpoint="a" * 64,
    sampler="Euler",
    steps=2,
    cfg_scale=5,
    width=64,
    height=64,
    clip_skip=1,
    seed=1,
)


def config_of(family: str) -> Path:
    return next(config for config in shipped_configs() if config.name == family)


def empty_models(config: Path) -> list[Any]:
    """The modules that a configuration describes, without weights."""
    diffusers = quiet_diffusers()
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with init_empty_weights():
        models = [
            kind.from_config(kind.load_config(config / part))
            for kind, part in (
                (diffusers.UNet2DConditionModel, "unet"),
                (diffusers.AutoencoderKL, "vae"),
            )
        ]
        models.append(CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder")))
        if (config / "text_encoder_2").is_dir():
            told = CLIPTextConfig.from_pretrained(config / "text_encoder_2")
            models.append(CLIPTextModelWithProjection(told))
    return models


def write_hole(path: Path, tensors: Tensors) -> None:
    """A safetensors file of fp16 zeros with the shapes of ``tensors``."""
    header, position = {}, 0
    for name, tensor in tensors.items():
        end = position + 2 * math.prod(tensor.shape)
        header[name] = {
            "dtype": "F16", "shape": list(tensor.shape), "data_offsets": [position, end]
        }  # fmt: skip
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_architectures_are_those_that_were_released(family: str, tmp_path: Path) -> None:
    models = empty_models(config_of(family))
    assert PARAMETERS[family] == tuple(sum(p.numel() for p in m.parameters()) for m in models)
    path = tmp_path / "model.safetensors"
    write_hole(path, single_file_tensors(*models))
    assert find_config(path.name, read_header(path), shipped_configs()) == config_of(family)


@pytest.mark.full_size
@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_files_load(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models = empty_models(config_of(family))
    write_hole(path, single_file_tensors(*models))
    loaded = load_checkpoint(ModelRef("a", "a", path=path), shipped_configs(), torch.float16)
    assert loaded.family == family
    pipeline = loaded.pipeline
    names = ["unet", "vae", "text_encoder", "text_encoder_2"]
    for name, model in zip(names, models, strict=False):
        state = getattr(pipeline, name).state_dict()
        assert {key: tensor.shape for key, tensor in state.items()} == {
            key: tensor.shape for key, tensor in model.state_dict().items()
        }
        assert not any(tensor.is_meta for tensor in state.values())
    assert pipeline.vae.dtype == (torch.float32 if family == "sdxl" else torch.float16)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_draws_what_its_pipeline_draws(family: str, tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    config = tmp_path / "configs" / family
    pipeline = tiny_sd.build_like(config_of(family), config)
    path = tmp_path / "model.safetensors"
    tiny_sd.save_single_file(pipeline, path)
    renderer = DiffusersRenderer(torch.device("cpu"), [*shipped_configs(), config])
    renderer.prepare(Files(ModelRef("a", "a", path=path)))
    (drawn,) = renderer.render([RECIPE])
    assert not isinstance(drawn, RenderError), drawn

    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace"
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        RECIPE.prompt,
        # SDXL's pipeline zeroes a negative prompt that is None, the others take '' for it.
        num_inference_steps=2,
        guidance_scale=5,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images[0]
    picture = np.asarray(drawn)
    assert picture.std() > 1
    assert np.abs(picture - expected * 255).max() < 1


def test_loras_of_sdxl_are_translated_from_kohyas_names(tmp_path: Path) -> None:
    config = tmp_path / "configs" / "xl"
    pipeline = tiny_sd.build_like(config_of("sdxl"), config)
    tiny_sd.save_single_file(pipeline, tmp_path / "model.safetensors")
    unet = pipeline.unet
    block = unet.down_blocks[1].attentions[0].transformer_blocks[0]
    layer = pipeline.text_encoder_2.text_model.encoder.layers[1].mlp.fc1
    generator = torch.Generator().manual_seed(0)
    tensors, deltas = {}, {}
    for stem, module in (
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v", block.attn2.to_v),
        ("lora_unet_input_blocks_4_0_in_layers_2", unet.down_blocks[1].resnets[0].conv1),
        ("lora_te2_text_model_encoder_layers_1_mlp_fc1", layer),
    ):
        weight = module.weight
        up = torch.randn(weight.shape[0], 2, *[1] * (weight.ndim - 2), generator=generator)
        down = torch.randn(2, *weight.shape[1:], generator=generator)
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        deltas[module] = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) / 2
    save_file(tensors, tmp_path / "lora.safetensors")

    renderer = DiffusersRenderer(torch.device("cpu"), [config])
    recipe = RECIPE.model_copy(update={"loras": (LoRAUse(sha256="l", weight=0.8),)})
    lora = ModelRef("l", "l", path=tmp_path / "lora.safetensors")
    plain = ModelRef("a", "a", path=tmp_path / "model.safetensors")
    renderer.prepare(Files(plain, loras=(lora,)))
    (drawn,) = renderer.render([recipe])

    with torch.no_grad():
        for module, delta in deltas.items():
            module.weight += 0.8 * delta
    tiny_sd.save_single_file(pipeline, tmp_path / "merged.safetensors", torch.float32)
    renderer.prepare(Files(ModelRef("m", "m", path=tmp_path / "merged.safetensors")))
    (expected,) = renderer.render([RECIPE])
    difference = np.asarray(drawn).astype(int) - np.asarray(expected)
    assert np.asarray(drawn).std() > 1
    assert np.abs(difference).max() <= 1


def test_a_file_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "configs" / "sd1"
    pipeline = tiny_sd.build_like(config_of("sd1"), config)
    tensors = single_file_tensors(pipeline.unet, pipeline.vae, pipeline.text_encoder)
    for part in ("text_model.encoder.layers.1", "diffusion_model.out.2", "decoder.conv_out"):
        path = tmp_path / f"without-{part}.safetensors"
        save_file({name: t for name, t in tensors.items() if part not in name}, path)
        with pytest.raises(RenderError) as refused:
            load_checkpoint(ModelRef("a", "a", path=path), [config], torch.float32)
        assert refused.value.reason == "bad-model-file"
        assert "lacks" in str(refused.value) and "tensors" in str(refused.value)
    for prefix, part in (("first_stage_model.", "VAE"), ("cond_stage_model.", "text encoder")):
        save_file({n: t for n, t in tensors.items() if not n.startswith(prefix)}, path)
        with pytest.raises(RenderError, match=f"lacks the {part}, which cannot be had"):
            load_checkpoint(ModelRef("a", "a", path=path), [config], torch.float32)


def test_what_predicts_velocity_is_known_by_its_signs(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}

    def told(tensors: Tensors, base_model: str = "", **metadata: str) -> dict[str, Any]:
        save_file({"weight": torch.zeros(1), **tensors}, path, metadata)
        return scheduler_overrides(path, read_header(path), base_model)

    velocity = {"prediction_type": "v_prediction"}
    assert told({}) == told({}, "SD 2.1") == {}
    assert told({}, "SD 2.1 768") == velocity
    assert told(marks, "NoobAI") == {**velocity, "rescale_betas_zero_snr": True}
    assert told({}, **{"modelspec.prediction_type": "v"}) == velocity
    path.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert told({}) == velocity


def test_velocity_and_a_noisy_end_change_the_picture(tmp_path: Path) -> None:
    config = tmp_path / "configs" / "sd2"
    pipeline = tiny_sd.build_like(config_of("sd2"), config)
    tensors = single_file_tensors(pipeline.unet, pipeline.vae, pipeline.text_encoder)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    heun = RECIPE.model_copy(update={"sampler": "Heun"})
    seen = set()
    for number, added in enumerate(({}, {"v_pred": marks["v_pred"]}, marks)):
        path = tmp_path / f"{number}.safetensors"
        save_file({**tensors, **added}, path)
        renderer = DiffusersRenderer(torch.device("cpu"), [config])
        renderer.prepare(Files(ModelRef("a", "a", path=path)))
        by_euler, by_heun = renderer.render([RECIPE, heun])
        assert not isinstance(by_euler, RenderError), by_euler
        seen.add(by_euler.tobytes())
        assert getattr(by_heun, "reason", None) == (
            "unsupported-sampler" if "ztsnr" in added else None
        )
    assert len(seen) == 3


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    first = "model.diffusion_model.input_blocks.0.0.weight"
    path = tmp_path / "inpainting.safetensors"
    save_file({first: torch.zeros(320, 9, 3, 3)}, path)
    with pytest.raises(RenderError, match="inpainting") as refused:
        find_config(path.name, read_header(path), shipped_configs())
    assert refused.value.reason == "bad-model-file"


def test_the_vocabulary_is_clips(tmp_path: Path) -> None:
    from diffagent import compat
    from diffagent.render.diffusers.checkpoints import _tokenizers

    compat.install()
    import open_clip

    reference = open_clip.SimpleTokenizer()
    for tokenizer in _tokenizers(config_of("sdxl")).values():
        for text in ("a photo of a cat, 1girl's (masterpiece), don't", "猫 é ßtraße 🙂", ""):
            expected = [number for number in reference(text)[0].tolist() if number]
            assert tokenizer(text).input_ids == expected

"""Weights with scales beside them: equal to the whole ones within rounding, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from diffagent.errors import RenderError
from diffagent.render.diffusers.checkpoints import load_checkpoint, shipped_configs
from diffagent.render.diffusers.pipelines import DiffusersRenderer
from diffagent.render.renderer import Files, ModelRef
from diffagent.t2i.quantised import check_quantisation, load_tensors
from tests.render import tiny_sd
from tests.render.diffusers.test_pipelines import RECIPE

Tensors = dict[str, torch.Tensor]
WEIGHT = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def save_file(tensors: Tensors, path: Path, notes: dict[str, str] | None = None) -> None:
    """Save tensors that may share memory."""
    save_tensors({name: tensor.clone() for name, tensor in tensors.items()}, path, notes)


def as_json(**settings: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def small(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = weight / scale
    return (values.round() if dtype == torch.int8 else values).to(dtype)


FP8 = torch.float8_e4m3fn
WHOLE = WEIGHT.abs().max() / 448
ROWS = WEIGHT.abs().amax(1, keepdim=True) / 448
INTS = WEIGHT.abs().amax(1, keepdim=True) / 127
BLOCKS = WEIGHT.abs().amax() / 448 * torch.ones(4, 3)
SCALED: dict[str, tuple[Tensors, dict[str, str]]] = {
    "scaled_fp8": (
        {"x.weight": small(WEIGHT, WHOLE, FP8), "x.scale_weight": WHOLE, "x.scale_input": WHOLE,
         "scaled_fp8": torch.zeros(2, dtype=FP8)}, {},
    ),
    "weight_scale": (
        {"x.weight": small(WEIGHT, WHOLE, FP8), "x.weight_scale": WHOLE[None],
         "x.input_scale": WHOLE, "x.comfy_quant": as_json(format="float8_e4m3fn")}, {},
    ),
    "rows": (
        {"x.weight": small(WEIGHT, ROWS, FP8), "x.weight_scale": ROWS},
        {"_quantization_metadata": json.dumps({"layers": {"x": {"format": "float8_e4m3fn"}}})},
    ),
    "rows, flat": ({"x.weight": small(WEIGHT, ROWS, FP8), "x.weight_scale": ROWS[:, 0]}, {}),
    "blocks": ({"x.weight": small(WEIGHT, WHOLE, FP8), "x.weight_scale": BLOCKS}, {}),
    "e5m2": (
        {"x.weight": small(WEIGHT, WHOLE, torch.float8_e5m2), "x.scale_weight": WHOLE}, {},
    ),
    "int8": (
        {"x.weight": small(WEIGHT, INTS, torch.int8), "x.weight_scale": INTS,
         "x.comfy_quant": as_json(format="int8_tensorwise")}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_scales_are_multiplied_out(tmp_path: Path, kind: str) -> None:
    tensors, notes = SCALED[kind]
    rest = {"x.bias": torch.ones(8), "y.weight": torch.ones(2, dtype=torch.float16)}
    save_file({**tensors, **rest}, tmp_path / "x.safetensors", notes)
    assert check_quantisation(tmp_path / "x.safetensors")
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == {"x.weight", *rest}
    assert loaded["y.weight"].dtype == torch.float16
    step = {"e5m2": 2**-3, "int8": 0.1}.get(kind, 2**-4)  # of the value; of the largest for int8
    room = step * WEIGHT.abs() + (WHOLE if kind != "int8" else INTS)
    assert ((loaded["x.weight"] - WEIGHT).abs() <= room).all()
    half = load_tensors(tmp_path / "x.safetensors", torch.float16)
    assert half["x.weight"].dtype == torch.float16


@pytest.mark.parametrize("elsewhere", ["x_scale", "scales.x.weight", "header"])
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_weights_whose_scale_is_elsewhere_are_refused(
    tmp_path: Path, elsewhere: str, dtype: torch.dtype
) -> None:
    """Whatever names a quantiser gives: weights that fill the type's range are no weights."""
    path = tmp_path / "x.safetensors"
    scale = WEIGHT.abs().max() / torch.finfo(dtype).max
    tensors = {"x.weight": small(WEIGHT, scale, dtype)}
    if elsewhere == "header":
        save_file(tensors, path, {"quantization_config": json.dumps({"x": float(scale)})})
    else:
        save_file({**tensors, elsewhere: scale}, path)
    with pytest.raises(RenderError, match="in float8, and its scale is not known"):
        load_tensors(path)
    save_file({"x.weight": WEIGHT.to(dtype)}, path)  # only rounded
    assert load_tensors(path)["x.weight"].dtype == dtype


def test_a_scale_that_takes_the_weight_away_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for scale in (torch.zeros(()), -WHOLE):
        save_file({"x.weight": WEIGHT.to(FP8), "x.weight_scale": scale}, path)
        with pytest.raises(RenderError, match="weight_scale' is not positive"):
            load_tensors(path)
    save_file({"x.weight": torch.zeros(8, 6).to(FP8), "x.weight_scale": torch.zeros(())}, path)
    assert not load_tensors(path)["x.weight"].any()


U8 = torch.zeros(8, 3, dtype=torch.uint8)
REFUSED: dict[str, tuple[Tensors, dict[str, str]]] = {
    "nf4": (
        {"x.weight": U8, "x.weight.absmax": torch.ones(3), "x.weight.quant_map": torch.ones(16),
         "x.weight.quant_state.bitsandbytes__nf4": U8[0]}, {},
    ),
    "LLM.int8": ({"x.weight": U8.to(torch.int8), "x.SCB": torch.ones(8)}, {}),
    "nvfp4": (
        {"x.weight": U8, "x.weight_scale": torch.ones(8, 2).to(FP8),
         "x.weight_scale_2": torch.ones(())}, {},
    ),
    "quantised as {'format': 'mxfp8'}": (
        {"x.weight": torch.ones(8, 32).to(FP8), "x.weight_scale": U8[:, :1]},
        {"_quantization_metadata": json.dumps({"layers": {"x": {"format": "mxfp8"}}})},
    ),
    "convrot": (
        {"x.weight": U8.to(torch.int8), "x.weight_scale": torch.ones(8, 1),
         "x.comfy_quant": as_json(format="int8_tensorwise", convrot=True)}, {},
    ),
    "GPTQ, AWQ or SVDQuant": ({"x.qweight": U8.int(), "x.scales": torch.ones(3)}, {}),
    "quanto": ({"x.weight._data": U8, "x.weight._scale": torch.ones(8)}, {}),
    "packed or quantised as U8": ({"x.weight": U8}, {}),
    "packed or quantised as I8": ({"x.weight": U8.to(torch.int8)}, {}),
    "'x.weight_scale_inv' changes": (
        {"x.weight": WEIGHT.to(FP8), "x.weight_scale_inv": torch.ones(1, 1)}, {},
    ),
    "'x.weight_mask' changes": ({"x.weight": WEIGHT, "x.weight_mask": torch.ones(8, 6)}, {}),
    "'x.weight.zero_point' changes": (
        {"x.weight": WEIGHT, "x.weight.zero_point": torch.ones(8)}, {},
    ),
    "no weight": ({"x.weight_scale": WHOLE, "y": torch.ones(1)}, {}),
    "two scales": ({"x.weight": WEIGHT, "x.weight_scale": WHOLE, "x.scale_weight": WHOLE}, {}),
    "does not fit": ({"x.weight": WEIGHT.to(FP8), "x.weight_scale": torch.ones(5)}, {}),
    "has no scale": (
        {"x.weight": WEIGHT.to(FP8), "x.comfy_quant": as_json(format="float8_e4m3fn")}, {},
    ),
    "holds no JSON": (
        {"x.weight": WEIGHT.to(FP8), "x.weight_scale": WHOLE,
         "x.comfy_quant": torch.ones(4, dtype=torch.uint8)}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_a_scale_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    tensors, notes = REFUSED[kind]
    save_file(tensors, tmp_path / "x.safetensors", notes)
    for read in (check_quantisation, load_tensors):
        with pytest.raises(RenderError) as refused:
            read(tmp_path / "x.safetensors")
        assert kind in str(refused.value)
        assert "fp16, bf16 or fp32" in str(refused.value) or kind == "holds no JSON"
        assert refused.value.reason == "bad-model-file"


@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale"])
def test_a_scaled_checkpoint_draws_the_right_picture(tmp_path: Path, leaf: str) -> None:
    pipeline = tiny_sd.build(tmp_path / "config")
    whole = tmp_path / "whole.safetensors"
    tiny_sd.save_single_file(pipeline, whole)
    tensors: Tensors = {}
    for name, tensor in load_file(whole).items():
        tensors[name] = tensor
        if name.endswith(".weight") and tensor.ndim == 2 and "embedding" not in name:
            scale = tensor.float().abs().max() / 448
            tensors[name] = (tensor.float() / scale).to(FP8)
            tensors[name.removesuffix("weight") + leaf] = scale
    save_file(tensors, tmp_path / "scaled.safetensors")
    unscaled = {n: t for n, t in tensors.items() if not n.endswith(leaf)}
    save_file(unscaled, tmp_path / "unscaled.safetensors")

    def draw(name: str) -> Any:
        renderer = DiffusersRenderer(torch.device("cpu"), [tmp_path / "config"])
        path = tmp_path / f"{name}.safetensors"
        renderer.prepare(Files(ModelRef(name, name, path=path)))
        (drawn,) = renderer.render([RECIPE])
        return np.asarray(drawn).astype(float) if not isinstance(drawn, RenderError) else None

    right, scaled, without = draw("whole"), draw("scaled"), draw("unscaled")
    assert np.abs(scaled - right).mean() < 3
    assert without is None or np.abs(without - right).mean() > 10, "the scales matter here"


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families_load_with_scales_too(tmp_path: Path, family: str) -> None:
    released = next(config for config in shipped_configs() if config.name == family)
    pipeline = tiny_sd.build_like(released, tmp_path / "config")
    path = tmp_path / "scaled.safetensors"
    tiny_sd.save_single_file(pipeline, path)
    tensors: Tensors = {}
    for name, tensor in load_file(path).items():
        tensors[name] = tensor
        if name.endswith(".weight") and tensor.ndim == 2 and ".proj.weight" in name:
            scale = tensor.float().abs().amax(1, keepdim=True) / 448
            tensors[name] = (tensor.float() / scale).to(FP8)
            tensors[f"{name}_scale"] = scale
    assert len(tensors) > len(load_file(path))
    save_file(tensors, path)
    file = ModelRef("a", "a", path=path)
    loaded = load_checkpoint(file, [tmp_path / "config"], torch.float32).pipeline
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if not hasattr(pipeline, part):
            continue
        right = getattr(pipeline, part).state_dict()
        for name, tensor in getattr(loaded, part).state_dict().items():
            if tensor.is_floating_point():
                step = float(right[name].abs().max()) * 2**-4
                assert (tensor - right[name]).abs().max() <= step, name


def test_a_4_bit_checkpoint_is_refused_by_its_kind(tmp_path: Path) -> None:
    pipeline = tiny_sd.build(tmp_path / "config")
    path = tmp_path / "nf4.safetensors"
    tiny_sd.save_single_file(pipeline, path)
    tensors = load_file(path)
    name = "model.diffusion_model.time_embed.0.weight"
    tensors |= {name: U8, f"{name}.quant_state.bitsandbytes__nf4": U8[0]}
    save_file(tensors, path)
    renderer = DiffusersRenderer(torch.device("cpu"), [tmp_path / "config"])
    with pytest.raises(RenderError, match=r"4-bit bitsandbytes \(nf4\)") as refused:
        renderer.prepare(Files(ModelRef("a", "a", path=path)))
    assert refused.value.reason == "bad-model-file"

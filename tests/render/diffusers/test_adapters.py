"""LoRAs of all spellings: as strong as in diffusers' own loader, what does not fit by its name."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffagent.errors import RenderError
from diffagent.render.diffusers.adapters import LoRAOverlay, read_lora
from tests.render import tiny_sd

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's configuration and weights."""
    folder = tmp_path_factory.mktemp("loras")
    pipeline = tiny_sd.build(folder / "config")
    torch.save({n: getattr(pipeline, n).state_dict() for n in PARTS}, folder / "weights.pt")
    return folder


PARTS = ("unet", "text_encoder")


def build(folder: Path) -> Any:
    """The pipeline, always with the same weights."""
    pipeline = tiny_sd.build(folder / "config")
    for name, state in torch.load(folder / "weights.pt").items():
        getattr(pipeline, name).load_state_dict(state)
    return pipeline


def weights(pipeline: Any) -> Tensors:
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part in PARTS
        for name, tensor in getattr(pipeline, part).named_parameters()
    }


def merged_here(folder: Path, path: Path, strength: float = 1.0) -> Tensors:
    pipeline = build(folder)
    LoRAOverlay(pipeline).lay([(read_lora(path, pipeline), strength)])
    return weights(pipeline)


def merged_by_diffusers(folder: Path, path: Path) -> Tensors:
    pipeline = build(folder)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return weights(pipeline)


def assert_equal(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5, msg=name)


def trained(folder: Path, target: Path, on_text: bool = True, **settings: Any) -> Path:
    """A LoRA saved by diffusers, its settings in the header's metadata."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = build(folder)
    torch.manual_seed(1)
    modules = {"unet": ["to_k", "to_q", "to_out.0"], "text_encoder": ["q_proj", "fc1"]}
    arguments: dict[str, Any] = {}
    for part in PARTS if on_text else PARTS[:1]:
        model = getattr(pipeline, part)
        config = LoraConfig(r=4, target_modules=modules[part], **settings)
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        arguments[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        arguments[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(target, **arguments)
    return target / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 1},
        {"lora_alpha": 6, "use_rslora": True},
        {
            "lora_alpha": 3,
            "rank_pattern": {"attn1.to_k": 2, "to_q": 6, "fc1": 3},
            "alpha_pattern": {"attn2.to_q": 7, "to_k": 0.5, "q_proj": 9},
        },
    ],
    ids=["alpha", "rslora", "patterns"],
)
def test_what_peft_trained_is_as_strong_as_in_diffusers(
    folder: Path, tmp_path: Path, settings: Any
) -> None:
    path = trained(folder, tmp_path, **settings)
    ours = merged_here(folder, path)
    assert_equal(ours, merged_by_diffusers(folder, path))
    changed = [
        name for name, tensor in weights(build(folder)).items() if (ours[name] != tensor).any()
    ]
    assert {name.partition(".")[0] for name in changed} == set(PARTS)


def test_ranks_that_differ_without_metadata_are_as_in_diffusers(
    folder: Path, tmp_path: Path
) -> None:
    path = trained(folder, tmp_path, lora_alpha=1, rank_pattern={"attn1.to_k": 2, "to_q": 6})
    save_file(load_file(path), path)  # without notes every layer has strength 1
    assert_equal(merged_here(folder, path), merged_by_diffusers(folder, path))


def test_an_alpha_beside_diffusers_names_counts(folder: Path, tmp_path: Path) -> None:
    path = trained(folder, tmp_path, lora_alpha=4)
    tensors = load_file(path)
    plain, beside = tmp_path / "plain.safetensors", tmp_path / "beside.safetensors"
    save_file(tensors, plain)
    ends = (".lora_A.weight", ".lora_linear_layer.down.weight", ".lora.down.weight")
    stems = {n.removesuffix(e) for n in tensors for e in ends if n.endswith(e)}
    save_file({**tensors, **{f"{stem}.alpha": torch.tensor(1.0) for stem in stems}}, beside)
    assert_equal(merged_here(folder, beside), merged_here(folder, plain, strength=1 / 4))


def test_layers_of_the_unet_alone_need_no_prefix(folder: Path, tmp_path: Path) -> None:
    path = trained(folder, tmp_path, on_text=False, lora_alpha=2)
    bare = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}
    settings = json.dumps({"r": 4, "lora_alpha": 2})
    save_file(bare, tmp_path / "bare.safetensors", {"lora_adapter_metadata": settings})
    assert_equal(merged_here(folder, tmp_path / "bare.safetensors"), merged_here(folder, path))


EXTRAS: Mapping[str, str] = {
    "bundle_emb.ink.string_to_param": "OneTrainer's bundled embedding",
    "notes": "a trainer's note",
    "lora_unet_nowhere.alpha": "an alpha without a layer",
    "lora_unet_half.lora_down.weight": "half a layer",
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_what_is_no_layer_is_left_out_by_its_name(
    folder: Path, tmp_path: Path, extra: str, spelling: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lora.safetensors"
    if spelling == "kohya":
        tiny_sd.save_kohya_lora(build(folder), path)
    else:
        path = trained(folder, tmp_path, lora_alpha=1)
    right = merged_here(folder, path)
    assert not ours(caplog)
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    save_file({**load_file(path), extra: torch.ones(2, 2)}, path, header.get("__metadata__"))
    assert_equal(merged_here(folder, path), right)
    assert [extra in record.getMessage() for record in ours(caplog)] == [True]


@pytest.mark.parametrize("leaf", ["scale", "alphas"])
def test_a_tensor_beside_the_factors_of_a_layer_is_not_ignored(
    folder: Path, tmp_path: Path, leaf: str
) -> None:
    """The WebUI takes ``.scale`` for a layer's strength, instead of its alpha."""
    path = tmp_path / "lora.safetensors"
    tiny_sd.save_kohya_lora(build(folder), path)
    tensors = load_file(path)
    stem = next(name for name in tensors if name.endswith(".lora_down.weight")).partition(".")[0]
    save_file({**tensors, f"{stem}.{leaf}": torch.tensor(0.5)}, path)
    with pytest.raises(RenderError, match=f"{leaf}' changes its layer in an unknown way"):
        merged_here(folder, path)


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Warnings of this project's own loggers."""
    records = [r for r in caplog.records if r.name.startswith("diffagent")]
    return [record for record in records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("oft_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.dora_scale", "DoRA"),
        ("unet.x.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.lora_mid.weight", "Tucker"),
        ("lora_unet_x.diff_b", "full difference"),
        ("lora_unet_x.w_norm", "full difference"),
        ("unet.x.lora_B.bias", "biases"),
        ("lora_unet_x.on_input", "IA3"),
        ("lora_unet_x.scalar", "rescaled"),
    ],
)
def test_other_decompositions_are_refused_by_name(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / "lora.safetensors"
    pipeline = build(folder)
    tiny_sd.save_kohya_lora(pipeline, path)
    save_file({**load_file(path), name: torch.ones(2)}, path)
    with pytest.raises(RenderError, match=f"{kind}.*{name}.*not supported") as refused:
        read_lora(path, pipeline)
    assert refused.value.reason == "bad-lora"


KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
FACTORS = {f"{KEY}.lora_A.weight": torch.ones(4, 32), f"{KEY}.lora_B.weight": torch.ones(32, 4)}


@pytest.mark.parametrize(
    ("tensors", "settings", "problem"),
    [
        ({"notes": torch.ones(1)}, None, "holds no LoRA layer, but 'notes'"),
        (
            {f"lora_unet_nowhere_{i}.lora_{end}.weight": torch.ones(2, 2)
             for i in range(3) for end in ("up", "down")},
            None, "none of its 3 layers is in this checkpoint, such as 'lora_unet_nowhere_0",
        ),
        (
            {f"base_model.model.x.lora_{end}.weight": torch.ones(2, 2) for end in "AB"},
            None, "saved by PEFT, whose adapter_config.json has the strength",
        ),
        (FACTORS, "{", "lora_adapter_metadata that is no JSON"),
        (FACTORS, "[1]", "lora_adapter_metadata is no JSON object"),
        (FACTORS, {"unet.use_dora": True}, "DoRA"),
        (FACTORS, {"unet.lora_bias": True}, "biases"),
        (FACTORS, {"unet.init_lora_weights": "pissa_niter_4"}, "changes the checkpoint too"),
        (FACTORS, {"unet.r": 8, "unet.lora_alpha": 8}, "has rank 4, and 8 by its metadata"),
        (FACTORS, {"unet.r": 4, "unet.lora_alpha": "strong"}, "has 'strong' for a rank or an"),
        (FACTORS, '{"unet.r": 4, "unet.lora_alpha": NaN}', "has nan for a rank or an alpha"),
        (FACTORS, {"unet.r": 4, "unet.alpha_pattern": {"(a+)+$": 1}}, "names layers by"),
        ({**FACTORS, f"{KEY}.alpha": torch.ones(3)}, None, "alpha' holds 3 numbers instead"),
        ({n: t[:0] if "_A" in n else t[:, :0] for n, t in FACTORS.items()}, None, "does not fit"),
        ({n: t[0] for n, t in FACTORS.items()}, None, r"has shape \(32,\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_true_reason(
    folder: Path, tmp_path: Path, tensors: Tensors, settings: Any, problem: str
) -> None:
    text = settings if isinstance(settings, str | None) else json.dumps(settings)
    pipeline, path = build(folder), tmp_path / "lora.safetensors"
    if KEY.removeprefix("unet.") not in dict(pipeline.unet.named_modules()):
        pytest.fail("the tiny U-Net has no such layer")
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        path,
        {"lora_adapter_metadata": text} if text else None,
    )
    with pytest.raises(RenderError, match=problem) as refused:
        read_lora(path, pipeline)
    assert refused.value.reason == "bad-lora"

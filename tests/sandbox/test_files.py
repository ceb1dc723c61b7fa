"""The sandbox's model files and records: reproducible, in the layouts that diffusers reads."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffagent import compat
from diffagent.errors import ArtifactError
from diffagent.sandbox import files, site_records, world

compat.install()

from tools.sandbox import tiny_adapters, tiny_networks  # noqa: E402
from tools.sandbox.caption_tokenizer import load_tokenizer  # noqa: E402
from tools.sandbox.single_file import single_file_tensors  # noqa: E402


@pytest.fixture(scope="module")
def dump(sandbox_site: Path) -> Path:
    return sandbox_site


@pytest.fixture(scope="module")
def paths(dump: Path) -> dict[str, Path]:
    return {file.key: file.path for file in files.model_files(dump)}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def paint(pipeline: Any, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a red star on white",
        num_inference_steps=2,
        height=64,
        width=64,
        output_type="pt",
        generator=torch.Generator().manual_seed(1),
        **options,
    ).images[0]
    return torch.as_tensor(picture)


def test_assembling_twice_gives_the_same_bytes(dump: Path, tmp_path: Path) -> None:
    copy = files.materialise(tmp_path / "copy")
    names = sorted(p.relative_to(dump) for p in dump.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(copy) for p in copy.rglob("*") if p.is_file())
    assert all((dump / name).read_bytes() == (copy / name).read_bytes() for name in names)


def test_files_are_named_by_their_hash_and_kept(dump: Path) -> None:
    for file in files.model_files(dump):
        content = file.path.read_bytes()
        assert hashlib.sha256(content).hexdigest() == file.path.resolve().name
        assert file.hashes["SHA256"].startswith(file.hashes["AutoV2"])
        assert len(content) == file.size
    before = (dump / "sandbox.json").stat().st_mtime_ns
    assert files.materialise(dump) == dump
    assert (dump / "sandbox.json").stat().st_mtime_ns == before


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not the sandbox's"):
        files.materialise(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_single_file_gives_the_same_pictures_as_its_modules(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    tokenizer = load_tokenizer(tiny_networks.CONFIG_DIR / "tokenizer")
    torch.manual_seed(0)
    # Weights that fp16 holds exactly: the file rounds, and the comparison is about the names.
    modules = [
        module.half().float().eval()
        for module in (
            tiny_networks.build_unet(),
            AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_networks.CONFIG_DIR / "vae")),
            tiny_networks.build_text_encoder(tokenizer),
        )
    ]
    direct = tiny_networks.assemble(*modules, tokenizer)
    tensors = single_file_tensors(*modules)
    assert set(tensors) == set(load_file(paths["base"]))
    save_file(tensors, tmp_path / "own.safetensors")
    loaded = tiny_networks.build_pipeline(tmp_path / "own.safetensors")
    assert torch.equal(paint(loaded), paint(direct))


def test_a_specialist_is_the_base_with_its_lora(paths: dict[str, Path]) -> None:
    base, special = load_file(paths["base"]), load_file(paths["specialist-3d"])
    assert set(base) == set(special)
    changed = {name for name in base if not torch.equal(base[name], special[name])}
    assert changed
    assert all(name.startswith("model.diffusion_model.") for name in changed)


def test_the_committed_targets_of_loras_are_those_of_the_network() -> None:
    targets = json.loads((files.WEIGHTS / "lora_targets.json").read_text())
    assert targets == tiny_adapters.lora_targets()


def test_a_merged_lora_equals_a_loaded_one(paths: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pipeline = tiny_networks.build_pipeline(paths["base"])
    plain = paint(pipeline)
    pipeline.load_lora_weights(
        str(paths["lora-night"].parent), weight_name=paths["lora-night"].name
    )
    loaded = paint(pipeline, cross_attention_kwargs={"scale": 0.8})
    merged = files.merge_lora(load_file(paths["base"]), load_file(paths["lora-night"]), 0.8)
    save_file(merged, tmp_path / "merged.safetensors")
    fused = paint(tiny_networks.build_pipeline(tmp_path / "merged.safetensors"))
    assert (loaded - plain).abs().max() > 0.02
    assert (loaded - fused).abs().max() < 0.02  # merging rounds to fp16


def test_the_tokenizer_knows_the_world_and_takes_anything() -> None:
    tokenizer = load_tokenizer(tiny_networks.CONFIG_DIR / "tokenizer")
    for word in world.words():
        assert len(tokenizer(word).input_ids) == 3, word
    odd = "Größe 猫 🙂 " * 40
    ids = tokenizer(odd, truncation=True).input_ids
    assert len(ids) == 77
    assert tokenizer.eos_token_id not in ids[1:-1]


def test_every_usable_model_has_the_hashes_of_its_file(dump: Path) -> None:
    by_id = {model["id"]: model for model in lines(dump / "models.jsonl")}
    assembled = {file.key: file for file in files.model_files(dump)}
    for listing in site_records.USABLE:
        file = by_id[listing.model_id]["modelVersions"][0]["files"][0]
        assert file["hashes"] == assembled[listing.key].hashes
        assert file["sizeKB"] * 1024 == assembled[listing.key].size
    assert all(model["name"].startswith("Sandbox") for model in by_id.values())
    assert all(model["creator"]["username"] == site_records.CREATOR for model in by_id.values())
    assert len({json.dumps(m["allowCommercialUse"])[0:2] for m in by_id.values()}) == 3


@pytest.mark.parametrize(
    ("word", "key", "share"),
    [("line art", "specialist-outline", 0.6), ("pencil sketch", "base", 0.4)],
)
def test_users_know_the_specialists_but_for_overlooked_styles(
    dump: Path, word: str, key: str, share: float
) -> None:
    chosen: Counter[str] = Counter()
    for image in lines(dump / "images.jsonl"):
        meta = image["meta"] or {}
        if word in (meta.get("prompt") or "") and image["modelVersionIds"]:
            chosen[str(image["modelVersionIds"][0])] += 1
    usual = next(m for m in site_records.USABLE if m.key == key)
    assert chosen.most_common(1)[0][0] == str(usual.version_id)
    assert chosen[str(usual.version_id)] > share * chosen.total()


def test_records_have_the_forms_that_the_site_sends(dump: Path) -> None:
    images = lines(dump / "images.jsonl")
    assert len(images) == site_records.IMAGE_COUNT
    assert len({image["id"] for image in images}) == len(images)
    assert any(image["meta"] is None for image in images)
    assert any("<lora:" in ((i["meta"] or {}).get("prompt") or "") for i in images)
    assert {"image", "video"} == {image["type"] for image in images}

"""``diffagent render`` over a folder with files that cannot be drawn with: the others are drawn."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffagent.cli import main
from diffagent.errors import ConfigError, RenderError
from diffagent.localcivitai.sources.local import FileHashes, inspect_file
from diffagent.render.diffusers.pipelines import DiffusersRenderer
from diffagent.render.recipe import LoRAUse
from diffagent.render.render_stage import REASONS
from diffagent.render.renderer import Files, ModelRef
from diffagent.sandbox import files as sandbox_files
from diffagent.sheet.prompts_file import folder_entries
from tests.render import tiny_sd
from tests.render.diffusers.test_pipelines import RECIPE
from tools.sandbox.tiny_networks import CONFIG_DIR


def with_notes(content: bytes, notes: Any) -> bytes:
    """A safetensors file with another ``__metadata__``, of any type."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    raw = json.dumps({**header, "__metadata__": notes}).encode()
    return len(raw).to_bytes(8, "little") + raw + content[8 + length :]


@pytest.fixture
def models(tmp_path: Path, sandbox_site: Path) -> Path:
    """A folder of the WebUI with the sandbox's base and LoRA, and broken copies of both."""
    sources = {file.key: file.path for file in sandbox_files.model_files(sandbox_site)}
    folder = tmp_path / "models"
    checkpoints, loras = folder / "Stable-diffusion", folder / "Lora"
    checkpoints.mkdir(parents=True), loras.mkdir()
    shutil.copy(sources["base"], checkpoints / "good.safetensors")
    shutil.copy(sources["lora-night"], loras / "night.safetensors")
    base, night = sources["base"].read_bytes(), sources["lora-night"].read_bytes()
    (checkpoints / "odd.safetensors").write_bytes(with_notes(base, {"step": None}))
    (checkpoints / "cut.safetensors").write_bytes(base[:-1000])
    (checkpoints / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>log in</html>")
    (loras / "oddlora.safetensors").write_bytes(with_notes(night, {"step": 5}))
    (loras / "pointer.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"
    )
    (folder / "unplaced.safetensors").write_bytes(b'{"error": "log in"}')
    tensors = load_file(sources["lora-night"])
    save_file({**tensors, "bundle_emb.x": torch.ones(3)}, loras / "bundled.safetensors")
    nan = {name: torch.full_like(t, torch.nan) for name, t in tensors.items()}
    save_file(nan, loras / "nan.safetensors")
    return folder


PROBLEMS = {
    "0001-1": "'odd.safetensors' is refused: its __metadata__ has None for 'step'",
    "0001-2": "'cut.safetensors' is refused: cut off after",
    "0001-3": "'page.safetensors' is refused: it is a web page",
    "0003-0": "'oddlora.safetensors' is refused: its __metadata__ has 5 for 'step'",
    "0004-0": "'pointer.safetensors' is refused: it is a git-lfs pointer",
    "0005-0": "'unplaced.safetensors' is refused: it is JSON text",
    "0007-0": "'nan.safetensors' is refused: tensor",
}


def test_pictures_that_need_a_broken_file_fail_alone(tmp_path: Path, models: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    loras = ("night", "oddlora", "pointer", "unplaced", "bundled", "nan")
    prompts.write_text(
        "a red circle\n" + "".join(f"a red circle <lora:{name}:0.9>\n" for name in loras)
    )
    arguments = [
        "render",
        prompts,
        "--models",
        models,
        "--out",
        tmp_path / "out",
        "--no-score",
        "--set",
        f"runtime.store={tmp_path / 'store'}",
        "--set",
        f"runtime.models.configs=[{CONFIG_DIR.parent}]",
        *("-p", "steps=2", "-p", "width=64", "-p", "height=64"),
    ]
    for name in ("good", "odd", "cut", "page"):
        arguments += ["--model", name]
    done = CliRunner().invoke(main.app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 1, done.output
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    rows = {row["number"].removesuffix("-0"): row for row in map(json.loads, lines)}
    assert len(rows) == 28
    drawn = {number for number, row in rows.items() if row["picture"]}
    assert drawn == {"0001-0", "0002-0", "0006-0"}
    for number, problem in PROBLEMS.items():
        assert rows[number]["problem"].startswith(problem), number
    pictures = {n: (tmp_path / "out" / rows[n]["picture"]).read_bytes() for n in drawn}
    assert pictures["0001-0"] != pictures["0002-0"], "the LoRA counts"

    with_extra = rows["0006-0"]["picture"]
    from PIL import Image, ImageChops

    night, bundled = (
        Image.open(tmp_path / "out" / name) for name in (rows["0002-0"]["picture"], with_extra)
    )
    assert ImageChops.difference(night, bundled).getbbox() is None, "what fits is applied"


def test_sidecars_tell_what_headers_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "models"
    (folder / "flat").mkdir(parents=True)
    names = ("a", "b", "c", "d")
    for number, name in enumerate(names):
        save_file({"w": torch.full((2,), float(number))}, folder / f"flat/{name}.safetensors")
    entries = {name: folder / "flat" / name for name in names}
    from diffagent.store import sha256_file

    sha256 = sha256_file(entries["a"].with_suffix(".safetensors"))
    answer = {"id": 77, "modelId": 7, "name": "v2", "baseModel": "Pony",
              "model": {"name": "Theirs", "type": "Checkpoint"},
              "files": [{"id": 1, "hashes": {"SHA256": sha256.upper()}}]}  # fmt: skip
    entries["a"].with_suffix(".civitai.info").write_text(json.dumps(answer))
    answer["files"] = [
        {"id": 2, "hashes": {"SHA256": sha256_file(Path(f"{entries['b']}.safetensors"))}}
    ]
    answer |= {"model": {"name": "Style", "type": "LORA"}, "id": 78}
    managed = {"civitai": answer, "base_model": "Pony"}
    entries["b"].with_suffix(".metadata.json").write_text(json.dumps(managed))
    entries["c"].with_suffix(".json").write_text(json.dumps({"sd version": "SD1"}))
    found = {
        entry.model: (entry.type, entry.base_model, entry.air)
        for entry in folder_entries([folder], tmp_path / "hashes.json")
    }
    assert found == {
        "a": ("Checkpoint", "Pony", "urn:air:sdxl:checkpoint:civitai:7@77"),
        "b": ("LORA", "Pony", "urn:air:sdxl:lora:civitai:7@78"),
    }
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    scan = CliRunner().invoke(
        main.app, ["models", "scan", str(folder), "--models", str(tmp_path / "cache"), "--json"]
    )
    rows = {Path(r["path"]).stem: r for r in map(json.loads, scan.output.splitlines())}
    assert (rows["a"]["type"], rows["a"]["base_model"], rows["a"]["model"]) == (
        *("Checkpoint", "Pony", "Theirs"),
    )
    assert (rows["b"]["type"], rows["b"]["version"]) == ("LORA", "v2")
    assert rows["c"]["base_model"] == "SD 1.5"


def test_a_folder_of_many_odd_files_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "Stable-diffusion"
    folder.mkdir()
    for number in range(5):
        (folder / f"page{number}.safetensors").write_bytes(b"<html>" + bytes([number]) * 9)
        save_file({"w": torch.full((2,), float(number))}, folder / f"bare{number}.safetensors")
    for _ in range(2):
        caplog.clear()
        assert len(folder_entries([folder], tmp_path / "hashes.json")) == 10
        warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(warnings) == 2
        assert "5 of the files cannot be drawn with" in warnings[0]
        assert "5 checkpoints do not state their base model" in warnings[1]
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="models scan"):
        folder_entries([tmp_path / "none"], tmp_path / "hashes.json")


ODD_NAMES = (
    *("", ".", "weight", "x" * 900, "\u043a\u043b\u044e\u0447", "lora_unet_", ".lora_down.weight"),
    *("unet.lora_A.weight", "lora_unet_input_blocks_x_y.lora_down.weight"),
)
TYPES = (torch.float64, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool,
         torch.float8_e4m3fn, torch.complex64)  # fmt: skip


def mutated(tensors: dict[str, torch.Tensor], random: Random) -> dict[str, torch.Tensor]:
    """The tensors with a few odd types, shapes, names and gaps."""
    result = dict(tensors)
    for _ in range(random.choice((1, 1, 2, 5))):
        name = random.choice(list(result))
        tensor = result[name]
        other = random.choice(list(result))
        changes = (
            {name: tensor.to(random.choice(TYPES))},
            {name: tensor.flatten()},
            {name: tensor[:0] if tensor.ndim else tensor},
            {name: torch.zeros(())},
            {name: tensor.unsqueeze(0)},
            {random.choice(ODD_NAMES): tensor},
            {name: result[other], other: tensor},
            {f"{name}{random.choice(('.weight', '.alpha', '_scale', '.scale_weight'))}": tensor},
        )
        result |= random.choice(changes)
        if random.random() < 0.3 and len(result) > 1:
            del result[name]
    return {name: tensor.clone() for name, tensor in result.items()}


@pytest.mark.parametrize("kind", ["checkpoint", "vae", "lora", "embedding"])
def test_whatever_a_file_holds_is_drawn_or_refused(tmp_path: Path, kind: str) -> None:
    pipeline = tiny_sd.build(tmp_path / "config")
    whole, path = tmp_path / "whole.safetensors", tmp_path / "odd.safetensors"
    tiny_sd.save_single_file(pipeline, whole)
    tiny_sd.save_kohya_lora(pipeline, path)
    tensors = load_file(whole)
    sources = {
        "checkpoint": tensors,
        "lora": load_file(path),
        "embedding": {"x": torch.ones(2, 32)},
    }
    start = "first_stage_model."
    sources["vae"] = {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)}
    renderer = DiffusersRenderer(torch.device("cpu"), [tmp_path / "config"])
    base = ModelRef("base", "base", path=whole)
    outcomes = Counter[str]()
    for seed in range(25):
        save_file(mutated(sources[kind], Random(seed)), path)
        odd = ModelRef(f"{seed:064x}", "odd", path=path)
        files = {
            "checkpoint": Files(odd),
            "vae": Files(base, vae=odd),
            "lora": Files(base, loras=(odd,)),
            "embedding": Files(base, embeddings=(odd,)),
        }[kind]
        assert inspect_file(path, FileHashes(None)).sha256
        try:
            renderer.prepare(files)
        except RenderError as error:
            assert error.reason in REASONS and "odd" in str(error)
            outcomes["refused"] += 1
            continue
        uses = (LoRAUse(sha256=odd.sha256, weight=1),) if kind == "lora" else ()
        (drawn,) = renderer.render([RECIPE.model_copy(update={"loras": uses, "steps": 1})])
        outcomes["failed" if isinstance(drawn, RenderError) else "drawn"] += 1
    assert outcomes["refused"] and outcomes.total() == 25
    renderer.prepare(Files(base))
    (drawn,) = renderer.render([RECIPE])
    assert not isinstance(drawn, RenderError), "the renderer stays usable"

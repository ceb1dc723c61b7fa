"""A folder of model files is a site like any other: crawled, refreshed, downloaded from."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from diffagent.cli.main import app
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.errors import ConfigError
from diffagent.localcivitai.site import open_site
from diffagent.localcivitai.sources import open_source, synthetic_id
from diffagent.localcivitai.sources.local import FileHashes, hash_file, inspect_file, model_files
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact, open_artifact
from diffagent.t2i.catalogue import SYNTHETIC
from tests.conftest import ROOT
from tests.contract.test_civitai_crawl import rows

SD1 = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (1, 768)}
XL_LORA = {
    "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (1, 2048),
    "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_k.lora_up.weight": (640, 1),
}
Shapes = dict[str, tuple[int, ...]]


def safetensors(shapes: Shapes, notes: dict[str, str] | None = None, fill: int = 0) -> bytes:
    """A file of bytes ``fill``, one a parameter."""
    header: dict[str, Any] = {"__metadata__": notes} if notes else {}
    at = 0
    for name, shape in shapes.items():
        size = 1
        for side in shape:
            size *= side
        header[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes([fill]) * at


def put(path: Path, data: bytes | dict[str, Any]) -> str:
    """Write a file; returns the SHA256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(data).encode() if isinstance(data, dict) else data
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def picture(path: Path, text: str) -> None:
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (64, 96)).save(path, pnginfo=info)


def parameters(checkpoint: str, prompt: str = "a red circle") -> str:
    return (
        f"{prompt}\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, "
        f"Size: 512x768, Model hash: {checkpoint[:10]}, Model: ours"
    )


def answer(version: int, model: int, sha256: str) -> dict[str, Any]:
    """What /by-hash says, as Civitai Helper keeps it."""
    image = {"url": f"https://image.civitai.com/x/{version}1.jpeg", "nsfwLevel": 1, "width": 512}
    image |= {
        "meta": {
            "prompt": "a green square",
            "steps": 10,
            "sampler": "Euler",
            "cfgScale": 5,
            "seed": 1,
        }
    }
    image["meta"] |= {"Size": "512x512", "Model hash": sha256[:10]}
    file = {"id": version * 10, "name": "theirs.safetensors", "sizeKB": 1, "type": "Model"}
    file |= {"pickleScanResult": "Success", "virusScanResult": "Success"}
    return {
        "id": version,
        "modelId": model,
        "name": "v2",
        "baseModel": "SD 1.5",
        "trainedWords": ["style"],
        "model": {"name": "Their Model", "type": "Checkpoint", "nsfw": False, "poi": False},
        "creator": {"username": "someone"},
        "files": [{**file, "hashes": {"SHA256": sha256.upper(), "BLAKE3": "AB" * 32}}],
        "images": [image, {"url": "https://image.civitai.com/x/9.jpeg", "meta": None}],
        "downloadUrl": f"https://civitai.com/api/download/models/{version}",
        "extensions": {"sd_civitai_helper": {"version": "1.8"}},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A team's folder: own models, one of the site's, a pickle, and what to be wary of."""
    top = tmp_path / "models"
    own = put(
        top / "Stable-diffusion/ours.safetensors", safetensors(SD1, {"modelspec.title": "Ours"})
    )
    picture(top / "Stable-diffusion/ours.preview.png", parameters(own))
    theirs = put(top / "Stable-diffusion/deep/er/renamed.safetensors", safetensors(SD1, fill=1))
    put(top / "Stable-diffusion/deep/er/renamed.civitai.info", answer(77, 7, theirs))
    put(top / "Lora/style.safetensors", safetensors(XL_LORA, {"ss_output_name": "style_xl"}))
    put(top / "Lora/style.json", {"activation text": "sty, le", "description": "ours"})
    put(top / "Lora/old.pt", b"\x80\x04 never opened")
    return top


def run(folder: Path, store: Path, **options: Any) -> Artifact:
    config = CrawlConfig(site=f"local:{folder}", model_types=(), image_source="feed")
    runtime = RuntimeConfig(store=str(store), site=options)
    return crawl.run(config, {}, runtime, site_url=config.site, refresh=True)


def test_a_folder_becomes_a_catalogue_with_pairs(folder: Path, tmp_path: Path) -> None:
    snapshot = run(folder, tmp_path / "store")
    assert snapshot.manifest.metrics["schema_drift"] == {}
    models = {m["name"]: m for m in rows(snapshot, "models")}
    assert models.keys() == {"Ours", "Their Model", "style_xl", "old"}
    assert (models["Their Model"]["id"], models["Their Model"]["modelVersions"][0]["id"]) == (7, 77)
    assert models["Ours"]["id"] >= SYNTHETIC > 2**31
    (lora,) = models["style_xl"]["modelVersions"]
    assert (models["style_xl"]["type"], lora["baseModel"]) == ("LORA", "SDXL 1.0")
    assert lora["trainedWords"] == ["sty", "le"]

    made = filter_records.run(
        FilterConfig(), {"snapshot": [snapshot]}, RuntimeConfig(store=str(tmp_path / "store"))
    )
    catalogue = {
        row["model"]: row for row in pq.read_table(made.file("catalogue.parquet")).to_pylist()
    }
    assert catalogue.keys() == {"Ours", "Their Model", "style_xl"}
    pairs = pq.read_table(made.file("records-00000.parquet")).to_pylist()
    assert {(p["prompt"], p["model"]) for p in pairs} == {
        ("a red circle", "Ours"),
        ("a green square", "Their Model"),
    }
    # Every file can be had by the way that the catalogue names.
    with open_site(f"local:{folder}", RuntimeConfig(store=str(tmp_path))) as site:
        for row in catalogue.values():
            path = site.download(row["download_path"], tmp_path / "file", sha256=row["sha256"])
            assert path.stat().st_size == row["size_bytes"]


def test_one_command_makes_a_dataset_of_a_folder(folder: Path, tmp_path: Path) -> None:
    for number in range(2, 9):
        name = f"own-{number}"
        digest = put(folder / f"{name}.safetensors", safetensors(SD1, fill=number))
        picture(
            folder / f"{name}.png", parameters(digest, f"drawing {number} of thing {number * 7}")
        )
    store = tmp_path / "store"
    settings = ["--set", f"crawl.site=local:{folder}", "--set", f"runtime.store={store}"]
    config = ["--config", str(ROOT / "configs/paper.yaml")]
    done = CliRunner().invoke(app, ["run", "--until", "shard", *config, *settings])
    assert done.exit_code == 0, done.output
    (shards,) = store.glob("shard/[0-9a-f]*/manifest.json")
    made = open_artifact(shards.parent)
    assert made.manifest.rows["catalogue"] == 10
    found = [r for p in made.glob("data/*.parquet") for r in pq.read_table(p).to_pylist()]
    assert {r["model"] for r in found} == {
        "Ours",
        "Their Model",
        *(f"own-{n}" for n in range(2, 9)),
    }
    assert (store / "local-files.json").is_file()


def test_a_file_that_goes_is_a_tombstone_and_one_that_comes_is_new(
    folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    first = run(folder, store)
    assert run(folder, store) == first, "nothing new"
    lora = folder / "Lora/style.safetensors"
    gone = synthetic_id(hash_file(lora)["SHA256"])
    lora.unlink()
    put(folder / "new.safetensors", safetensors(SD1, fill=3))
    second = run(folder, store)
    assert {(row["kind"], row["id"]) for row in rows(second, "gone")} == {("models", gone)}
    assert {m["name"] for m in rows(second, "models")} >= {"style_xl", "new"}


def test_a_file_is_hashed_once_and_nothing_is_written_beside_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    cache, path = tmp_path / "store/local-files.json", folder / "Lora/style.safetensors"
    open_source(f"local:{folder}", cache)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    known = FileHashes(cache).of(path)
    assert known == hash_file(path)
    monkeypatch.setattr(
        "diffagent.localcivitai.sources.local.hash_file", lambda p: {"SHA256": "AA" * 32}
    )
    assert FileHashes(cache).of(path) == known
    os.utime(path, ns=(1, 1))
    assert FileHashes(cache).of(path) == {"SHA256": "AA" * 32}
    cache.write_bytes(b"damaged")
    assert FileHashes(cache).of(path) == {"SHA256": "AA" * 32}


def test_what_two_processes_have_hashed_is_merged(tmp_path: Path) -> None:
    cache, paths = (
        tmp_path / "hashes.json",
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
    )
    one, other = FileHashes(cache), FileHashes(cache)
    for number, (hashes, path) in enumerate(zip((one, other), paths, strict=True)):
        put(path, safetensors({"x": (4,)}, fill=number))
        hashes.of(path)
    one.flaw(paths[0])
    one.save()
    other.save()
    assert all(FileHashes(cache).has(path) for path in paths)
    before = cache.stat().st_mtime_ns
    FileHashes(cache).save()
    assert FileHashes(cache).flaw(paths[0]) == "" and cache.stat().st_mtime_ns == before


def test_hashes_that_cannot_be_kept_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.safetensors"
    put(path, safetensors({"x": (4,)}))
    hashes = FileHashes(path / "below" / "hashes.json")
    assert hashes.of(path) == hash_file(path)
    hashes.save()
    assert "cannot be stored" in caplog.text


def test_a_whole_installation_is_its_model_folders(tmp_path: Path) -> None:
    for name in ("launch.py", "models/Lora/a.safetensors", "embeddings/b.pt", "venv/c.safetensors"):
        put(tmp_path / name, b"")
    assert [path.name for path in model_files(tmp_path)] == ["b.pt", "a.safetensors"]
    (tmp_path / "launch.py").unlink()
    names = [path.name for path in model_files(tmp_path)]
    assert names == ["b.pt", "a.safetensors", "c.safetensors"]


def test_the_folder_tells_the_type_that_tensors_do_not(tmp_path: Path) -> None:
    notes = {"ss_base_model_version": "sdxl_base_v1-0"}
    path = tmp_path / "models" / "Lora" / "mine" / "a.safetensors"
    put(path, safetensors({"x": (4,)}, notes))
    found = inspect_file(path, FileHashes(None)).architecture
    assert (found.type, found.base_model) == ("LORA", "SDXL 1.0")


def test_hashes_are_those_of_the_site(tmp_path: Path) -> None:
    from diffagent.sandbox.files import file_hashes

    content = safetensors({"a": (1_300_000,)}, fill=7)
    put(tmp_path / "a.safetensors", content)
    assert hash_file(tmp_path / "a.safetensors") == file_hashes(content)


BAD = {
    "overlap": lambda head: head["b"].update(data_offsets=[0, 4]),
    "hole": lambda head: head["b"].update(data_offsets=[5, 9]),
    "outside": lambda head: head["b"].update(data_offsets=[4, 4000]),
    "negative": lambda head: head["a"].update(shape=[-4]),
    "path": lambda head: head.update({"../x": head.pop("b")}),
}


@pytest.mark.parametrize("damage", BAD.values(), ids=list(BAD))
def test_a_header_that_lies_is_refused_and_listed_with_the_reason(
    tmp_path: Path, damage: Any
) -> None:
    content = safetensors({"a": (4,), "b": (4,)})
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    damage(head)
    text = json.dumps(head).encode()
    put(tmp_path / "bad.safetensors", struct.pack("<Q", len(text)) + text + content[8 + length :])
    records = open_source(f"local:{tmp_path}")
    (model,) = records.models
    assert not records.files
    (file,) = model["modelVersions"][0]["files"]
    assert file["pickleScanResult"] == "Danger" and "is refused" in file["pickleScanMessage"]
    assert "downloadUrl" not in file


@pytest.mark.parametrize(
    "start", [b"", b"\xff" * 8, struct.pack("<Q", 2**40), b"PK\x03\x04" + bytes(9)]
)
def test_what_is_no_safetensors_is_refused(tmp_path: Path, start: bytes) -> None:
    put(tmp_path / "bad.safetensors", start)
    assert inspect_file(tmp_path / "bad.safetensors", FileHashes(None)).refused


def test_links_odd_names_and_broken_sidecars_do_no_harm(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    put(elsewhere, safetensors(SD1, fill=9))
    (folder / "link.safetensors").symlink_to(elsewhere)
    (folder / "folder.safetensors").mkdir()
    (folder / "circle").symlink_to(folder)
    os.mkfifo(folder / "pipe.safetensors")
    odd = os.fsdecode(b"odd\xff\n<b>.safetensors")
    put(folder / odd, safetensors(SD1, fill=4))
    put(folder / "broken.safetensors", safetensors(SD1, fill=5))
    (folder / "broken.civitai.info").write_bytes(b'{"id": 1, "modelId"')
    put(folder / "liar.safetensors", safetensors(SD1, fill=6))
    put(folder / "liar.civitai.info", answer(88, 8, "0" * 64))
    put(folder / "strange.safetensors", safetensors(SD1, fill=7))
    strange: dict[str, Any] = {
        "id": 99,
        "modelId": 9,
        "model": {"name": 5, "tags": "x", "stats": []},
    }
    strange |= {"files": [None], "images": [None, {"meta": 3}], "publishedAt": 7, "creator": "x"}
    put(folder / "strange.civitai.info", strange)
    names = {m["name"] for m in rows(run(folder, tmp_path / "store"), "models")}
    expected = {"Ours", "Their Model", "style_xl", "old", "broken", "liar", "strange", "link"}
    assert names == expected | {"odd\ufffd\n<b>"}


def test_the_manager_s_notes_name_what_the_site_does_not_know(tmp_path: Path) -> None:
    put(tmp_path / "a.safetensors", safetensors({"x": (4,)}))
    notes = {"model_name": "Named", "base_model": "SD 1.5", "tags": ["t"], "civitai": {}}
    put(tmp_path / "a.metadata.json", notes)
    sha = put(tmp_path / "b.safetensors", safetensors(SD1))
    put(tmp_path / "b.metadata.json", {"model_name": "x", "civitai": answer(5, 6, sha)})
    known, named = sorted(open_source(f"local:{tmp_path}").models, key=lambda m: m["id"])
    assert (known["id"], known["name"]) == (6, "Their Model")
    assert (named["name"], named["tags"]) == ("Named", ["t"])
    assert named["modelVersions"][0]["baseModel"] == "SD 1.5"


def test_stability_matrix_notes_name_the_model(tmp_path: Path) -> None:
    sha = put(tmp_path / "a.safetensors", safetensors({"x": (4,)}))
    notes: dict[str, Any] = {"ModelId": 5, "VersionId": 6, "ModelName": "Theirs", "Nsfw": False}
    notes |= {"VersionName": "v2", "BaseModel": "Pony", "ModelType": "LORA", "TrainedWords": ["x"]}
    put(tmp_path / "a.cm-info.json", {**notes, "Hashes": {"SHA256": sha.upper()}})
    put(tmp_path / "b.safetensors", safetensors({"y": (4,)}))
    put(tmp_path / "b.cm-info.json", {**notes, "Hashes": {"SHA256": "0" * 64}})
    known, other = sorted(open_source(f"local:{tmp_path}").models, key=lambda m: m["id"])
    (version,) = known["modelVersions"]
    assert (known["id"], known["name"], known["type"]) == (5, "Theirs", "LORA")
    assert (version["id"], version["baseModel"], version["trainedWords"]) == (6, "Pony", ["x"])
    assert other["name"] == "b", "notes of another file"


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model file"):
        open_source(f"local:{tmp_path}")


def names(*folders: Path) -> list[str]:
    return [path.name for path in model_files(*folders)]


def test_links_are_followed_and_everything_counts_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    top, other = tmp_path / "webui" / "models", tmp_path / "disk" / "loras"
    put(top / "a.safetensors", b"")
    put(other / "deep" / "b.safetensors", b"")
    put(tmp_path / "blobs" / "0123abcd", b"")  # as the hub's cache keeps files
    (top / "Lora").symlink_to(other)
    (top / "again").symlink_to(other / "deep")
    (top / "same.safetensors").symlink_to(top / "a.safetensors")
    (top / "hub.safetensors").symlink_to(tmp_path / "blobs" / "0123abcd")
    assert names(top) == ["a.safetensors", "hub.safetensors", "b.safetensors"]
    assert not caplog.records
    assert names(top, tmp_path / "disk") == names(top), "whatever folders are named"

    (other / "circle").symlink_to(top)
    (other / "self").symlink_to(other)
    (top / "root").symlink_to("/")
    (top / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (top / "gone").symlink_to(tmp_path / "nowhere")
    assert names(top) == ["a.safetensors", "hub.safetensors", "b.safetensors"]
    told = [record.getMessage() for record in caplog.records]
    assert any("'root' is a link to a folder around it" in text.replace(str(top) + "/", "")
               for text in told)  # fmt: skip
    assert any("gone.safetensors' is a link that leads nowhere" in text for text in told)
    linked = tmp_path / "linked"
    linked.symlink_to(top)
    assert names(linked) == names(top)


def test_a_linked_folder_is_served_like_any_other(tmp_path: Path) -> None:
    sha256 = put(tmp_path / "disk/ours.safetensors", safetensors(SD1))
    put(tmp_path / "disk/ours.civitai.info", answer(77, 7, sha256))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/Stable-diffusion").symlink_to(tmp_path / "disk")
    snapshot = run(tmp_path / "models", tmp_path / "store")
    assert [m["name"] for m in rows(snapshot, "models")] == ["Their Model"]
    runtime = RuntimeConfig(store=str(tmp_path / "store"))
    with open_site(f"local:{tmp_path / 'models'}", runtime) as site:
        path = site.download("/api/download/models/77", tmp_path / "file", sha256=sha256)
        assert path.read_bytes() == safetensors(SD1)


def test_comfyuis_extra_model_paths_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install, disk = tmp_path / "ComfyUI", tmp_path / "disk"
    for path in (
        install / "main.py",
        install / "models/checkpoints/a.safetensors",
        install / "output/never.safetensors",
        disk / "ckpt/b.safetensors",
        disk / "lora one/c.safetensors",
        disk / "two/d.safetensors",
        disk / "other/e.safetensors",
    ):
        put(path, b"")
    (install / "extra_model_paths.yaml").write_text(
        f"""
a111:
    base_path: {disk}
    is_default: true
    checkpoints: ckpt
    loras: |
        lora one
        two
        gone
    custom_nodes: other
nothing: null
""",
        encoding="utf-8",
    )
    assert names(install) == [f"{letter}.safetensors" for letter in "abcd"]
    assert "names 'gone', which is no folder" in caplog.text
    for text in ("- [", "just text", "a: {checkpoints: 5}", "[1, 2]", "\x00"):
        (install / "extra_model_paths.yaml").write_text(text)
        assert names(install) == ["a.safetensors"]


PIPELINE = {
    "unet/diffusion_pytorch_model.safetensors": {"down_blocks.0.resnets.0.conv1.weight": (1,)},
    "text_encoder/model.safetensors": {"text_model.encoder.layers.0.mlp.fc1.weight": (1,)},
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": {"x.weight": (1,)},
}


def test_parts_of_a_pipeline_and_shards_are_no_checkpoints(tmp_path: Path) -> None:
    top = tmp_path / "Stable-diffusion"
    for name, shapes in PIPELINE.items():
        put(top / "pipe" / name, safetensors(shapes))
        put((top / "pipe" / name).with_name("config.json"), {})
    put(top / "pipe/model_index.json", {})
    put(top / "big-00001-of-00002.safetensors", safetensors(SD1))
    put(top / "renamed-unet.safetensors", safetensors(PIPELINE[next(iter(PIPELINE))]))
    put(top / "model.safetensors", safetensors(SD1, fill=1))
    put(top / "whole.safetensors", safetensors(SD1, fill=2))
    files = {
        path.relative_to(top).as_posix(): inspect_file(path, FileHashes(None))
        for path in model_files(top)
    }
    whole = {name for name, file in files.items() if file.architecture.type == "Checkpoint"}
    assert whole == {"model.safetensors", "whole.safetensors"}
    reasons = {name: file.undrawable for name, file in files.items() if name not in whole}
    assert reasons.keys() == {
        *(f"pipe/{name}" for name in PIPELINE),
        *("big-00001-of-00002.safetensors", "renamed-unet.safetensors"),
    }
    assert all("; get the model in one file" in reason for reason in reasons.values())
    assert reasons["big-00001-of-00002.safetensors"].startswith("part 1 of 2 of a sharded model")


@pytest.mark.parametrize(
    "sidecar",
    [
        b'{"id": 1, "modelId": 2, "x": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"id": 1, "modelId": 2, "x": ' + b"[" * 100_000 + b"}",
        b'{"id": 1, "modelId": 2, "stats": {"downloadCount": 1e999}}',
        b'{"id": 9223372036854775808, "modelId": 2}',
        b'{"id": -5, "modelId": 2}',
        b'{"id": 1, "modelId": 2, "images": [{"id": 9223372036854775808, "meta": {}}]}',
        b"\xff\xfe",
        b"[]",
    ],
)
def test_a_sidecar_that_no_store_can_hold_is_left_out(tmp_path: Path, sidecar: bytes) -> None:
    put(tmp_path / "models/a.safetensors", safetensors(SD1))
    (tmp_path / "models/a.civitai.info").write_bytes(sidecar)
    put(tmp_path / "models/b.safetensors", safetensors(SD1, fill=1))
    snapshot = run(tmp_path / "models", tmp_path / "store")
    assert {m["name"] for m in rows(snapshot, "models")} == {"a", "b"}

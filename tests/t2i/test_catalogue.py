"""Names are unique, AIRs are the site's, and the file is the one that can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.dabench.parquet_tables import write_table
from diffagent.errors import ArtifactError
from diffagent.t2i.catalogue import (
    Catalogue,
    choose_file,
    ecosystem,
    first_sentences,
    make_entry,
    rename,
    unique_names,
)
from tests.dabench.dabench_records import model, version


def entry(ident: int, name: str = "Shapes", number: int = 0, **changes: Any) -> Any:
    made = version(number or ident * 100, **changes)
    return make_entry(model(ident, name=name), made, made["files"][0])


def test_every_colliding_name_is_marked() -> None:
    assert unique_names({1: "Shapes", 2: " shapes ", 3: "Other"}) == {
        1: "Shapes #1",
        2: "shapes #2",
        3: "Other",
    }


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 30), st.sampled_from(["a", "A", "a #1", "a #2 #2", ""])))
def test_names_become_unique(names: dict[int, str]) -> None:
    made = unique_names(names)
    assert set(made) == set(names)
    assert len({name.casefold() for name in made.values()}) == len(names)


@pytest.mark.parametrize(
    ("base_model", "root"),
    [("SD 1.5", "sd1"), ("SD 1.4", "sd1"), ("SDXL 1.0", "sdxl"), ("Pony", "sdxl"),
     ("Illustrious", "sdxl"), ("SD 2.1 768", "sd2"), ("Flux.1 D", "flux1"), ("", "other")],
)  # fmt: skip
def test_ecosystem(base_model: str, root: str) -> None:
    assert ecosystem(base_model) == root


def test_entry_and_air() -> None:
    made = entry(5)
    assert made.air == "urn:air:sd1:checkpoint:civitai:5@500"
    assert made.download_path == "/api/download/models/500"
    assert made.size_bytes == 1024512
    assert made.allow_commercial_use == ("Image", "Rent")
    lora = version(9)
    lora["files"][0].pop("primary")
    made = make_entry(model(3, type="LoCon"), lora, lora["files"][0])
    assert made.air == "urn:air:sd1:lycoris:civitai:3@9"
    assert made.download_path == "/api/download/models/9?fileId=90"


def test_choose_file_prefers_pruned_fp16_safetensors() -> None:
    good = version(1)["files"][0]
    full = {**good, "id": 11, "metadata": {"format": "SafeTensor", "size": "full", "fp": "fp32"}}
    pickle = {**good, "id": 12, "metadata": {"format": "PickleTensor"}}
    vae = {**good, "id": 13, "type": "VAE"}
    assert choose_file([full, pickle, vae, good], require_scans=True) == (good, "")
    assert choose_file([pickle], require_scans=True) == (None, "no safetensors file")
    assert choose_file([vae], require_scans=True) == (None, "no model file")
    assert choose_file([], require_scans=True) == (None, "no files")
    bad = {**good, "virusScanResult": "Danger"}
    assert choose_file([bad], require_scans=True) == (None, "scan not passed")
    assert choose_file([bad], require_scans=False) == (bad, "")
    assert choose_file([{**good, "hashes": {}}], require_scans=True) == (None, "no SHA256")


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ({"fp": "fp8"}, "a.safetensors"),
        ({"fp": "nf4"}, "a.safetensors"),
        ({"quantType": "Q4_K_M"}, "a.safetensors"),
        ({}, "model_fp8_e4m3fn.safetensors"),
        ({"fp": "fp16"}, "model-svdq-int4_r32.safetensors"),
        ({}, "model-bnb-nf4-v2.safetensors"),
        ({}, "model Q4_K_S.safetensors"),
        ({"fp": "mxfp8"}, "a.safetensors"),
    ],
)
def test_choose_file_prefers_what_is_drawn_right(stated: dict[str, str], name: str) -> None:
    good = version(1)["files"][0]
    for fp in ("fp32", "bf16", "fp16", None):
        whole = {**good, "id": 90, "primary": False, "name": "fp80s_style.safetensors"}
        whole["metadata"] = {"format": "SafeTensor", "size": "full", "fp": fp}
        small = {**good, "id": 1, "primary": True, "name": name}
        small["metadata"] = {"format": "SafeTensor", "size": "pruned", **stated}
        for files in ([whole, small], [small, whole]):
            assert choose_file(files, require_scans=True) == (whole, "")
        assert choose_file([small], require_scans=True) == (small, ""), "when it is the only one"
        fp8 = {**whole, "metadata": {"format": "SafeTensor", "fp": "fp8"}}
        if "8" not in str(stated) + name:
            assert choose_file([small, fp8], require_scans=True) == (fp8, "")


def test_first_sentences() -> None:
    assert first_sentences("One. Two.") == "One. Two."
    text = first_sentences("A sentence of some words. " * 40, limit=100)
    assert text.endswith(".")
    assert 33 <= len(text) <= 100
    assert first_sentences("x" * 400, limit=100) == "x" * 100


def test_round_trip_and_look_up(tmp_path: Path) -> None:
    lora = version(300)
    entries = rename(
        [
            entry(1),
            entry(2),
            entry(2, number=201, name="Shapes"),
            make_entry(model(3, type="LORA", name="Ink"), lora, lora["files"][0]),
        ]
    )
    write_table(tmp_path / "catalogue.parquet", Catalogue(entries).to_table())
    loaded = Catalogue.load(tmp_path)
    assert loaded.entries == Catalogue(entries).entries
    assert loaded.has_model("Shapes #1")
    found = loaded.checkpoint("Shapes #2", "v201")
    assert found is not None
    assert found.version_id == 201
    assert loaded.lora("Shapes #2", "v201") is None
    assert loaded.checkpoint("Ink", "v300") is None
    assert loaded.lora("Ink", "v300") is not None
    assert "Euler a" in loaded.samplers
    assert "DPM adaptive" not in loaded.samplers  # diffusers cannot run it


def test_no_catalogue_says_where(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="catalogue"):
        Catalogue.load(tmp_path)

"""Metadata in files: chunks of PNG, EXIF of JPEG and WebP, and damage."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffagent.dabench.metadata import Generation, read_image_metadata, read_parameters
from diffagent.dabench.metadata.image import decode_comment
from tests.unit.test_metadata_comfy import PLAIN, graph, workflow
from tests.unit.test_metadata_programs import FOOOCUS, INVOKEAI, NOVELAI, SWARMUI

TEXT = (
    "a cat, 猫\nNegative prompt: b\nSteps: 5, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64"
)


def png(path: Path, texts: dict[str, str], how: str = "add_text") -> Path:
    info = PngInfo()
    for name, text in texts.items():
        if how == "zip":
            info.add_text(name, text, zip=True)
        else:
            getattr(info, how)(name, text)
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("how", ["add_text", "add_itxt", "zip"])
def test_png_parameters(tmp_path: Path, how: str) -> None:
    made = read_image_metadata(png(tmp_path / "x.png", {"parameters": TEXT}, how))
    assert made == read_parameters(TEXT)
    assert (made.prompt, made.steps) == ("a cat, 猫", 5)


def test_png_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    both = {"prompt": json.dumps(graph()), "workflow": json.dumps(workflow())}
    assert read_image_metadata(png(path, both)) == PLAIN
    del both["prompt"]
    assert read_image_metadata(png(path, both)).form == "comfyui-workflow"
    swarm = read_image_metadata(png(path, {"parameters": json.dumps(SWARMUI)}))
    assert (swarm.form, swarm.steps) == ("swarmui", 30)
    fooocus = {"parameters": json.dumps(FOOOCUS), "fooocus_scheme": "fooocus"}
    assert read_image_metadata(png(path, fooocus)).form == "fooocus"
    assert read_image_metadata(png(path, {"invokeai_metadata": json.dumps(INVOKEAI)})).steps == 30
    assert read_image_metadata(png(path, {"Comment": json.dumps(NOVELAI)})).form == "novelai"


def test_settings_as_text_are_better_than_a_graph_and_a_graph_than_a_prompt(tmp_path: Path) -> None:
    both = {"parameters": TEXT, "prompt": json.dumps(graph())}
    assert read_image_metadata(png(tmp_path / "x.png", both)).form == "a1111-text"
    both["parameters"] = "only words"
    assert read_image_metadata(png(tmp_path / "x.png", both)) == PLAIN
    words = read_image_metadata(png(tmp_path / "x.png", {"parameters": "only words"}))
    assert (words.prompt, words.size_from_image) == ("only words", True)


def test_chunks_after_the_pixels(tmp_path: Path) -> None:
    path = png(tmp_path / "x.png", {})
    data = b"parameters\0" + b"a\nSteps: 5, Seed: 1, Size: 64x64"
    chunk = b"tEXt" + data
    chunk = len(data).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    end = path.read_bytes().rindex(b"IEND") - 4
    path.write_bytes(path.read_bytes()[:end] + chunk + path.read_bytes()[end:])
    assert read_image_metadata(path).steps == 5


def exif(comment: bytes | None = None, **fields: str) -> Image.Exif:
    made = Image.Exif()
    if comment is not None:
        made.get_ifd(0x8769)[0x9286] = comment
    for name, value in fields.items():
        made[{"make": 0x010F, "model": 0x0110, "description": 0x010E}[name]] = value
    return made


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_exif_comment(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    comment = b"UNICODE\0" + TEXT.encode("utf-16-be")
    Image.new("RGB", (64, 64)).save(path, exif=exif(comment))
    assert read_image_metadata(path) == read_parameters(TEXT)


def test_comfyui_in_fields_of_the_camera(tmp_path: Path) -> None:
    path = tmp_path / "x.webp"
    fields = {
        "make": "Workflow:" + json.dumps(workflow()),
        "model": "Prompt:" + json.dumps(graph()),
    }
    Image.new("RGB", (64, 64)).save(path, exif=exif(**fields))
    assert read_image_metadata(path) == PLAIN
    Image.new("RGB", (64, 64)).save(path, exif=exif(model=json.dumps(SWARMUI)))
    assert read_image_metadata(path).form == "swarmui"


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "ab 猫: 1".encode("utf-16-be"),
        b"UNICODE\0" + "ab 猫: 1".encode("utf-16-le"),
        b"UNICODE\0" + b"\xfe\xff" + "ab 猫: 1".encode("utf-16-be"),
        b"UNICODE\0" + "ab 猫: 1".encode("utf-16"),
        b"UNICODE\0" + "ab 猫: 1".encode(),
        b"ASCII\0\0\0" + "ab 猫: 1".encode(),
        b"\0" * 8 + "ab 猫: 1".encode(),
        "ab 猫: 1".encode(),
        "ab 猫: 1",
    ],
)
def test_encodings_of_the_comment(comment: bytes | str) -> None:
    assert decode_comment(comment) == "ab 猫: 1"


def test_files_that_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("Steps: 5, Sampler: Euler a, Seed: 1")
    assert read_image_metadata(tmp_path / "x.txt") == Generation()
    assert read_image_metadata(png(tmp_path / "x.png", {})) == Generation()
    with pytest.raises(FileNotFoundError):
        read_image_metadata(tmp_path / "none.png")


def _whole() -> list[bytes]:
    info = PngInfo()
    info.add_text("parameters", TEXT)
    info.add_text("workflow", "x" * 50, zip=True)
    made = []
    for kind, options in (
        ("PNG", {"pnginfo": info}),
        ("JPEG", {"exif": exif(b"UNICODE\0" + TEXT.encode("utf-16-be"), make="prompt:{}")}),
        ("WEBP", {"exif": exif(b"ASCII\0\0\0ab")}),
    ):
        data = io.BytesIO()
        Image.new("RGB", (8, 8)).save(data, kind, **options)
        made.append(data.getvalue())
    return made


WHOLE = _whole()


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda whole, at, new, cut: (whole[: at % len(whole)] + new + whole[at % len(whole) :])[
            :cut
        ],
        st.sampled_from(WHOLE),
        st.integers(0, 5000),
        st.binary(max_size=6),
        st.integers(20, 5000),
    )
)
def test_reading_never_raises_on_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    read_image_metadata(path)


@settings(deadline=None)
@given(st.binary())
def test_decoding_never_raises(comment: bytes) -> None:
    decode_comment(comment)
    decode_comment(b"UNICODE\0" + comment)

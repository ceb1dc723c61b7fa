"""Metadata in files: chunks of PNG, EXIF of JPEG and WebP, and damage."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffagent.t2i.metadata import Generation, read_image_metadata, read_parameters
from diffagent.t2i.metadata.image import decode_comment
from tests.t2i.metadata.test_comfy import PLAIN, graph, workflow
from tests.t2i.metadata.test_programs import FOOOCUS, INVOKEAI, NOVELAI, SWARMUI

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


# --- containers -----------------------------------------------------------------------------

WORDS = "a cat, 猫 🐈"
SETTINGS = f"{WORDS}\nNegative prompt: b\nSteps: 5, Sampler: Euler a, CFG scale: 7, Seed: 1"
GRAPH_AS_TEXT = json.dumps(
    {"prompt": json.dumps(graph()), "workflow": json.dumps(workflow())}, ensure_ascii=False
)


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def with_chunks(path: Path, *chunks: bytes) -> Path:
    """A PNG with chunks as other programs write them: right after the header."""
    data = png(path, {}).read_bytes()
    at = 8 + 25  # the signature and IHDR
    path.write_bytes(data[:at] + b"".join(chunks) + data[at:])
    return path


def picture(path: Path, mode: str = "RGB", **options: object) -> Path:
    Image.new(mode, (64, 64)).save(path, **options)
    return path


def test_a_graph_in_the_comment_is_no_prompt(tmp_path: Path) -> None:
    for comment in (
        b"UNICODE\0" + GRAPH_AS_TEXT.encode("utf-16-be"),
        b"ASCII\0\0\0" + GRAPH_AS_TEXT.encode(),
        b"\0" * 8 + json.dumps({"prompt": graph(), "workflow": {}}).encode(),
        b"ASCII\0\0\0prompt:" + json.dumps(graph()).encode(),
    ):
        for suffix in ("jpg", "webp", "avif"):
            path = picture(tmp_path / f"x.{suffix}", exif=exif(comment).tobytes())
            assert read_image_metadata(path) == PLAIN
    workflow_only = json.dumps({"workflow": json.dumps(workflow())}).encode()
    path = picture(tmp_path / "x.jpg", exif=exif(b"ASCII\0\0\0" + workflow_only))
    assert read_image_metadata(path).form == "comfyui-workflow"


def test_utf8_in_latin1_chunks(tmp_path: Path) -> None:
    raw = b"parameters\0" + SETTINGS.encode()
    squeezed = b"parameters\0\0" + zlib.compress(SETTINGS.encode())
    for one in (chunk(b"tEXt", raw), chunk(b"zTXt", squeezed)):
        made = read_image_metadata(with_chunks(tmp_path / "x.png", one))
        assert (made.prompt, made.steps) == (WORDS, 5)
    latin = chunk(
        b"tEXt", b"parameters\0" + "a café\nSteps: 5, Seed: 1, Size: 8x8".encode("latin-1")
    )
    assert read_image_metadata(with_chunks(tmp_path / "x.png", latin)).prompt == "a café"
    double = png(tmp_path / "x.png", {"parameters": "Ã© is \u2713\nSteps: 5, Seed: 1, Size: 8x8"})
    assert read_image_metadata(double).prompt == "Ã© is \u2713"


DRAW_THINGS = {"c": "a cat", "uc": "a dog", "model": "base_f16.ckpt", "sampler": "DPM++ 2M Karras",
               "scale": 4, "seed": 5, "size": "1152x896", "steps": 30, "strength": 1,
               "lora": [{"model": "ink_lora_f16.ckpt", "weight": 0.6}]}  # fmt: skip


def xmp(name: str, text: str) -> bytes:
    """XMP with a property in the manner of Apple's writer."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description rdf:about="" '
        'xmlns:exif="http://ns.adobe.com/exif/1.0/"><xmp:CreatorTool>Draw Things</xmp:CreatorTool>'
        f'<{name}>\n <rdf:Alt>\n  <rdf:li xml:lang="x-default">{escaped}</rdf:li>\n </rdf:Alt>\n'
        f"</{name}></rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def test_draw_things(tmp_path: Path) -> None:
    data = xmp("exif:UserComment", json.dumps(DRAW_THINGS))
    itxt = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + data)
    paths = [with_chunks(tmp_path / "x.png", itxt)]
    paths += [picture(tmp_path / f"x.{suffix}", xmp=data) for suffix in ("jpg", "webp", "avif")]
    for path in paths:
        made = read_image_metadata(path)
        assert (made.form, made.prompt, made.negative_prompt) == ("drawthings", "a cat", "a dog")
        assert (made.steps, made.cfg_scale, made.width, made.height) == (30, 4.0, 1152, 896)
        assert (made.sampler, made.seed) == ("DPM++ 2M Karras", 5)
        assert [(use.name, use.weight) for use in made.loras] == [("ink_lora_f16.ckpt", 0.6)]
        assert not made.from_image


def test_descriptions_count_only_with_settings(tmp_path: Path) -> None:
    text = "a <lora:ink:0.6> cat\nSteps: 5, Sampler: Euler a, Seed: 1, Size: 8x8"
    for suffix in ("jpg", "webp"):
        path = tmp_path / f"x.{suffix}"
        made = read_image_metadata(picture(path, xmp=xmp("dc:description", text)))
        assert (made.prompt, made.loras[0].weight) == ("a cat", 0.6)
        assert read_image_metadata(picture(path, exif=exif(description=text))).steps == 5
        explorer = Image.Exif()
        explorer[0x9C9C] = text.encode("utf-16-le") + b"\0\0"
        assert read_image_metadata(picture(path, exif=explorer)).steps == 5
        about = "OLYMPUS DIGITAL CAMERA"
        assert read_image_metadata(picture(path, exif=exif(description=about))).form == "none"
        assert read_image_metadata(picture(path, xmp=xmp("dc:description", about))).form == "none"
    path = tmp_path / "x.jpg"
    made = read_image_metadata(picture(path, comment=SETTINGS.encode()))
    assert (made.prompt, made.steps) == (WORDS, 5)
    assert read_image_metadata(picture(path, comment=json.dumps(FOOOCUS))).form == "fooocus"
    assert read_image_metadata(picture(path, comment=b"CREATOR: gd-jpeg v1.0")).form == "none"
    made = read_image_metadata(picture(tmp_path / "x.gif", comment=SETTINGS.encode()))
    assert made.prompt == WORDS


def test_an_ascii_head_with_a_wide_body(tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be", "utf-16", "utf-8"):
        comment = b"ASCII\0\0\0" + SETTINGS.encode(encoding)
        made = read_image_metadata(picture(tmp_path / "x.jpg", exif=exif(comment)))
        assert (made.prompt, made.steps) == (WORDS, 5)


NOVELAI_CHUNKS = {"Comment": json.dumps(NOVELAI), "Description": "a cat", "Software": "NovelAI",
                  "Source": "Stable Diffusion XL 7BCCAA2C"}  # fmt: skip


def test_novelai_outside_of_png(tmp_path: Path) -> None:
    comment = b"ASCII\0\0\0" + json.dumps(NOVELAI_CHUNKS).encode()
    made = read_image_metadata(picture(tmp_path / "x.webp", exif=exif(comment)))
    assert (made.form, made.prompt, made.negative_prompt) == ("novelai", "a cat", "a dog")
    assert made.steps == 30


@pytest.mark.parametrize("kind", [b"stealth_pngcomp", b"stealth_pnginfo"])
def test_novelai_in_the_alpha_channel(tmp_path: Path, kind: bytes) -> None:
    text = json.dumps(NOVELAI_CHUNKS).encode()
    body = gzip.compress(text) if kind.endswith(b"comp") else text
    data = kind + (len(body) * 8).to_bytes(4, "big") + body
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    alpha = np.full(96 * 96, 254, np.uint8)
    alpha[: bits.size] |= bits
    image = Image.new("RGBA", (96, 96))
    image.putalpha(Image.fromarray(np.ascontiguousarray(alpha.reshape(96, 96).T)))
    path = tmp_path / "x.png"
    image.save(path)
    assert read_image_metadata(path).form == "novelai"
    image.save(tmp_path / "x.webp", lossless=True, exact=True)
    assert read_image_metadata(tmp_path / "x.webp").steps == 30


EASY = {"prompt": "a cat", "negative_prompt": "a dog", "seed": "5", "width": "1152",
        "height": "896", "num_inference_steps": "30", "guidance_scale": "4.0",
        "sampler_name": "euler_a", "use_stable_diffusion_model": "C:\\models\\base.safetensors",
        "clip_skip": "True", "use_lora_model": '["ink"]', "lora_alpha": "[0.5]"}  # fmt: skip


def test_easy_diffusion(tmp_path: Path) -> None:
    labels = {"Prompt": "a cat", "Negative Prompt": "a dog", "Seed": "5", "Width": "1152",
              "Height": "896", "Steps": "30", "Guidance Scale": "4.0", "Sampler": "euler_a",
              "Stable Diffusion model": "base.safetensors", "Clip Skip": "True",
              "LoRA model": "ink", "LoRA Strength": "0.5"}  # fmt: skip
    comment = exif(b"UNICODE\0" + json.dumps(EASY).encode("utf-16-be"))
    for path in (
        png(tmp_path / "x.png", EASY),
        png(tmp_path / "y.png", labels),
        picture(tmp_path / "x.jpg", exif=comment),
    ):
        made = read_image_metadata(path)
        assert (made.form, made.prompt, made.negative_prompt) == ("easydiffusion", "a cat", "a dog")
        assert (made.steps, made.cfg_scale, made.width, made.seed) == (30, 4.0, 1152, 5)
        assert (made.sampler, made.clip_skip) == ("Euler a", 2)
        assert made.checkpoints[0].name == "base.safetensors"
        assert [(use.name, use.weight) for use in made.loras] == [("ink", 0.5)]


def test_invokeai_of_every_age(tmp_path: Path) -> None:
    dream = '"a cat [a dog]" -s 30 -S 5 -W 1152 -H 896 -C 4.0 -A k_euler_a'
    made = read_image_metadata(png(tmp_path / "x.png", {"Dream": dream}))
    assert (made.form, made.prompt, made.negative_prompt) == ("invokeai", "a cat", "a dog")
    assert (made.steps, made.cfg_scale, made.width, made.seed) == (30, 4.0, 1152, 5)
    old = {
        "model_weights": "base",
        "model_hash": "ab" * 32,
        "image": {
            "prompt": [{"prompt": "a cat [a dog]", "weight": 1}],
            "steps": 30,
            "cfg_scale": 4,
            "width": 1152,
            "height": 896,
            "seed": 5,
            "sampler": "k_euler_a",
            "type": "txt2img",
        },
    }
    made = read_image_metadata(png(tmp_path / "x.png", {"sd-metadata": json.dumps(old)}))
    assert (made.prompt, made.negative_prompt, made.steps) == ("a cat", "a dog", 30)
    new = {
        **INVOKEAI,
        "model": {"key": "x", "hash": "blake3:" + "ab" * 32, "name": "base"},
        "loras": [{"model": {"name": "ink", "hash": "blake3:" + "cd" * 32}, "weight": 0.5}],
    }
    made = read_image_metadata(png(tmp_path / "x.png", {"invokeai_metadata": json.dumps(new)}))
    assert made.checkpoints[0].hash == "AB" * 32
    assert (made.loras[0].hash, made.loras[0].weight) == ("CD" * 32, 0.5)


def test_stability_matrix(tmp_path: Path) -> None:
    own = {"PositivePrompt": WORDS, "NegativePrompt": "b", "Steps": 5, "Sampler": "Euler a",
           "CfgScale": 7, "Seed": 1, "Width": 64, "Height": 64, "ModelHash": "ab" * 32,
           "ModelName": "base.safetensors"}  # fmt: skip
    made = read_image_metadata(
        with_chunks(
            tmp_path / "x.png",
            chunk(b"tEXt", b"parameters-json\0" + json.dumps(own, ensure_ascii=False).encode()),
        )
    )
    assert (made.form, made.prompt, made.steps) == ("stabilitymatrix", WORDS, 5)
    assert made.checkpoints[0].hash == "AB" * 32


def test_swarmui_in_a_webp(tmp_path: Path) -> None:
    comment = b"UNICODE\0" + json.dumps(SWARMUI).encode("utf-16-le")
    assert read_image_metadata(picture(tmp_path / "x.webp", exif=exif(comment))).form == "swarmui"

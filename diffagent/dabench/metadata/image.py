"""Generation metadata in picture files: text chunks of PNG, EXIF of JPEG, WebP and AVIF."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffagent.dabench.metadata.comfy import read_comfy
from diffagent.dabench.metadata.generation import Generation, Reading
from diffagent.dabench.metadata.keys import read_keys
from diffagent.dabench.metadata.parse import read_text

log = logging.getLogger(__name__)

_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF")
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
#: Chunks that hold what a program wrote, most telling first. The WebUI and most others use
#: "parameters"; NovelAI "Comment"; InvokeAI a chunk of its own.
_CHUNKS = ("parameters", "sui_image_params", "invokeai_metadata", "sd-metadata", "Comment")


def read_image_metadata(path: Path) -> Generation:
    """Read how a picture was made from what its file carries besides pixels.

    Args:
        path: a PNG, JPEG, WebP or AVIF file.

    Returns:
        What the file says; form 'none' when it says nothing or is no picture.

    Raises:
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        texts, size = _texts(file, path.name)
    for reading in _readings(texts):
        if reading.keys.get("prompt") or reading.checkpoints:
            return read_keys(reading, *size)
    return Generation()


def _readings(texts: Mapping[str, str]) -> Iterator[Reading]:
    """Readings of a file's texts, best first: settings as text before a graph that implies them."""
    late = []
    for name in _CHUNKS:
        value = texts.get(name)
        if value is not None:
            reading = read_text(value)
            if reading is not None and reading.keys.get("steps"):
                yield reading
            elif reading is not None:
                late.append(reading)
    graph = read_comfy({name: texts[name] for name in ("prompt", "workflow") if name in texts})
    if graph is not None:
        yield graph
    yield from late


def _texts(file: Any, name: str) -> tuple[dict[str, str], tuple[int, int] | tuple[None, None]]:
    """All texts of a picture by the names of their chunks, and its size in pixels."""
    from PIL import Image

    try:
        with Image.open(file, formats=_FORMATS) as image:
            texts = _strings(image.info)
            if image.format != "PNG":
                texts |= _exif_texts(image)
            elif texts.keys().isdisjoint({*_CHUNKS, "prompt", "workflow"}):
                image.load()  # chunks may follow the pixels
                texts = {**_exif_texts(image), **_strings(image.info)}
            return texts, image.size
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        log.info("%s: no metadata can be read from it (%r)", name, error)
        return {}, (None, None)


def _strings(info: Mapping[Any, object]) -> dict[str, str]:
    return {str(key): str(value) for key, value in info.items() if isinstance(value, str) and value}


def _exif_texts(image: Any) -> dict[str, str]:
    """EXIF's texts under the names that PNG has for them.

    The comment is the WebUI's text or a program's JSON. ComfyUI's nodes write graphs into any
    field of the camera, with their name before: ``prompt:{...}``.
    """
    exif = image.getexif()
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT) or exif.get(_USER_COMMENT)
    texts: dict[str, str] = {}
    found = decode_comment(comment) if isinstance(comment, bytes | str) else ""
    if found:
        texts["parameters"] = found
    for value in exif.values():
        if not isinstance(value, str):
            continue
        kind, colon, rest = value.partition(":")
        if colon and kind.strip().lower() in ("prompt", "workflow"):
            texts.setdefault(kind.strip().lower(), rest.strip("\0 "))
        elif value.lstrip()[:1] == "{":
            texts.setdefault("parameters", value.strip("\0 "))
    return texts


def decode_comment(value: bytes | str) -> str:
    """EXIF's UserComment: eight bytes name the encoding; not every writer keeps to it.

    "UNICODE" should be UTF-16 in the file's byte order, and is big-endian from the WebUI,
    little-endian from some, UTF-8 from others.
    """
    if isinstance(value, str):
        return value.strip("\0 ")
    head, body = value[:8], value[8:]
    if head == b"UNICODE\0":
        return _utf16(body)
    if head not in (b"ASCII\0\0\0", b"\0" * 8, b"JIS\0\0\0\0\0"):
        body = value
    return body.decode("utf-8", "replace").strip("\0 ")


def _utf16(body: bytes) -> str:
    if body[:2] in (b"\xfe\xff", b"\xff\xfe"):
        return body.decode("utf-16", "replace").strip("\0 ")
    even, odd = body[0::2].count(0), body[1::2].count(0)  # Latin letters have a zero byte
    if not even and not odd and (text := _utf8(body)) is not None:
        return text
    return body.decode("utf-16-le" if odd > even else "utf-16-be", "replace").strip("\0 ")


def _utf8(body: bytes) -> str | None:
    try:
        return body.decode().strip("\0 ")
    except UnicodeDecodeError:
        return None

"""Generation metadata in picture files: chunks of PNG, EXIF, XMP, comments, the alpha channel."""

from __future__ import annotations

import html
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffagent.t2i.metadata.comfy import read_comfy
from diffagent.t2i.metadata.generation import Generation, Reading
from diffagent.t2i.metadata.keys import read_keys
from diffagent.t2i.metadata.parse import read_text
from diffagent.t2i.metadata.programs import read_dream, read_program

log = logging.getLogger(__name__)

_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF")
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
#: Fields of Windows' Explorer, which are UTF-16: title, comment, keywords, subject.
_EXPLORER = (0x9C9B, 0x9C9C, 0x9C9E, 0x9C9F)
#: Texts that hold what a program wrote, most telling first. The WebUI and most others use
#: "parameters"; NovelAI "Comment"; InvokeAI and Stability Matrix a chunk of their own.
_CHUNKS = (
    *("parameters", "sui_image_params", "invokeai_metadata", "sd-metadata", "parameters-json"),
    *("Comment", "stealth"),
)
#: Texts that may be about anything: only settings in them count, not a text without.
_OTHERS = ("comment", "description", "fields")
_MAX_STEALTH = 1 << 20  # bytes in the alpha channel, and of what they unfold to
_MAX_PIXELS = 1 << 24  # of a picture whose alpha channel is looked at
_MAX_TEXT = 1 << 24  # characters of one text; longer ones are not read


def read_image_metadata(path: Path) -> Generation:
    """Read how a picture was made from what its file carries besides pixels.

    Args:
        path: a PNG, JPEG, WebP, AVIF, TIFF or GIF file.

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
    for name in (*_CHUNKS, *_OTHERS):
        reading = read_text(texts[name]) if name in texts else None
        if reading is not None and (reading.keys.get("steps") or reading.literals is not None):
            yield reading
        elif reading is not None and name in _CHUNKS:
            late.append(reading)
    dream = read_dream(texts["Dream"]) if "Dream" in texts else None
    graph = read_comfy({name: texts[name] for name in ("prompt", "workflow") if name in texts})
    program = read_program(texts)  # a chunk for each key
    yield from (reading for reading in (graph, program, dream) if reading is not None)
    yield from late


def _texts(file: Any, name: str) -> tuple[dict[str, str], tuple[int, int] | tuple[None, None]]:
    """All texts of a picture by the names of their chunks, and its size in pixels."""
    from PIL import Image

    try:
        with Image.open(file, formats=_FORMATS) as image:
            texts = _strings(image.info)
            if image.format != "PNG":
                texts |= _other_texts(image)
            elif texts.keys().isdisjoint({*_CHUNKS, "prompt", "workflow"}):
                image.load()  # chunks may follow the pixels
                texts = {**_other_texts(image), **_strings(image.info)}
            if not texts and image.mode == "RGBA" and image.width * image.height <= _MAX_PIXELS:
                texts = _stealth(image)
            return {key: text for key, text in texts.items() if len(text) <= _MAX_TEXT}, image.size
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        log.info("%s: no metadata can be read from it (%r)", name, error)
        return {}, (None, None)


def _strings(info: Mapping[Any, object]) -> dict[str, str]:
    from PIL.PngImagePlugin import iTXt

    return {
        str(key): str(value) if isinstance(value, iTXt) else _repaired(value)
        for key, value in info.items()
        if isinstance(value, str) and value
    }


def _repaired(value: str) -> str:
    """A text that was read as Latin-1, the encoding of PNG and EXIF, and was written as UTF-8."""
    if value.isascii():
        return value
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _other_texts(image: Any) -> dict[str, str]:
    """Texts of EXIF, XMP and comments, under the names that PNG has for them."""
    texts: dict[str, str] = {}
    comment = image.info.get("comment")
    if isinstance(comment, bytes | str) and (text := decode_comment(comment)):
        texts["comment"] = text
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(xmp, bytes):
        xmp = _utf8(xmp) or ""
    if isinstance(xmp, str):
        texts |= _xmp_texts(xmp[:_MAX_TEXT])
    return texts | _exif_texts(image)


def _xmp_texts(xmp: str) -> dict[str, str]:
    """The comment that Draw Things writes, and the description."""
    texts = {}
    for name, key in (("exif:UserComment", "parameters"), ("dc:description", "description")):
        text = _xmp_text(xmp, name)
        if text:
            texts[key] = text
    return texts


def _xmp_text(xmp: str, name: str) -> str:
    """The text of a property, be it an element, with or without languages, or an attribute."""
    start = xmp.find(f"<{name}")
    if start >= 0:
        end = xmp.find(f"</{name}>", start)
        inner = xmp[xmp.find(">", start) + 1 : end] if end >= 0 else ""
        inner = inner.replace("<![CDATA[", "").replace("]]>", "")
        return html.unescape(_MARKUP.sub("", inner)).strip()
    attribute = re.search(rf"""\b{name}=(?:"([^"]*)"|'([^']*)')""", xmp)
    return html.unescape(attribute.group(1) or attribute.group(2) or "") if attribute else ""


_MARKUP = re.compile(r"</?(?:rdf|x|xml)\b[^<>]*>")


def _exif_texts(image: Any) -> dict[str, str]:
    """EXIF's texts under the names that PNG has for them.

    The comment is the WebUI's text or a program's JSON. ComfyUI's nodes write graphs into any
    field of the camera, with their name before: ``prompt:{...}``.
    """
    exif = image.getexif()
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT) or exif.get(_USER_COMMENT)
    comment = decode_comment(comment) if isinstance(comment, bytes | str) else ""
    fields = [_repaired(value) for value in exif.values() if isinstance(value, str)]
    fields += [_explorer(exif[tag]) for tag in _EXPLORER if tag in exif]
    texts: dict[str, str] = {}
    for number, field in enumerate((comment, *fields)):
        kind, colon, rest = field.partition(":")
        if colon and kind.strip().lower() in ("prompt", "workflow"):
            texts.setdefault(kind.strip().lower(), rest.strip("\0 "))
        elif (number == 0 and comment) or field.lstrip()[:1] == "{":
            texts.setdefault("parameters", field.strip("\0 "))
        elif "Steps:" in field:
            texts.setdefault("fields", field.strip("\0 "))
    return texts


def _explorer(value: object) -> str:
    data = bytes(value) if isinstance(value, bytes | tuple) else b""
    return data.decode("utf-16-le", "replace").strip("\0 ")


def decode_comment(value: bytes | str) -> str:
    """EXIF's UserComment: eight bytes name the encoding; not every writer keeps to it.

    "UNICODE" should be UTF-16 in the file's byte order, and is big-endian from the WebUI,
    little-endian from some, UTF-8 from others. Under "ASCII", or without a name, is UTF-8, and
    from some UTF-16.
    """
    if isinstance(value, str):
        return _without_charset(_repaired(value))
    head, body = value[:8], value[8:]
    name = head.strip(b"\0 ").upper()
    if name not in (b"UNICODE", b"ASCII", b"JIS", b""):
        body = value
    if body[:2] in (b"\xfe\xff", b"\xff\xfe"):
        return body.decode("utf-16", "replace").strip("\0 ")
    text = _utf8(body.removeprefix(b"\xef\xbb\xbf"))
    even, odd = body[0::2].count(0), body[1::2].count(0)  # Latin letters have a zero byte
    wide = max(even, odd) > len(body) // 8 and len(body.strip(b"\0")) * 2 > len(body)
    if text is not None and not (wide or (name == b"UNICODE" and "\0" in text)):
        return _without_charset(text)
    if wide or name == b"UNICODE":
        return body.decode("utf-16-le" if odd > even else "utf-16-be", "replace").strip("\0 ")
    return _without_charset(body.decode("utf-8", "replace").strip("\0 "))


def _without_charset(text: str) -> str:
    """Without what some tools print before a comment: ``charset=Unicode``."""
    return re.sub(r"\Acharset=[\w-]{1,20} ", "", text.strip("\0 "))


def _utf8(body: bytes) -> str | None:
    try:
        return body.decode().strip("\0 ")
    except UnicodeDecodeError:
        return None


def _stealth(image: Any) -> dict[str, str]:
    """The text that NovelAI hides in the lowest bits of the alpha channel, column by column."""
    import numpy as np

    alpha = np.asarray(image.getchannel("A"))
    bits = (alpha.T.reshape(-1)[: _MAX_STEALTH * 8] & 1).astype(np.uint8)
    data = np.packbits(bits).tobytes()
    kind = data[:15]
    if kind not in (b"stealth_pnginfo", b"stealth_pngcomp"):
        return {}
    length = int.from_bytes(data[15:19], "big") // 8
    body = data[19 : 19 + length]
    if kind == b"stealth_pngcomp":
        body = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(body, _MAX_STEALTH)
    return {"stealth": body.decode("utf-8", "replace")}

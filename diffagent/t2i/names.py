"""Names of models as people write them, reduced to what two spellings of one name share.

A picture's metadata has the name of a file on somebody's disk: as the site gave it
(``dreamshaper_8.safetensors``), as its maker called it (``DreamShaper 8 pruned fp16``), with a
folder before it (``anime_dreamshaper_8``) or a hash behind it.
"""

from __future__ import annotations

import re
import unicodedata

_ENDING = re.compile(r"\.(?:safetensors|ckpt|pth?|bin|gguf)\Z", re.I)
_HASH = re.compile(r"\s*[\[(][0-9a-f]{8,64}[\])]\s*\Z", re.I)
_BRACKETS = re.compile(r"[(\[{（【][^()\[\]{}（）【】]*[)\]}）】]")
_SUBTITLE = re.compile(r"\s[-–—]\s|[|｜/:：]")
_SEPARATORS = re.compile(r"[\W_]+")
_BREAK = re.compile(  # also before a capital, and between letters and digits
    r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])|[\W_]+"
)
#: How a file is packed, and what is in every name. "inpainting" stays: that is another model.
_NOISE = frozenset(
    {"fp", "bf", "f", "16", "32", "pruned", "ema", "emaonly", "noema", "nonema", "full", "half"}
    | {"vae", "baked", "no", "with", "not", "model", "checkpoint", "v", "ver", "version"}
    | {"safetensors", "ckpt", "the", "and", "of", "a", "0"}
)
_MAX_NAME = 200  # characters; merges are called after their whole recipe
_MAX_NAMES = 1000  # of a model and its version: to normalise Unicode takes the square of its length


def file_stem(name: str) -> str:
    """A file's name without folder, ending and the hash that some programs append."""
    name = _HASH.sub("", name[:_MAX_NAME])
    name = name.replace("\\", "/").rpartition("/")[2]
    return _HASH.sub("", _ENDING.sub("", name.strip()))


def exact_key(name: str) -> str:
    """Letters and digits of a name, whatever their case and what separates them."""
    return _SEPARATORS.sub("", _plain(name).casefold())


def words(name: str) -> frozenset[str]:
    """The words and numbers of a name that tell it from others; ``aB2_c`` has four."""
    found = map(str.casefold, _BREAK.split(_plain(name)))
    return frozenset(word for word in found if word and word not in _NOISE)


def titles(name: object) -> list[str]:
    """A model's or a version's name, and its parts that people use alone; none of what is no text.

    Without what is in brackets, without a subtitle, and without a second script.
    """
    if not isinstance(name, str):
        return []
    name = name[:_MAX_NAMES]
    bare = _BRACKETS.sub(" ", name)
    found = [name, bare, _SUBTITLE.split(bare.strip(" -|/:"), maxsplit=1)[0]]
    if not name.isascii():
        found.append("".join(letter if letter.isascii() else " " for letter in bare))
    return list(dict.fromkeys(found))


def _plain(name: str) -> str:
    name = name[:_MAX_NAMES]
    return name if name.isascii() else unicodedata.normalize("NFKC", name)

"""Names of models as people write them, reduced to what two spellings of one name share.

A picture's metadata has the name of a file on somebody's disk: as the site gave it
(``dreamshaper_8.safetensors``), as its maker called it (``DreamShaper 8 pruned fp16``), with a
folder before it (``anime_dreamshaper_8``) or a hash behind it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_ENDING = re.compile(r"\.(?:safetensors|ckpt|pth?|bin|gguf)\Z", re.I)
_HASH = re.compile(r"\s*[\[(][0-9a-f]{8,64}[\])]\s*\Z", re.I)
_BRACKETS = re.compile(r"[(\[{（【][^()\[\]{}（）【】]*[)\]}）】]")
_SUBTITLE = re.compile(r"\s[-–—]\s|[|｜/:：]")  # noqa: RUF001  as on the site
_SPLIT = re.compile(r"[\W_]+")
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|[\W_]+")
_VERSION = re.compile(r"(?<![a-z])v(?:er(?:sion)?)?[\W_]*(?=\d)", re.I)
_ZERO = re.compile(r"(?<=\d)\.0+(?!\d)")
_GLUED = re.compile(r"[bf]p?(?:16|32)|(?:not|non|un)?pruned|emaonly|no(?:n)?ema|bakedvae|novae")
_NOISE = frozenset(
    {"fp16", "fp32", "bf16", "f16", "pruned", "ema", "emaonly", "noema", "nonema", "full", "half"}
    | {"vae", "bakedvae", "baked", "novae", "no", "not", "non", "with", "model", "checkpoint"}
)
_MAX_NAME = 200  # characters; merges are called after their whole recipe
_MIN_TAIL = 6
_MAX_FOLDERS = 3


def file_stem(name: str) -> str:
    """A file's name without folder, ending and the hash that some programs append."""
    name = _HASH.sub("", name[:_MAX_NAME])
    name = name.replace("\\", "/").rpartition("/")[2]
    return _HASH.sub("", _ENDING.sub("", name.strip()))


def exact_key(name: str) -> str:
    """Letters and digits of a name, whatever their case and what separates them."""
    return _SPLIT.sub("", _fold(name))


def loose_key(name: str) -> str:
    """As `exact_key`, without precision, pruning, VAE, the ``v`` of a version and its ``.0``.

    "inpainting" stays: such a file is another model, not another packing of the same one.
    """
    if not name.isascii():
        name = unicodedata.normalize("NFKC", name)
    name = _ZERO.sub("", _VERSION.sub("", name))
    words = (word.casefold() for word in _WORDS.split(name))
    return _GLUED.sub("", "".join(word for word in words if word not in _NOISE))


def tails(stem: str) -> Iterator[str]:
    """What is left of a file's stem without the folders that the WebUI puts before it (``a_b_``)."""
    for _ in range(_MAX_FOLDERS):
        _, bar, stem = stem.partition("_")
        if not bar or len(stem) < _MIN_TAIL:
            return
        yield stem


def titles(name: str) -> list[str]:
    """A model's or a version's name, and its parts that people use alone.

    Without what is in brackets, without a subtitle, and without a second script.
    """
    plain = _BRACKETS.sub(" ", name)
    found = [name, plain, _SUBTITLE.split(plain.strip(" -|/:"), maxsplit=1)[0]]
    if not name.isascii():
        found.append("".join(letter if letter.isascii() else " " for letter in plain))
    return list(dict.fromkeys(found))


def _fold(name: str) -> str:
    return (name if name.isascii() else unicodedata.normalize("NFKC", name)).casefold()

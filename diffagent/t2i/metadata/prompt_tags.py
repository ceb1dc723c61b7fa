"""Prompts without what loads networks and embeddings, and what that was.

AUTOMATIC1111 takes every ``<word:...>`` out of a prompt before it is encoded, whatever the word
(``extra_networks.py``), and so does `split_prompt`. Embeddings are named in the prompt itself:
``embedding:NAME`` in ComfyUI, ``<embed:NAME>`` in SwarmUI, and any word in AUTOMATIC1111, where
only the hashes that it writes prove that the word was one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from diffagent.t2i.metadata.generation import Reference
from diffagent.t2i.metadata.values import air, text, weight

_TAG = re.compile(r"<(\w+):([^<>]+)>")
_NUMBER = re.compile(r"\s*([+-]?(?:\d{1,9}(?:[.,]\d{0,30}+)?|[.,]\d{1,30}+))")
_COMMAS = re.compile(r"(?: ?,)+")  # tried only where there is one too many
#: Brackets that hold nothing any more, with the weight that they had.
_EMPTY = re.compile(r"[(\[{][\s,]*+(?::\s*+[\d.]*+[\s,]*+)?[)\]}]")
_WORD, _LETTER = re.compile(r"\w"), re.compile(r"[^\W\d]")
_MAX_NESTED = 8  # brackets around one embedding
_MAX_WORDS, _MAX_WORD = 64, 200  # embeddings that are looked for in a prompt, characters of one
_EMBEDDING = re.compile(r"\bembedding:\s?(urn:air:[\w:@.+-]+|[^\s,:()\[\]{}<>|]+)")
_EMBEDDING_AIRS = frozenset({"embedding", "textualinversion", "embed"})
_WEIGHT = re.compile(r"\s?:\s?(-?(?:\d{1,3}(?:\.\d{1,6})?|\.\d{1,6}))\s?\)")
_LORA = frozenset({"lora", "lyco", "lycoris", "locon", "dora"})
_HYPERNET = frozenset({"hypernet", "hypernetwork"})
_EMBED = frozenset({"embed", "embedding"})


class Prompt(NamedTuple):
    """A prompt in one line, and what was taken out of it."""

    text: str = ""
    loras: tuple[Reference, ...] = ()
    hypernetworks: tuple[Reference, ...] = ()
    embeddings: tuple[Reference, ...] = ()
    weights_known: bool = True  # of the LoRAs


def clean_prompt(raw: str) -> str:
    """A prompt in one line without the tags that load networks (``<lora:name:0.8>``)."""
    if "<" in raw:
        raw = _TAG.sub(" ", raw)
    line = " ".join(raw.split())
    if " ," in line or ",," in line:
        line = _COMMAS.sub(",", line)
    return line.strip(" ,")


def split_prompt(
    raw: str, known: Iterable[tuple[str, str | None]] = (), *, take_words: bool = False
) -> Prompt:
    """A prompt and what it loads.

    Args:
        raw: the prompt as it is written.
        known: (name, hash) of embeddings that the metadata proves.
        take_words: take the words out that name those. In a negative prompt they mean nothing
            without the file; in a prompt they may be what it is about ("a cyborg").
    """
    loras: list[Reference] = []
    hypernetworks: list[Reference] = []
    embeddings: list[Reference] = []
    weights_known = True
    if "<" in raw:
        for kind, arguments in _TAG.findall(raw):
            found = kind.lower()
            if found in _LORA:
                reference, is_number = _tag(arguments)
                loras.append(reference)
                weights_known = weights_known and is_number
            elif found in _HYPERNET:
                hypernetworks.append(_tag(arguments)[0])
            elif found in _EMBED:
                embeddings.append(_embedding(arguments, 1.0))
    cleaned = raw
    if "embedding:" in raw:
        cleaned = _take(cleaned, map(_named, _EMBEDDING.finditer(cleaned)), embeddings)
    for name, digest in islice(known, _MAX_WORDS):
        taken: list[Reference] = []
        without = _take(cleaned, _words(cleaned, name), taken)
        if taken:
            cleaned = without if take_words else cleaned
            embeddings.append(taken[0]._replace(name=name, hash=digest))
    for _ in range(_MAX_NESTED if cleaned is not raw else 0):
        cleaned = _EMPTY.sub(" ", cleaned)
    return Prompt(
        clean_prompt(cleaned), tuple(loras), tuple(hypernetworks), tuple(embeddings), weights_known
    )


def _named(match: re.Match[str]) -> tuple[str, int, int]:
    return match.group(1), match.start(), match.end()


def _words(raw: str, name: str) -> Iterator[tuple[str, int, int]]:
    """Where a name stands in a text as a word of its own, whatever its case."""
    text_, word = _lower(raw), _lower(name)
    start = text_.find(word) if 0 < len(word) <= _MAX_WORD else -1
    while start >= 0:
        end = start + len(word)
        before, after = text_[start - 1 : start], text_[end : end + 1]
        if not (_in_word(before) or before == "." or _in_word(after)):
            yield raw[start:end], start, end
            start = text_.find(word, end)
        else:
            start = text_.find(word, start + 1)


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter in ("_", "-")


def _lower(text_: str) -> str:
    """Lower case, letter for letter."""
    lower = text_.lower()
    if len(lower) == len(text_):
        return lower
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text_)


def _tag(arguments: str) -> tuple[Reference, bool]:
    """``name:te:unet``, ``name:te=1:unet=0.5``; a single weight has to stand for both.

    A name may have colons: it ends where the first number or setting begins.

    Returns:
        Also whether the weight is known: ``name:0.0.8`` and ``name:NUM`` load nothing.
    """
    parts = arguments.split(":")
    end = next((i for i, part in enumerate(parts) if i and _is_setting(part)), 1)
    name, rest = ":".join(parts[:end]), parts[end:]
    named = dict(part.partition("=")[::2] for part in rest if "=" in part)
    positional = next((part for part in rest if "=" not in part), None)
    given = named.get("unet", named.get("te")) if positional is None else positional
    given = (given or "").strip()
    number = _NUMBER.match(given)
    is_number = not given or bool(number and not _WORD.search(given, number.end()))
    return Reference(name=text(name), weight=weight(number and number.group(1))), is_number


def _is_setting(part: str) -> bool:
    """Whether a part of a tag is more likely a weight, if a wrong one, than part of a name."""
    match = _NUMBER.match(part)
    return "=" in part or not part.strip() or bool(match and not _LETTER.search(part, match.end()))


def _embedding(name: str, strength: float) -> Reference:
    version = air(name, _EMBEDDING_AIRS)
    return Reference(version_id=version, name=text(name), weight=strength)


def _take(raw: str, words: Iterable[tuple[str, int, int]], found: list[Reference]) -> str:
    """Take words out; ``(NAME:1.2)`` around one is its weight."""
    parts: list[str] = []
    last = 0
    for name, start, end in words:
        number = _WEIGHT.match(raw, end)
        found.append(_embedding(name, weight(number.group(1) if number else None)))
        parts.append(raw[last:start])
        last = end
    return "".join([*parts, raw[last:]]) if parts else raw

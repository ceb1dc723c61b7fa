"""Prompts without what loads networks and embeddings, and what that was.

AUTOMATIC1111 takes every ``<word:...>`` out of a prompt before it is encoded, whatever the word
(``extra_networks.py``), and so does `split_prompt`. Embeddings are named in the prompt itself:
``embedding:NAME`` in ComfyUI, ``<embed:NAME>`` in SwarmUI, and any word in AUTOMATIC1111, where
only the hashes that it writes prove that the word was one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from diffagent.dabench.metadata.generation import Reference
from diffagent.dabench.metadata.values import air, text, weight

_TAG = re.compile(r"<(\w+):([^<>]+)>")
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")
_COMMAS = re.compile(r"(?: ?,)+")  # tried only where there is one too many
#: Brackets that hold nothing any more, with the weight that they had.
_EMPTY = re.compile(r"[(\[{][\s,]*+(?::\s*+[\d.]*+[\s,]*+)?[)\]}]")
_MAX_NESTED = 8  # brackets around one embedding
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
    if "<" in raw:
        for kind, arguments in _TAG.findall(raw):
            found = kind.lower()
            if found in _LORA:
                loras.append(_tag(arguments))
            elif found in _HYPERNET:
                hypernetworks.append(_tag(arguments))
            elif found in _EMBED:
                embeddings.append(_embedding(arguments, 1.0))
    cleaned = raw
    if "embedding:" in raw:
        cleaned = _take(cleaned, _EMBEDDING, embeddings)
    for name, digest in known:
        taken: list[Reference] = []
        without = _take(cleaned, _word(name), taken)
        if taken:
            cleaned = without if take_words else cleaned
            embeddings.append(taken[0]._replace(name=name, hash=digest))
    for _ in range(_MAX_NESTED if cleaned is not raw else 0):
        cleaned = _EMPTY.sub(" ", cleaned)
    return Prompt(clean_prompt(cleaned), tuple(loras), tuple(hypernetworks), tuple(embeddings))


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.-])({re.escape(name)})(?![\w-])", re.I)


def _tag(arguments: str) -> Reference:
    """``name:te:unet``, ``name:te=1:unet=0.5``; a single weight has to stand for both."""
    name, *rest = arguments.split(":")
    named = dict(part.partition("=")[::2] for part in rest if "=" in part)
    positional = next((part for part in rest if "=" not in part), None)
    given = named.get("unet", named.get("te")) if positional is None else positional
    match = _NUMBER.match(given.strip()) if given else None
    return Reference(name=text(name), weight=weight(match.group() if match else None))


def _embedding(name: str, strength: float) -> Reference:
    version = air(name, _EMBEDDING_AIRS)
    return Reference(version_id=version, name=text(name), weight=strength)


def _take(raw: str, pattern: re.Pattern[str], found: list[Reference]) -> str:
    """Take the matches out; ``(NAME:1.2)`` around one is its weight."""
    parts: list[str] = []
    end = 0
    for match in pattern.finditer(raw):
        number = _WEIGHT.match(raw, match.end())
        found.append(_embedding(match.group(1), weight(number.group(1) if number else None)))
        parts.append(raw[end : match.start()])
        end = match.end()
    return "".join([*parts, raw[end:]]) if parts else raw

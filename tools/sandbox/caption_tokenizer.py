"""Small CLIP vocabulary: all bytes, plus merges that make each word of the sandbox one token.

The files are CLIPTokenizer's own (vocab.json, merges.txt), so any text can be encoded; a word that
is not the sandbox's falls into bytes, which the text encoder has not learned.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffagent.sandbox import world

MAX_LENGTH = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """Returns the printable character of each byte in CLIP's (and GPT-2's) vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return [characters[byte] for byte in range(256)]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges adjacent pairs, most frequent first, until every word is one token.

    Args:
        words: lower-case ASCII words, one occurrence each; ties go to the alphabet.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merged(word, best) for word in pieces]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def write_tokenizer(directory: Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json of the sandbox's CLIPTokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    characters = byte_characters()
    merges = learn_merges([word for word in world.words() if word.isalpha()])
    tokens = [
        *characters,
        *(character + "</w>" for character in characters),
        *("".join(pair) for pair in merges),
        _START,
        _END,
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _END,
        "unk_token": _END,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(directory: Path) -> Any:
    """Loads the CLIPTokenizer in a directory."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(directory, local_files_only=True)

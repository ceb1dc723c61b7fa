"""A tokenizer's tokens as bytes, and which of them may go on in a JSON string."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

#: Longer tokens are runs of spaces and the like; free text does well without them.
_MAX_BYTES = 32

# States of the automaton over the bytes of a JSON string as ``json.dumps`` writes it with
# ensure_ascii=False: one spelling for each text. The closing quote and the brace end the answer.
TEXT, ESCAPE, U, U0, U00, U000, U001, CLOSED, END, DEAD = range(10)
_TAIL1, _TAIL2, _TAIL3, _E0, _ED, _F0, _F4 = range(10, 17)
_STATES = 17


def _transitions() -> Ints:
    """(states, 256) next states."""
    table = np.full((_STATES, 256), DEAD)

    def allow(state: int, first: int, last: int, then: int) -> None:
        table[state, first : last + 1] = then

    allow(TEXT, 0x20, 0x7F, TEXT)
    table[TEXT, ord('"')], table[TEXT, ord("\\")] = CLOSED, ESCAPE
    table[CLOSED, ord("}")] = END
    for char in '"\\bfnrt':
        table[ESCAPE, ord(char)] = TEXT
    table[ESCAPE, ord("u")], table[U, ord("0")], table[U0, ord("0")] = U, U0, U00
    table[U00, ord("0")], table[U00, ord("1")] = U000, U001
    for char in "01234567bef":  # the rest of 0..f have short escapes
        table[U000, ord(char)] = TEXT
    for char in "0123456789abcdef":
        table[U001, ord(char)] = TEXT
    # Well-formed UTF-8 (Unicode standard, table 3-7).
    allow(TEXT, 0xC2, 0xDF, _TAIL1)
    allow(TEXT, 0xE1, 0xEF, _TAIL2)
    allow(TEXT, 0xF1, 0xF3, _TAIL3)
    for byte, state in ((0xE0, _E0), (0xED, _ED), (0xF0, _F0), (0xF4, _F4)):
        table[TEXT, byte] = state
    for state, first, last, then in (
        (_TAIL1, 0x80, 0xBF, TEXT),
        (_TAIL2, 0x80, 0xBF, _TAIL1),
        (_TAIL3, 0x80, 0xBF, _TAIL2),
        (_E0, 0xA0, 0xBF, _TAIL1),
        (_ED, 0x80, 0x9F, _TAIL1),
        (_F0, 0x90, 0xBF, _TAIL2),
        (_F4, 0x80, 0x8F, _TAIL2),
    ):
        allow(state, first, last, then)
    return table


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def token_bytes(tokenizer: Any) -> list[bytes]:
    """What each token stands for, by id; b"" for special tokens.

    Byte-level BPE (GPT-2, Llama 3, SmolLM2) spells bytes as characters; others (Llama 2) write
    the space as '▁' and bytes that have no token as ``<0xAB>``.
    """
    backend = tokenizer.backend_tokenizer
    special = set(backend.get_added_tokens_decoder())
    byte_level = "ByteLevel" in repr(backend.decoder)
    chars = _byte_of_char()
    vocabulary = backend.get_vocab()
    result = [b""] * (max(vocabulary.values()) + 1)
    for token, ident in vocabulary.items():
        if ident in special:
            continue
        if byte_level:
            result[ident] = bytes(chars[char] for char in token if char in chars)
        elif found := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            result[ident] = bytes([int(found[1], 16)])
        else:
            result[ident] = token.replace("▁", " ").encode(errors="replace")
    return result


@dataclass(frozen=True)
class Step:
    """Tokens that may come in a state, ascending, and how many characters of text each adds."""

    tokens: Ints
    characters: Ints


class Vocabulary:
    """Which tokens go on in a JSON string, by state of the automaton; each state on demand."""

    def __init__(self, tokenizer: Any) -> None:
        self.bytes = token_bytes(tokenizer)
        usable = [i for i, spelt in enumerate(self.bytes) if 0 < len(spelt) <= _MAX_BYTES]
        usable.sort(key=lambda i: len(self.bytes[i]))
        self._ids = np.array(usable, np.int64)
        self._lengths = np.array([len(self.bytes[i]) for i in usable])
        padded = b"".join(self.bytes[i].ljust(_MAX_BYTES, b"\0") for i in usable)
        self._matrix = np.frombuffer(padded, np.uint8).reshape(len(usable), _MAX_BYTES)
        self._table = _transitions()
        self._steps: dict[int, Step] = {}
        valid = np.arange(_MAX_BYTES) < self._lengths[:, None]
        self._characters = (((self._matrix & 0xC0) != 0x80) & valid).sum(1)

    def step(self, state: int) -> Step:
        """What may come in ``state``. A character is counted where its first byte is."""
        if state not in self._steps:
            states = np.full(len(self._ids), state)
            for column in range(_MAX_BYTES):
                # Sorted by length: those that still have a byte are at the end.
                first = int(np.searchsorted(self._lengths, column, side="right"))
                if first == len(states):
                    break
                states[first:] = self._table[states[first:], self._matrix[first:, column]]
            alive = np.flatnonzero(states != DEAD)
            alive = alive[np.argsort(self._ids[alive])]
            characters = self._characters[alive] - np.select(
                [states[alive] == END, states[alive] == CLOSED], [2, 1]
            )
            self._steps[state] = Step(self._ids[alive], characters)
        return self._steps[state]

    def run(self, state: int, spelt: bytes) -> int:
        """The state after ``spelt``."""
        for byte in spelt:
            state = int(self._table[state, byte])
        return state
